"""The report's page: a template for summary and tables; the page's own script draws charts and transcripts."""

from __future__ import annotations

import base64
import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from importlib.resources import files
from pathlib import Path
from typing import Any, cast

from jinja2 import Environment, PackageLoader, StrictUndefined

from burnish.config.paths import file_problem
from burnish.config.stages import STAGES
from burnish.errors import ConfigError, show
from burnish.report.ending import ending, standing
from burnish.report.findings import findings
from burnish.report.records import Run, read_run
from burnish.report.series import histograms, pack_transcripts, sample_evenly, stage_curves
from burnish.runs.evaluations import Comparison, EvaluationSummary, Interval
from burnish.runs.files import replacing

__all__ = ["write_report"]

_SCRIPTS = ("common.js", "charts.js", "transcripts.js")
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
_STAGE_NAMES = {"raw": "Raw", **{kind: stage.title for kind, stage in STAGES.items()}}
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
    templates = Environment(
        loader=PackageLoader("burnish.report", "assets"), autoescape=True, undefined=StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    # Written as ASCII: a lone surrogate of a completion has no UTF-8 form.
    templates.policies["json.dumps_kwargs"] = {"allow_nan": False, "separators": (",", ":")}
    cast("dict[str, Any]", templates.filters).update(
        change=_change, ends=_ends, fixed=_fixed, indented=_indented, percent=_percent, stage=_stage_name,
        thousands=_thousands, verdict=_verdict,
    )  # fmt: skip
    assets = files("burnish.report") / "assets"
    parts = [(assets / name).read_text(encoding="utf-8") for name in _SCRIPTS]
    script = "(() => {\n'use strict';\n" + "\n".join(parts) + "\n})();"
    style = (assets / "report.css").read_text(encoding="utf-8")
    named = _look_up(run.config, _MODEL_KEYS), _look_up(run.config, _TASK_KEYS)
    return templates.get_template("report.html").render(
        policy=f"default-src 'none'; script-src {_digest(script)}; style-src {_digest(style)}; base-uri 'none'; "
        "form-action 'none'",
        script=script,
        style=style,
        title=[text for text in named if text] or [run.path.resolve().name],
        facts=_facts(run),
        notes=run.notes,
        evaluations=run.evaluations,
        comparisons=run.comparisons,
        health=_health(run),
        ks=sorted({k for evaluation in run.evaluations for k in evaluation.pass_at_k}),
        criteria=list(dict.fromkeys(name for evaluation in run.evaluations for name in evaluation.criteria)),
        config=run.config,
        environment=run.environment,
        charts={
            "curves": stage_curves(run.metrics),
            "histograms": histograms(run.transcripts),
            "evaluations": [_drawn(evaluation) for evaluation in run.evaluations],
            "names": _STAGE_NAMES,
        },
        transcripts=pack_transcripts(sample_evenly(run.transcripts, max_transcripts), len(run.transcripts)),
        max_transcripts=max_transcripts,
    )


def _digest(source: str) -> str:
    """The content-security-policy source of an inline script or style: nothing else may run on the page."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(source.encode()).digest()).decode()}'"


def _stage_name(stage: str) -> str:
    return _STAGE_NAMES.get(stage, stage)


def _look_up(config: Mapping[str, Any] | None, keys: Sequence[str]) -> str | None:
    """Return the value of the first dotted key that holds a string."""
    for key in keys:
        value: Any = config
        for part in key.split("."):
            value = value.get(part) if isinstance(value, dict) else None
        if isinstance(value, str) and value:
            return value
    return None


def _signed(text: str) -> str:
    """Replace hyphens in numbers by minus signs."""
    return text.replace("-", "\N{MINUS SIGN}")


def _number(value: float) -> str:
    return _signed(f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}")


def _fixed(value: float, digits: int) -> str:
    return _signed(f"{value:.{digits}f}")


def _thousands(value: float | None, digits: int = 0) -> str:
    return _ABSENT if value is None else f"{value:,.{digits}f}"


def _percent(value: float | None) -> str:
    return _ABSENT if value is None else f"{value:.1%}"


def _change(value: float, percent: bool) -> str:
    """Format a difference, in percentage points for fractions."""
    return _signed(f"{100 * value:+.1f} pp" if percent else f"{value:+.3g}")


def _ends(interval: Interval, form: str, scale: float = 1.0) -> str:
    if interval.low is None or interval.high is None:
        return "no interval"
    return _signed(f"{scale * interval.low:{form}} to {scale * interval.high:{form}}")


def _indented(value: Any) -> str:
    return json.dumps(value, indent=2, ensure_ascii=False)


def _verdict(comparison: Comparison) -> str:
    difference = comparison.difference
    if not difference.excludes_zero:
        return "unknown" if difference.excludes_zero is None else "unclear"
    return "better" if (difference.mean > 0) != (comparison.metric in _LOWER_IS_BETTER) else "worse"


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"


def _facts(run: Run) -> list[tuple[str, str]]:
    """Return the facts under the title: status, steps, times."""
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
    return facts


def _health(run: Run) -> list[tuple[str, str, str]]:
    """Return indicators of silent failure, as worst values over the run."""
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
        facts.append(("Completions cut at the limit", _percent(cut / count), f"{cut:,} of {count:,}"))
        facts.append(("Rewards that failed", f"{failed:,}", f"of {count:,} completions, excluded from the loss"))
    bad = sum(value is None for row in run.metrics for value in row.values.values())
    if run.metrics:
        facts.append(("Values that are not finite", f"{bad:,}", "in all metrics"))
    return facts


def _drawn(evaluation: EvaluationSummary) -> dict[str, Any]:
    def values(intervals: Mapping[Any, Interval]) -> dict[str, list[float | None]]:
        return {str(name): [i.mean, i.low, i.high] for name, i in intervals.items()}

    return {"name": evaluation.name, "pass": values(evaluation.pass_at_k), "criteria": values(evaluation.criteria)}
