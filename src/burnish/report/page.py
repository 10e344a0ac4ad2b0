"""The page: summary and tables written here, charts and the transcript browser drawn by the page's own script."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from html import escape
from importlib.resources import files
from pathlib import Path
from string import Template
from typing import Any

from burnish.config.paths import file_problem
from burnish.errors import ConfigError, show
from burnish.report.ending import ending, standing
from burnish.report.findings import findings
from burnish.report.records import Comparison, Evaluation, Interval, Run, read_run
from burnish.report.series import histograms, pack_transcripts, sample_evenly, stage_curves
from burnish.runs.files import replacing

__all__ = ["write_report"]

_SCRIPTS = ("common.js", "charts.js", "transcripts.js")
_UNSAFE_IN_SCRIPT = re.compile("[<>&\u2028\u2029\ud800-\udfff]")
_MODEL_KEYS = ("model_name_or_path", "model", "model.name_or_path", "model.model_name_or_path", "model.name")
_TASK_KEYS = (
    "task",
    "task.name",
    "environment",
    "environment.name",
    "dataset",
    "dataset_name",
    "data.name",
    "data.train.task",
)
_ABSENT = "\N{EN DASH}"
_STAGE_NAMES = {
    "raw": "Raw",
    "sft": "SFT",
    "reward": "Reward model",
    "dpo": "DPO",
    "kto": "KTO",
    "online_dpo": "Online DPO",
    "grpo": "GRPO",
    "ppo": "PPO",
    "rloo": "RLOO",
}
_LOWER_IS_BETTER = {"nll"}


def write_report(run_dir: str | os.PathLike[str], output: Path | None = None, *, max_transcripts: int = 5000) -> Path:
    """Write the report of a run as one HTML file that needs nothing else: no network, no other file.

    Files of the run that are missing or cut (an interrupted run) are named on the page instead of failing it.

    Args:
        run_dir: directory with any of status.json, metrics.jsonl, transcripts.jsonl, evaluations.json, config.json and
            environment.json.
        output: the file to write; None means `report.html` in `run_dir`.
        max_transcripts: most transcripts to embed, sampled evenly over the steps; the page says how many of how many.

    Returns:
        The path written.

    Raises:
        ConfigError: `max_transcripts` is negative, or `output` cannot be a file.
        DataError: `run_dir` is not a directory.
        FileError: `output` cannot be written.
    """
    if max_transcripts < 0:
        raise ConfigError(f"max_transcripts = {max_transcripts}: use 0 (embed none) or a positive integer.")
    run = read_run(Path(run_dir))
    run.notes = ending(run) + findings(run.metrics, run.transcripts) + run.notes
    path = run.path / "report.html" if output is None else Path(output)
    if (problem := file_problem(str(path))) is not None:
        raise ConfigError(f"output = {show(str(path))}: {problem}.")
    with replacing(path, "wb") as stream:
        stream.write(_page(run, max_transcripts).encode("utf-8", errors="xmlcharrefreplace"))
    return path


def _page(run: Run, max_transcripts: int) -> str:
    script = "(() => {\n'use strict';\n" + "\n".join(_asset(name) for name in _SCRIPTS) + "\n})();"
    style = _asset("report.css")
    embedded = sample_evenly(run.transcripts, max_transcripts)
    charts = {
        "curves": stage_curves(run.metrics),
        "histograms": histograms(run.transcripts),
        "evaluations": _evaluation_data(run.evaluations),
        "names": _STAGE_NAMES,
    }
    title = _title(run)
    return Template(_asset("report.html")).substitute(
        policy=f"default-src 'none'; script-src {_digest(script)}; style-src {_digest(style)}; base-uri 'none'; "
        "form-action 'none'",
        page_title=escape(" · ".join(title)),
        title=escape(title[0]),
        task=f'<p class="task">{escape(title[1])}</p>' if len(title) > 1 else "",
        facts=_facts(run),
        summary=_summary(run),
        evaluations=_evaluation_table(run.evaluations),
        notes=_notes(run.notes),
        shown=_shown(len(embedded), len(run.transcripts), max_transcripts),
        setup=_folded("Configuration", "config.json", run.config)
        + _folded("Environment", "environment.json", run.environment),
        charts_json=_script_json(charts),
        transcripts_json=_script_json(pack_transcripts(embedded, len(run.transcripts))),
        style=style,
        script=script,
    )


def _asset(name: str) -> str:
    return (files("burnish.report") / "assets" / name).read_text(encoding="utf-8")


def _digest(source: str) -> str:
    """The content-security-policy source of an inline script or style: nothing else may run on the page."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(source.encode()).digest()).decode()}'"


def _script_json(value: object) -> str:
    """JSON that is inert inside a script element: no `<`, so neither `</script>` nor `<!--` can appear."""
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return _UNSAFE_IN_SCRIPT.sub(lambda match: f"\\u{ord(match[0]):04x}", text)


def _stage_name(stage: str) -> str:
    return _STAGE_NAMES.get(stage, stage)


