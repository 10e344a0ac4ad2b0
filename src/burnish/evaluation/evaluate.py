"""Evaluation: pass@k, criteria and lengths of a policy on a set of problems, with intervals and paired comparisons."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, TypeVar, get_type_hints

import numpy as np
import torch

from burnish.config import FieldInfo, check_mapping
from burnish.data.instructions import instruction_columns
from burnish.environments.episodes import EpisodeEngine
from burnish.errors import ConfigError, RewardError
from burnish.model.packing import pack, split_by_tokens
from burnish.model.scoring import eval_mode, score
from burnish.objectives.aggregate import sequence_sums
from burnish.rewards import Rubric
from burnish.rollout.collect import collect
from burnish.rollout.engine import Engine, SamplingParams
from burnish.runs.evaluations import EvaluationSummary, Interval
from burnish.types import Completion, Group, Score

__all__ = [
    "Evaluation",
    "Interval",
    "Problem",
    "compare",
    "evaluate",
    "mean_interval",
    "mean_nll",
    "paired_difference",
    "pass_at_k",
    "sample_record",
]

_NUM_RESAMPLES = 10_000
_CHUNK_ELEMENTS = 4_000_000


def pass_at_k(num_samples: int, num_correct: int, k: int) -> float:
    r"""Estimate without bias the probability that at least one of k samples is correct.

    pass@k = 1 - C(n - c, k) / C(n, k) = 1 - prod_{i=n-c+1}^{n} (1 - k / i); section 2.1 of 2107.03374. The product is
    a sum of logarithms, which loses no precision to large binomials or to cancellation near 0.

    Args:
        num_samples: n, number of samples of the problem, at least 1.
        num_correct: c, number of correct samples, in 0 .. n.
        k: in 1 .. n.

    Returns:
        A probability.

    Raises:
        ConfigError: an argument outside its range.
    """
    if not 1 <= k <= num_samples:
        raise ConfigError(f"k = {k!r}: use 1 to num_samples ({num_samples}).")
    if not 0 <= num_correct <= num_samples:
        raise ConfigError(f"num_correct = {num_correct!r}: use 0 to num_samples ({num_samples}).")
    if num_samples - num_correct < k:
        return 1.0
    log_none = math.fsum(math.log1p(-k / i) for i in range(num_samples - num_correct + 1, num_samples + 1))
    return -math.expm1(log_none)


def mean_interval(
    values: Sequence[float], level: float = 0.95, *, bounds: tuple[float, float] | None = None, seed: int = 0
) -> Interval:
    """Compute the mean over problems with a bootstrap percentile interval (seeded, 10,000 resamples of the problems).

    Problems are resampled rather than completions, since completions of one problem are not independent. Per-problem
    rates cluster at 0 and 1, so no normal distribution is assumed. The standard deviation of resampled means is too
    small by sqrt((n - 1) / n); deviations from the mean are scaled by the inverse (1411.5279, section 4.1).

    Args:
        values: one number per problem, at least one.
        level: coverage in (0, 1).
        bounds: range of the values if it is known, such as (0, 1): the interval is clipped to it, and if all values
            equal one bound, the exact one-sided binomial limit 1 - (alpha/2)^(1/n) replaces a width of 0.
        seed: seed of the resampling.

    Returns:
        The interval. If all values are equal and not on a bound, its width is 0 and not informative.

    Raises:
        ConfigError: no values, a value that is not finite or out of bounds, or an invalid level.
    """
    if not 0 < level < 1:
        raise ConfigError(f"level = {level!r}: use a number in (0, 1).")
    array = np.asarray(values, dtype=np.float64)
    if array.ndim != 1 or array.size == 0 or not bool(np.isfinite(array).all()):
        raise ConfigError(f"values has shape {array.shape}: pass a list of finite numbers, one per problem.")
    num, mean = int(array.size), math.fsum(array.tolist()) / array.size
    low_bound, high_bound = bounds or (-math.inf, math.inf)
    if float(array.min()) < low_bound or float(array.max()) > high_bound:
        raise ConfigError(f"values reach from {array.min()} to {array.max()}, outside bounds = {bounds!r}.")
    if bounds and float(array.min()) == float(array.max()) and mean in bounds:
        # If P(value off the bound) were larger, n values on the bound would have a probability below alpha/2.
        reach = (1 - ((1 - level) / 2) ** (1 / num)) * (high_bound - low_bound)
        return Interval(mean, *((mean, mean + reach) if mean == low_bound else (mean - reach, mean)), num, level)
    rng = np.random.default_rng(seed)
    size = max(1, min(_NUM_RESAMPLES, _CHUNK_ELEMENTS // num))
    sizes = [min(size, _NUM_RESAMPLES - done) for done in range(0, _NUM_RESAMPLES, size)]
    means = np.concatenate([array[rng.integers(0, num, size=(part, num))].mean(axis=1) for part in sizes])
    widen = math.sqrt(num / (num - 1)) if num > 1 else 1.0
    low, high = (mean + widen * (float(q) - mean) for q in np.quantile(means, [(1 - level) / 2, (1 + level) / 2]))
    return Interval(mean, max(low, low_bound), min(high, high_bound), num, level)


def paired_difference(
    before: Sequence[float], after: Sequence[float], level: float = 0.95, *, seed: int = 0
) -> Interval:
    """Compute the mean of `after - before` over the same problems, with the interval of :func:`mean_interval`.

    Pairing removes the variance between problems, which is most of the noise of a benchmark.

    Args:
        before: one number per problem.
        after: the same problems, in the same order.
        level: coverage in (0, 1).
        seed: seed of the resampling.

    Returns:
        The interval; if it excludes 0, the change is significant at this level.

    Raises:
        ConfigError: the lengths differ; see also `mean_interval`.
    """
    if len(before) != len(after):
        raise ConfigError(f"before has {len(before)} problems and after {len(after)}: a pair needs both.")
    return mean_interval([b - a for a, b in zip(before, after, strict=True)], level, seed=seed)


@dataclass(frozen=True, slots=True)
class Problem:
    """Results of one problem.

    Attributes:
        key: hash of the problem's row, by which comparisons pair it with another evaluation.
        num_graded: completions with a value of the `solved` criterion.
        num_solved: completions for which that value is at least 1.
        num_failed: completions on which a criterion failed, or to which none applies.
        num_truncated: completions cut by the token limit.
        mean_tokens: mean length of the completions in tokens.
        criteria: mean of each criterion over the completions that have it; None if there is none.
        samples: the completions, `{text, stop_reason, num_tokens, reward, criteria, answers, errors}` each.
    """

    key: str
    num_graded: int
    num_solved: int
    num_failed: int
    num_truncated: int
    mean_tokens: float
    criteria: dict[str, float | None]
    samples: list[dict[str, Any]] = field(default_factory=list[dict[str, Any]])


@dataclass(frozen=True, slots=True)
class Evaluation:
    """Result of :func:`evaluate`.

    Attributes:
        name: name of the policy or data set, for reports.
        solved: criterion that counts as success.
        num_samples: completions per problem.
        seed: seed of the sampling.
        params: sampling parameters.
        problems: one record per problem, in order.
        pass_at_k: interval over problems for each k.
        criteria: interval over problems of each criterion's mean.
        mean_completion_tokens: mean over all completions.
        truncated_fraction: fraction of completions cut by the token limit.
        num_failed: completions on which a criterion failed, or to which none applies.
        errors: first messages of such failures.
    """

    name: str
    solved: str
    num_samples: int
    seed: int
    params: dict[str, Any]
    problems: tuple[Problem, ...]
    pass_at_k: dict[int, Interval]
    criteria: dict[str, Interval]
    mean_completion_tokens: float
    truncated_fraction: float
    num_failed: int
    errors: tuple[str, ...]

    def with_criterion(self, name: str, values: Sequence[float | None]) -> Evaluation:
        """Add a criterion, with a value or None per problem; `compare` pairs it like any other."""
        problems = tuple(
            replace(problem, criteria={**problem.criteria, name: value})
            for problem, value in zip(self.problems, values, strict=True)
        )
        interval = mean_interval([value for value in values if value is not None])
        return replace(self, problems=problems, criteria={**self.criteria, name: interval})

    def to_dict(self) -> dict[str, Any]:
        """Convert to JSON values; :meth:`from_dict` restores an equal object."""
        return json.loads(json.dumps(asdict(self)))

    def summary(self) -> EvaluationSummary:
        """Summarise the evaluation without its problems."""
        return EvaluationSummary(
            name=self.name,
            num_problems=len(self.problems),
            num_samples=self.num_samples,
            pass_at_k=self.pass_at_k,
            criteria=self.criteria,
            mean_tokens=self.mean_completion_tokens,
            truncated_fraction=self.truncated_fraction,
            num_failed=self.num_failed,
        )

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Evaluation:
        """Restore an object from :meth:`to_dict`.

        Raises:
            ConfigError: missing or unknown fields.
        """
        try:
            fields = check_mapping(_STORED, dict(data), "evaluation")
            fields["problems"] = tuple(_stored(Problem, problem) for problem in fields["problems"])
            fields["pass_at_k"] = {int(k): _interval(interval) for k, interval in fields["pass_at_k"].items()}
            fields["criteria"] = {name: _interval(interval) for name, interval in fields["criteria"].items()}
            fields["errors"] = tuple(fields["errors"])
            return cls(**fields)
        except (KeyError, TypeError, ValueError) as error:
            raise ConfigError(f"data is not an evaluation written by to_dict: {error}.") from error


_STORED = {
    name: FieldInfo(name, hint)
    for name, hint in {
        "name": str,
        "solved": str,
        "num_samples": int,
        "seed": int,
        "params": dict[str, Any],
        "problems": list[dict[str, Any]],
        "pass_at_k": dict[str, dict[str, Any]],
        "criteria": dict[str, dict[str, Any]],
        "mean_completion_tokens": float,
        "truncated_fraction": float,
        "num_failed": int,
        "errors": list[str],
    }.items()
}
"""Fields of an evaluation in JSON."""

_R = TypeVar("_R", Problem, Interval)


def _stored(record: type[_R], data: Mapping[str, Any]) -> _R:
    infos = {name: FieldInfo(name, hint) for name, hint in get_type_hints(record).items()}
    return record(**check_mapping(infos, data, record.__name__))


def _interval(data: Mapping[str, Any]) -> Interval:
    found = _stored(Interval, data)
    if None in (found.low, found.high, found.num):
        raise ValueError(f"the interval {dict(data)} lacks an end or its number of problems")
    return found


def evaluate(
    engine: Engine,
    groups: Sequence[Group],
    rubric: Rubric,
    *,
    params: SamplingParams,
    num_samples: int,
    ks: Sequence[int] = (1,),
    seed: int = 0,
    step: int = 0,
    solved: str | None = None,
    name: str = "",
    max_failed_fraction: float = 0.0,
) -> Evaluation:
    """Sample every problem `num_samples` times and report pass@k, criteria and lengths.

    Args:
        engine: sampler, with its weights in sync.
        groups: the problems; their `completions` are ignored and left unchanged.
        rubric: criteria to grade by.
        params: sampling parameters.
        num_samples: completions per problem, at least 1.
        ks: values of k for pass@k, each in 1 .. num_samples.
        seed: the same seed, step and problems give the same completions.
        step: training step, part of the key of the random numbers.
        solved: criterion whose value of at least 1 counts as success; None for the only criterion of a rubric.
        name: name of the result.
        max_failed_fraction: fraction of completions on which rewards may fail. Failures are counted, but not as wrong
            answers; a problem with fewer than k graded completions is excluded from pass@k.

    Returns:
        The evaluation.

    Raises:
        ConfigError: an invalid argument.
        RewardError: rewards failed on more completions than allowed.
    """
    solved = _check_arguments(groups, rubric, num_samples, ks, solved)
    problems = [Group(prompt_ids=g.prompt_ids, completions=[], row=g.row, index=g.index) for g in groups]
    collect(engine, problems, num_generations=num_samples, params=params, seed=seed, step=step)
    scores = rubric.score(problems)
    if isinstance(engine, EpisodeEngine):
        engine.end(problems)
    errors = _check_failures(scores, max_failed_fraction)
    records = tuple(_problem(g, s, solved) for g, s in zip(problems, scores, strict=True))
    return Evaluation(
        name=name,
        solved=solved,
        num_samples=num_samples,
        seed=seed,
        params=json.loads(json.dumps(asdict(params))),
        problems=records,
        **_figures(problems, records, rubric.names, ks),
        errors=errors[:8],
    )


def _figures(
    problems: Sequence[Group], records: Sequence[Problem], criteria: Sequence[str], ks: Sequence[int]
) -> dict[str, Any]:
    """Compute the figures over all problems."""
    lengths = [len(completion.token_ids) for problem in problems for completion in problem.completions]
    values = {name: _present(records, _criterion(name)) for name in criteria}
    return {
        "pass_at_k": {k: mean_interval(_present(records, _pass_at(k)), bounds=(0.0, 1.0)) for k in sorted(set(ks))},
        "criteria": {name: mean_interval(means) for name, means in values.items() if means},
        "mean_completion_tokens": sum(lengths) / len(lengths),
        "truncated_fraction": sum(record.num_truncated for record in records) / len(lengths),
        "num_failed": sum(record.num_failed for record in records),
    }


@torch.no_grad()
def mean_nll(model: torch.nn.Module, groups: Sequence[Group], *, token_budget: int | None = 4096) -> list[float]:
    r"""Compute the negative log-likelihood of each group's completion, per scored token.

    .. math:: -\frac{1}{|y|} \sum_t \log \pi(y_t \mid x, y_{<t})

    Args:
        model: model prepared by `prepare_for_scoring`.
        groups: demonstrations, one completion each.
        token_budget: maximum number of tokens per forward pass; None for a single pass.

    Returns:
        Nats per token, in the order of the groups.
    """
    device = next(model.parameters()).device
    with eval_mode(model):
        for part in split_by_tokens(groups, token_budget):
            batch = pack(part).to(device)
            tokens_S = torch.bincount(batch.sequence_index, minlength=batch.num_sequences)
            sums_S = sequence_sums(score(model, batch).logprobs, batch.sequence_index, batch.num_sequences)
            values = (-sums_S / tokens_S).tolist()
            for group, value in zip(part, values, strict=True):
                group.completions[0].sequence["nll"] = value
    return [group.completions[0].sequence["nll"] for group in groups]


def compare(before: Evaluation, after: Evaluation, metric: str = "pass@1", *, level: float = 0.95) -> Interval:
    """Compute the paired interval of `after - before` over the problems of two evaluations.

    Args:
        before: an evaluation.
        after: another evaluation of the same problems, in the same order.
        metric: "pass@k" with a number for k, "completion_tokens", "truncated_fraction", or the name of a criterion.
        level: coverage in (0, 1).

    Returns:
        The interval over problems with the metric in both evaluations.

    Raises:
        ConfigError: the problems differ, the metric is unknown, or no problem has it in both.
    """
    keys = [[problem.key for problem in evaluation.problems] for evaluation in (before, after)]
    if keys[0] != keys[1]:
        shared = len(set(keys[0]) & set(keys[1]))
        raise ConfigError(
            f"before ({len(keys[0])} problems) and after ({len(keys[1])}) are not the same problems in the same order "
            f"({shared} shared): evaluate both on one set."
        )
    read = _metric(metric, before, after)
    pairs = [(read(a), read(b)) for a, b in zip(before.problems, after.problems, strict=True)]
    whole = [(a, b) for a, b in pairs if a is not None and b is not None]
    if not whole:
        raise ConfigError(f"metric = {metric!r}: no problem has it in both evaluations.")
    return paired_difference([a for a, _ in whole], [b for _, b in whole], level)


def _check_arguments(
    groups: Sequence[Group], rubric: Rubric, num_samples: int, ks: Sequence[int], solved: str | None
) -> str:
    if not groups:
        raise ConfigError("groups = []: an evaluation needs at least one problem.")
    rubric.check_columns(groups)
    if num_samples < 1:
        raise ConfigError(f"num_samples = {num_samples!r}: use an integer of at least 1.")
    if not ks or min(ks) < 1 or max(ks) > num_samples:
        raise ConfigError(f"ks = {tuple(ks)!r}: use numbers in 1 .. num_samples ({num_samples}).")
    if solved is None and len(rubric.names) == 1:
        return rubric.names[0]
    if solved not in rubric.names:
        raise ConfigError(f"solved = {solved!r}: name the criterion of success: {', '.join(rubric.names)}.")
    return solved


def _check_failures(scores: Sequence[Sequence[Score]], max_failed_fraction: float) -> tuple[str, ...]:
    """Return the messages of failed rewards; refuse more failures than allowed."""
    flat = [score for group in scores for score in group]
    errors = tuple(message for score in flat for message in score.errors.values())
    failed, allowed = sum(bool(score.errors) for score in flat), max_failed_fraction * len(flat)
    if failed > allowed:
        raise RewardError(
            f"rewards failed on {failed} of {len(flat)} completions, max_failed_fraction = "
            f"{max_failed_fraction!r} allows {int(allowed)}: fix the criterion or allow more. First: {errors[0]}"
        )
    return errors


def _problem(group: Group, scores: Sequence[Score], solved: str) -> Problem:
    graded = [value for score in scores if (value := score.criteria[solved]) is not None]
    criteria = {name: [v for s in scores if (v := s.criteria[name]) is not None] for name in scores[0].criteria}
    return Problem(
        key=_key(group.row),
        num_graded=len(graded),
        num_solved=sum(value >= 1 for value in graded),
        num_failed=sum(bool(score.errors) for score in scores),
        num_truncated=sum(completion.is_truncated for completion in group.completions),
        mean_tokens=sum(len(completion.token_ids) for completion in group.completions) / len(group.completions),
        criteria={name: math.fsum(values) / len(values) if values else None for name, values in criteria.items()},
        samples=[sample_record(completion, score) for completion, score in zip(group.completions, scores, strict=True)],
    )


def sample_record(completion: Completion, score: Score) -> dict[str, Any]:
    """Return a scored completion as JSON."""
    return {
        "text": completion.text,
        "stop_reason": completion.stop_reason and completion.stop_reason.value,
        "num_tokens": len(completion.token_ids),
        "reward": score.total,
        "criteria": score.criteria,
        "answers": score.answers,
        "errors": score.errors,
    }


def _key(row: Mapping[str, Any]) -> str:
    """Hash the problem of a row, without its demonstration; the key does not depend on the tokenizer."""
    asked = {name: value for name, value in row.items() if name != "completion"}
    without = {name: value for name, value in asked.items() if name != "prompt"}
    if instruction_columns(without):  # the prompt was derived from them, as text or as messages
        asked = without
    return hashlib.sha256(json.dumps(asked, sort_keys=True, default=str).encode()).hexdigest()[:16]


def _pass_at(k: int) -> Callable[[Problem], float | None]:
    return lambda p: pass_at_k(p.num_graded, p.num_solved, k) if p.num_graded >= k else None


def _criterion(name: str) -> Callable[[Problem], float | None]:
    return lambda problem: problem.criteria.get(name)


def _present(problems: Sequence[Problem], read: Callable[[Problem], float | None]) -> list[float]:
    return [value for problem in problems if (value := read(problem)) is not None]


def _metric(metric: str, before: Evaluation, after: Evaluation) -> Callable[[Problem], float | None]:
    names = set(before.criteria) & set(after.criteria)
    if metric in names:
        return _criterion(metric)
    if metric == "completion_tokens":
        return lambda problem: problem.mean_tokens
    if metric == "truncated_fraction":
        return lambda problem: problem.num_truncated / before.num_samples
    most = min(before.num_samples, after.num_samples)
    if metric.startswith("pass@") and metric[5:].isdecimal() and 1 <= int(metric[5:]) <= most:
        if before.solved != after.solved:
            raise ConfigError(f"metric = {metric!r}: success is {before.solved!r} before but {after.solved!r} after.")
        return _pass_at(int(metric[5:]))
    known = ["pass@k with k in 1 .. " + str(most), "completion_tokens", "truncated_fraction", *sorted(names)]
    raise ConfigError(f"metric = {metric!r}: use one of: {', '.join(known)}.")
