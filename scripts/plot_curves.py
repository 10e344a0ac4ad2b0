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
from collections.abc import Iterator, Sequence
from html import escape
from pathlib import Path
from typing import Any

# Distinguishable with the common colour blindnesses, on white (Okabe and Ito).
PALETTE = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000", "#999999")
WIDTH, HEIGHT = 372, 290
LEFT, RIGHT, TOP, BOTTOM = 56, 14, 34, 44
LINE = 16
FEW = 12
"""With at most so many points each is marked, and intervals are whiskers."""

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
    args.svg.write_text(picture(panels, document.get("title", ""), document.get("columns")), encoding="utf-8")
    if args.points is not None:
        args.points.write_text(json.dumps({**document, "panels": panels}, indent=1) + "\n", encoding="utf-8")


def with_points(series: dict[str, Any]) -> dict[str, Any]:
    """The series with x and y as numbers, read from its file where it names one."""
    if "file" not in series:
        return series
    x_name, y_name, stage = series.get("x", "step"), series["y"], series.get("stage")
    lines = Path(series["file"]).read_text(encoding="utf-8").splitlines()
    records = [record for record in map(json.loads, lines) if stage is None or record.get("stage") == stage]
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


def picture(panels: Sequence[Panel], title: str = "", columns: int | None = None) -> str:
    """The SVG text of panels in rows of `columns` (all in one row if None), with one legend each."""
    columns = min(columns or len(panels), len(panels))
    head = 30 if title else 6
    rows = [panels[i : i + columns] for i in range(0, len(panels), columns)]
    heights = [HEIGHT + LINE * max(len(panel["series"]) for panel in row) for row in rows]
    width, height = columns * WIDTH, head + sum(heights)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
        'font-family="Helvetica, Arial, sans-serif" font-size="11" fill="#222">',
        f'<rect width="{width}" height="{height}" fill="#fff"/>',
    ]
    if title:
        parts.append(f'<text x="{LEFT}" y="20" font-size="14" font-weight="bold">{escape(title)}</text>')
    top = head
    for row, row_height in zip(rows, heights, strict=True):
        for column, panel in enumerate(row):
            parts += [f'<g transform="translate({column * WIDTH} {top})">', *drawn(panel), "</g>"]
        top += row_height
    return "\n".join([*parts, "</svg>"]) + "\n"


def drawn(panel: Panel) -> Iterator[str]:
    """Frame, ticks, curves and legend of one panel."""
    series = panel["series"]
    x_low, x_high, x_ticks = scale([x for one in series for x in one["x"]], room=0.0)
    ends = [value for one in series for name in ("y", "low", "high") for value in one.get(name) or ()]
    y_low, y_high, y_ticks = scale([y for y in ends if y is not None])
    right, bottom = WIDTH - RIGHT, HEIGHT - BOTTOM

    def place(x: float, y: float) -> tuple[float, float]:
        across, up = (x - x_low) / (x_high - x_low), (y - y_low) / (y_high - y_low)
        return round(LEFT + across * (right - LEFT), 1), round(bottom - up * (bottom - TOP), 1)

    yield f'<text x="{LEFT}" y="18" font-weight="bold">{escape(panel.get("title", ""))}</text>'
    percent = panel.get("y_percent", False)
    for tick in y_ticks:
        _, y = place(x_low, tick)
        yield f'<path d="M{LEFT} {y}H{right}" stroke="#e4e4e4"/>'
        yield f'<text x="{LEFT - 6}" y="{y + 4}" text-anchor="end">{number(100 * tick if percent else tick)}</text>'
    for tick in x_ticks:
        x, _ = place(tick, y_low)
        yield f'<path d="M{x} {bottom}v4" stroke="#222"/>'
        yield f'<text x="{x}" y="{bottom + 16}" text-anchor="middle">{number(tick)}</text>'
    yield f'<path d="M{LEFT} {TOP}V{bottom}H{right}" fill="none" stroke="#222"/>'
    middle_x, middle_y = (LEFT + right) / 2, (TOP + bottom) / 2
    yield f'<text x="{middle_x}" y="{bottom + 34}" text-anchor="middle">{escape(panel.get("x_label", ""))}</text>'
    label = escape(panel.get("y_label", ""))
    yield f'<text transform="translate(13 {middle_y}) rotate(-90)" text-anchor="middle">{label}</text>'
    for order, one in enumerate(series):
        colour = PALETTE[one.get("color", order) % len(PALETTE)]
        yield from curve(one, colour, place)
        y = HEIGHT + order * LINE
        dash = ' stroke-dasharray="5 3"' if one.get("dashed") else ""
        yield f'<path d="M{LEFT} {y}h20" stroke="{colour}" stroke-width="2"{dash}/>'
        yield f'<text x="{LEFT + 26}" y="{y + 4}">{escape(one["name"])}</text>'


