"""The script that draws curves: points at their places, numbers from a run's file, gaps and intervals."""

from __future__ import annotations

import itertools
import json
import re
import sys
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from conftest import load_script

FILE = Path(__file__).parent.parent / "scripts" / "plot_curves.py"


@pytest.fixture(scope="module")
def plot() -> Any:
    return load_script("plot_curves")


def test_points_lie_where_the_axes_say(plot: Any) -> None:
    series = {"name": "a <b>", "x": [0, 5, 10], "y": [0.0, 1.0, 0.5], "low": [0.0, 0.5, 0.25], "high": [0.5, 1.0, 0.75]}
    text = plot.picture([{"title": "t", "series": [series]}])
    root = ElementTree.fromstring(text)
    circles = [(float(c.get("cx", "")), float(c.get("cy", ""))) for c in root.iter() if c.tag.endswith("circle")]
    left, right, bottom = plot.LEFT, plot.WIDTH - plot.RIGHT, plot.HEIGHT - plot.BOTTOM
    assert [x for x, _ in circles] == [left, (left + right) / 2, right]
    heights = [bottom - y for _, y in circles]
    assert heights[0] == 0
    assert heights[1] == pytest.approx(2 * heights[2], abs=0.2), "to the rounding of 0.1"
    assert "a &lt;b&gt;" in text
    assert text.count('stroke-opacity="0.55"') == 3, "few points have whiskers"


def test_a_gap_ends_a_line(plot: Any) -> None:
    assert plot.path([(0, 1), (2, 3), None, (4, 5), (6, 7)]) == "M0 1L2 3M4 5L6 7"
    assert plot.smooth([1.0, None, 3.0], 3) == [1.0, None, pytest.approx((0.5 + 3.0) / 1.5)]


def test_ticks_are_round_and_inside(plot: Any) -> None:
    for values in ([0.1, 0.9], [3.0, 3.0], [0.001, 0.0042], [-3.0, 17.0], [1000.0, 52000.0], [1.742, 0.147]):
        low, high, ticks = plot.scale(values)
        assert low <= min(values) < high
        assert low - 1e-9 <= ticks[0] < ticks[-1] <= high + 1e-9
        assert 3 <= len(ticks) <= 7, (values, ticks)
        steps = [b - a for a, b in itertools.pairwise(ticks)]
        assert steps == pytest.approx([steps[0]] * len(steps))


def test_points_come_from_the_metrics_of_a_run(plot: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    records = [
        {"stage": "sft", "step": 1, "time": 5.0, "loss": 9.0},
        {"stage": "dpo", "step": 1, "time": 10.0, "loss": 0.7, "tokens": 3},
        {"stage": "dpo", "step": 1, "time": 11.0, "eval_loss": 0.6},
        {"stage": "dpo", "step": 2, "time": 14.0, "loss": 0.5, "tokens": 4},
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    series = {"name": "train", "file": str(tmp_path / "metrics.jsonl"), "stage": "dpo", "y": "loss"}
    assert plot.with_points(series) == {"name": "train", "x": [1, 2], "y": [0.7, 0.5]}
    assert plot.with_points({**series, "x": "seconds"})["x"] == [0.0, 4.0]
    assert plot.with_points({**series, "x": "cumulative:tokens"})["x"] == [3.0, 7.0]
    with pytest.raises(SystemExit, match="no record of stage 'kto'"):
        plot.with_points({**series, "stage": "kto"})
    (tmp_path / "in.json").write_text(json.dumps([{"title": "t", "series": [series]}]))
    files = [str(tmp_path / name) for name in ("in.json", "a.svg", "points.json", "b.svg")]
    monkeypatch.setattr(sys, "argv", ["plot_curves.py", *files[:2], "--points", files[2]])
    plot.main()
    (tmp_path / "metrics.jsonl").unlink()
    monkeypatch.setattr(sys, "argv", ["plot_curves.py", files[2], files[3]])
    plot.main()
    assert Path(files[1]).read_text() == Path(files[3]).read_text(), "the points draw the same picture without the run"


def test_many_points_have_a_band_and_no_marks(plot: Any) -> None:
    x = list(range(50))
    text = plot.picture([{"series": [{"name": "n", "x": x, "y": x, "low": x, "high": x}]}], "title", 1)
    assert "<circle" not in text
    assert len(re.findall('fill-opacity="0.15"', text)) == 1
