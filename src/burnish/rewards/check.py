"""Check of a rubric before a run depends on it: what it says of gold answers, of cheap tricks, and of samples."""

from __future__ import annotations

import dataclasses
import itertools
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import correlation, fmean
from typing import Any

from burnish.errors import RewardError
from burnish.rewards.answers import answer_text, render_answer
from burnish.rewards.criterion import Criterion
from burnish.rewards.formats import FormatVerifier
from burnish.rewards.rubric import Rubric
from burnish.rewards.verifiers import AnswerVerifier
from burnish.types import Completion, Group

__all__ = ["CriterionCheck", "RubricCheck", "check_rubric", "check_samples"]

GOLD = "gold"
_GOLD_COLUMNS = ("answer", "solution")
_MOST_OPTIONS = 20
_FILLER = "I think that this is how it works. "
_GAMED = 0.5
"""Part of the way from the lowest total to gold's at which a trick is said to pay."""
_TOGETHER = 0.95
"""Correlation from which criteria are said to move together."""


@dataclass(frozen=True, slots=True)
class CriterionCheck:
    """One criterion on all texts.

    Attributes:
        name: name of the criterion.
        values: mean value by kind of text ("gold", the tricks, or "samples"); None where it applied to none.
        failed: fraction of completions on which it failed.
        timed_out: fraction of completions on which it exceeded its time limit.
        ties: fraction of prompts whose texts all have one value.
        milliseconds: time per completion.
        first_error: message of the first failure.
    """

    name: str
    values: dict[str, float | None]
    failed: float
    timed_out: float
    ties: float
    milliseconds: float
    first_error: str | None


@dataclass(frozen=True, slots=True)
class RubricCheck:
    """What a check has found.

    Attributes:
        num_prompts: prompts whose texts were scored.
        totals: mean total by kind of text.
        ties: fraction of prompts whose texts all have one total.
        criteria: each criterion.
        correlations: Pearson correlation of each pair of criteria that vary.
        findings: what to look at, in words.
    """

    num_prompts: int
    totals: dict[str, float | None]
    ties: float
    criteria: list[CriterionCheck]
    correlations: dict[tuple[str, str], float]
    findings: list[str] = field(default_factory=list[str])

    def as_dict(self) -> dict[str, Any]:
        """Return plain data for a JSON file."""
        pairs = [{"criteria": list(pair), "value": value} for pair, value in self.correlations.items()]
        return dataclasses.asdict(self) | {"correlations": pairs}


def check_rubric(rubric: Rubric, rows: Sequence[Mapping[str, Any]]) -> RubricCheck:
    """Score the gold answer of each row, and tricks that should earn little.

    The tricks: nothing, a copy of the prompt, every tag and box around one letter, a sentence repeated, every answer of
    the rows one after another, and the gold answer of another row.

    Args:
        rubric: the criteria.
        rows: columns of each row, `prompt` among them.

    Raises:
        RewardError: no rows, or a row without a prompt.
    """
    if not rows:
        raise RewardError("rows = []: a check needs at least one row.")
    golds = [_gold_text(rubric, row) for row in rows]
    texts = [
        {**({} if gold is None else {GOLD: gold}), **_tricks(rubric, rows, golds, i)} for i, gold in enumerate(golds)
    ]
    # A token for each word: what counts is that longer texts have more.
    completions = [
        [(kind, Completion([0] * len(text.split()), text=text)) for kind, text in kinds.items()] for kinds in texts
    ]
    check = _scored(rubric, list(zip(rows, completions, strict=True)))
    findings = [*_failures(check), *_gold_findings(rubric, check)]
    if not any(gold is not None for gold in golds):
        findings.append("no criterion names a gold answer, and no row has one: only tricks were scored.")
    return dataclasses.replace(check, findings=findings)


