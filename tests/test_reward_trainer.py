"""Reward models: packed scores equal plain ones, splits change nothing, transformers and peft load what is saved."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    MambaConfig,
    MambaForCausalLM,
    TrainerCallback,
)

import tiny
from burnish import ConfigError, DataError, ModelError, RewardConfig, RewardError, RewardTrainer, Rubric
from burnish.data import read_last, reward_group
from burnish.errors import CheckFailed
from burnish.model.classifier import load_reward_model, pack_reads, prepare_for_rewards, reward_scores, to_reward_model
from burnish.rewards import RewardModel
from burnish.types import Completion, Group

PAD = 1
"""Not EOS, so that scores are read at EOS."""
PAIRS = [
    {"prompt": f"{i}+{i}=" + "0" * (i % 4), "chosen": str(2 * i) * (1 + i % 3), "rejected": "x" * (1 + i % 5)}
    for i in range(12)
]
RANKED = [
    {"prompt": f"{i}+{i}=", "completions": [str(2 * i), "z" * (1 + i % 3), "no", "x" * (2 + i % 4)][: 2 + i % 3]}
    for i in range(12)
]
STEPS = [
    {"prompt": f"{i}+{i}=", "completions": ["a" * n, "bb", "c"][:n], "labels": [True, False, True][:n]}
    for i, n in enumerate([1, 2, 3] * 4)
]
KINDS = {"pairs": PAIRS, "ranked": RANKED, "steps": STEPS}


def tokenizer() -> Any:
    made = tiny.tokenizer()
    made.pad_token = "<unk>"
    assert made.pad_token_id == PAD
    return made


def classifier(kind: str = "llama", *, dtype: torch.dtype = torch.float32, **changes: Any) -> Any:
    made = to_reward_model(tiny.model(kind, dtype=dtype, **changes), seed=3)
    # Larger than the usual start: scores must be far from 0 for a mistake to show.
    made.score.weight.data *= 20
    made.config.get_text_config().pad_token_id = PAD
    return made.eval()


def settings(folder: Path, **changes: Any) -> RewardConfig:
    base: dict[str, Any] = {
        "output_dir": str(folder), "bf16": False, "use_cpu": True, "max_steps": 3, "learning_rate": 1e-2,
        "report_to": [], "logging_steps": 1, "save_strategy": "no", "progress": False, "seed": 7,
        "per_device_train_batch_size": 4,
    }  # fmt: skip
    return RewardConfig(**{**base, **changes})


def trainer(folder: Path, rows: Any = PAIRS, model: Any = None, evaluated: Any = None, **changes: Any) -> RewardTrainer:
    peft_config = changes.pop("peft_config", None)
    start = tiny.model() if model is None else model
    args = settings(folder, **changes)
    return RewardTrainer(
        start, args, train_dataset=rows, eval_dataset=evaluated, processing_class=tokenizer(), peft_config=peft_config
    )


def weights(made: Any) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in made.model.named_parameters()}


def assert_same(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor], tolerance: float) -> None:
    assert left.keys() == right.keys()
    for name, value in left.items():
        torch.testing.assert_close(value, right[name], rtol=0, atol=tolerance, msg=name)


def sequences(groups: list[Group]) -> list[list[int]]:
    return [g.prompt_ids + c.token_ids for g in groups for c in g.completions]


def groups(seed: int = 0) -> list[Group]:
    generator = torch.Generator().manual_seed(seed)

    def ids(length: int) -> list[int]:
        return torch.randint(2, 90, (length,), generator=generator).tolist()

    return [
        Group(ids(9), [Completion(ids(n)) for n in (5, 3, 6)]),
        Group(ids(7), [Completion([*ids(4), PAD]), Completion([PAD, PAD])]),
        Group([], [Completion(ids(8)), Completion(ids(2))]),
    ]


def compare(plain: Any, packed: Any, tolerance: float) -> None:
    """Scores against the class's own unpadded forward, and every gradient."""
    whole = sequences(groups())
    expected = torch.cat([plain(input_ids=torch.tensor([ids]), use_cache=False).logits[0] for ids in whole])
    mix = torch.linspace(-1, 1, len(whole)).to(expected.dtype)
    (expected * mix).sum().backward()
    rows = [read_last(group, PAD) for group in groups()]
    assert sequences(rows) == whole
    got = reward_scores(packed, pack_reads(rows))
    (got * mix).sum().backward()
    torch.testing.assert_close(got, expected, rtol=0, atol=tolerance)
    assert float(expected.detach().std()) > 0.1
    compared = dict(plain.named_parameters())
    for name, parameter in packed.named_parameters():
        wanted = compared[name].grad
        assert (parameter.grad is None) == (wanted is None), name
        if wanted is not None:
            scale = float(wanted.abs().max()) + 1.0
            torch.testing.assert_close(parameter.grad, wanted, rtol=0, atol=tolerance * scale, msg=name)


