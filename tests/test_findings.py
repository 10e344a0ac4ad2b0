"""The report says first what went wrong."""

from __future__ import annotations

import json
import re
from html import unescape
from pathlib import Path
from typing import Any

import pytest

from burnish.report import write_report
from burnish.report.findings import findings
from burnish.report.records import MetricRow, Transcript


def metric(step: int, **values: float) -> MetricRow:
    return MetricRow("grpo", step, None, dict(values))


def transcript(stop_reason: str = "eos", **errors: str) -> Transcript:
    return Transcript("grpo", 1, 0, 0, "p", "c", stop_reason, 3, None if errors else 1.0, {}, errors, None)


@pytest.mark.parametrize(
    ("metrics", "transcripts", "said"),
    [
        ([metric(i, reward=0.0, frac_reward_zero_std=1.0) for i in (1, 2)], [], "grpo: no prompt's rewards differed"),
        ([metric(i, grad_norm=float(i < 2)) for i in range(6)], [], "grpo: the gradient was zero in the later half"),
        ([], [transcript(), transcript(exact="TypeError: no")], "failed on 1 of 2 .*'exact'.*TypeError: no"),
        ([], [transcript("length"), transcript()], "1 of 2 completions were cut at the token limit"),
    ],
)  # fmt: skip
def test_each_fault_is_one_sentence(metrics: list[Any], transcripts: list[Any], said: str) -> None:
    (sentence,) = findings(metrics, transcripts)
    assert re.search(said, sentence)


def test_a_sound_run_has_none() -> None:
    sound = [metric(1, reward=0.5, frac_reward_zero_std=0.5, grad_norm=1.0), metric(2, reward=1.0, grad_norm=0.5)]
    assert findings(sound, [transcript()] * 4) == []


def test_the_page_shows_them_first(tmp_path: Path) -> None:
    rows = [{"stage": "grpo", "step": i, "reward": 0.0, "frac_reward_zero_std": 1.0} for i in (1, 2)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    page = unescape(write_report(tmp_path).read_text())
    assert "Read first</h2><ul><li>grpo: no prompt's rewards differed in any of 2 logged steps" in page
