"""Kept prompts: a group cut into pieces has the loss and gradients of the whole, and computes its prompt once."""

from __future__ import annotations

import gc
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model

import tiny
from burnish import GRPOConfig, GRPOTrainer
from burnish.model import offload, prefix
from burnish.model.attention import SlidingWindow
from burnish.model.kept_prompt import KeptPrompt, _Kept
from burnish.model.offload import offloading
from burnish.model.packing import pack, split_by_tokens, unpack
from burnish.model.recomputation import tile_mlps
from burnish.model.scoring import continuing, keeps_prompts, prepare_for_scoring, score
from burnish.types import Completion, Group, GroupSpan
from live_bytes import LiveBytes
from test_scoring import DEFAULT_TOLERANCE, TOLERANCE
from test_trainers import assert_same as assert_same_weights
from test_trainers import digits, settings, weights

SINKS = {"num_local_experts": 2, "num_experts_per_tok": 1, "sliding_window": 4, "experts_implementation": "eager"}
KINDS: dict[str, dict[str, Any]] = {kind: {} for kind in (*tiny.ARCHITECTURES,)} | {"gpt_oss": SINKS, "phi3": {}}


def group(prompt: int, *lengths: int, seed: int = 0) -> Group:
    generator = torch.Generator().manual_seed(seed)

    def ids(length: int) -> list[int]:
        return torch.randint(1, 90, (length,), generator=generator).tolist()

    masked = [Completion(ids(n), loss_mask=[j % 3 != 1 for j in range(n)]) for n in lengths[:1]]
    return Group(ids(prompt), masked + [Completion(ids(n)) for n in lengths[1:]])


def cut(groups: list[Group], budget: int) -> list[list[Group]]:
    return split_by_tokens(groups, budget, keep_prompts=True)