# RMS norms compute in fp32 whatever the model's dtype, so float64 is exact to fp32 rounding only.
TOLERANCE = {"gpt2": 1e-12}


@pytest.mark.parametrize("kind", ["llama", "qwen3", "gpt2", "gemma3_text"])
def test_packed_scores_and_gradients_equal_plain_forwards(kind: str) -> None:
    plain = classifier(kind, dtype=torch.float64, attn_implementation="eager")
    packed = copy.deepcopy(plain)
    prepare_for_rewards(packed)
    compare(plain, packed, TOLERANCE.get(kind, 5e-6))
    ids = torch.tensor([[5, 6, 7]])
    torch.testing.assert_close(packed(input_ids=ids).logits, plain(input_ids=ids).logits, rtol=0, atol=1e-5)


def test_models_without_prefix_attention_run_one_row_per_completion(caplog: pytest.LogCaptureFixture) -> None:
    sizes = {"mamba_d_state": 4, "mamba_expand": 2, "use_mamba_kernels": False, "num_hidden_layers": 2}
    layers = {"attn_layer_period": 2, "attn_layer_offset": 1, "num_experts": 1}
    plain = classifier("jamba", **sizes, **layers)
    packed = copy.deepcopy(plain)
    prepare_for_rewards(packed)
    assert sum("one row per completion" in record.message for record in caplog.records) == 1
    compare(plain, packed, 2e-5)


def test_scores_are_those_of_batched_plain_inference() -> None:
    """Right-padded rows through transformers' own forward: the place that is read is the same."""
    model = classifier()
    prepare_for_rewards(model)
    whole = sequences(groups())
    length = max(map(len, whole))
    ids = torch.tensor([row + [PAD] * (length - len(row)) for row in whole])
    mask = torch.tensor([[place < len(row) for place in range(length)] for row in whole]).long()
    expected = model(input_ids=ids, attention_mask=mask).logits[:, 0]
    got = reward_scores(model, pack_reads([read_last(group, PAD) for group in groups()]))
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-5)


def test_scores_inside_a_row_are_those_of_its_beginnings() -> None:
    """A step's score is the plain score of the text up to its end."""
    model = classifier(dtype=torch.float64)
    prepare_for_rewards(model)
    group = reward_group(STEPS[2], tokenizer(), pad_token_id=PAD)
    marks = group.completions[0].loss_mask
    assert marks is not None
    ends = [place for place, read in enumerate(marks) if read]
    tokens = tokenizer().convert_ids_to_tokens(group.completions[0].token_ids)
    assert "".join(tokens) == "aaa\nbb\nc\n"
    assert [tokens[end] for end in ends] == ["\n"] * 3
    cuts = [group.prompt_ids + group.completions[0].token_ids[: end + 1] for end in ends]
    expected = torch.cat([model(input_ids=torch.tensor([ids])).logits[0] for ids in cuts])
    torch.testing.assert_close(reward_scores(model, pack_reads([group])), expected, rtol=0, atol=5e-6)


def test_a_language_model_becomes_a_classifier_with_its_decoder_and_a_seeded_score(tmp_path: Path) -> None:
    lm = tiny.model()
    decoder = lm.model
    torch.manual_seed(11)
    made, _ = load_reward_model(lm, bf16=False, seed=5)
    torch.manual_seed(12)
    again, _ = load_reward_model(tiny.model(), bf16=False, seed=5)
    other, _ = load_reward_model(tiny.model(), bf16=False, seed=6)
    assert made.model is decoder
    assert torch.equal(made.score.weight, again.score.weight)
    assert not torch.equal(made.score.weight, other.score.weight)
    assert 0 < float(made.score.weight.detach().std()) < 2 / 33
    tiny.model().save_pretrained(tmp_path)
    read, exact = load_reward_model(tmp_path, bf16=True, seed=5)
    assert read.score.weight.dtype == torch.bfloat16
    for name, parameter in read.named_parameters():
        torch.testing.assert_close(exact[parameter], dict(made.named_parameters())[name].detach(), rtol=0, atol=0)


