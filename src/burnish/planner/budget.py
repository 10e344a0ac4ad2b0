"""Keep a run within `memory_budget`, or refuse what cannot fit its device."""

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
"""Times the device's memory over which a run is refused: twice the formulas' greatest error (docs/planning.md)."""


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
        least = format_size(least_plan(request).peak_bytes)
        raise ConfigError(
            f"memory_budget = {budget!r}: {_need(plan)}, and still {least} with all settings that leave the gradient "
            f"as it is; {_fix(request)}, or give it more memory."
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
    """Refuse a run that takes more than its device has, by more than the formulas' error.

    Raises:
        ConfigError: it does; with settings that make it fit.
    """
    plan = estimate(request)
    memory = request.device.memory_bytes
    if plan.peak_bytes > _MARGIN * memory:
        raise ConfigError(
            f"check_memory = True: {_need(plan)}, and {request.device.name} has {format_size(memory)}; "
            f"{_fix(request)}, or set check_memory = false to try."
        )


def _need(plan: Plan) -> str:
    return f"the run takes {format_size(plan.peak_bytes)} ({plan.peak_phase.name})"


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