def run(model: Any, parts: list[list[Group]], offloads: bool = False) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Sum of the loss and gradients of the parts: each token's weight differs, as advantages do."""
    model.zero_grad()
    total = torch.zeros((), dtype=torch.float64)
    for part in parts:
        batch = pack(part)
        with offloading(model, copies_on_cpu=True) if offloads else nullcontext(), continuing(model, batch):
            scores = score(model, batch, temperature=0.7, with_entropy=True)
            weights = 1 + batch.target_ids % 7
            assert scores.entropy is not None
            loss = (scores.logprobs * weights).sum() + (scores.entropy * weights).sum() / 5
            loss.backward()
        total += loss.detach()
    return total, {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def prepared(kind: str = "llama", *, lora: Any = None, checkpointing: bool = False, **changes: Any) -> Any:
    model = tiny.model(kind, dtype=torch.float64, **{**KINDS[kind], **changes}).train()
    if lora:
        model = get_peft_model(model, LoraConfig(target_modules=lora, init_lora_weights=False))
        model = model.double()
    if checkpointing:
        enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
        enable({"use_reentrant": False})
    prepare_for_scoring(model)
    return model


def assert_same(whole: Any, cut: Any, kind: str = "llama") -> None:
    tolerance = TOLERANCE.get(kind, DEFAULT_TOLERANCE)
    torch.testing.assert_close(cut[0], whole[0], rtol=tolerance, atol=tolerance)
    assert cut[1].keys() == whole[1].keys()
    for name, gradient in whole[1].items():
        scale = max(float(gradient.abs().max()), 1.0)
        torch.testing.assert_close(cut[1][name], gradient, rtol=0, atol=10 * tolerance * scale, msg=name)


GROUPS = [group(70, 9, 6, 1, 8), group(80, 5, 7, seed=1), group(1, 6, 7, seed=2), group(0, 9, seed=3)]


@pytest.mark.parametrize("kind", KINDS)
def test_pieces_are_the_whole_group(kind: str) -> None:
    model = prepared(kind)
    parts = cut(GROUPS, 80)
    # A group whose prompt has one token has nothing to keep.
    assert [part[0].kept_prompt is not None for part in parts] == [True] * 5 + [False]
    assert_same(run(model, [GROUPS]), run(model, parts), kind)


@pytest.mark.parametrize("offloads", [False, True])
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("lora", [None, "all-linear", ["v_proj"], ["down_proj"]])
def test_pieces_under_what_saves_memory(
    lora: Any, checkpointing: bool, offloads: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(offload, "_MIN_BYTES", 1)
    model = prepared("gemma3_text", lora=lora, checkpointing=checkpointing)
    whole = run(model, [GROUPS])
    tile_mlps(model, 3)
    parts = cut(GROUPS, 80)
    assert_same(whole, run(model, parts, offloads))
    assert not any(part[0].kept_prompt.is_begun for part in parts[:-1])


def test_short_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """A tile of queries that begins within a completion, a window that ends within the kept tokens."""
    monkeypatch.setattr(prefix, "_MAX_QUERIES", 3)
    model = prepared("mistral", sliding_window=6)
    assert_same(run(model, [GROUPS]), run(model, cut(GROUPS, 80)))


def test_pieces_in_bf16_with_heads_that_have_kernels() -> None:
    """On a CPU with AMX, the whole row and the prompt's run in kernels that pieces do not have."""
    exact = prepared(head_dim=32)
    narrow = tiny.model(head_dim=32, dtype=torch.bfloat16).train()
    prepare_for_scoring(narrow)
    expected = run(exact, [GROUPS])[1]
    errors = [
        max(float((found[name] - one).norm() / one.norm()) for name, one in expected.items())
        for found in (run(narrow, parts)[1] for parts in ([GROUPS], cut(GROUPS, 80)))
    ]
    # Gradients of parts add up in bf16 here.
    assert errors[1] < 2 * errors[0]


@pytest.mark.parametrize("rule", [None, SlidingWindow(6)])
def test_a_block_mask_is_the_whole_row_s(rule: SlidingWindow | None) -> None:
    """What FlexAttention is given on a GPU: the rows of the whole mask that belong to the piece's queries."""
    whole = (GroupSpan((0, 20), ((20, 5), (25, 3))),)
    piece = (GroupSpan((-19, 20), ((1, 5), (6, 3))),)
    keys, zero = torch.arange(28)[None], torch.zeros(1, dtype=torch.long)

    def mask(spans: Any, kept: int) -> torch.Tensor:
        return prefix._mask_mod(spans, torch.device("cpu"), rule, kept)(
            zero, zero, torch.arange(28 - kept)[:, None], keys
        )

    assert torch.equal(mask(piece, 19), mask(whole, 0)[19:])


def test_pieces_are_scored_in_their_order() -> None:
    parts = cut([GROUPS[0]], 80)
    model = prepared()
    with torch.no_grad():
        whole = score(model, pack([GROUPS[0]])).logprobs.tolist()
        found = []
        for part in parts:
            with continuing(model, batch := pack(part)):
                found += unpack(part, score(model, batch).logprobs.tolist())
    expected = unpack([GROUPS[0]], whole)
    for one, other in zip(found, expected, strict=True):
        assert one == pytest.approx(other, abs=1e-6)


def test_gradients_of_pieces_add_up_in_fp32() -> None:
    """Sixteen times a number that bf16 would round away beside the first."""
    kept = _Kept.of(torch.zeros(1, 1, 1, 1, dtype=torch.bfloat16))
    for value in (256.0, *[1.0] * 16):
        kept.add(torch.full((1, 1, 1, 1), value, dtype=torch.bfloat16))
    taken = kept.take_gradient()
    assert float(taken) == 272
    assert taken.dtype == torch.bfloat16


@pytest.mark.parametrize("checkpointing", [False, True])
def test_live_bytes_do_not_grow_with_the_completions(checkpointing: bool) -> None:
    model = prepared(checkpointing=checkpointing)
    model.requires_grad_(False)
    model.model.embed_tokens.weight.requires_grad_(True)

    def peak(completions: int) -> int:
        parts = cut([group(150, *[30] * completions)], 180)
        assert len(parts) == completions
        gc.collect()  # what tests before have left is not freed in the middle
        with LiveBytes() as live:
            run(model, parts)
        return live.peak

    peak(4)  # caches of the first run
    few, many = peak(4), peak(16)
    assert many < 1.02 * few


def test_a_prompt_is_computed_once() -> None:
    model = prepared()
    rows: list[int] = []
    model.model.layers[1].register_forward_hook(lambda module, args, output: rows.append(args[0].shape[1]))
    run(model, cut([group(150, *[30] * 8)], 180))
    assert rows == [149] + [31] * 8


def test_short_prompts_are_not_worth_a_pass() -> None:
    kept = [[part[0].kept_prompt is not None for part in cut([group(n, 20, 20)], 60)] for n in (64, 65)]
    assert kept == [[False, False], [True, True]]
    assert all(part[0].kept_prompt is None for part in split_by_tokens([group(65, 20, 20)], 60))
    (whole,) = split_by_tokens([group(65, 20, 20)], 60, whole=True, keep_prompts=True)
    assert whole[0].kept_prompt is None


def test_rows_that_change_positions_keep_no_prompt() -> None:
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    assert keeps_prompts(prepared())
    model = prepared()
    model.config.rope_parameters = rope
    assert not keeps_prompts(model)
    model.config.rope_parameters = {"full_attention": rope}
    assert not keeps_prompts(model)


@pytest.mark.parametrize("bf16", [False, True])
def test_a_trainer_takes_the_step_of_whole_groups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bf16: bool) -> None:
    """Long prompts, one completion at a time: the same logs and weights."""
    rows = [{"prompt": str(n) * 75} for n in range(4)]
    end_piece, ended = KeptPrompt.end_piece, []
    monkeypatch.setattr(KeptPrompt, "end_piece", lambda self: ended.append(self.num_pieces) or end_piece(self))

    def trained(budget: int) -> Any:
        fields = settings(
            tmp_path / str(budget), per_device_train_batch_size=8, num_generations=4, max_steps=2, token_budget=budget,
            max_completion_length=8, bf16=bf16, beta=0.1, gradient_accumulation_steps=2, optim="sgd",
        )  # fmt: skip
        trainer = GRPOTrainer(tiny.model(), digits, GRPOConfig(**fields), rows, processing_class=tiny.tokenizer())
        trainer.train()
        return trainer

    whole = trained(4096)
    assert not ended
    pieces = trained(85)
    assert ended
    # bf16 rounds gradients by what is computed together; masters see their sum.
    assert_same_weights(weights(whole), weights(pieces), 2e-3 if bf16 else 2e-6)
    for one, other in zip(whole.state.log_history, pieces.state.log_history, strict=True):
        for name in ("loss", "entropy", "kl", "grad_norm", "num_tokens", "tokens/update"):
            if name in one:
                assert one[name] == pytest.approx(other[name], abs=2e-2 if bf16 else 1e-4), name
