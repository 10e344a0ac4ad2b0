"""Preference pairs and demonstrations from a model's samples and a rubric (`burnish pairs`), and their ranking by a
reward model.

Every sample is written to `samples.jsonl` with its rewards, so that an interrupted run can resume and rows can be
selected again without sampling. `pairs.jsonl` holds preference rows, `best.jsonl` prompt-completion rows.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import torch

from burnish.errors import ConfigError, DataError
from burnish.evaluation.evaluate import mean_interval, sample_record
from burnish.objectives.reward_modelling import calibration_bins, calibration_error
from burnish.progress import Progress, say
from burnish.rewards import Rubric
from burnish.rewards.identity import rubric_identity
from burnish.rollout import Engine, SamplingParams
from burnish.rollout.collect import collect
from burnish.runs.evaluations import EvaluationSummary, Interval
from burnish.runs.files import append_json_lines, filter_json_lines, read_json_lines
from burnish.types import Group, Score

__all__ = ["PairRanking", "best_row", "preference_rows", "rank_pairs", "sample_rows"]

Row = Mapping[str, Any]


def sample_rows(
    engine: Engine,
    groups: Sequence[Group],
    rubric: Rubric,
    *,
    params: SamplingParams,
    num_samples: int,
    file: Path,
    model: str,
    seed: int = 0,
    prompts_per_round: int = 16,
) -> list[dict[str, Any]]:
    """Sample and score every prompt once; prompts in the file are not sampled again.

    Args:
        engine: sampler, with its weights in sync.
        groups: prompts, with their rows.
        rubric: criteria to grade by.
        params: sampling parameters.
        num_samples: completions per prompt.
        file: JSON lines, one record per prompt.
        model: identity of the model, such as the fingerprint of its weights; a file with samples of another model,
            other prompts or columns, another rubric or other settings is refused.
        seed: seed of the sampling.
        prompts_per_round: prompts sampled and written together.

    Returns:
        Records `{index, prompt, row, samples: [{text, reward, criteria, answers, errors, stop_reason}]}`, by index.

    Raises:
        ConfigError: the file holds samples of another run.
        DataError: a column with a reserved name.
    """
    rubric.check_columns(groups)
    rows = [(group.index, group.prompt_ids, group.row) for group in groups]
    asked = [model, repr(params), num_samples, seed, rubric_identity(rubric), rows]
    text = json.dumps(asked, sort_keys=True, default=str)
    key = hashlib.sha256(text.encode(errors="surrogatepass")).hexdigest()[:16]
    before = list(read_json_lines(file))
    if any(record.get("key") != key for record in before):
        raise ConfigError(
            f"{file} holds samples of another model, other prompts, another rubric or other settings: give another "
            "output_dir, or delete the file."
        )
    done = {record["index"]: record for record in before}
    missing = [group for group in groups if group.index not in done]
    if done:
        say(f"pairs: {len(done)} of {len(groups)} prompts already sampled")
    filter_json_lines(file, lambda record: True)  # drops a line that was cut off when the run was killed
    with Progress("pairs", len(groups), completed=len(done)) as progress:
        for begin in range(0, len(missing), prompts_per_round):
            part = [Group(g.prompt_ids, [], g.row, g.index) for g in missing[begin : begin + prompts_per_round]]
            collect(engine, part, num_generations=num_samples, params=params, seed=seed, step=0)
            records = [_record(group, scores, key) for group, scores in zip(part, rubric.score(part), strict=True)]
            append_json_lines(file, records)
            done |= {record["index"]: record for record in records}
            progress.update(len(done))
    return [done[group.index] for group in groups]


def preference_rows(
    record: Row, *, pairs_per_prompt: int = 1, min_margin: float = 0.0, seed: int = 0
) -> list[dict[str, Any]]:
    """Pair the i-th best sample with the i-th worst, while their rewards differ by more than `min_margin`.

    Ties are broken by a random number of (seed, prompt), equal texts count once, and blank or truncated texts and
    samples without a reward are excluded.

    Args:
        record: record of `sample_rows`.
        pairs_per_prompt: maximum number of rows per prompt.
        min_margin: the difference of the rewards must exceed this.
        seed: seed of the order of ties.

    Returns:
        Rows with `prompt`, `chosen`, `rejected`, `score_chosen`, `score_rejected`, `differs_in` (the criteria whose
        values differ), and the prompt's own columns.
    """
    ranked = _ranked(record, seed)
    rows: list[dict[str, Any]] = []
    for best, worst in zip(ranked, reversed(ranked), strict=True):
        if len(rows) == pairs_per_prompt or not best["reward"] - worst["reward"] > min_margin:
            break
        chosen, rejected = (_as_completion(record["prompt"], sample["text"]) for sample in (best, worst))
        scores = {
            "score_chosen": best["reward"],
            "score_rejected": worst["reward"],
            "differs_in": [name for name, value in best["criteria"].items() if value != worst["criteria"].get(name)],
        }
        rows.append({**record["row"], "prompt": record["prompt"], "chosen": chosen, "rejected": rejected, **scores})
    return rows


def best_row(record: Row, *, min_reward: float | None = None, seed: int = 0) -> dict[str, Any] | None:
    """Return the best sample as a prompt-completion row (best-of-n); None if no reward reaches `min_reward`."""
    ranked = _ranked(record, seed)
    if not ranked or (min_reward is not None and ranked[0]["reward"] < min_reward):
        return None
    best = ranked[0]
    completion = _as_completion(record["prompt"], best["text"])
    return {**record["row"], "prompt": record["prompt"], "completion": completion, "score": best["reward"]}


@dataclass(frozen=True, slots=True)
class PairRanking:
    """Ranking of preference pairs by a reward model.

    Attributes:
        num_pairs: number of pairs.
        num_problems: number of prompts that they belong to.
        accuracy: fraction of a problem's pairs with the higher score for chosen, over problems.
        accuracy_by_kind: the same by the criteria in which the pairs differ, such as `correct` or `format+correct`.
        pairs_by_kind: number of pairs of each kind.
        calibration_error: of sigma(r_chosen - r_rejected) as a probability, each pair in both orders, 10 bins.
        brier_score: mean of (1 - sigma(r_chosen - r_rejected))^2.
        ahead: r_chosen - r_rejected of each pair, in the order of the rows.
    """

    num_pairs: int
    num_problems: int
    accuracy: Interval
    accuracy_by_kind: dict[str, Interval]
    pairs_by_kind: dict[str, int]
    calibration_error: float
    brier_score: float
    ahead: tuple[float, ...]

    def summary(self, name: str) -> EvaluationSummary:
        """Summarise the ranking without its pairs."""
        kinds = {f"ranked right, {kind}": interval for kind, interval in self.accuracy_by_kind.items()}
        figures = {"calibration error": self.calibration_error, "Brier score": self.brier_score}
        return EvaluationSummary(
            name=name,
            num_problems=self.num_problems,
            criteria={"pairs ranked right": self.accuracy, **(kinds if len(kinds) > 1 else {})}
            | {figure: Interval(value) for figure, value in figures.items()},
        )


def rank_pairs(scorer: Callable[[Sequence[Any], Sequence[Any]], Sequence[float]], rows: Sequence[Row]) -> PairRanking:
    """Score both completions of every pair and compare them.

    Args:
        scorer: function `scorer(prompts, completions)` to one score per completion, such as a `burnish.RewardModel`.
        rows: rows of `preference_rows`, or others with `prompt`, `chosen` and `rejected`.

    Returns:
        The ranking; equal scores count as wrong.

    Raises:
        DataError: no rows.
    """
    if not rows:
        raise DataError("rows = []: a ranking needs at least one pair.")
    prompts = [row["prompt"] for row in rows]
    chosen, rejected = (scorer(prompts, [row[side] for row in rows]) for side in ("chosen", "rejected"))
    ahead = [float(better - worse) for better, worse in zip(chosen, rejected, strict=True)]
    kinds = ["+".join(row.get("differs_in") or ()) or "unknown" for row in rows]
    problems = [json.dumps(prompt, sort_keys=True, default=str) for prompt in prompts]

    def accuracy(kind: str | None) -> Interval:
        right: dict[str, list[float]] = defaultdict(list)
        for problem, differing, value in zip(problems, kinds, ahead, strict=True):
            if kind in (None, differing):
                right[problem].append(float(value > 0))
        return mean_interval([fmean(values) for values in right.values()], bounds=(0.0, 1.0))

    wins_M = torch.tensor(ahead, dtype=torch.float64).sigmoid()
    both = calibration_bins(
        torch.cat((wins_M, 1 - wins_M)), torch.cat((torch.ones_like(wins_M), torch.zeros_like(wins_M)))
    )
    counts = Counter(kinds)
    return PairRanking(
        num_pairs=len(rows),
        num_problems=len(set(problems)),
        accuracy=accuracy(None),
        accuracy_by_kind={kind: accuracy(kind) for kind in sorted(counts)},
        pairs_by_kind=dict(sorted(counts.items())),
        calibration_error=calibration_error(both),
        brier_score=float(((1 - wins_M) ** 2).mean()),
        ahead=tuple(ahead),
    )


def _ranked(record: Row, seed: int) -> list[Row]:
    rng = random.Random(f"{seed}-{record['index']}")
    # A blank text would teach the model to stop at once, and stages refuse it.
    samples: dict[str, Row] = {s["text"]: s for s in record["samples"] if s["reward"] is not None and s["text"].strip()}
    # A truncated text would teach the model to stop early as chosen, and be penalised for its length as rejected.
    whole = [s for s in samples.values() if s["stop_reason"] != "length"]
    return sorted(whole, key=lambda s: (-s["reward"], rng.random()))


def _as_completion(prompt: Any, text: str) -> Any:
    """Convert a text to a completion in the format of the prompt."""
    return text if isinstance(prompt, str) else [{"role": "assistant", "content": text}]


def _record(group: Group, scores: Sequence[Score], key: str) -> dict[str, Any]:
    """Return a prompt and its scored samples as JSON."""
    samples = [sample_record(completion, score) for completion, score in zip(group.completions, scores, strict=True)]
    row = {name: value for name, value in group.row.items() if name not in ("prompt", "completion")}
    return {"key": key, "index": group.index, "prompt": group.row["prompt"], "row": row, "samples": samples}