def _look_up(config: Mapping[str, Any] | None, keys: Sequence[str]) -> str | None:
    """The first of several dotted keys that holds a string."""
    for key in keys:
        value: Any = config
        for part in key.split("."):
            value = value.get(part) if isinstance(value, dict) else None
        if isinstance(value, str) and value:
            return value
    return None


def _title(run: Run) -> list[str]:
    """[model, task] as far as the configuration names them, else the directory's name."""
    model, task = _look_up(run.config, _MODEL_KEYS), _look_up(run.config, _TASK_KEYS)
    return [text for text in (model, task) if text] or [run.path.resolve().name]


def _signed(text: str) -> str:
    """Numbers written with the minus sign instead of the hyphen."""
    return text.replace("-", "\N{MINUS SIGN}")


def _number(value: float) -> str:
    return _signed(f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}")


def _percent(value: float) -> str:
    return f"{100 * value:.1f}"


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"


def _facts(run: Run) -> str:
    """The line under the title: status, steps, times."""
    noted = f"see the notes ({len(run.notes)})" if run.notes else ""
    known = standing(run) or ("" if noted else "Complete")
    status = ", ".join(filter(None, (known, noted)))
    facts: list[tuple[str, str]] = [("Status", status[0].upper() + status[1:])]
    stages = dict.fromkeys(row.stage for row in run.metrics)
    steps = {stage: sum(row.stage == stage for row in run.metrics) for stage in stages}
    if steps:
        facts.append(("Steps logged", " + ".join(f"{count:,} {_stage_name(stage)}" for stage, count in steps.items())))
    times = [row.time for row in run.metrics if row.time is not None]
    if len(times) > 1:
        facts.append(("First to last step", _duration(max(times) - min(times))))
        facts.append(("Started", f"{datetime.fromtimestamp(min(times), UTC):%Y-%m-%d %H:%M} UTC"))
    if run.transcripts:
        facts.append(("Completions", f"{len(run.transcripts):,}"))
    return "".join(f"<div><dt>{escape(name)}</dt><dd>{escape(value)}</dd></div>" for name, value in facts)


def _notes(notes: Sequence[str]) -> str:
    if not notes:
        return ""
    items = "".join(f"<li>{escape(note)}</li>" for note in notes)
    return f'<aside class="notes" aria-label="Notes"><h2>Read first</h2><ul>{items}</ul></aside>'


def _range(interval: Interval, scale: float, sign: str = "") -> str:
    if interval.low is None or interval.high is None:
        return "no interval"
    return _signed(f"{scale * interval.low:{sign}.1f} to {scale * interval.high:{sign}.1f}")


def _summary(run: Run) -> str:
    """Headline: pass@k at the smallest k of each model, then every paired gain with its verdict."""
    scored = [evaluation for evaluation in run.evaluations if evaluation.pass_at_k]
    tiles: list[str] = []
    for evaluation in scored:
        k = min(evaluation.pass_at_k)
        interval = evaluation.pass_at_k[k]
        size = f"{evaluation.num_problems:,} problems" if evaluation.num_problems is not None else ""
        size += f", {evaluation.num_samples:,} samples each" if size and evaluation.num_samples is not None else ""
        tiles.append(
            f'<li class="tile" data-stage="{escape(evaluation.name)}"><h3>{escape(_stage_name(evaluation.name))}</h3>'
            f'<p class="big">{_percent(interval.mean)}<span>%</span></p>'
            f"<p>pass@{k}, 95% CI {_range(interval, 100)}</p><p>{size}</p></li>"
        )
    gains = "".join(_gain(comparison) for comparison in run.comparisons)
    parts = [
        f'<ol class="tiles">{"".join(tiles)}</ol>' if tiles else "",
        f'<div class="gains"><h3>Paired differences on the same problems</h3><ul>{gains}</ul></div>' if gains else "",
        _health(run),
    ]
    return "".join(parts) or '<p class="empty">No evaluation and no metrics to summarise yet.</p>'


def _gain(comparison: Comparison) -> str:
    """One paired difference; pass@k in percentage points, any other metric in its own unit."""
    difference, scale = comparison.difference, 100.0 if comparison.k is not None else 1.0
    value = f"{100 * difference.mean:+.1f} pp" if comparison.k is not None else f"{difference.mean:+.3g}"
    metric = comparison.metric if comparison.k is None else f"pass@{comparison.k}"
    if difference.excludes_zero is None:
        kind, verdict = "unknown", "no interval"
    elif not difference.excludes_zero:
        kind, verdict = "unclear", "interval includes 0"
    else:
        up = difference.mean > 0
        kind = "better" if up != (comparison.metric in _LOWER_IS_BETTER) else "worse"
        verdict = "interval excludes 0"
    if comparison.k is None and difference.low is not None and difference.high is not None:
        bounds = f"{difference.low:+.3g} to {difference.high:+.3g}"
    else:
        bounds = _range(difference, scale, "+")
    names = f"{_stage_name(comparison.before)} → {_stage_name(comparison.after)}"
    return (
        f'<li class="{kind}"><span class="pair">{escape(names)}</span><span class="metric">{escape(metric)}</span>'
        f"<b>{_signed(value)}</b><span>[{_signed(bounds)}]</span><em>{verdict}</em></li>"
    )


