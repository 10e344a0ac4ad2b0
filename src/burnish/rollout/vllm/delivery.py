"""Delivery of weights to a server in two phases: it answers at the version before, or not at all, until it has all."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from burnish.errors import CheckFailed
from burnish.rollout.vllm.client import Deadlines, ServerClient, ServerLost, ServerRefused
from burnish.rollout.vllm.identity import Served
from burnish.rollout.vllm.probe import Agreement, Answers, compare
from burnish.rollout.vllm.wire import parse_prompt_logprobs, probe_request

__all__ = ["Server", "Update", "confirm", "deliver"]

_UPDATING = "updating"
"""Version of a server between its weights; no run asks for it."""


@dataclass(frozen=True, slots=True)
class Update:
    """Weights to deliver, and the proof to ask for.

    Attributes:
        tag: identifies the weights; unique over runs.
        version: the trainer's number of the weights.
        folder: weights or adapters on disk.
        is_adapter: whether the folder holds adapters.
        sequences: tokens of the probe.
        expected: [N] the trainer's log-probabilities of the probe.
        base: [N] those without adapters; empty where there are none.
        bound: largest KL that rounding explains.
    """

    tag: str
    version: int
    folder: str
    is_adapter: bool
    sequences: Sequence[Sequence[int]]
    expected: list[float]
    base: list[float]
    bound: float


@dataclass(slots=True, eq=False)
class Server:
    """A server of the pool.

    Attributes:
        client: its connections.
        served: its base model, once connected.
        version: tag at which it was verified; None while it may not sample.
        adapter: name of the adapter that it has loaded.
        reason: why it is not ready.
        last, anchor: earlier probes, see `burnish.rollout.vllm.probe.compare`.
        agreement: outcome of the last probe.
    """

    client: ServerClient
    served: Served | None = None
    version: str | None = None
    adapter: str | None = None
    reason: str = "not connected yet"
    last: Answers | None = None
    anchor: Answers | None = None
    agreement: Agreement | None = None

    @property
    def model(self) -> str:
        """Name to ask for: the adapter, or the model."""
        assert self.served is not None
        return self.adapter or self.served.name


async def deliver(server: Server, update: Update, deadlines: Deadlines) -> None:
    """Load an update, prove it by the probe, and let the server sample again.

    Raises:
        ServerLost, ServerRefused: the server failed on the way, and may not sample.
        CheckFailed: it has loaded something else.
    """
    server.version = None
    if update.is_adapter:
        await server.client.post("/resume", {}, deadline=deadlines.sync)  # paused where groups were running
        await _deliver_adapter(server, update, deadlines)
    else:
        await _deliver_weights(server, update, deadlines)
    await prove(server, update, deadlines)
    server.version, server.reason = update.tag, ""


async def _deliver_weights(server: Server, update: Update, deadlines: Deadlines) -> None:
    client = server.client
    # Paused first: no request may see half of the weights, or keys and values of the old ones.
    await client.post("/pause?mode=abort", {}, deadline=deadlines.sync)
    await client.post("/update_weight_version", {"new_version": _UPDATING})
    call = {
        "method": "reload_weights",
        "kwargs": {"weights_path": update.folder},
        "timeout": deadlines.sync,
    }
    await client.post("/collective_rpc", call, deadline=deadlines.sync + deadlines.call)
    await _reset_prefix_cache(client)
    await client.post("/update_weight_version", {"new_version": update.tag})
    await client.post("/resume", {}, deadline=deadlines.sync)


async def _reset_prefix_cache(client: ServerClient) -> None:
    """Forget keys and values of the old weights; blocks of aborted requests may be held for a moment."""
    for _ in range(20):
        if (await client.post("/reset_prefix_cache", {})).get("success", True):
            return
        await asyncio.sleep(0.25)
    raise ServerLost(f"{client.url} keeps keys and values of the old weights: /reset_prefix_cache does not succeed.")


async def _deliver_adapter(server: Server, update: Update, deadlines: Deadlines) -> None:
    client, before = server.client, server.adapter
    body = {"lora_name": update.tag, "lora_path": update.folder}
    try:
        await client.post("/v1/load_lora_adapter", body, deadline=deadlines.sync)
    except ServerRefused as error:
        rank = json.loads((Path(update.folder) / "adapter_config.json").read_text(encoding="utf-8")).get("r")
        fix = f"start it with `burnish serve MODEL --lora-rank {rank}`"
        if "No adapter found" in str(error):
            reason = f"{client.url} cannot read {update.folder}: set vllm_weights_dir to a folder that both see."
            raise ServerRefused(reason, error.status) from error
        if error.status == 404:
            raise ServerRefused(f"{client.url} takes no adapters: {fix}.", error.status) from error
        if "already" not in str(error):
            raise ServerRefused(f"{error} If it is the rank, {fix}.", error.status) from error
    server.adapter = update.tag
    if before is not None and before != update.tag:
        with contextlib.suppress(ServerRefused):  # a server that was restarted does not have it
            await client.post("/v1/unload_lora_adapter", {"lora_name": before})


async def prove(server: Server, update: Update, deadlines: Deadlines) -> None:
    """Compare the server's log-probabilities of the probe with the trainer's.

    Raises:
        CheckFailed: they differ, with the likely cause.
    """
    observed: list[float] = []
    for tokens in update.sequences:
        answer = await server.client.post(
            "/v1/completions", probe_request(tokens, model=server.model), deadline=deadlines.stall + deadlines.call
        )
        observed += parse_prompt_logprobs(answer, tokens)
    now = Answers(update.tag, update.expected, observed)
    found = compare(now, server.last, server.anchor, bound=update.bound)
    server.agreement = found
    if found.cause:
        cause = found.cause
        if update.base and _nearer(observed, update.base, update.expected):
            cause = "it answers with the base model: the adapter never arrived"
        raise CheckFailed(
            f"{server.client.url} does not sample from the weights of {update.tag}: its log-probabilities of "
            f"{len(observed)} fixed tokens differ from the trainer's by {found.difference:.3g} nats on average (KL "
            f"{found.kl:.3g}, bound {update.bound:g}). Likely cause: {cause}. Restart it with `burnish serve MODEL`, "
            "in the dtype that is trained; the run stops before it samples from the wrong weights."
        )
    server.last = now
    if server.anchor is None or found.is_resolved:
        server.anchor = now


def _nearer(observed: Sequence[float], one: Sequence[float], other: Sequence[float]) -> bool:
    """Return whether values are much nearer to one list than to the other."""
    first, second = (sum(abs(a - b) for a, b in zip(observed, to, strict=True)) for to in (one, other))
    return first < 0.5 * second


async def confirm(server: Server, tag: str) -> None:
    """Ask a server which version it has: a restarted one has forgotten it.

    Raises:
        ServerLost: it has another.
    """
    if server.adapter is not None:
        return  # requests name the adapter, and a server without it refuses them
    found = (await server.client.get("/weight_info")).get("weight_version")
    if found != tag:
        raise ServerLost(f"{server.client.url} was restarted, or another run uses it: its weights are {found!r}.")
