"""Draw named curves side by side into one SVG file: `python scripts/plot_curves.py curves.json curves.svg`.

The JSON file is a list of panels, or `{"title": ..., "columns": ..., "panels": [...]}`. A panel is

    {"title": "...", "x_label": "...", "y_label": "...", "y_percent": false, "series": [...]}

and a series is either its points, or where a run wrote them:

    {"name": "...", "x": [...], "y": [...], "low": [...], "high": [...]}
    {"name": "...", "file": "outputs/run/metrics.jsonl", "stage": "sft", "y": "eval_loss", "x": "step"}

`low` and `high` (a band, or whiskers where there are few points) may be left out; a null ends a line and starts it anew.
`x` of a file is any column; "seconds" counts from the stage's first record, and "cumulative:NAME" adds NAME up. `smooth`
is the span of an exponential moving average, drawn over the faint raw line. `dashed` is true or false; `color` is a place
in the palette, so that one thing has one colour in all panels. `--points FILE` writes the panels with every number in
them, which draws the same picture without the run.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from burnish.report.series import ema
from burnish.runs.files import read_json_lines

# Distinguishable with the common colour blindnesses, on white (Okabe and Ito).
PALETTE = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000", "#999999")
FEW = 12
"""With at most so many points each is marked, and intervals are whiskers."""

# Text stays text, and the same numbers give the same file.
STYLE = {"svg.fonttype": "none", "svg.hashsalt": "burnish", "font.family": "sans-serif", "font.size": 9}

Panel = dict[str, Any]


def main() -> None:
    """Read, draw, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("panels", type=Path)
    parser.add_argument("svg", type=Path)
    parser.add_argument("--points", type=Path, help="write the panels with all their numbers here")
    args = parser.parse_args()
    document = json.loads(args.panels.read_text(encoding="utf-8"))
    document = document if isinstance(document, dict) else {"panels": document}
    panels = [{**panel, "series": [with_points(one) for one in panel["series"]]} for panel in document["panels"]]
    save(draw(panels, document.get("title", ""), document.get("columns")), args.svg)
    if args.points is not None:
        args.points.write_text(json.dumps({**document, "panels": panels}, indent=1) + "\n", encoding="utf-8")


def with_points(series: dict[str, Any]) -> dict[str, Any]:
    """The series with x and y as numbers, read from its file where it names one."""
    if "file" not in series:
        return series
    x_name, y_name, stage = series.get("x", "step"), series["y"], series.get("stage")
    lines = read_json_lines(Path(series["file"]))
    records = [record for record in lines if stage is None or record.get("stage") == stage]
    total = 0.0
    points: list[tuple[float, float]] = []
    for record in records:
        if x_name.startswith("cumulative:"):
            total += record.get(x_name.removeprefix("cumulative:"), 0.0)
            x: float | None = total
        elif x_name == "seconds":
            x = record["time"] - records[0]["time"]
        else:
            x = record.get(x_name)
        if x is not None and record.get(y_name) is not None:
            points.append((x, record[y_name]))
    if not points:
        raise SystemExit(f"{series['file']}: no record of stage {stage!r} has {x_name!r} and {y_name!r}.")
    kept = {name: value for name, value in series.items() if name not in ("file", "stage", "x", "y")}
    return {**kept, "x": [x for x, _ in points], "y": [y for _, y in points]}


def draw(panels: Sequence[Panel], title: str = "", columns: int | None = None) -> Figure:
    """Draw panels in rows of `columns` (all in one row if None), with a legend each."""
    columns = min(columns or len(panels), len(panels))
    rows = math.ceil(len(panels) / columns)
    figure = Figure(figsize=(4.2 * columns, 3.4 * rows + 0.3 * bool(title)), layout="constrained")
    figure.suptitle(title, fontweight="bold")
    for place, panel in enumerate(panels, 1):
        axes = figure.add_subplot(rows, columns, place)
        axes.set_title(panel.get("title", ""), loc="left", fontsize="medium", fontweight="bold")
        axes.set_xlabel(panel.get("x_label", ""))
        axes.set_ylabel(panel.get("y_label", ""))
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", alpha=0.4)
        if panel.get("y_percent"):
            axes.yaxis.set_major_formatter(PercentFormatter(1.0))
        for order, series in enumerate(panel["series"]):
            draw_series(axes, series, PALETTE[series.get("color", order) % len(PALETTE)])
        axes.legend(frameon=False, fontsize="small")
    return figure


def draw_series(axes: Axes, series: dict[str, Any], color: str) -> None:
    """Draw one series: its band or whiskers, its line, its points."""
    x, y, low, high = (
        [math.nan if v is None else v for v in series.get(name) or ()] for name in ("x", "y", "low", "high")
    )
    few = sum(map(math.isfinite, y)) <= FEW
    if low and few:
        axes.vlines(x, low, high, color=color, alpha=0.55)
    elif low:
        axes.fill_between(x, low, high, color=color, alpha=0.15, linewidth=0)
    style = {"color": color, "linestyle": "--" if series.get("dashed") else "-"}
    if series.get("smooth"):
        axes.plot(x, y, color=color, alpha=0.25)
        smooth = ema(series["y"], series["smooth"])
        y = [math.nan if raw is None else value for raw, value in zip(series["y"], smooth, strict=True)]
    axes.plot(x, y, marker="o" if few else None, markersize=4, label=series["name"], **style)


def save(figure: Figure, file: Path) -> None:
    """Write a figure as SVG, the same bytes for the same figure."""
    with matplotlib.rc_context(STYLE):
        figure.savefig(file, format="svg", metadata={"Date": None})


if __name__ == "__main__":
    main()