def _health(run: Run) -> str:
    """Signs of a silent failure, worst values over the whole run."""
    facts: list[tuple[str, str, str]] = []
    if run.metrics:
        stage = run.metrics[-1].stage
        rewards = [v for row in run.metrics if row.stage == stage and (v := row.values.get("reward")) is not None]
        if rewards:
            tenth = max(1, len(rewards) // 10)
            first, last = sum(rewards[:tenth]) / tenth, sum(rewards[-tenth:]) / tenth
            where = f"first and last {tenth} {_stage_name(stage)} steps"
            facts.append(("Training reward", f"{_number(first)} → {_number(last)}", where))
    gaps = [
        (value, row) for row in run.metrics if (value := row.values.get("sampling/logprob_difference/max")) is not None
    ]
    if gaps:
        value, row = max(gaps, key=lambda gap: gap[0])
        facts.append(("Sampler against trainer", f"{_number(value)} nats", f"worst token, step {row.step}"))
    if run.transcripts:
        failed = sum(bool(t.errors) for t in run.transcripts)
        cut = sum(t.stop_reason == "length" for t in run.transcripts)
        count = len(run.transcripts)
        facts.append(("Completions cut at the limit", f"{_percent(cut / count)}%", f"{cut:,} of {count:,}"))
        facts.append(("Rewards that failed", f"{failed:,}", f"of {count:,} completions, left out of the loss"))
    bad = sum(value is None for row in run.metrics for value in row.values.values())
    if run.metrics:
        facts.append(("Values that are not finite", f"{bad:,}", "in all metrics"))
    cells = "".join(
        f"<div><dt>{escape(name)}</dt><dd><b>{escape(value)}</b> <span>{escape(where)}</span></dd></div>"
        for name, value, where in facts
    )
    return f'<dl class="health">{cells}</dl>' if cells else ""


def _evaluation_data(evaluations: Sequence[Evaluation]) -> list[dict[str, Any]]:
    def values(intervals: Mapping[Any, Interval]) -> dict[str, list[float | None]]:
        return {str(name): [i.mean, i.low, i.high] for name, i in intervals.items()}

    return [{"name": e.name, "pass": values(e.pass_at_k), "criteria": values(e.criteria)} for e in evaluations]


def _evaluation_table(evaluations: Sequence[Evaluation]) -> str:
    """Every number of the evaluations, one column per model."""
    if not evaluations:
        return '<p class="empty">No evaluation was found.</p>'
    ks = sorted({k for e in evaluations for k in e.pass_at_k})
    criteria = dict.fromkeys(name for e in evaluations for name in e.criteria)

    def cell(interval: Interval | None, scale: float, digits: int, unit: str) -> str:
        if interval is None:
            return _ABSENT
        value = f"{scale * interval.mean:.{digits}f}{unit}"
        if interval.low is None or interval.high is None:
            return _signed(value)
        low, high = (f"{scale * end:.{digits}f}" for end in (interval.low, interval.high))
        return f"{_signed(value)} <small>{_signed(low)} to {_signed(high)}</small>"

    def plain(value: float | None, template: str) -> str:
        return _ABSENT if value is None else template.format(value)

    rows = [(f"pass@{k}", [cell(e.pass_at_k.get(k), 100, 1, "%") for e in evaluations]) for k in ks]
    rows += [(name, [cell(e.criteria.get(name), 1, 3, "") for e in evaluations]) for name in criteria]
    rows.append(("Tokens, mean", [plain(e.mean_tokens, "{:,.1f}") for e in evaluations]))
    rows.append(("Cut at the limit", [plain(e.truncated_fraction, "{:.1%}") for e in evaluations]))
    rows.append(("Problems", [plain(e.num_problems, "{:,}") for e in evaluations]))
    rows.append(("Samples per problem", [plain(e.num_samples, "{:,}") for e in evaluations]))
    head = "".join(f'<th scope="col">{escape(_stage_name(e.name))}</th>' for e in evaluations)
    body = "".join(
        f'<tr><th scope="row">{escape(name)}</th>{"".join(f"<td>{text}</td>" for text in cells)}</tr>'
        for name, cells in rows
    )
    return (
        '<div class="scroll" tabindex="0" role="region" aria-label="Evaluation numbers"><table class="numbers">'
        f"<thead><tr><td></td>{head}</tr></thead><tbody>{body}</tbody></table></div>"
    )


def _shown(num_embedded: int, total: int, limit: int) -> str:
    if total == 0:
        return "No transcript was found."
    if num_embedded == total:
        return f"All {total:,} completions of the run."
    return f"{num_embedded:,} of {total:,} completions, sampled evenly over the steps (max_transcripts = {limit:,})."


def _folded(title: str, name: str, value: dict[str, Any] | None) -> str:
    text = f"{name} is missing or unreadable." if value is None else json.dumps(value, indent=2, ensure_ascii=False)
    return f"<details><summary>{title} <small>{name}</small></summary><pre>{escape(text)}</pre></details>"