def test_unprepared_models_are_refused() -> None:
    with pytest.raises(CheckFailed, match="prepare_for_rewards"):
        reward_scores(classifier(), pack_reads([read_last(group, PAD) for group in groups()]))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "split",
    [
        {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4},
        {"token_budget": 20},
        {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "token_budget": 15},
    ],
)
def test_training_is_independent_of_the_split(tmp_path: Path, kind: str, split: dict[str, int]) -> None:
    centred = {} if kind == "steps" else {"center_rewards_coefficient": 0.1}
    # Adam's first steps divide a gradient by its own size and amplify rounding: SGD shows the gradient itself.
    whole = trainer(tmp_path / "a", KINDS[kind], optim="sgd", **centred)
    whole.train()
    parts = trainer(tmp_path / "b", KINDS[kind], optim="sgd", **centred, **split)
    parts.train()
    assert_same(weights(whole), weights(parts), 1e-6)
    for name in ("loss", "min_reward", "mean_reward", "max_reward", "accuracy"):
        logs = [[log[name] for log in t.state.log_history if name in log] for t in (whole, parts)]
        assert logs[0] == pytest.approx(logs[1], abs=1e-5), name
        assert len(logs[0]) == 3


def test_the_step_by_an_independent_script(tmp_path: Path) -> None:
    """One SGD step over all pairs, with margins and centring, against plain forwards of a plain classifier."""
    rows = [{**row, "margin": 0.1 * i} for i, row in enumerate(PAIRS)]
    made = trainer(
        tmp_path, rows, classifier(), max_steps=1, per_device_train_batch_size=12, optim="sgd", learning_rate=0.5,
        lr_scheduler_type="constant", max_grad_norm=0.0, center_rewards_coefficient=0.05,
    )  # fmt: skip
    plain = classifier()
    made.train()
    tok = tokenizer()

    def reward(row: dict[str, Any], name: str) -> torch.Tensor:
        ids = tok(row["prompt"] + row[name])["input_ids"] + [tok.eos_token_id]
        return plain(input_ids=torch.tensor([ids])).logits[0, 0]

    pairs = [(reward(row, "chosen"), reward(row, "rejected")) for row in rows]
    losses = [
        -torch.nn.functional.logsigmoid(w - r - row["margin"]) + 0.05 * (w + r) ** 2
        for (w, r), row in zip(pairs, rows, strict=True)
    ]
    loss = torch.stack(losses).mean()
    loss.backward()
    log = made.state.log_history[0]
    assert log["loss"] == pytest.approx(loss.item(), abs=1e-4)  # the log rounds
    flat = [r.item() for pair in pairs for r in pair]
    assert log["min_reward"] == pytest.approx(min(flat), abs=1e-5)
    assert log["max_reward"] == pytest.approx(max(flat), abs=1e-5)
    assert log["mean_reward"] == pytest.approx(sum(flat) / 24, abs=1e-5)
    assert log["accuracy"] == pytest.approx(sum(float(w > r) for w, r in pairs) / 12)
    assert log["margin"] == pytest.approx(sum((w - r).item() for w, r in pairs) / 12, abs=1e-5)
    after = weights(made)
    for name, parameter in plain.named_parameters():
        assert parameter.grad is not None
        moved = (parameter.detach() - after[name]) / 0.5
        scale = float(parameter.grad.abs().max()) + 1e-3
        torch.testing.assert_close(moved, parameter.grad, rtol=0, atol=1e-4 * scale, msg=name)


def test_step_losses_are_means_over_steps_and_lists_over_lists(tmp_path: Path) -> None:
    plain = classifier()

    def score(text: str) -> float:
        return plain(input_ids=torch.tensor([tokenizer()(text)["input_ids"]])).logits[0, 0].item()

    steps = []
    for row in STEPS:
        ends = ["".join(f"{step}\n" for step in row["completions"][: n + 1]) for n in range(len(row["completions"]))]
        signed = zip(map(score, (row["prompt"] + text for text in ends)), row["labels"], strict=True)
        steps += [math.log1p(math.exp(-value if label else value)) for value, label in signed]
    lists = []
    for row in RANKED:
        odds = [math.exp(score(row["prompt"] + text + "<eos>")) for text in row["completions"]]
        lists.append(-sum(math.log(one / sum(odds[i:])) for i, one in enumerate(odds)))
    for rows, losses in ((STEPS, steps), (RANKED, lists)):
        made = trainer(tmp_path, rows, classifier(), rows, max_steps=1, per_device_train_batch_size=12)
        expected = pytest.approx(sum(losses) / len(losses), abs=1e-4)  # the log rounds
        assert made.evaluate()["eval_loss"] == expected
        made.train()
        assert made.state.log_history[0]["loss"] == expected


