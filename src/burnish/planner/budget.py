"""Keep a run within `memory_budget`, or refuse what cannot fit its device or the host."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from burnish.config.predicates import parse_size
from burnish.config.tips import toml_line
from burnish.errors import ConfigError
from burnish.planner.plan import Plan, estimate, format_size
from burnish.planner.proposals import Proposal, least_plan, propose
from burnish.planner.run import Request

__all__ = ["Budgeted", "keep_budget", "refuse_too_large"]

_MARGIN = 1.1
"""Times the memory of device or host over which a run is refused: twice the formulas' worst error (planning.md)."""


class Budgeted(NamedTuple):
    """A request that keeps its `memory_budget`.

    Attributes:
        request: with the chosen settings, on a device of that size.
        chosen: fields of the stage that were set -> their values.
        reasons: two lines, what was chosen and why; none where the run fits as configured.
    """

    request: Request
    chosen: Mapping[str, Any]
    reasons: Sequence[str]


def keep_budget(request: Request) -> Budgeted:
    """Choose the fastest settings that fit `memory_budget`, of those that leave the gradient as it is.

    Raises:
        ConfigError: there are none.
    """
    budget = request.training.get("memory_budget")
    if budget is None:
        return Budgeted(request, {}, ())
    size = parse_size(budget) or request.device.memory_bytes
    request = dataclasses.replace(request, device=dataclasses.replace(request.device, memory_bytes=size))
    plan = estimate(request)
    if plan.fits:
        return Budgeted(request, {}, ())
    proposals = propose(request, only_exact=True)
    if not proposals:
        exact = "all settings that leave the gradient as it is"
        least = f"and still {format_size(least_plan(request).peak_bytes)} with {exact}"
        if plan.fits_device:
            least = f"which has {format_size(request.device.host_bytes or 0)}, and {exact} do not change that"
        raise ConfigError(
            f"memory_budget = {budget!r}: {_need(plan)}, {least}; {_fix(request)}, or give it more memory."
        )
    best, *others = proposals
    chosen: dict[str, Any] = {}
    for change in best.changes:
        request, chosen = change.apply(request), chosen | dict(change.values)
    slower = f"; the next best takes {others[0].slowdown:.2f}: {_settings(others[0])}" if others else ""
    reasons = (
        f"memory_budget = {budget}: {_need(plan)} as configured; chosen: {_settings(best)}",
        f"with that, {_need(best.plan)}, in {best.slowdown:.2f} times the time a step by the formulas{slower}",
    )
    return Budgeted(request, chosen, reasons)


def refuse_too_large(request: Request) -> None:
    """Refuse a run that takes more than its device or the host has, by more than the formulas' error.

    Raises:
        ConfigError: it does; with settings that make it fit.
    """
    plan, device = estimate(request), request.device
    over = None
    if plan.peak_bytes > _MARGIN * device.memory_bytes:
        over = f"{_need(plan)}, and {device.name} has {format_size(device.memory_bytes)}"
    elif device.host_bytes is not None and plan.host_bytes > _MARGIN * device.host_bytes:
        over = f"{_need_of_host(plan)}, which has {format_size(device.host_bytes)}"
    if over is not None:
        raise ConfigError(f"check_memory = True: {over}; {_fix(request)}, or set check_memory = false to try.")


def _need(plan: Plan) -> str:
    """Say what a run takes, of the host where only that is too small."""
    if plan.fits_device and not plan.fits:
        return _need_of_host(plan)
    return f"the run takes {format_size(plan.peak_bytes)} ({plan.peak_phase.name})"


def _need_of_host(plan: Plan) -> str:
    return f"the run takes {format_size(plan.host_bytes)} of the host's memory ({plan.peak_host_phase.name})"


def _fix(request: Request) -> str:
    proposals = propose(request)
    return f"set {_settings(proposals[0])}" if proposals else "use a smaller model or shorter rows"


def _settings(proposal: Proposal) -> str:
    """Write the settings of a proposal as TOML, after the table of those that are not the stage's own."""
    return ", ".join(
        ("" if change.table == "training" else f"{change.table}.") + toml_line(name, value)
        for change in proposal.changes
        for name, value in change.values.items()
    )
