"""The proof of a sync: what the comparison of two lists of log-probabilities finds, and what it leaves alone."""

from __future__ import annotations

import math
import random

import pytest
import torch

import tiny
from burnish.model.scoring import prepare_for_scoring
from burnish.rollout.vllm.probe import Answers, compare, probe_sequences, score_probe

NOISE, BOUND, N = 0.03, 1e-2, 252
"""Noise of bf16 as measured on SmolLM2, its bound, and the tokens of the probe."""


def normal(scale: float, seed: int) -> list[float]:
    generator = random.Random(seed)
    return [generator.gauss(0.0, scale) for _ in range(N)]


def added(*lists: list[float]) -> list[float]:
    return [sum(values) for values in zip(*lists, strict=True)]


START = [value - 3.0 for value in normal(1.0, 0)]
BEFORE = Answers("v0", START, added(START, normal(NOISE, 1)))


def after(change: float, *, arrived: float = 1.0, noise_seed: int = 2) -> Answers:
    """The trainer moved by `change` nats (root mean square), the server made a part of it."""
    moved = normal(change, 3)
    observed = added(START, [arrived * value for value in moved], normal(NOISE, noise_seed))
    return Answers("v1", added(START, moved), observed)


@pytest.mark.parametrize("change", [0.0, 1e-3, 0.02, 0.1, 0.5, 2.0])
def test_new_weights_agree_whatever_the_change(change: float) -> None:
    for seed in range(20):
        found = compare(after(change, noise_seed=seed + 10), BEFORE, BEFORE, bound=BOUND)
        assert found.cause == ""
        assert found.moved == pytest.approx(change, rel=0.2, abs=1e-9)
        if found.is_resolved:
            assert found.followed == pytest.approx(1.0, abs=0.4)


def test_what_can_be_told_apart_is_stated() -> None:
    assert not compare(after(2.5 * NOISE), BEFORE, BEFORE, bound=BOUND).is_resolved
    assert compare(after(3.5 * NOISE), BEFORE, BEFORE, bound=BOUND).is_resolved


@pytest.mark.parametrize("share", [0.5, 1.0, 1.4])
def test_rounding_drawn_anew_is_no_change_of_weights(share: float) -> None:
    """In bf16 a last-place update moves the trainer by its noise, which the server cannot follow."""
    for seed in range(20):
        moved = normal(share * NOISE, 100 + seed)
        now = Answers("v1", added(START, moved), added(START, normal(NOISE, 200 + seed)))
        assert compare(now, BEFORE, BEFORE, bound=BOUND).cause == ""
    # Beside a change of weights of 3 sigma, it leaves c well above the half that is asked for.
    for seed in range(20):
        signal, noise = normal(3 * NOISE, 300 + seed), normal(share * NOISE, 100 + seed)
        now = Answers("v1", added(START, signal, noise), added(START, signal, normal(NOISE, 200 + seed)))
        assert compare(now, BEFORE, BEFORE, bound=BOUND).cause == ""


@pytest.mark.parametrize("change", [0.12, 0.5, 2.0])
def test_old_weights_are_found_once_the_change_exceeds_the_noise(change: float) -> None:
    for seed in range(20):
        found = compare(after(change, arrived=0.0, noise_seed=seed + 10), BEFORE, BEFORE, bound=BOUND)
        assert "weights of v0" in found.cause
        assert abs(found.followed) < 0.5


def test_small_changes_add_up_until_they_are_seen() -> None:
    """A sync that never works is found at the latest when all changes since the anchor exceed the noise."""
    step = 0.2 * NOISE
    for number in range(1, 40):
        now = Answers(f"v{number}", added(START, normal(step * number, 3)), added(START, normal(NOISE, 20 + number)))
        found = compare(now, None, BEFORE, bound=BOUND)
        if found.cause:
            break
    assert 12 <= number <= 18


def test_a_server_that_did_not_move_at_all_is_found_below_the_noise() -> None:
    now = Answers("v1", added(START, normal(1e-5, 3)), BEFORE.observed)
    assert "bit for bit as at v0" in compare(now, BEFORE, BEFORE, bound=BOUND).cause
    # Where the trainer did not move either, there is nothing to see.
    same = Answers("v1", list(START), BEFORE.observed)
    assert compare(same, BEFORE, BEFORE, bound=BOUND).cause == ""


def test_a_part_left_behind_is_found() -> None:
    """Half of the tokens' change is missing, as where only some layers were loaded."""
    moved = normal(0.4, 3)
    made = [value if place % 2 else 0.1 * value for place, value in enumerate(moved)]
    now = Answers("v1", added(START, moved), added(START, made, normal(NOISE, 2)))
    found = compare(now, BEFORE, BEFORE, bound=0.05)
    assert "part of the weights was left behind" in found.cause


def test_another_model_is_found_without_a_version_before() -> None:
    now = Answers("v0", START, added(START, normal(0.5, 5)))
    assert "another model" in compare(now, None, None, bound=BOUND).cause
    assert compare(BEFORE, None, None, bound=BOUND).cause == ""
    broken = Answers("v0", START, [math.nan, *START[1:]])
    assert "not finite" in compare(broken, None, None, bound=BOUND).cause


def test_one_wild_token_of_bf16_is_no_mismatch() -> None:
    now = after(0.1)
    now.observed[17] += 2.5
    assert compare(now, BEFORE, BEFORE, bound=BOUND).cause == ""


def test_the_probe_is_scored_by_the_trained_model() -> None:
    model, tokenizer = tiny.model(), tiny.tokenizer()
    prepare_for_scoring(model)
    sequences = probe_sequences(tokenizer, model)
    assert [len(ids) for ids in sequences] == [64, 64, 64, 64]
    found = score_probe(model, sequences)
    wanted: list[float] = []
    with torch.no_grad():
        for ids in sequences:
            rows = model(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
            wanted += [float(rows[place, token]) for place, token in enumerate(ids[1:])]
    assert found == pytest.approx(wanted, abs=1e-4)
    # Same weights, same values: an unchanged model is not delivered twice.
    assert score_probe(model, sequences) == found
    assert max(map(len, probe_sequences(tokenizer, model, longest=20))) == 19
