"""Delivery of weights to a server in two phases: it answers at the version before, or not at all, until it has all."""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from burnish.rollout.vllm.client import Deadlines, ServerClient, ServerLost, ServerRefused
from burnish.rollout.vllm.identity import Served
from burnish.rollout.vllm.transfer import WeightTransfer
from burnish.rollout.vllm.updates import Proof, Update
from burnish.rollout.vllm.wire import parse_prompt_logprobs, probe_request

__all__ = ["FAILED", "Server", "confirm", "deliver", "has", "prove"]

_ON_ITS_WAY = ", on its way"
"""Ends the version of a server between its weights; no group is sampled at it."""

FAILED = ", failed"
"""Ends the version of a server that could not load the whole of one: it must be started again."""


@dataclass(slots=True, eq=False)
class Server:
    """A server of the pool.

    Attributes:
        client: its connections.
        served: its base model, once connected.
        version: tag at which it was verified; None while it may not sample.
        adapter: name of the adapter that it has loaded.
        reason: why it is not ready.
        proof: what the probe has shown of it.
    """

    client: ServerClient
    served: Served | None = None
    version: str | None = None
    adapter: str | None = None
    reason: str = "not connected yet"
    proof: Proof = field(default_factory=Proof)

    @property
    def model(self) -> str:
        """Name to ask for: the adapter, or the model."""
        assert self.served is not None
        return self.adapter or self.served.name


async def deliver(server: Server, update: Update, transfer: WeightTransfer, deadlines: Deadlines) -> None:
    """Load an update, prove it by the probe, and let the server sample again.

    Args:
        server: takes the update.
        update: what to load.
        transfer: way of full weights.
        deadlines: see `Deadlines`.

    Raises:
        ServerLost, ServerRefused: the server failed on the way, and may not sample.
        CheckFailed: it has loaded something else.
    """
    server.version = None
    if update.is_adapter:
        await server.client.post("/resume", {}, deadline=deadlines.sync)  # paused where groups were running
        await _deliver_adapter(server, update, deadlines)
    else:
        await _deliver_weights(server, update, transfer, deadlines)
    await prove(server, update, deadlines)
    server.version, server.reason = update.tag, ""


async def _deliver_weights(server: Server, update: Update, transfer: WeightTransfer, deadlines: Deadlines) -> None:
    client, served = server.client, server.served
    assert served is not None
    found = str(await _version(server))
    is_cut = found.endswith(_ON_ITS_WAY)
    if is_cut and not transfer.resumes:
        found = found.replace(_ON_ITS_WAY, FAILED)
        await _mark(client, found)
    if found.endswith(FAILED):
        raise ServerLost(
            f"{client.url} has only a part of {found[: -len(FAILED)]}: start it again (`burnish serve` does)."
        )
    try:
        await transfer.prepare(client, served, update, deadlines)
    except (ServerLost, ServerRefused):
        if not is_cut:  # it has the version before, whole, and may answer others with it
            with contextlib.suppress(ServerLost, ServerRefused):
                await client.post("/resume", {})
        raise
    # Paused first: no request may see half of the weights, or keys and values of the old ones.
    await client.post("/pause?mode=abort", {}, deadline=deadlines.sync)
    await client.post("/update_weight_version", {"new_version": f"{update.tag}{_ON_ITS_WAY}"})
    try:
        await transfer.commit(client, served, update, deadlines)
    except (ServerLost, ServerRefused):
        await _mark(client, f"{update.tag}{FAILED}")  # another attempt would mix the two
        raise
    await _reset_prefix_cache(client)
    await client.post("/update_weight_version", {"new_version": update.tag})
    await client.post("/resume", {}, deadline=deadlines.sync)


async def _mark(client: ServerClient, version: str) -> None:
    """Leave a note on a server, if it answers."""
    with contextlib.suppress(ServerLost, ServerRefused):
        await client.post("/update_weight_version", {"new_version": version})


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
        await client.tell("/v1/load_lora_adapter", body, deadline=deadlines.sync)
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
            await client.tell("/v1/unload_lora_adapter", {"lora_name": before})


async def has(server: Server, update: Update, deadlines: Deadlines) -> bool:
    """Return whether a server says that it has an update; wait while another process of the run delivers it.

    Raises:
        ServerLost, ServerRefused: it does not say.
    """
    if update.is_adapter:
        return server.adapter == update.tag
    until = time.monotonic() + deadlines.sync
    while (found := await _version(server)) == f"{update.tag}{_ON_ITS_WAY}" and time.monotonic() < until:
        await asyncio.sleep(deadlines.heartbeat)
    return found == update.tag


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
    fix = "Restart it with `burnish serve MODEL`, in the dtype that is trained"
    server.proof.check(update, observed, who=server.client.url, fix=fix)


async def confirm(server: Server, tag: str) -> None:
    """Ask a server which version it has: a restarted one has forgotten it.

    Raises:
        ServerLost: it has another.
    """
    if server.adapter is not None:
        return  # requests name the adapter, and a server without it refuses them
    if (found := await _version(server)) != tag:
        raise ServerLost(f"{server.client.url} was restarted, or another run uses it: its weights are {found!r}.")


async def _version(server: Server) -> Any:
    return (await server.client.get("/weight_info")).get("weight_version")
