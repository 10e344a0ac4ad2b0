"""`burnish plan --trace`: the step of a planned run on fake tensors, beside the formulas."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.table import Table

from burnish.planner.plan import Plan, format_size
from burnish.planner.run import Request
from burnish.progress import phase
from burnish.training.traced_run import check_traceable, trace_request

__all__ = ["check_traceable", "show_trace"]


def show_trace(console: Console, request: Request, plan: Plan) -> dict[str, Any]:
    """Trace a run's step; print its bytes by component beside the formulas' total, and return them."""
    with phase("tracing the step"):
        trace = trace_request(request)
    context = plan.fixed.get("context", 0)
    untraced = context + plan.fixed.get("process", 0)
    # Packed copies of weights are made by kernels of a CPU, which take no fake tensors.
    expected = {
        planned.name: plan.total(planned) - untraced - planned.device.get("packed weights", 0)
        for planned in plan.phases
    }
    peaks = trace.by_phase()
    table = Table(box=None, pad_edge=False)
    for title in ("traced", *peaks):
        table.add_column(title, justify="left" if title == "traced" else "right")
    for place in ("device", "host"):
        found = {title: getattr(peak, place) for title, peak in peaks.items()}
        for name in dict.fromkeys(name for sizes in found.values() for name in sizes):
            label = name if place == "device" else f"{name} (host)"
            table.add_row(label, *(format_size(sizes[name]) if name in sizes else "" for sizes in found.values()))
    table.add_row("total on the device", *(format_size(peak.device_bytes) for peak in peaks.values()), style="bold")
    differences = [
        f"{expected[title] / peak.device_bytes - 1:+.1%}" if title in expected else "" for title, peak in peaks.items()
    ]
    table.add_row("formulas against it", *differences)
    console.print(table)
    total = format_size(trace.update.device_bytes + context)
    console.print(f"with the context of {format_size(context)}: {total} in the update\n")
    return {title: {"device": peak.device, "host": peak.host} for title, peak in peaks.items()}
