"""What an engine returns is checked in one place, whoever asked it."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import tiny
from burnish import CheckFailed, Criterion, EngineError, GRPOConfig, GRPOTrainer, Rubric
from burnish.evaluation.evaluate import evaluate
from burnish.evaluation.pairs import sample_rows
from burnish.rollout import Request, SamplingParams, make_engine
from burnish.rollout.validation import check_completions
from burnish.types import Completion, Group, StopReason

PARAMS = SamplingParams(max_new_tokens=4, stop=("!",), eos_token_ids=(0,))
Rows = list[list[Completion]]


def sound() -> Completion:
    return Completion([5, 6, 0], text="ab", stop_reason=StopReason.EOS, sampler_logprobs=[-1.0, 0.0, 1e-4],
                      policy_logprobs=[-1.0, -2.0, -3.0])  # fmt: skip


def changed(**fields: Any) -> Callable[[Rows], None]:
    def change(rows: Rows) -> None:
        for name, value in fields.items():
            setattr(rows[1][1], name, value)

    return change


BROKEN: dict[str, tuple[Callable[[Rows], Any], str]] = {
    "too few lists": (lambda rows: rows.pop(), "1 lists of completions for 2 prompts"),
    "too few": (lambda rows: rows[1].pop(), "1 completions instead of num_samples = 2"),
    "too many": (lambda rows: rows[1].append(sound()), "3 completions instead of num_samples = 2"),
    "another type": (lambda rows: rows[1].__setitem__(1, "text"), "a str instead of a burnish.types.Completion"),  # type: ignore[call-overload]
    "empty": (changed(token_ids=[], sampler_logprobs=[], policy_logprobs=[]), "at least one token"),
    "a tuple": (changed(token_ids=(5, 6, 0)), "a list of at least one token"),
    "beyond the vocabulary": (changed(token_ids=[5, 96, 0]), "token id 96 .* below 96"),
    "a negative id": (changed(token_ids=[5, -1, 0]), "token id -1"),
    "a float id": (changed(token_ids=[5, 6.0, 0]), "token id 6.0"),
    "too long": (changed(token_ids=[5, 6, 7, 8, 0]), "5 tokens, above max_new_tokens = 4"),
    "a NaN of the policy": (changed(policy_logprobs=[-1.0, math.nan, -1.0]), "policy_logprobs holds nan"),
    "a NaN of the sampler": (changed(sampler_logprobs=[-1.0, math.nan, -1.0]), "sampler_logprobs holds nan"),
    "an infinity": (changed(policy_logprobs=[-math.inf, -1.0, -1.0]), "policy_logprobs holds -inf"),
    "a probability": (changed(policy_logprobs=[0.9, 0.8, 0.7]), "policy_logprobs holds 0.9"),
    "too few log-probabilities": (changed(policy_logprobs=[-1.0]), "1 policy_logprobs for 3 tokens"),
    "too many log-probabilities": (changed(sampler_logprobs=[-1.0] * 4), "4 sampler_logprobs for 3 tokens"),
    "a short mask": (changed(loss_mask=[True]), "1 loss_mask for 3 tokens"),
    "unknown in one": (changed(policy_logprobs=None), "1 of 4 completions have no policy_logprobs"),
    "no reason": (changed(stop_reason=None), "stop_reason = None: use one of eos, stop, length, settled"),
    "a reason as text": (changed(stop_reason="eos"), "stop_reason = 'eos': use one of"),
    "an end that is none": (changed(token_ids=[5, 6, 7]), "the last token 7 is not one of"),
    "a cut that is an end": (changed(stop_reason=StopReason.LENGTH), "the last token 0 is an end-of-sequence token"),
    "no text": (changed(text=None), "text is a NoneType"),
}


@pytest.mark.parametrize("case", sorted(BROKEN))
def test_a_broken_contract_is_named(case: str) -> None:
    breaks, message = BROKEN[case]
    rows = [[sound(), sound()], [sound(), sound()]]
    requests = [Request([1], 2, PARAMS), Request([2], 2, PARAMS)]
    check_completions(requests, rows, vocab_size=96)
    breaks(rows)
    with pytest.raises(EngineError, match=message):
        check_completions(requests, rows, vocab_size=96)


@pytest.mark.parametrize(("reason", "what"), [(StopReason.STOP, "stop strings"), (StopReason.SETTLED, "is_settled")])
def test_a_stop_that_nobody_asked_for(reason: StopReason, what: str) -> None:
    completion = Completion([5], text="a", stop_reason=reason)
    request = Request([1], 1, SamplingParams(4, eos_token_ids=(0,)))
    with pytest.raises(EngineError, match=f"the request has no {what}"):
        check_completions([request], [[completion]])
    asking = replace(request, params=replace(request.params, stop=("b",)), is_settled=bool)
    check_completions([asking], [[completion]])


class Broken:
    """An engine of ours whose last completion loses what it is told to."""

    def __init__(self, engine: Any, **fields: Any) -> None:
        self.own, self.fields = engine, fields

    def generate(self, requests: Sequence[Request], *, seed: int, step: int) -> Rows:
        made = self.own.generate(requests, seed=seed, step=step)
        for completion in (c for row in made for c in row):
            for name, value in self.fields.items():
                setattr(completion, name, [value] * len(completion.token_ids))
        return made

    def sync(self, version: int) -> None: ...

    def close(self) -> None: ...


def ones(completions: list[str], **columns: Any) -> list[float]:
    return [float(len(text)) for text in completions]


def trainer(folder: Path) -> GRPOTrainer:
    args = GRPOConfig(
        output_dir=str(folder), use_cpu=True, bf16=False, max_steps=1, report_to=[], save_strategy="no", progress=False,
        per_device_train_batch_size=4, num_generations=4, max_completion_length=4, learning_rate=1e-3,
    )  # fmt: skip
    rows = [{"prompt": f"{i}="} for i in range(4)]
    return GRPOTrainer(tiny.model(), ones, args, rows, eval_dataset=rows, processing_class=tiny.tokenizer())


@pytest.mark.parametrize("asker", ["train", "trainer.evaluate", "evaluate", "pairs"])
def test_everyone_who_samples_checks(tmp_path: Path, asker: str) -> None:
    own = trainer(tmp_path)
    own.stage.sampler.engine = engine = Broken(own.stage.sampler.engine, policy_logprobs=math.nan)  # type: ignore[assignment]
    rubric = Rubric([Criterion("ones", ones)])
    groups = [Group([5], [], {"prompt": "a"}, 0)]
    shared: dict[str, Any] = {"params": PARAMS, "num_samples": 2}
    calls: dict[str, Callable[[], Any]] = {
        "train": own.train,
        "trainer.evaluate": own.evaluate,
        "evaluate": lambda: evaluate(engine, groups, rubric, **shared),
        "pairs": lambda: sample_rows(engine, groups, rubric, file=tmp_path / "samples.jsonl", model="m", **shared),
    }
    with pytest.raises(EngineError, match="Broken, prompt 0, sample 0: policy_logprobs holds nan"):
        calls[asker]()


def test_the_engines_of_the_library_keep_the_contract() -> None:
    params = SamplingParams(max_new_tokens=6, stop=("a", "1"), eos_token_ids=(0,))
    requests = [Request([5, 6], 8, params, index) for index in range(4)]
    made = make_engine(tiny.model(), tiny.tokenizer()).generate(requests, seed=0, step=0)
    assert len({completion.stop_reason for row in made for completion in row}) > 1
    check_completions(requests, made, vocab_size=96)


def test_a_trainer_whose_own_log_probabilities_are_not_numbers_stops(tmp_path: Path) -> None:
    """A NaN among the old log-probabilities would pass for "fresh", and the ratio for 1."""
    own = trainer(tmp_path)
    own.args.num_iterations = 2
    generate = own.stage.sampler.engine.generate

    def then_break(*args: Any, **kwargs: Any) -> Any:
        made = generate(*args, **kwargs)
        own.model.model.norm.weight.data.fill_(math.nan)
        return made

    own.stage.sampler.engine.generate = then_break  # type: ignore[method-assign]
    with pytest.raises(CheckFailed, match="old_logprobs are not finite"):
        own.train()