def check_samples(rubric: Rubric, samples: Sequence[tuple[Mapping[str, Any], Sequence[Completion]]]) -> RubricCheck:
    """Score completions of a model, grouped by prompt.

    Args:
        rubric: the criteria.
        samples: columns of a row, `prompt` among them, and its completions.

    Raises:
        RewardError: no samples, or a row without a prompt.
    """
    if not samples:
        raise RewardError("samples = []: a check needs at least one prompt with completions.")
    check = _scored(rubric, [(row, [("samples", one) for one in completions]) for row, completions in samples])
    findings = _failures(check)
    if check.ties > 0.5:
        findings.append(f"all completions tie on {check.ties:.0%} of the prompts, which teach nothing.")
    findings += [
        f"{one.name}: all completions tie on {one.ties:.0%} of the prompts: the criterion gives no signal there."
        for one in check.criteria
        if one.ties > 0.9
    ]
    findings += [
        f"{left} and {right} move together (correlation {value:.2f}): one of them may be superfluous."
        for (left, right), value in check.correlations.items()
        if abs(value) >= _TOGETHER
    ]
    return dataclasses.replace(check, findings=findings)


def _scored(
    rubric: Rubric, prompts: Sequence[tuple[Mapping[str, Any], Sequence[tuple[str, Completion]]]]
) -> RubricCheck:
    groups = [
        Group([], [completion for _, completion in texts], dict(row), index)
        for index, (row, texts) in enumerate(prompts)
    ]
    kinds = [kind for _, texts in prompts for kind, _ in texts]
    sizes = [len(texts) for _, texts in prompts]
    found = {criterion.name: _Outcomes(criterion, groups) for criterion in rubric.criteria}
    known = [dataclasses.replace(c, function=found[c.name].again, per_group=False) for c in rubric.criteria]
    try:
        scores = [score for row in Rubric(known).score(groups) for score in row]
        totals = [score.total for score in scores]
    except RewardError:  # a criterion failed on everything, as its own entry says
        totals = [None] * len(kinds)
    criteria = [
        CriterionCheck(
            name=name,
            values=_by_kind(kinds, outcomes.values),
            failed=len(outcomes.errors) / len(kinds),
            timed_out=sum("CallTimeout" in text or "TimeoutError" in text for text in outcomes.errors) / len(kinds),
            ties=_ties(outcomes.values, sizes),
            milliseconds=1e3 * outcomes.seconds / len(kinds),
            first_error=outcomes.errors[0] if outcomes.errors else None,
        )
        for name, outcomes in found.items()
    ]
    pairs = itertools.combinations(found, 2)
    correlations = {
        pair: value for pair in pairs if (value := _correlation(*(found[n].values for n in pair))) is not None
    }
    return RubricCheck(len(prompts), _by_kind(kinds, totals), _ties(totals, sizes), criteria, correlations)


class _Outcomes:
    """Values of one criterion, scored alone, with the time that it took."""

    def __init__(self, criterion: Criterion, groups: Sequence[Group]) -> None:
        alone = Rubric([dataclasses.replace(criterion, requires=(), normalize=None, weight=1.0, schedule=())])
        size = sum(len(group.completions) for group in groups)
        self.values: list[float | None] = [None] * size
        self.messages: list[str | None] = [None] * size
        started = time.perf_counter()
        try:
            scores = [score for row in alone.score(groups) for score in row]
        except RewardError as error:
            self.messages = [str(error)] * size
        else:
            self.values = [score.criteria[criterion.name] for score in scores]
            self.messages = [score.errors.get(criterion.name) for score in scores]
        self.seconds = time.perf_counter() - started

    @property
    def errors(self) -> list[str]:
        return [message for message in self.messages if message is not None]

    def again(self, **columns: Any) -> list[Any]:
        """Return the outcomes as a reward function does."""
        pairs = zip(self.values, self.messages, strict=True)
        return [value if message is None else RewardError(message) for value, message in pairs]


def _by_kind(kinds: Sequence[str], values: Sequence[float | None]) -> dict[str, float | None]:
    found: dict[str, list[float]] = {kind: [] for kind in kinds}
    for kind, value in zip(kinds, values, strict=True):
        if value is not None:
            found[kind].append(value)
    return {kind: fmean(own) if own else None for kind, own in found.items()}


def _ties(values: Sequence[float | None], sizes: Sequence[int]) -> float:
    """Return the fraction of groups of several values that have only one; failures are left out."""
    parts = [values[end - size : end] for end, size in zip(itertools.accumulate(sizes), sizes, strict=True)]
    groups = [present for part in parts if len(present := [value for value in part if value is not None]) > 1]
    return fmean(len(set(group)) == 1 for group in groups) if groups else 0.0


