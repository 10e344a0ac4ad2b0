"""Special tokens within a completion are text to everything that reads completions; those that end it are not."""

from __future__ import annotations

import json
import string
from pathlib import Path
from typing import Any

import pytest
from tokenizers import decoders

import tiny
from burnish import GRPOConfig, GRPOTrainer, RewardModel
from burnish.data import encode_rows, prompt_group
from burnish.data.tokens import decode_text
from burnish.evaluation.evaluate import evaluate
from burnish.evaluation.pairs import sample_rows
from burnish.model.classifier import to_reward_model
from burnish.rewards import Rubric
from burnish.rollout import Request, SamplingParams, make_engine
from burnish.rollout.lockstep import LockstepEngine
from burnish.types import StopReason
from test_trainers import settings

ROWS = [{"prompt": f"{i}+1="} for i in range(4)]
VISIBLE = set(string.digits + string.ascii_letters)


def special() -> Any:
    """Every letter and digit is a special token, as `<think>` and `</answer>` are in some vocabularies."""
    made = tiny.tokenizer()
    made.backend_tokenizer.decoder = decoders.Fuse()
    made.add_special_tokens({"additional_special_tokens": sorted(VISIBLE)})
    made.add_special_tokens({"pad_token": "?"})
    assert len(made) == len(tiny.tokenizer())
    return made


class Seen:
    """A reward that remembers what it was given."""

    __name__ = "seen"

    def __init__(self) -> None:
        self.texts: list[str] = []

    def __call__(self, completions: list[Any], **columns: Any) -> list[float]:
        self.texts += completions
        return [float(len(text)) for text in completions]


@pytest.mark.parametrize("engine", [make_engine, LockstepEngine])
def test_engines_keep_special_tokens(engine: Any) -> None:
    tokenizer = special()
    params = SamplingParams(12, eos_token_ids=(0,))
    (group,) = engine(tiny.model(), tokenizer).generate([Request([5, 6], 16, params)], seed=0, step=0)
    reasons = {completion.stop_reason for completion in group}
    assert reasons == {StopReason.EOS, StopReason.LENGTH}
    for completion in group:
        ids = completion.token_ids
        while ids and ids[-1] in (0, tokenizer.pad_token_id):
            ids = ids[:-1]
        assert completion.text == tokenizer.decode(ids, skip_special_tokens=False)
    assert VISIBLE & set("".join(completion.text for completion in group))


@pytest.mark.parametrize("engine", [make_engine, LockstepEngine])
def test_a_special_token_can_be_a_stop_string(engine: Any) -> None:
    tokenizer = special()
    free, cut = (
        engine(tiny.model(), tokenizer).generate(
            [Request([5, 6], 16, SamplingParams(12, eos_token_ids=(0,), stop=stop))], seed=0, step=0
        )[0]
        for stop in ((), tuple(VISIBLE))
    )
    stopped = [(a, b) for a, b in zip(free, cut, strict=True) if VISIBLE & set(a.text)]
    assert len(stopped) > 8
    for whole, part in stopped:
        assert part.stop_reason == StopReason.STOP
        assert whole.text.startswith(part.text)
        assert not VISIBLE & set(part.text)
        assert tokenizer.convert_ids_to_tokens(part.token_ids[-1]) in VISIBLE


def test_only_what_ends_a_completion_is_left_out() -> None:
    tokenizer = special()
    eos, pad, a = tokenizer.convert_tokens_to_ids(["<eos>", "?", "a"])
    assert decode_text(tokenizer, [a, eos, a, pad, eos, pad], {eos, pad}) == "a<eos>a"
    assert decode_text(tokenizer, [a, eos]) == "a<eos>"
    assert decode_text(tokenizer, [eos, eos], {eos}) == ""


def test_rewards_and_transcripts_see_special_tokens(tmp_path: Path) -> None:
    seen = Seen()
    args = GRPOConfig(
        **settings(tmp_path, max_steps=1, per_device_train_batch_size=8, num_generations=4, max_completion_length=8,
                   log_completions=True, logprob_check_bound=1.0)
    )  # fmt: skip
    GRPOTrainer(tiny.model(), seen, args, train_dataset=ROWS, processing_class=special()).train()
    assert VISIBLE & set("".join(seen.texts))
    written = [json.loads(line) for line in (tmp_path / "transcripts.jsonl").read_text().splitlines()]
    assert sorted(record["completion"] for record in written) == sorted(seen.texts)
    assert all(record["prompt"] in {row["prompt"] for row in ROWS} for record in written)


def test_evaluations_and_pairs_see_special_tokens(tmp_path: Path) -> None:
    tokenizer, params = special(), SamplingParams(8, eos_token_ids=(0,))
    seen = Seen()
    groups = encode_rows(prompt_group, ROWS, tokenizer)
    engine, rubric = make_engine(tiny.model(), tokenizer), Rubric.from_functions(seen)
    evaluate(engine, groups, rubric, params=params, num_samples=4, ks=[1])
    assert VISIBLE & set("".join(seen.texts))
    seen.texts.clear()
    records = sample_rows(
        engine, groups, rubric, params=params, num_samples=4, file=tmp_path / "samples.jsonl", model="tiny"
    )
    assert [sample["text"] for record in records for sample in record["samples"]] == seen.texts
    assert VISIBLE & set("".join(seen.texts))


def test_a_reward_model_reads_special_tokens_as_they_were_sampled() -> None:
    tokenizer = special()
    judge = RewardModel(to_reward_model(tiny.model(), seed=0), tokenizer)
    bare, marked = judge(["1+1=", "1+1="], [" 2", " 2a"])
    assert bare != marked
