"""The compiled attention of a decode forward to cached prompts, against float64 and against torch's operators."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Sequence
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from burnish.kernels.attention import PromptTable, attend_prompts
from burnish.rollout import NativeEngine, Request, SamplingParams, cache
from burnish.types import Completion
from test_attention_kernels import BF16, kernel
from test_native import tokenizer

__all__ = ["kernel", "tokenizer"]

ROOM = 304


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(BF16)


class Case:
    """Prompts in a cache, tokens that continue them in some order, and attention to the tokens' own rows."""

    def __init__(
        self,
        lengths: tuple[int, ...] = (300, 7, 64, 129),
        tokens: tuple[int, ...] = (8, 1, 0, 13),
        heads: tuple[int, int] = (6, 2),
        sizes: tuple[int, int] = (64, 64),
    ) -> None:
        self.lengths, (self.heads, kv_heads), self.scaling = lengths, heads, sizes[0] ** -0.5
        total = sum(tokens)
        order = torch.randperm(total, generator=torch.Generator().manual_seed(0)).tolist()
        ends = list(itertools.accumulate(tokens, initial=0))
        self.members = [order[a:b] for a, b in itertools.pairwise(ends)]
        self.keys, self.values = (normal(len(lengths), ROOM, kv_heads, size, seed=n) for n, size in enumerate(sizes))
        for slot, length in enumerate(lengths):  # what is beyond a prompt must not be read
            self.keys[slot, length:], self.values[slot, length:] = torch.nan, torch.nan
        self.query = normal(1, total, self.heads, sizes[0], seed=2).transpose(1, 2)
        self.own, self.norms = normal(total, self.heads, sizes[1], seed=3), normal(total, self.heads, seed=4).float()

    def computed(self) -> Tensor:
        own = self.own.clone()
        table = PromptTable.of(self.members, self.lengths)
        attend_prompts(self.query, self.keys, self.values, table, own, self.norms, scaling=self.scaling)
        return own

    def exact(self) -> Tensor:
        """One softmax over the prompt, merged with the own part by the definition, in float64."""
        merged = self.own.double()
        repeats = self.heads // self.keys.shape[2]
        for slot, members in enumerate(self.members):
            key, value = (x[slot, : self.lengths[slot]].double() for x in (self.keys, self.values))
            for token, head in itertools.product(members, range(self.heads)):
                scores = self.scaling * key[:, head // repeats] @ self.query[0, head, token].double()
                norm, own_norm = scores.logsumexp(0), self.norms[token, head].double()
                shared, both = scores.softmax(0) @ value[:, head // repeats], torch.logaddexp(norm, own_norm)
                merged[token, head] *= (own_norm - both).exp()
                merged[token, head] += (norm - both).exp() * shared
        return merged


@pytest.mark.parametrize("heads", [(6, 2), (9, 3), (4, 4), (8, 1)])
@pytest.mark.parametrize("sizes", [(64, 64), (32, 96), (128, 128)])
def test_the_merged_attention_equals_the_definition(heads: tuple[int, int], sizes: tuple[int, int]) -> None:
    case = Case(heads=heads, sizes=sizes)
    difference = case.computed().double() - case.exact()
    assert difference.norm() < 0.004 * case.exact().norm()
    assert difference.abs().max() < 0.03


@pytest.mark.parametrize("length", [1, 2, 15, 16, 31, 32, 33, 127, 128, 129, 160, 304])
@pytest.mark.parametrize("tokens", [1, 10, 11, 32])
def test_every_length_of_a_prompt_and_number_of_its_tokens(length: int, tokens: int) -> None:
    case = Case(lengths=(length,), tokens=(tokens,))
    assert (case.computed().double() - case.exact()).norm() < 0.004 * case.exact().norm()


def test_a_token_does_not_depend_on_the_others() -> None:
    """Nor on their order, on other prompts, or on the number of threads."""
    case, threads = Case(), torch.get_num_threads()
    together = case.computed()
    try:
        torch.set_num_threads(1)
        assert torch.equal(case.computed(), together)
    finally:
        torch.set_num_threads(threads)
    for slot, members in enumerate(case.members):
        for token in members:
            alone, empty = case.own.clone(), [[] for _ in case.members]
            table = PromptTable.of([[0] if n == slot else part for n, part in enumerate(empty)], case.lengths)
            own = alone[token : token + 1].contiguous()
            attend_prompts(
                case.query[:, :, token : token + 1], case.keys, case.values, table, own,
                case.norms[token : token + 1].contiguous(), scaling=case.scaling,
            )  # fmt: skip
            assert torch.equal(own[0], together[token])


@pytest.mark.parametrize("shift", [60.0, -60.0])
def test_the_parts_weigh_by_their_normalisers(shift: float) -> None:
    """Far apart, one of them is all: the prompt where the own one is lower, the row's own tokens where it is higher."""
    case = Case()
    case.norms += shift
    assert torch.allclose(case.computed().double(), case.exact(), rtol=0, atol=0.02)
    assert torch.equal(case.computed(), case.own) == (shift > 0)


@pytest.mark.parametrize(
    ("make", "fields", "is_computed"),
    [
        (transformers.LlamaConfig, {}, True),
        (transformers.MistralConfig, {"sliding_window": 100}, False),
        (transformers.Gemma2Config, {"sliding_window": 4096, "attn_logit_softcapping": 2.0}, False),
    ],
)
def test_an_engine_is_as_exact_with_the_kernel_as_with_torchs_operators(
    make: Any, fields: dict[str, Any], is_computed: bool, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make(
        vocab_size=256, hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=32, initializer_range=0.2, **fields,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").to(BF16).eval()
    # Too long to be copied into the rows.
    asked = [Request(list(range(3, 153 + n)), 5, SamplingParams(20), index=n) for n in range(3)]
    calls: list[int] = []

    def counted(*given: Any, **options: Any) -> None:
        calls.append(1)
        attend_prompts(*given, **options)

    monkeypatch.setattr(cache, "attend_prompts", counted)
    errors: list[float] = []
    for by_kernel in (True, False):
        if not by_kernel:
            monkeypatch.setattr(cache, "_by_kernel", lambda *_: False)
        groups = NativeEngine(model, tokenizer).generate(asked, seed=0, step=0)
        assert bool(calls) == (by_kernel and is_computed)
        calls.clear()
        errors.append(error(model, asked, groups))
    assert errors[0] < max(1.2 * errors[1], 0.01)


def error(model: Any, asked: Sequence[Request], groups: Sequence[Sequence[Completion]]) -> float:
    """Mean difference of log-probabilities from those of the model in float64."""
    exact, differences = copy.deepcopy(model).double(), list[Tensor]()
    for request, completion in ((r, c) for r, group in zip(asked, groups, strict=True) for c in group):
        ids, start = [*request.prompt_ids, *completion.token_ids], len(request.prompt_ids) - 1
        with torch.no_grad():
            logprobs = exact(torch.tensor([ids]), use_cache=False).logits[0, start:-1].log_softmax(-1)
        expected = logprobs.gather(1, torch.tensor(completion.token_ids)[:, None])[:, 0]
        differences.append((torch.tensor(completion.policy_logprobs) - expected).abs())
    return float(torch.cat(differences).mean())
