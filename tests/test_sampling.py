"""Uniforms, truncation and the inverse of the cumulative distribution, against hand computation."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from burnish.rollout.engine import SamplingParams
from burnish.rollout.sampling import DrawnTokens, SamplingBatch, draw, stream_key, uniforms

PROBS = torch.tensor([0.05, 0.30, 0.15, 0.40, 0.10], dtype=torch.float64)


def draw_many(logits: torch.Tensor, params: SamplingParams, count: int) -> DrawnTokens:
    """`count` draws at evenly spread uniforms: the share of each token is its probability up to 1 / count."""
    uniform = (torch.arange(count, dtype=torch.float64) + 0.5) / count
    return draw(logits.expand(count, -1), uniform, SamplingBatch.of([params] * count))


def shares(tokens: torch.Tensor, vocabulary: int) -> torch.Tensor:
    return torch.bincount(tokens, minlength=vocabulary).to(torch.float64) / len(tokens)


@pytest.mark.parametrize(
    ("params", "kept"),
    [
        (SamplingParams(1), [0, 1, 2, 3, 4]),
        (SamplingParams(1, top_k=2), [1, 3]),
        (SamplingParams(1, top_k=99), [0, 1, 2, 3, 4]),
        (SamplingParams(1, top_p=0.69), [1, 3]),
        (SamplingParams(1, top_p=0.71), [1, 2, 3]),
        (SamplingParams(1, top_p=0.01), [3]),
        (SamplingParams(1, min_p=0.3), [1, 2, 3]),
        (SamplingParams(1, top_k=3, top_p=0.8), [1, 3]),  # 0.7 of the 0.85 that top-k keeps is more than 0.8 of it
        (SamplingParams(1, top_k=4, top_p=0.95, min_p=0.5), [1, 3]),
    ],
)
def test_truncation_is_the_hand_computed_one(params: SamplingParams, kept: list[int]) -> None:
    drawn = draw_many(PROBS.log()[None].float(), params, 2000)
    expected = torch.zeros(5, dtype=torch.float64)
    expected[kept] = PROBS[kept] / PROBS[kept].sum()
    torch.testing.assert_close(shares(drawn.token_ids, 5), expected, atol=1e-3, rtol=0)
    torch.testing.assert_close(drawn.sampler_logprobs.double(), expected.log()[drawn.token_ids], atol=1e-6, rtol=0)
    torch.testing.assert_close(drawn.policy_logprobs.double(), PROBS.log()[drawn.token_ids], atol=1e-6, rtol=0)


def test_temperature_divides_logits_before_truncation() -> None:
    drawn = draw_many(PROBS.log()[None].float(), SamplingParams(1, temperature=0.5, top_k=2), 500)
    sharp = (PROBS.log() / 0.5).softmax(-1)
    torch.testing.assert_close(drawn.policy_logprobs.double(), sharp.log()[drawn.token_ids], atol=1e-6, rtol=0)
    kept = sharp[[1, 3]] / sharp[[1, 3]].sum()
    torch.testing.assert_close(shares(drawn.token_ids, 5)[[1, 3]], kept, atol=2e-3, rtol=0)


def test_greedy_takes_the_first_of_the_most_likely() -> None:
    logits = torch.tensor([[1.0, 3.0, 3.0, 0.0]])
    drawn = draw(
        logits, torch.tensor([0.99], dtype=torch.float64), SamplingBatch.of([SamplingParams(1, temperature=0)])
    )
    assert drawn.token_ids.tolist() == [1]
    assert drawn.sampler_logprobs.tolist() == [0.0]
    torch.testing.assert_close(drawn.policy_logprobs, logits.log_softmax(-1)[0, 1:2])


def test_scale_and_softcap_are_the_models() -> None:
    logits = torch.randn(3, 700)
    uniform = torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64)
    batch = SamplingBatch.of([SamplingParams(1, temperature=0.7)] * 3)
    drawn = draw(logits, uniform, batch, scale=2.0, softcap=1.5)
    policy = (1.5 * torch.tanh(2.0 * logits.double() / 1.5) / 0.7).log_softmax(-1)
    expected = policy.gather(1, drawn.token_ids[:, None])[:, 0]
    torch.testing.assert_close(drawn.policy_logprobs.double(), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("vocabulary", [1, 3, 256, 257, 1000])
def test_inverse_cdf_is_in_vocabulary_order(vocabulary: int) -> None:
    logits = torch.randn(1, vocabulary, generator=torch.Generator().manual_seed(vocabulary))
    uniform = (torch.arange(400, dtype=torch.float64) + 0.5) / 400
    drawn = draw_many(logits, SamplingParams(1), 400)
    cumulative = logits[0].double().softmax(-1).cumsum(-1)
    expected = torch.searchsorted(cumulative, uniform, right=True)
    apart = (drawn.token_ids != expected).nonzero()[:, 0]
    # fp32 weights move a border by about 1e-7: a draw may differ only where its uniform lies that near to one.
    nearest = (cumulative[None] - uniform[apart, None]).abs().min(dim=1).values if len(apart) else torch.zeros(0)
    assert bool((nearest < 1e-6).all())


@pytest.mark.parametrize("edge", [0.0, 1 - 2.0**-53])
def test_impossible_tokens_are_never_drawn(edge: float) -> None:
    logits = torch.full((2, 600), -torch.inf)
    logits[0, 300], logits[1, [7, 520]] = 0.0, 0.0
    uniform = torch.full((2,), edge, dtype=torch.float64)
    drawn = draw(logits, uniform, SamplingBatch.of([SamplingParams(1)] * 2))
    assert drawn.token_ids.tolist() == [300, 7 if edge == 0 else 520]


def test_a_flat_nucleus_is_wider_than_the_first_look() -> None:
    drawn = draw_many(torch.arange(4000.0, 0.0, -1.0)[None] * 1e-5, SamplingParams(1, top_p=0.5), 3000)
    probs = (torch.arange(4000, 0, -1, dtype=torch.float64) * 1e-5).softmax(-1)
    last = int((probs.cumsum(-1) < 0.5).sum())
    assert abs(int(drawn.token_ids.max()) - last) <= 2
    expected = -probs[: last + 1].sum().log() + probs[drawn.token_ids].log()
    torch.testing.assert_close(drawn.sampler_logprobs.double(), expected, atol=1e-3, rtol=0)


def test_rows_keep_their_own_parameters() -> None:
    params = [
        SamplingParams(1),
        SamplingParams(1, temperature=0),
        SamplingParams(1, top_k=1),
        SamplingParams(1, top_p=0.5),
    ]
    logits = PROBS.log().float().expand(4, -1)
    uniform = torch.full((4,), 0.2, dtype=torch.float64)
    together = draw(logits, uniform, SamplingBatch.of(params))
    alone = [draw(logits[:1], uniform[:1], SamplingBatch.of([p])) for p in params]
    assert together.token_ids.tolist() == [int(d.token_ids) for d in alone] == [1, 3, 3, 1]
    assert together.sampler_logprobs.tolist() == [float(d.sampler_logprobs) for d in alone]


def test_frequencies_match_probabilities() -> None:
    count = 20_000
    keys = np.full(count, stream_key(1, 2, 3, 4), dtype=np.uint64)
    uniform = torch.from_numpy(uniforms(keys, np.arange(count)))
    drawn = draw(PROBS.log().float().expand(count, -1), uniform, SamplingBatch.of([SamplingParams(1)] * count))
    observed = shares(drawn.token_ids, 5) * count
    chi_square = float(((observed - PROBS * count) ** 2 / (PROBS * count)).sum())
    assert chi_square < 18.5  # 99.9% of chi-square with 4 degrees of freedom


def test_uniforms_are_uniform_and_independent() -> None:
    keys = np.array(
        [stream_key(0, step, index, sample) for step in range(4) for index in range(8) for sample in range(8)]
    )
    assert len(set(keys.tolist())) == 256
    grid = np.stack([uniforms(keys, np.full(256, position)) for position in range(64)])  # [position, stream]
    assert grid.min() >= 0
    assert grid.max() < 1
    counts = np.histogram(grid, bins=64, range=(0, 1))[0]
    assert float(((counts - 256) ** 2 / 256).sum()) < 103.5  # 99.9%, 63 degrees of freedom
    # The correlation of n independent pairs has standard deviation n^-1/2; neighbours along every axis are pairs.
    streams = grid.reshape(64, 4, 8, 8)
    for axis in range(4):
        left = np.take(streams, range(streams.shape[axis] - 1), axis).ravel()
        right = np.take(streams, range(1, streams.shape[axis]), axis).ravel()
        assert abs(np.corrcoef(left, right)[0, 1]) < 4 / len(left) ** 0.5


def test_uniforms_are_pinned() -> None:
    """A change of these numbers changes every run: it must be meant."""
    keys = np.array([stream_key(0, 0, 0, 0), stream_key(-1, 5, 7, 3)])
    assert keys.tolist() == [8760411249752654535, 1732964936235031996]
    assert uniforms(keys, np.array([0, 9])).tolist() == [0.4437839116774617, 0.37136973166212817]
    assert stream_key(-1, 5, 7, 3) == stream_key(2**64 - 1, 5, 7, 3) != stream_key(5, -1, 7, 3)


@pytest.mark.parametrize(
    ("params", "kept"),
    [
        (SamplingParams(1), [0, 1, 4]),
        (SamplingParams(1, top_k=2), [1, 4]),
        (SamplingParams(1, top_p=0.6), [1]),  # 0.30 of the 0.45 that may be drawn
        (SamplingParams(1, min_p=0.3), [1, 4]),  # of the most likely that may be drawn
    ],
)
def test_unknown_tokens_count_in_the_policy_and_are_never_drawn(params: SamplingParams, kept: list[int]) -> None:
    count = 2000
    uniform = (torch.arange(count, dtype=torch.float64) + 0.5) / count
    logits = PROBS.log()[None].float().expand(count, -1)
    drawn = draw(logits, uniform, SamplingBatch.of([params] * count), unknown=torch.tensor([2, 3]))
    expected = torch.zeros(5, dtype=torch.float64)
    expected[kept] = PROBS[kept] / PROBS[kept].sum()
    torch.testing.assert_close(shares(drawn.token_ids, 5), expected, atol=1e-3, rtol=0)
    torch.testing.assert_close(drawn.sampler_logprobs.double(), expected.log()[drawn.token_ids], atol=1e-6, rtol=0)
    torch.testing.assert_close(drawn.policy_logprobs.double(), PROBS.log()[drawn.token_ids], atol=1e-6, rtol=0)


def test_greedy_and_peaks_pass_over_unknown_tokens() -> None:
    """An unknown token 100 nats above the others, which fp32 weights relative to it could not hold."""
    logits = torch.tensor([[0.0, 100.0, 1.0, 1.0]])
    for temperature in (0.0, 1.0):
        params = SamplingBatch.of([SamplingParams(1, temperature=temperature)])
        drawn = draw(logits, torch.tensor([0.3], dtype=torch.float64), params, unknown=torch.tensor([1]))
        assert drawn.token_ids.tolist() == [2]
        torch.testing.assert_close(drawn.policy_logprobs, torch.tensor([-99.0]))
        assert -1 < float(drawn.sampler_logprobs) <= 0


def test_a_repetition_penalty_is_transformers_own_and_leaves_the_policy_alone() -> None:
    """Sampled as asked, with the log-probability of what was sampled; the policy's is that without a penalty."""
    from transformers import RepetitionPenaltyLogitsProcessor

    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(5, 40, generator=generator) * 3
    seen = [[1, 2, 2, 39], [], [0], list(range(40)), [7, 8]]
    params = SamplingBatch.of([SamplingParams(8, temperature=0.7, repetition_penalty=1.3)] * 5)
    uniform = torch.rand(5, generator=generator, dtype=torch.float64)
    drawn = draw(logits, uniform, params, seen=seen)
    process = RepetitionPenaltyLogitsProcessor(1.3)
    for row, tokens in enumerate(seen):
        penalised = logits[row : row + 1].clone()
        if tokens:
            penalised = process(torch.tensor([tokens]), penalised)  # type: ignore[arg-type]  # pyright: ignore
        token = int(drawn.token_ids[row])
        expected = (penalised[0].double() / 0.7).log_softmax(-1)[token]
        assert float(drawn.sampler_logprobs[row]) == pytest.approx(float(expected), abs=1e-5)
        plain = (logits[row].double() / 0.7).log_softmax(-1)[token]
        assert float(drawn.policy_logprobs[row]) == pytest.approx(float(plain), abs=1e-5)
    assert not torch.allclose(drawn.sampler_logprobs, drawn.policy_logprobs, atol=1e-2)