def test_evaluation_is_over_the_whole_set(tmp_path: Path) -> None:
    made = trainer(tmp_path, PAIRS, classifier(), PAIRS[:7], per_device_eval_batch_size=2, token_budget=40)
    metrics = made.evaluate()
    score = RewardModel(made.model, tokenizer())
    chosen, rejected = (
        score([row["prompt"] for row in PAIRS[:7]], [row[name] for row in PAIRS[:7]]) for name in ("chosen", "rejected")
    )
    ahead = [w - r for w, r in zip(chosen, rejected, strict=True)]
    sigma = [1 / (1 + math.exp(-d)) for d in ahead]
    assert metrics["eval_loss"] == pytest.approx(-sum(map(math.log, sigma)) / 7, abs=1e-5)
    assert metrics["eval_brier_score"] == pytest.approx(sum((1 - p) ** 2 for p in sigma) / 7, abs=1e-5)
    assert metrics["eval_accuracy"] == pytest.approx(sum(d > 0 for d in ahead) / 7)
    assert metrics["eval_margin"] == pytest.approx(sum(ahead) / 7, abs=1e-5)
    assert metrics["eval_min_reward"] == pytest.approx(min(chosen + rejected), abs=1e-5)
    assert metrics["eval_max_reward"] == pytest.approx(max(chosen + rejected), abs=1e-5)
    bins: list[list[tuple[float, float]]] = [[] for _ in range(10)]
    for p in sigma:
        bins[min(int(p * 10), 9)].append((p, 1.0))
        bins[min(int((1 - p) * 10), 9)].append((1 - p, 0.0))
    error = sum(abs(sum(y - p for p, y in b)) for b in bins) / 14
    assert metrics["eval_calibration_error"] == pytest.approx(error, abs=1e-5)
    assert 0 < error < 1


@pytest.mark.parametrize("kind", KINDS)
def test_it_learns(tmp_path: Path, kind: str) -> None:
    made = trainer(tmp_path, KINDS[kind], None, KINDS[kind], max_steps=60, learning_rate=1e-2)
    before = made.evaluate()
    made.train()
    after = made.evaluate()
    assert after["eval_loss"] < before["eval_loss"] / 2
    assert after["eval_accuracy"] > 0.9
    assert ("eval_margin" in after) == (kind != "steps")


def test_lists_of_two_train_as_pairs_do(tmp_path: Path) -> None:
    lists = [{"prompt": row["prompt"], "completions": [row["chosen"], row["rejected"]]} for row in PAIRS]
    made = [trainer(tmp_path / str(i), rows, optim="sgd") for i, rows in enumerate((PAIRS, lists))]
    for one in made:
        one.train()
    assert_same(weights(made[0]), weights(made[1]), 0.0)


def test_formats_without_a_prompt_and_with_messages(tmp_path: Path) -> None:
    tok = tokenizer()
    implicit = [{"chosen": row["prompt"] + row["chosen"], "rejected": row["prompt"] + row["rejected"]} for row in PAIRS]
    explicit, bare = (reward_group(rows[3], tok, pad_token_id=PAD) for rows in (PAIRS, implicit))
    assert sequences([explicit]) == sequences([bare])

    def say(text: str, role: str = "assistant") -> list[dict[str, str]]:
        return [{"role": role, "content": text}]

    pairs = [
        {"prompt": say(r["prompt"], "user"), "chosen": say(r["chosen"]), "rejected": say(r["rejected"])} for r in PAIRS
    ]
    lists = [{"prompt": r["prompt"], "completions": [r["chosen"], r["rejected"]]} for r in pairs]
    groups = [reward_group(rows[3], tok, pad_token_id=PAD) for rows in (pairs, lists)]
    assert sequences(groups[:1]) == sequences(groups[1:])
    assert "".join(tok.convert_ids_to_tokens(sequences(groups)[0])) == "<user>3+3=000<eos><assistant>6<eos>"
    trainer(tmp_path, pairs, max_steps=1).train()


