"""`burnish plan FILE|MODEL`: bytes by component and phase, seconds, and whether a run fits its device."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from burnish.cli.config import load_pipeline_file, load_run_file
from burnish.config import STAGES, Kind, check_fields
from burnish.config.files import apply_overrides, read_file
from burnish.config.lora import check_lora
from burnish.config.sections import model_init
from burnish.config.stages import PIPELINE_STAGES, known_fields
from burnish.errors import ConfigError
from burnish.planner.budget import Budgeted, keep_budget
from burnish.planner.devices import find_device
from burnish.planner.models import find_shape
from burnish.planner.plan import Plan, estimate, format_size
from burnish.planner.proposals import Proposal, propose
from burnish.planner.run import Request
from burnish.runs.files import write_json

__all__ = ["draw_plans", "is_pipeline", "read_requests", "run", "stage_of"]

_LORA = {"r": 16, "target_modules": "all-linear"}
_COLORS = (
    "#0072b2", "#56b4e9", "#009e73", "#f0e442", "#999999", "#d55e00", "#e69f00", "#cc79a7", "#8b5e3c", "#332288",
    "#88ccee", "#117733",
)  # fmt: skip


def run(args: argparse.Namespace) -> None:
    """Plan every stage of a file, or one stage of a model; print, and write what is asked for."""
    plans = [
        (budgeted, estimate(budgeted.request), propose(budgeted.request))
        for budgeted in map(keep_budget, read_requests(args))
    ]
    of_pipeline = is_pipeline(args.target)
    console = Console(soft_wrap=True, highlight=False, markup=False)
    traces: list[dict[str, Any]] = []
    # By name: this module stays free of torch.
    tracing = import_module("burnish.cli.trace") if args.trace else None
    if tracing is not None:
        for budgeted, _, _ in plans:
            tracing.check_traceable(budgeted.request)  # before any stage of a pipeline is traced
    for budgeted, plan, proposals in plans:
        request = budgeted.request
        _print(console, budgeted, plan, proposals, request.kind if of_pipeline else "training")
        if tracing is not None:
            traces.append(tracing.show_trace(console, request, plan))
    if args.json is not None:
        found = [
            {
                **plan.as_dict(),
                "chosen": dict(budgeted.chosen),
                "proposals": [one.as_dict(plan.run.kind if of_pipeline else "training") for one in proposals],
                **({"trace": traces[number]} if traces else {}),
            }
            for number, (budgeted, plan, proposals) in enumerate(plans)
        ]
        write_json(args.json, {"plans": found})
    if args.svg is not None:
        draw_plans([plan for _, plan, _ in plans], args.svg)


def read_requests(args: argparse.Namespace) -> list[Request]:
    """Read a run file, or a model's name with the overrides of a file, and check all of it.

    Raises:
        ConfigError: a bad setting.
        ModelError: the model's dimensions are not known.
    """
    for name, value in (("--ranks", args.ranks), ("--prompt-tokens", args.prompt_tokens)):
        if value is not None and value < 1:
            raise ConfigError(f"{name} = {value}: use a number of at least 1.")
    target = str(args.target)
    stages: Mapping[Kind, Mapping[str, Any]]
    if Path(target).suffix not in (".toml", ".yaml", ".yml"):
        kind = args.stage or "grpo"
        document = apply_overrides({"model": target}, args.overrides)
        if unknown := sorted(document.keys() - {"model", "training", "peft", "model_init"}):
            raise ConfigError(f"--{unknown[0]}: a model has no such table; use training, peft or model_init.")
        model, stages = target, {kind: check_fields(kind, document.get("training", {}))}
        peft = check_lora(document["peft"]) if "peft" in document else None
        init = model_init(document.get("model_init", {}))
    elif is_pipeline(target):
        file = load_pipeline_file(target, args.overrides)
        if args.stage is not None and args.stage not in file.stages:
            raise ConfigError(
                f"--stage = {args.stage!r}: {target} has no table of it; leave it out to plan all stages."
            )
        model, peft, init = file.model, file.peft, file.model_init
        wanted = [kind for kind in file.stages if kind != "pairs" and args.stage in (None, kind)]
        stages = {kind: file.stages[kind] for kind in wanted}
    else:
        kind = args.stage or stage_of(target, args.overrides)
        file = load_run_file(target, args.overrides, kind)
        model, peft, init, stages = file.model, file.peft, file.model_init, {kind: file.training}
    if args.lora or args.qlora:
        peft = peft or _LORA
    if args.qlora:
        init = {**init, "quantization_config": "nf4"}
    found, device = find_shape(model), find_device(args.device)
    return [
        Request(kind, found, device, training, peft, init, args.prompt_tokens, args.ranks, args.sharding)
        for kind, training in stages.items()
    ]


def is_pipeline(target: Any) -> bool:
    """Return whether a target is the run file of a pipeline."""
    path = Path(target)
    if path.suffix not in (".toml", ".yaml", ".yml"):
        return False
    return "training" not in (document := read_file(path)) and any(kind in document for kind in PIPELINE_STAGES)


def stage_of(path: str, overrides: Sequence[str]) -> Kind:
    """Return the first stage that has all fields of [training], GRPO before others where there is a rubric."""
    document = apply_overrides(read_file(path), overrides)
    if "training" not in document:
        raise ConfigError(f"{path}: no stage that trains; name the file of a stage or of a pipeline.")
    names = set(document["training"]) if isinstance(document["training"], Mapping) else set[str]()
    online = "rubric" in document
    order = sorted(STAGES, key=lambda kind: kind != "grpo")
    fitting = [kind for kind in order if STAGES[kind].online is online and names <= known_fields(kind).keys()]
    if not fitting:
        raise ConfigError(f"{path}: no stage has all fields of [training]; name the one it is for by --stage.")
    return fitting[0]


def _print(console: Console, budgeted: Budgeted, plan: Plan, proposals: Sequence[Proposal], training: str) -> None:
    """Print the setting, the table of bytes, the verdict and the proposals."""
    request, planned, shape = budgeted.request, plan.run, plan.run.shape
    ranks = f", {planned.ranks} ranks ({planned.sharding})" if planned.ranks > 1 else ""
    console.print(
        f"{STAGES[planned.kind].title}, {shape.model_type} of {_count(shape.num_parameters)} parameters from "
        f"{request.model.origin}, {_count(planned.method.trained(shape))} trained; {plan.device.name}{ranks}"
    )
    passes = len(planned.parts) * planned.accumulation
    console.print(
        f"prompts of {planned.prompt_tokens} and completions of {planned.completion_tokens} tokens, "
        f"{planned.completions} a micro-batch; {passes} {'pass' if passes == 1 else 'passes'} of up to "
        f"{planned.largest.held} tokens a step"
    )
    for line in budgeted.reasons:
        console.print(line)
    console.print(_table(plan))
    headroom = plan.usable_bytes - plan.peak_bytes
    phase = plan.peak_phase.name
    if plan.fits:
        console.print(f"fits: {format_size(plan.peak_bytes)} during {phase}, {format_size(headroom)} to spare")
    else:
        console.print(
            f"does not fit: {format_size(plan.peak_bytes)} during {phase}, {format_size(-headroom)} more than the "
            f"{format_size(plan.usable_bytes)} that {plan.device.name} can hold"
        )
    if plan.host_bytes and not plan.device.is_cpu:
        console.print(f"host memory of each rank: {format_size(plan.host_bytes)}")
    for note in plan.notes:
        console.print(f"note: {note}")
    if not plan.fits and not proposals:
        console.print("no change of settings makes it fit: use a larger device, a smaller model or shorter prompts")
    for number, proposal in enumerate(proposals, 1):
        effects = "; ".join(change.effect for change in proposal.changes)
        size = format_size(proposal.plan.peak_bytes)
        console.print(f"\n{number}. {proposal.slowdown:.2f} times the time a step, {size} ({effects}):")
        console.print("   " + proposal.toml(training).replace("\n", "\n   "))
    console.print()


def _table(plan: Plan) -> Table:
    table = Table(box=None, pad_edge=False)
    table.add_column("")
    for phase in plan.phases:
        table.add_column(phase.name, justify="right")
    names = list(dict.fromkeys([*plan.fixed, *(name for phase in plan.phases for name in phase.device)]))
    for name in names:
        sizes = [phase.device.get(name, 0) + plan.held(phase).get(name, 0) for phase in plan.phases]
        if any(sizes):
            table.add_row(name, *(format_size(size) if size else "" for size in sizes))
    table.add_row("total", *(format_size(plan.total(phase)) for phase in plan.phases), style="bold")
    times = [phase.cost for phase in plan.phases]
    table.add_row("TFLOP a step", *(f"{cost.flops / 1e12:,.1f}" if cost.flops else "" for cost in times))
    table.add_row("about, seconds a step", *(f"{cost.seconds:,.2g}" if cost.seconds else "" for cost in times))
    return table


def _count(number: int) -> str:
    return f"{number / 1e9:.2f}B" if number >= 1e9 else f"{number / 1e6:.1f}M"


def draw_plans(plans: Sequence[Plan], path: Path) -> None:
    """Draw a bar for each phase, stacked by component, with a line where the device is full.

    Raises:
        ConfigError: matplotlib is not installed.
    """
    try:
        from matplotlib import rc_context
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ConfigError("--svg needs the package matplotlib: pip install 'burnish[plot]'.") from error
    path.parent.mkdir(parents=True, exist_ok=True)
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "burnish", "font.size": 9}):
        rows = [(plan, phase) for plan in plans for phase in plan.phases]
        figure = Figure(figsize=(9, 0.5 * len(rows) + 1.8), layout="constrained")
        axes: Any = figure.add_subplot()
        labels = [f"{plan.run.kind}: {phase.name}" if len(plans) > 1 else phase.name for plan, phase in rows]
        bars = [plan.held(phase) | phase.device for plan, phase in rows]
        lefts = [0.0] * len(rows)
        names = dict.fromkeys(name for bar in bars for name, size in bar.items() if size)
        for number, name in enumerate(names):
            sizes = [bar.get(name, 0) / 1e9 for bar in bars]
            axes.barh(labels, sizes, left=lefts, color=_COLORS[number % len(_COLORS)], label=name)
            lefts = [left + size for left, size in zip(lefts, sizes, strict=True)]
        axes.axvline(
            plans[0].usable_bytes / 1e9, color="black", linestyle="--", label=f"usable, {plans[0].device.name}"
        )
        axes.invert_yaxis()
        axes.set_xlabel("GB")
        axes.spines[["top", "right"]].set_visible(False)
        figure.legend(loc="outside lower center", ncols=4, frameon=False)
        figure.savefig(path, format=path.suffix.removeprefix(".") or "svg", metadata={"Date": None})