def curve(one: dict[str, Any], colour: str, place: Any) -> Iterator[str]:
    """One series: its band or whiskers, its line, its points."""
    known = [i for i, y in enumerate(one["y"]) if y is not None]
    few = len(known) <= FEW
    if one.get("low"):
        ends = [i for i in known if one["low"][i] is not None and one["high"][i] is not None]
        if few:
            for i in ends:
                (x, low), (_, high) = (place(one["x"][i], one[name][i]) for name in ("low", "high"))
                yield f'<path d="M{x} {low}V{high}" stroke="{colour}" stroke-opacity="0.55" stroke-width="1.5"/>'
        else:
            corners = [place(one["x"][i], one["low"][i]) for i in ends]
            corners += [place(one["x"][i], one["high"][i]) for i in reversed(ends)]
            yield f'<path d="M{" ".join(f"{x} {y}" for x, y in corners)}Z" fill="{colour}" fill-opacity="0.15"/>'
    dash = ' stroke-dasharray="5 3"' if one.get("dashed") else ""
    raw = path([None if y is None else place(x, y) for x, y in zip(one["x"], one["y"], strict=True)])
    if one.get("smooth"):
        yield f'<path d="{raw}" fill="none" stroke="{colour}" stroke-opacity="0.25"/>'
        smoothed = smooth(one["y"], one["smooth"])
        raw = path([None if y is None else place(x, y) for x, y in zip(one["x"], smoothed, strict=True)])
    yield f'<path d="{raw}" fill="none" stroke="{colour}" stroke-width="2" stroke-linejoin="round"{dash}/>'
    if few:
        for i in known:
            x, y = place(one["x"][i], one["y"][i])
            yield f'<circle cx="{x}" cy="{y}" r="3" fill="{colour}"/>'


def path(points: Sequence[tuple[float, float] | None]) -> str:
    """Path data; a None starts a new line."""
    words: list[str] = []
    pen = "M"
    for point in points:
        if point is None:
            pen = "M"
            continue
        words.append(f"{pen}{point[0]} {point[1]}")
        pen = "L"
    return "".join(words)


def smooth(values: Sequence[float | None], span: float) -> list[float | None]:
    """Exponential moving average without the pull of its start."""
    decay, total, weight = 1 - 2 / (span + 1), 0.0, 0.0
    found: list[float | None] = []
    for value in values:
        if value is not None:
            total, weight = decay * total + value, decay * weight + 1
        found.append(None if value is None else total / weight)
    return found


def scale(values: Sequence[float], room: float = 0.05) -> tuple[float, float, list[float]]:
    """Ends of an axis around the values, and round ticks between them."""
    low, high = min(values), max(values)
    if low == high:
        low, high = low - 0.5, high + 0.5
    # An axis that nearly reaches 0 starts there.
    low, high = (0.0 if 0 <= low < 0.3 * high else low - room * (high - low)), high + room * (high - low)
    step = 10.0 ** math.floor(math.log10((high - low) / 4))
    step *= next(factor for factor in (1, 2, 2.5, 5, 10) if (high - low) / (step * factor) <= 6)
    first = math.ceil(low / step - 1e-9)
    return low, high, [i * step for i in range(first, math.floor(high / step + 1e-9) + 1)]


def number(value: float) -> str:
    """A tick's label."""
    if value and abs(value) >= 10_000:
        return f"{value / 1000:g}k"
    return f"{value:.6g}"


if __name__ == "__main__":
    main()