def test_where_eos_pads_scores_are_read_before_it(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    tok = tiny.tokenizer()
    group = reward_group(PAIRS[1], tok, pad_token_id=tok.pad_token_id)
    for completion in group.completions:
        assert completion.loss_mask == [False] * (len(completion.token_ids) - 2) + [True, False]
    continued = reward_group({"chosen": "ab", "rejected": "abc"}, tok, pad_token_id=tok.pad_token_id)
    assert sequences([continued]) == [[*tok("ab")["input_ids"], 0], [*tok("abc")["input_ids"], 0]]
    assert [c.loss_mask for c in continued.completions] == [[True, False], [False, True, False]]
    RewardTrainer(tiny.model(), settings(tmp_path), train_dataset=PAIRS, processing_class=tok)
    assert any("read before EOS" in record.message for record in caplog.records)


@pytest.mark.parametrize("pad_token", ["<unk>", None])
def test_saved_models_load_in_transformers_and_score_the_same(tmp_path: Path, pad_token: str | None) -> None:
    args = settings(tmp_path, pad_token=pad_token)
    made = RewardTrainer(tiny.model(), args, train_dataset=PAIRS, eval_dataset=PAIRS, processing_class=tiny.tokenizer())
    assert made.model.config.pad_token_id == made.tokenizer.pad_token_id == (PAD if pad_token else 0)
    made.train()
    made.save_model()
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    tok = AutoTokenizer.from_pretrained(tmp_path)
    assert loaded.config._attn_implementation != "burnish"
    assert loaded.config.pad_token_id == tok.pad_token_id == (PAD if pad_token else 0)
    texts = [row["prompt"] + row["chosen"] + tok.eos_token for row in PAIRS]
    inputs = tok(texts, return_tensors="pt", padding=True)
    plain = loaded(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits[:, 0]
    reward = RewardModel(tmp_path, bf16=False, device="cpu")
    packed = reward([row["prompt"] for row in PAIRS], [row["chosen"] for row in PAIRS])
    torch.testing.assert_close(torch.tensor(packed), plain.detach(), rtol=0, atol=1e-5)
    torch.testing.assert_close(
        torch.tensor(RewardModel(made.model, tok)([row["prompt"] for row in PAIRS], [row["chosen"] for row in PAIRS])),
        plain.detach(), rtol=0, atol=1e-5,
    )  # fmt: skip
    more = RewardTrainer(str(tmp_path), settings(tmp_path / "more", pad_token=pad_token), train_dataset=PAIRS)
    assert torch.equal(more.model.score.weight, made.model.score.weight), "a trained score is kept"


def test_adapters_are_saved_with_the_score(tmp_path: Path) -> None:
    from peft import LoraConfig, PeftModel

    config = LoraConfig(r=4, target_modules=["q_proj", "v_proj"])
    base = classifier()
    made = trainer(tmp_path, PAIRS, copy.deepcopy(base), peft_config=config, max_steps=4)
    assert {n.split(".")[-2] for n, p in made.model.named_parameters() if p.requires_grad} == {"default"}
    made.train()
    made.save_model()
    assert config.modules_to_save is None
    reloaded = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path).eval()
    ids = torch.tensor([[3, 4, 5]])
    torch.testing.assert_close(reloaded(ids).logits, made.model.eval()(ids).logits, rtol=0, atol=1e-6)
    assert not torch.equal(reloaded.base_model.model.score.modules_to_save["default"].weight, base.score.weight)
    prompts, chosen = [row["prompt"] for row in PAIRS], [row["chosen"] for row in PAIRS]
    scores = [RewardModel(model, tokenizer())(prompts, chosen) for model in (made.model, reloaded)]
    assert scores[0] == pytest.approx(scores[1], abs=1e-6)
    with pytest.raises(ModelError, match="task_type = 'CAUSAL_LM'"):
        trainer(tmp_path, peft_config=LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    with pytest.raises(ModelError, match="adapters that do not name their base"):
        RewardModel(tmp_path)


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("adapters", [False, True])
def test_resumed_is_uninterrupted(tmp_path: Path, bf16: bool, adapters: bool) -> None:
    from peft import LoraConfig

    changes: dict[str, Any] = {
        "max_steps": 4, "bf16": bf16, "save_strategy": "steps", "save_steps": 2, "learning_rate": 1e-3,
    }  # fmt: skip
    if adapters:
        changes["peft_config"] = LoraConfig(r=4, target_modules=["q_proj", "v_proj"])
    start = tiny.model(dtype=torch.bfloat16 if bf16 else torch.float32)
    whole = trainer(tmp_path / "a", PAIRS, copy.deepcopy(start), **changes)
    whole.train()
    resumed = trainer(tmp_path / "a", PAIRS, copy.deepcopy(start), **changes)
    resumed.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-2"))
    assert resumed.state.global_step == 4
    assert_same(weights(whole), weights(resumed), 0.0)


def test_bf16_keeps_fp32_masters_of_the_new_score_too(tmp_path: Path) -> None:
    tiny.model().save_pretrained(tmp_path / "lm")
    tokenizer().save_pretrained(tmp_path / "lm")
    made = RewardTrainer(tmp_path / "lm", settings(tmp_path, bf16=True, learning_rate=1e-6), train_dataset=PAIRS)
    head = made.model.score.weight
    assert head.dtype == torch.bfloat16
    start = head.detach().clone()
    made.train()
    assert made.master_weights is not None
    master = dict(zip(made.master_weights.trained, made.master_weights.masters, strict=True))[head]
    assert master.dtype == torch.float32
    assert not torch.equal(master, master.bfloat16().float()), "steps below a bf16 gap are kept"
    torch.testing.assert_close(head, start, rtol=0, atol=1e-3)


def test_dropout_is_off_unless_asked_for(tmp_path: Path) -> None:
    def probabilities(model: Any) -> set[float]:
        layers = {m.p for m in model.modules() if isinstance(m, torch.nn.Dropout)}
        return layers | {m.attention_dropout for m in model.modules() if hasattr(m, "attention_dropout")}

    from peft import LoraConfig

    class Watches(TrainerCallback):
        def on_step_begin(self, *args: Any, model: Any = None, **kwargs: Any) -> None:
            seen.append(probabilities(model))

    adapters = LoraConfig(r=2, target_modules=["q_proj"], lora_dropout=0.5)
    for changes, expected in (({}, {0.0}), ({"disable_dropout": False}, {0.0, 0.5})):
        seen: list[set[float]] = []
        made = trainer(tmp_path, PAIRS, tiny.model(), peft_config=adapters, max_steps=1, **changes)
        made.add_callback(Watches())
        made.train()
        assert seen == [expected]
        assert probabilities(made.model) == {0.0, 0.5}, "the next trainer finds the model's own"
    starts = [tiny.model("gpt2", resid_pdrop=p, embd_pdrop=p) for p in (0.0, 0.4)]
    made = [trainer(tmp_path / str(i), PAIRS, start, optim="sgd") for i, start in enumerate(starts)]
    for one in made:
        one.train()
    assert_same(weights(made[0]), weights(made[1]), 0.0)


GOOD = PAIRS[0]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"prompt": "1", "chosen": "2"}], r"row 0 has the columns \['chosen', 'prompt'\]"),
        ([{**GOOD, "completions": ["a", "b"]}], "drop the columns that you do not mean"),
        ([{**GOOD, "margin": float("nan")}], "margin = nan: use a finite number"),
        ([{**GOOD, "margin": "big"}], "margin = 'big': use a finite number"),
        ([{**GOOD, "margin": 1.0}, GOOD], "row 1 has no margin and others do"),
        ([{**RANKED[0], "margin": 1.0}], "margin belongs to chosen and rejected"),
        ([{**STEPS[0], "margin": 1.0}], "margin belongs to chosen and rejected"),
        ([{**GOOD, "rejected": GOOD["chosen"]}], "chosen equals rejected"),
        ([{**GOOD, "rejected": GOOD["chosen"] + "<eos>"}], "are the same tokens"),
        ([{**RANKED[0], "completions": ["a", "b", "a"]}], "are the same tokens"),
        ([{**GOOD, "rejected": ""}], "row 0: completion 1 is empty"),
        ([{**RANKED[0], "completions": [" ", "b"]}], "row 0: completion 0 is empty"),
        ([{**RANKED[0], "completions": ["b"]}], "a list of at least two"),
        ([{**STEPS[0], "completions": [], "labels": []}], "a non-empty list of steps"),
        ([{**STEPS[0], "completions": ["a", ""], "labels": [True, True]}], "none an empty text"),
        ([{**STEPS[0], "completions": ["a", "b"], "labels": [True]}], "1 labels for 2 steps"),
        ([{**STEPS[0], "completions": ["a"], "labels": ["yes"]}], "use a list of true and false"),
        ([GOOD, RANKED[0]], "row 0 is preference, row 1 is ranked"),
        ([RANKED[0], STEPS[0]], "row 0 is ranked, row 1 is stepwise"),
        ([{**GOOD, "chosen": [{"role": "assistant", "content": "a"}]}], "mixes plain and conversational"),
        ([], "train_dataset: there are no rows"),
    ],
)
def test_bad_rows_are_refused(tmp_path: Path, rows: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        trainer(tmp_path, rows)


def test_bad_models_and_settings_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="train_dataset = None"):
        RewardTrainer(tiny.model(), settings(tmp_path), processing_class=tokenizer())
    config = tiny.model().config
    config.num_labels = 2
    two = AutoModelForSequenceClassification.from_config(config)
    with pytest.raises(ModelError, match="num_labels = 2 of LlamaForSequenceClassification"):
        trainer(tmp_path, PAIRS, two)
    two.save_pretrained(tmp_path / "two")
    with pytest.raises(ModelError, match="num_labels = 2"):
        trainer(tmp_path, PAIRS, str(tmp_path / "two"))
    with pytest.raises(ModelError, match="without a trained score"):
        RewardModel(tiny.model(), tokenizer())
    mamba = MambaForCausalLM(MambaConfig(vocab_size=96, hidden_size=32, num_hidden_layers=1))
    with pytest.raises(ModelError, match="no sequence classifier"):
        to_reward_model(mamba, seed=0)
    with pytest.raises(ConfigError, match="pad_token = 'nothing'"):
        trainer(tmp_path, pad_token="nothing")
    with pytest.raises(ConfigError, match="nothing to centre"):
        trainer(tmp_path, STEPS, center_rewards_coefficient=0.1)
    with pytest.raises(ModelError, match="tokenizer = None"):
        RewardModel(classifier())
    with pytest.raises(ModelError, match="a model in memory keeps its own; omit both"):
        RewardModel(classifier(), tokenizer(), device="cpu")


