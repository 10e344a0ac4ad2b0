"""The script that draws curves: points, gaps and intervals, numbers from a run's file."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

import pytest

from conftest import load_script


@pytest.fixture(scope="module")
def plot() -> Any:
    return load_script("plot_curves")


def test_points_whiskers_and_names_are_drawn(plot: Any, tmp_path: Path) -> None:
    series = {"name": "a <b>", "x": [0, 5, 10], "y": [0.0, 1.0, 0.5], "low": [0.0, 0.5, 0.25], "high": [0.5, 1.0, 0.75]}
    figure = plot.draw([{"title": "t", "y_percent": True, "series": [series]}])
    (axes,) = figure.axes
    (line,), (whiskers,) = axes.lines, axes.collections
    assert (list(line.get_xdata()), list(line.get_ydata())) == ([0, 5, 10], [0.0, 1.0, 0.5])
    assert line.get_marker() == "o"
    assert [list(segment[:, 1]) for segment in whiskers.get_segments()] == [[0.0, 0.5], [0.5, 1.0], [0.25, 0.75]]
    for name in ("one.svg", "two.svg"):
        plot.save(figure, tmp_path / name)
    text = (tmp_path / "one.svg").read_text()
    assert "a &lt;b&gt;" in text
    assert "100%" in text
    assert text == (tmp_path / "two.svg").read_text(), "a picture changes with its numbers only"


def test_a_gap_ends_a_line_and_a_smooth_line_lies_over_the_raw_one(plot: Any) -> None:
    series = {"name": "n", "x": [0, 1, 2], "y": [1.0, None, 3.0], "smooth": 3, "color": 2, "dashed": True}
    raw, smooth = plot.draw([{"series": [series]}]).axes[0].lines
    assert list(raw.get_ydata()) == pytest.approx([1.0, math.nan, 3.0], nan_ok=True)
    assert list(smooth.get_ydata()) == pytest.approx([1.0, math.nan, (0.5 + 3.0) / 1.5], nan_ok=True)
    assert (smooth.get_color(), smooth.get_linestyle()) == (plot.PALETTE[2], "--")


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
    panels = [{"series": [{"name": "n", "x": x, "y": x, "low": x, "high": x}]}] * 3
    figure = plot.draw(panels, "title", 2)
    assert [axes.get_subplotspec().rowspan.start for axes in figure.axes] == [0, 0, 1]
    (line,), (band,) = figure.axes[0].lines, figure.axes[0].collections
    assert line.get_marker() == "None"
    assert band.get_alpha() == 0.15