def _correlation(left: Sequence[float | None], right: Sequence[float | None]) -> float | None:
    pairs = [(a, b) for a, b in zip(left, right, strict=True) if a is not None and b is not None]
    if len({a for a, _ in pairs}) < 2 or len({b for _, b in pairs}) < 2:
        return None
    return correlation(*zip(*pairs, strict=True))


def _gold_text(rubric: Rubric, row: Mapping[str, Any]) -> str | None:
    """Write the completion that every criterion should like best; None where the row has no gold answer."""
    functions = [criterion.function for criterion in rubric.criteria]
    verifiers = [f for f in functions if isinstance(f, AnswerVerifier) and row.get(f.gold_column) is not None]
    shown: dict[str, None] = {}
    for verifier in verifiers:
        for answer in verifier.gold(row)[:1]:
            shown[render_answer(answer, tag=verifier.tag, sources=verifier.sources)] = None
    column = next((name for name in _GOLD_COLUMNS if row.get(name) is not None), None)
    if not verifiers and column is not None:
        shown[rf"\boxed{{{answer_text(row[column])}}}"] = None
    if not shown:
        return None
    text = "\n".join(shown)
    form = next((f for f in functions if isinstance(f, FormatVerifier)), None)
    if form is None:
        return text
    # The last tag holds the answer; a verifier of that very tag reads it from there.
    inner = text.removeprefix(f"<{form.tags[-1]}>").removesuffix(f"</{form.tags[-1]}>")
    parts = [f"<{tag}>{_FILLER.strip()}</{tag}>" for tag in form.tags[:-1]]
    return "\n".join([*parts, f"<{form.tags[-1]}>{inner}</{form.tags[-1]}>"]).removeprefix(form.prefix)


def _tricks(rubric: Rubric, rows: Sequence[Mapping[str, Any]], golds: Sequence[str | None], i: int) -> dict[str, str]:
    prompt = rows[i].get("prompt", "")
    functions = [criterion.function for criterion in rubric.criteria]
    tags = {f.tag: None for f in functions if isinstance(f, AnswerVerifier)}
    tags |= {tag: None for f in functions if isinstance(f, FormatVerifier) for tag in f.tags}
    others = list(dict.fromkeys(gold for gold in golds if gold is not None))
    other = next((gold for gold in [*golds[i + 1 :], *golds[:i]] if gold is not None and gold != golds[i]), None)
    return {
        "nothing": "",
        "the prompt": prompt if isinstance(prompt, str) else str(prompt[-1]["content"]),
        "every tag": "".join(f"<{tag}>x</{tag}>" for tag in tags) + r"\boxed{x}",
        "a sentence repeated": 40 * _FILLER,
        **({"every answer": "\n".join(others[:_MOST_OPTIONS])} if len(others) > 1 else {}),
        **({"another row's answer": other} if other is not None else {}),
    }


def _failures(check: RubricCheck) -> list[str]:
    return [
        f"{one.name} fails on {one.failed:.1%} of the completions"
        f"{f', {one.timed_out:.1%} by its time limit' if one.timed_out else ''}: {one.first_error}"
        for one in check.criteria
        if one.failed
    ]


def _gold_findings(rubric: Rubric, check: RubricCheck) -> Iterable[str]:
    graded = {c.name for c in rubric.criteria if isinstance(c.function, AnswerVerifier | FormatVerifier)}
    for one in check.criteria:
        value = one.values.get(GOLD)
        if one.name in graded and value is not None and value < 1:
            yield f"{one.name} gives gold answers {value:.3g} in the mean, not 1: some rows are broken, or it is."
    gold = check.totals.get(GOLD)
    tricks = {kind: total for kind, total in check.totals.items() if kind != GOLD and total is not None}
    if gold is None or not tricks:
        return
    lowest = min(tricks.values())
    for kind, total in tricks.items():
        if gold <= lowest or (total - lowest) / (gold - lowest) >= _GAMED:
            yield f"{kind} earns {total:.3g} in the mean, where the gold answer earns {gold:.3g}: it can be gamed."