def test_rows_over_max_length_are_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    made = trainer(tmp_path, max_length=10)
    assert 0 < len(made.train_dataset) < len(PAIRS)
    assert all(len(ids) <= 10 for ids in sequences(made.train_dataset))
    assert any("longer than max_length = 10" in record.message for record in caplog.records)
    with pytest.raises(DataError, match="train_dataset: every row is longer than max_length = 3"):
        trainer(tmp_path, max_length=3)


@pytest.mark.parametrize("token_budget", [None, 12])
def test_a_reward_model_is_a_reward_function(token_budget: int | None) -> None:
    model = classifier()
    plain = copy.deepcopy(model)
    reward = RewardModel(model, tokenizer(), token_budget=token_budget)
    prompts = ["1+1=", "7-2=", "1+1=", "1+1=", "7-2="]
    completions = ["2", "5", "three", "", "555555"]
    got = reward(prompts=prompts, completions=completions, completion_ids=[[0]] * 5, answer=["x"] * 5)
    tok = tokenizer()
    for prompt, completion, value in zip(prompts, completions, got, strict=True):
        ids = tok(prompt + completion)["input_ids"] + [tok.eos_token_id]
        assert value == pytest.approx(plain(torch.tensor([ids])).logits[0, 0].item(), abs=1e-5)
    assert reward([], []) == []
    with pytest.raises(RewardError, match="2 prompts for 1 completions"):
        reward(["a", "b"], ["c"])
    chat = reward([[{"role": "user", "content": "1"}]], [[{"role": "assistant", "content": "2"}]], tools=[None])
    ids = tok("<user>1<eos><assistant>2<eos>")["input_ids"]
    assert chat == pytest.approx([plain(torch.tensor([ids])).logits[0, 0].item()], abs=1e-5)


def test_a_reward_model_works_in_a_rubric() -> None:
    reward = RewardModel(classifier(), tokenizer())
    rubric = Rubric.from_functions([reward])
    assert rubric.names == ("RewardModel",)
    group = Group([5], [Completion([6], text="2"), Completion([7], text="3")], {"prompt": "1+1="})
    scores = rubric.score([group])[0]
    assert [s.total for s in scores] == pytest.approx(reward(["1+1="] * 2, ["2", "3"]))
