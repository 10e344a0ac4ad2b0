"""Preference pairs and demonstrations from a model's own samples and a rubric: `burnish pairs`.

Every sampled completion goes to `samples.jsonl` with its rewards, so a killed run goes on where it was, and the rows
can be chosen anew without sampling. `pairs.jsonl` holds preference rows, `best.jsonl` prompt-completion rows.
"""

from __future__ import annotations

import hashlib
import json
import random
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from burnish.errors import ConfigError
from burnish.progress import format_seconds, say
from burnish.rewards import Rubric
from burnish.rollout import Engine, SamplingParams
from burnish.rollout.collect import collect
from burnish.types import Group

__all__ = ["best_row", "preference_rows", "sample_rows", "write_rows"]

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
    """Sample and score every prompt once; what the file already holds is not sampled again.

    Args:
        engine: samples; its weights must be in sync.
        groups: prompts, with their rows.
        rubric: judges.
        params: how tokens are drawn.
        num_samples: completions a prompt.
        file: JSON lines, one record a prompt.
        model: its name, for the record: a file of another model or other settings is refused.
        seed: of the random numbers.
        prompts_per_round: prompts sampled and written together.

    Returns:
        Records `{index, prompt, row, samples: [{text, reward, criteria, errors, stop_reason}]}`, by index.

    Raises:
        ConfigError: the file holds samples of another run.
    """
    key = _key(model, groups, params, num_samples, seed)
    done = {record["index"]: record for record in _read(file, key)}
    missing = [group for group in groups if group.index not in done]
    if done:
        say(f"pairs: {len(done)} of {len(groups)} prompts sampled before")
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(_line(record) for record in done.values()), encoding="utf-8")
    started = time.monotonic()
    for begin in range(0, len(missing), prompts_per_round):
        part = [Group(g.prompt_ids, [], g.row, g.index) for g in missing[begin : begin + prompts_per_round]]
        collect(engine, part, num_generations=num_samples, params=params, seed=seed, step=0)
        rubric.score(part)
        records = [_record(group, key) for group in part]
        with file.open("a", encoding="utf-8") as stream:
            stream.writelines(_line(record) for record in records)
        done |= {record["index"]: record for record in records}
        left = (time.monotonic() - started) / (begin + len(part)) * (len(missing) - begin - len(part))
        say(f"pairs: {len(done)}/{len(groups)} prompts sampled  left {format_seconds(left)}")
    return [done[group.index] for group in groups]


def preference_rows(
    record: Row, *, pairs_per_prompt: int = 1, min_margin: float = 0.0, seed: int = 0
) -> list[dict[str, Any]]:
    """The i-th best sample over the i-th worst, while their rewards differ by more than `min_margin`.

    Equal rewards are ordered by a random number of (seed, prompt), equal texts count once, and samples without a reward
    not at all.

    Args:
        record: of `sample_rows`.
        pairs_per_prompt: most rows of one prompt.
        min_margin: rewards must differ by more.
        seed: of the order of ties.

    Returns:
        Rows with `prompt`, `chosen`, `rejected`, `score_chosen`, `score_rejected`, and the prompt's own columns.
    """
    ranked = _ranked(record, seed)
    rows: list[dict[str, Any]] = []
    for best, worst in zip(ranked, reversed(ranked), strict=True):
        if len(rows) == pairs_per_prompt or not best["reward"] - worst["reward"] > min_margin:
            break
        chosen, rejected = (_said(record["prompt"], sample["text"]) for sample in (best, worst))
        scores = {"score_chosen": best["reward"], "score_rejected": worst["reward"]}
        rows.append({**record["row"], "prompt": record["prompt"], "chosen": chosen, "rejected": rejected, **scores})
    return rows


def best_row(record: Row, *, min_reward: float | None = None, seed: int = 0) -> dict[str, Any] | None:
    """Best-of-n: the best sample as a prompt-completion row; None where none has a reward of at least `min_reward`."""
    ranked = _ranked(record, seed)
    if not ranked or (min_reward is not None and ranked[0]["reward"] < min_reward):
        return None
    best = ranked[0]
    said = _said(record["prompt"], best["text"])
    return {**record["row"], "prompt": record["prompt"], "completion": said, "score": best["reward"]}


def write_rows(file: Path, rows: Iterable[Row]) -> int:
    """Write JSON lines whole or not at all; returns their number."""
    draft, count = file.with_suffix(".tmp"), 0
    with draft.open("w", encoding="utf-8") as stream:
        for row in rows:
            stream.write(_line(row))
            count += 1
    draft.replace(file)
    return count


def _ranked(record: Row, seed: int) -> list[Row]:
    rng = random.Random(f"{seed}-{record['index']}")
    samples: dict[str, Row] = {s["text"]: s for s in record["samples"] if s["reward"] is not None}
    # A truncated text would teach the model to stop in the middle, or that stopping there is bad for its content.
    whole = [s for s in samples.values() if s["stop_reason"] != "length"]
    return sorted(whole, key=lambda s: (-s["reward"], rng.random()))


def _said(prompt: Any, text: str) -> Any:
    """A completion in the prompt's own format."""
    return text if isinstance(prompt, str) else [{"role": "assistant", "content": text}]


def _record(group: Group, key: str) -> dict[str, Any]:
    samples: list[dict[str, Any]] = []
    for completion in group.completions:
        assert completion.score is not None
        reason = completion.stop_reason.value if completion.stop_reason else None
        score = completion.score
        samples.append(
            {"text": completion.text, "reward": score.total, "criteria": score.criteria, "errors": score.errors,
             "stop_reason": reason}
        )  # fmt: skip
    row = {name: value for name, value in group.row.items() if name not in ("prompt", "completion")}
    return {"key": key, "index": group.index, "prompt": group.row["prompt"], "row": row, "samples": samples}


def _line(row: Row) -> str:
    return json.dumps(row, ensure_ascii=False, default=str) + "\n"


def _key(model: str, groups: Sequence[Group], params: SamplingParams, num_samples: int, seed: int) -> str:
    asked = [model, repr(params), num_samples, seed, [(g.index, g.prompt_ids) for g in groups]]
    return hashlib.sha256(json.dumps(asked).encode()).hexdigest()[:16]


def _read(file: Path, key: str) -> list[dict[str, Any]]:
    if not file.is_file():
        return []
    records: list[dict[str, Any]] = []
    for line in file.read_text(encoding="utf-8").splitlines():
        try:
            record = json.loads(line)
        except json.JSONDecodeError:
            continue  # the line that a killed run was writing
        if record.get("key") != key:
            raise ConfigError(
                f"{file} holds samples of another model, other prompts or other settings: give another output_dir, or "
                "delete the file."
            )
        records.append(record)
    return records
