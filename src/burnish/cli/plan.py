"""`burnish plan FILE|MODEL`: bytes by component and phase, seconds, and whether a run fits its device and the host."""

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
from burnish.config.predicates import parse_size
from burnish.config.sections import model_init
from burnish.config.stages import PIPELINE_STAGES, known_fields
from burnish.errors import ConfigError, show
from burnish.planner.budget import Budgeted, keep_budget
from burnish.planner.devices import Device, find_device
from burnish.planner.memory import Bytes
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
    found, device = find_shape(model), _device(args)
    return [
        Request(kind, found, device, training, peft, init, args.prompt_tokens, args.ranks, args.sharding)
        for kind, training in stages.items()
    ]


def _device(args: argparse.Namespace) -> Device:
    """Return the device of a rank, with its share of the host's memory."""
    host = None if args.host_memory is None else parse_size(args.host_memory)
    if args.host_memory is not None and host is None:
        raise ConfigError(f"--host-memory = {show(args.host_memory)}: use a size such as 64GB or 60GiB.")
    return find_device(args.device).with_host(host).shared_by(args.ranks)


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
    for line in _verdict(plan):
        console.print(line)
    for note in plan.notes:
        console.print(f"note: {note}")
    if not plan.fits and not proposals:
        larger = "host with more memory" if plan.fits_device else "larger device"
        console.print(f"no change of settings makes it fit: use a {larger}, a smaller model or shorter prompts")
    for number, proposal in enumerate(proposals, 1):
        effects = "; ".join(change.effect for change in proposal.changes)
        size = format_size(proposal.plan.peak_bytes)
        if plan.fits_host is False:
            size += f" and {format_size(proposal.plan.host_bytes)} of the host's"
        console.print(f"\n{number}. {proposal.slowdown:.2f} times the time a step, {size} ({effects}):")
        console.print("   " + proposal.toml(training).replace("\n", "\n   "))
    console.print()


def _verdict(plan: Plan) -> list[str]:
    """Say whether a run fits the device, and whether it fits the host."""
    host_too_small = plan.fits_host is False
    spare, phase = plan.usable_bytes - plan.peak_bytes, plan.peak_phase.name
    need = f"{format_size(plan.peak_bytes)} during {phase}"
    if not plan.fits_device:
        more = f"{format_size(-spare)} more than the {format_size(plan.usable_bytes)} that {plan.device.name} can hold"
        lines = [f"does not fit: {need}, {more}"]
    elif host_too_small:
        lines = [f"fits {plan.device.name}, but not the host: {need} on the device, {format_size(spare)} to spare"]
    else:
        lines = [f"fits: {need}, {format_size(spare)} to spare"]
    if plan.device.is_cpu:
        return lines
    need = f"host memory of each rank: {format_size(plan.host_bytes)} during {plan.peak_host_phase.name}"
    if plan.usable_host_bytes is None:
        return [*lines, f"{need}; not checked: the host's memory is not known (--host-memory)"]
    spare = plan.usable_host_bytes - plan.host_bytes
    if host_too_small:
        more = f"{format_size(-spare)} more than the {format_size(plan.usable_host_bytes)} that it can hold"
        return [*lines, f"{need}, {more}"]
    return [*lines, f"{need}, {format_size(spare)} to spare"]


def _table(plan: Plan) -> Table:
    table = Table(box=None, pad_edge=False)
    table.add_column("")
    for phase in plan.phases:
        table.add_column(phase.name, justify="right")

    def add_rows(held: Sequence[Bytes], ending: str) -> None:
        for name in dict.fromkeys(name for sizes in held for name in sizes):
            if any(sizes.get(name) for sizes in held):
                table.add_row(name + ending, *(format_size(size) if (size := one.get(name)) else "" for one in held))

    add_rows([plan.held(phase) | phase.device for phase in plan.phases], "")
    table.add_row("total", *(format_size(plan.total(phase)) for phase in plan.phases), style="bold")
    if not plan.device.is_cpu:
        add_rows([plan.held_on_host(phase) | phase.host for phase in plan.phases], " (host)")
        totals = (format_size(plan.host_total(phase)) for phase in plan.phases)
        table.add_row("total in host memory", *totals, style="bold")
    times = [phase.cost for phase in plan.phases]
    table.add_row("TFLOP a step", *(f"{cost.flops / 1e12:,.1f}" if cost.flops else "" for cost in times))
    table.add_row("about, seconds a step", *(f"{cost.seconds:,.2g}" if cost.seconds else "" for cost in times))
    return table


def _count(number: int) -> str:
    return f"{number / 1e9:.2f}B" if number >= 1e9 else f"{number / 1e6:.1f}M"


def draw_plans(plans: Sequence[Plan], path: Path) -> None:
    """Draw a bar for each phase, stacked by component, with a line where the device is full; beside it the host's.

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
        device, has_host = plans[0].device, not plans[0].device.is_cpu
        places = [("GB on the device" if has_host else "GB", device.name, plans[0].usable_bytes)]
        bars = [[plan.held(phase) | phase.device for plan, phase in rows]]
        if has_host:
            places.append(("GB of host memory", "host", plans[0].usable_host_bytes or 0))
            bars.append([plan.held_on_host(phase) | phase.host for plan, phase in rows])
        figure = Figure(figsize=(9, 0.5 * len(rows) + 2), layout="constrained")
        labels = [f"{plan.run.kind}: {phase.name}" if len(plans) > 1 else phase.name for plan, phase in rows]
        names = list(dict.fromkeys(name for held in bars for bar in held for name, size in bar.items() if size))
        panels: Any = figure.subplots(1, len(places), sharey=True, squeeze=False)[0]
        for axes, held, (label, place, usable) in zip(panels, bars, places, strict=True):
            lefts = [0.0] * len(rows)
            for number, name in enumerate(names):
                sizes = [bar.get(name, 0) / 1e9 for bar in held]
                color = _COLORS[number % len(_COLORS)]
                axes.barh(labels, sizes, left=lefts, color=color, label=name if any(sizes) else None)
                lefts = [left + size for left, size in zip(lefts, sizes, strict=True)]
            if usable:
                axes.axvline(usable / 1e9, color="black", linestyle="--", label=f"usable, {place}")
            axes.set_xlabel(label)
            axes.spines[["top", "right"]].set_visible(False)
        panels[0].invert_yaxis()  # of both
        figure.legend(loc="outside lower center", ncols=4, frameon=False)
        figure.savefig(path, format=path.suffix.removeprefix(".") or "svg", metadata={"Date": None})
