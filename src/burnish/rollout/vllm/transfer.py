"""Ways of full weights to a server: a folder, CUDA IPC on the same GPU, NCCL to another; each in two phases."""

from __future__ import annotations

import asyncio
import base64
import importlib
import importlib.util
import pickle
import socket
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol, cast
from urllib.parse import urlsplit

import torch
from torch import Tensor
from torch.multiprocessing import reductions

from burnish.errors import ConfigError
from burnish.model.scoring import causal_lm
from burnish.rollout.vllm.client import Deadlines, ServerClient, ServerLost, ServerRefused
from burnish.rollout.vllm.embedded import undisturbed
from burnish.rollout.vllm.identity import Served
from burnish.rollout.vllm.registry import gpus_of
from burnish.rollout.vllm.updates import Update
from burnish.rollout.vllm.weights import checkpoint_weights
from burnish.vllm_plugin import BACKEND, NOT_PREPARED, folder_checksum

__all__ = [
    "FolderTransfer",
    "IPCTransfer",
    "NCCLTransfer",
    "Transport",
    "WeightTransfer",
    "check_transport",
    "choose_transport",
    "make_transfer",
]

Transport = Literal["folder", "ipc", "nccl"]


class Reachable(Protocol):
    """A server of the pool."""

    client: ServerClient
    served: Served | None


class WeightTransfer(Protocol):
    """A way of weights to servers.

    `prepare` checks all that can be checked while the server samples, and changes nothing. `commit` loads the weights
    into the paused server, which holds a mixture until it returns.

    Attributes:
        resumes: whether a server that was left in the middle of a commit can take another one without a restart.
    """

    resumes: bool

    async def prepare(self, client: ServerClient, served: Served, update: Update, deadlines: Deadlines) -> None:
        """Make a server ready to take an update.

        Raises:
            ServerLost, ServerRefused: it is not.
        """
        ...

    async def commit(self, client: ServerClient, served: Served, update: Update, deadlines: Deadlines) -> None:
        """Load a prepared update.

        Raises:
            ServerLost, ServerRefused: the server has a part of it, or nothing.
        """
        ...


def check_transport(asked: str) -> None:
    """Check, before weights load, that this process can send weights in the way that was asked for.

    Raises:
        ConfigError: it cannot.
    """
    if asked not in ("ipc", "nccl"):
        return
    shown = f'vllm_weight_transfer = "{asked}"'
    if not torch.cuda.is_available():
        raise ConfigError(f'{shown}: the trainer has no GPU to send weights from; use "folder", or "auto".')
    if asked == "nccl" and importlib.util.find_spec("vllm") is None:
        raise ConfigError(
            f"{shown} needs vLLM's communicator in the trainer's environment too: pip install 'vllm>=0.32', or use "
            '"folder".'
        )


def choose_transport(
    asked: str, device: torch.device, servers: Sequence[Reachable], *, ranks: int, overlaps: bool
) -> Transport:
    """Choose the way of weights to servers.

    Args:
        asked: "auto" chooses what the servers were started for where it can work, else the folder.
        device: where the trainer's weights are.
        servers: those of the run; what is not up yet is as the others are.
        ranks: processes that train together.
        overlaps: whether a server may have to take weights while they change.
    """
    if asked != "auto":
        return cast("Transport", asked)
    found = [(server.client.url, server.served) for server in servers if server.served is not None]
    backends = {served.backend for _, served in found}
    if device.type != "cuda" or overlaps or len(backends) != 1:
        return "folder"
    ours, theirs = _uuid(device), [gpus_of(url)[: served.workers] for url, served in found]
    if backends == {"ipc"} and ranks == 1 and all(used == [ours] for used in theirs):
        return "ipc"
    # NCCL takes no two ranks on one GPU.
    if backends == {"nccl"} and not any(ours in used for used in theirs) and importlib.util.find_spec("vllm"):
        return "nccl"
    return "folder"


def make_transfer(transport: Transport, model: Any) -> WeightTransfer:
    """Make the way of a model's weights to servers."""
    if transport == "folder":
        return FolderTransfer()
    return IPCTransfer(model) if transport == "ipc" else NCCLTransfer(model)


def _uuid(device: torch.device) -> str:
    return str(torch.cuda.get_device_properties(device).uuid)


def _check_backend(client: ServerClient, served: Served, wanted: str) -> None:
    if served.backend != wanted:
        raise ServerRefused(
            f'vllm_weight_transfer = "{wanted}", and {client.url} has the back end {served.backend!r}: start it with '
            f"`burnish serve MODEL --weight-transfer {wanted}`.",
            409,
        )


async def _update(client: ServerClient, update_info: dict[str, Any], deadlines: Deadlines) -> None:
    """Run a session of vLLM's weight transfer."""
    await client.post("/start_weight_update", {}, deadline=deadlines.sync)
    await client.post("/update_weights", {"update_info": update_info}, deadline=deadlines.sync)
    await client.post("/finish_weight_update", {}, deadline=deadlines.sync)


class FolderTransfer:
    """Weights by the folder that the trainer has written: by burnish's plug-in, or by `reload_weights` without it.

    The plug-in maps the files and checks them before anything changes. `reload_weights` finds a file that is missing or
    damaged when the layers are already being replaced.
    """

    resumes = True

    def __init__(self) -> None:
        self._checked = ("", 0)

    async def prepare(self, client: ServerClient, served: Served, update: Update, deadlines: Deadlines) -> None:
        """Have the plug-in map and check the files."""
        if served.backend != BACKEND:
            return
        if self._checked[0] != update.folder:
            self._checked = (update.folder, await asyncio.to_thread(folder_checksum, update.folder))
        manifest = {"folder": update.folder, "version": update.tag, "run": update.run, "checksum": self._checked[1]}
        try:
            await client.post("/init_weight_transfer_engine", {"init_info": manifest}, deadline=deadlines.sync)
        except ServerLost as error:
            if NOT_PREPARED not in str(error):
                raise
            reason = f"{client.url} keeps its weights, since it cannot take {update.tag} ({error}): if it does not see "
            raise ServerRefused(f"{reason}the folder, set vllm_weights_dir to one that both see.", 500) from error

    async def commit(self, client: ServerClient, served: Served, update: Update, deadlines: Deadlines) -> None:
        """Have the server load the files."""
        if served.backend == BACKEND:
            try:
                await _update(client, {"version": update.tag}, deadlines)
            except ServerLost as error:
                if "already active" not in str(error):
                    raise
                # A trainer ended within its session; the plug-in has loaded all of that version, or ended too.
                await client.post("/finish_weight_update", {}, deadline=deadlines.sync)
                await _update(client, {"version": update.tag}, deadlines)
            return
        call = {
            "method": "reload_weights",
            "kwargs": {"weights_path": update.folder},
            "timeout": deadlines.sync,
        }
        await client.post("/collective_rpc", call, deadline=deadlines.sync + deadlines.call)


class IPCTransfer:
    """Weights by handles of the trainer's CUDA memory, for servers on its GPU; nothing is copied on the way.

    It runs while the trainer waits, so that its weights are those of the update.

    Args:
        model: the model being trained.
    """

    resumes = False

    def __init__(self, model: Any) -> None:
        self._model = model

    async def prepare(self, client: ServerClient, served: Served, update: Update, deadlines: Deadlines) -> None:
        """Check that the server runs on this GPU, and name the form of the handles."""
        _check_backend(client, served, "ipc")
        ours, theirs = _uuid(causal_lm(self._model).device), gpus_of(client.url)[: served.workers]
        if theirs and theirs != [ours]:
            raise ServerRefused(
                f'vllm_weight_transfer = "ipc": {client.url} runs on {", ".join(theirs)} and the trainer on {ours}; '
                'start it on the same GPU (CUDA_VISIBLE_DEVICES), or use "nccl".',
                409,
            )
        await client.post("/init_weight_transfer_engine", {"init_info": {"packed": False}}, deadline=deadlines.sync)

    async def commit(self, client: ServerClient, served: Served, update: Update, deadlines: Deadlines) -> None:
        """Have the server copy from the trainer's memory."""
        device = causal_lm(self._model).device
        torch.cuda.synchronize(device)
        weights = {name: value.detach().contiguous() for name, value in checkpoint_weights(self._model).items()}
        await _update(client, ipc_update_info(weights, _uuid(device)), deadlines)
        del weights  # copies that `contiguous` made must outlive the session
        torch.cuda.ipc_collect()


def ipc_update_info(weights: dict[str, Tensor], uuid: str) -> dict[str, Any]:
    """Build the body of an update by IPC: names, dtypes, shapes, and a pickled handle of each tensor by GPU."""
    handles = [{uuid: reductions.reduce_tensor(value)[1]} for value in weights.values()]
    return {
        "names": list(weights),
        "dtype_names": [str(value.dtype).removeprefix("torch.") for value in weights.values()],
        "shapes": [list(value.shape) for value in weights.values()],
        "ipc_handles_pickled": base64.b64encode(pickle.dumps(handles)).decode("ascii"),
    }


class NCCLTransfer:
    """Weights by vLLM's own broadcast, for servers on other GPUs; each server has a group with the trainer.

    It runs while the trainer waits, so that its weights are those of the update. vLLM must be installed here.

    Args:
        model: the model being trained.
    """

    resumes = False

    def __init__(self, model: Any) -> None:
        self._model = model
        self._senders: dict[str, Any] = {}

    async def prepare(self, client: ServerClient, served: Served, update: Update, deadlines: Deadlines) -> None:
        """Meet the server's workers in a group, unless they are in one already."""
        _check_backend(client, served, "nccl")
        version = str((await client.get("/weight_info")).get("weight_version"))
        # A server without a version of this run was restarted, or has met another trainer.
        if client.url in self._senders and version.startswith(update.run):
            return
        self._leave(client.url)
        await client.post("/shutdown_weight_transfer_engine", {}, deadline=deadlines.call)
        control = _Control(client, asyncio.get_running_loop(), deadlines.sync)
        self._senders[client.url] = await self._in_thread(client, deadlines, lambda: self._meet(control, served))

    async def commit(self, client: ServerClient, served: Served, update: Update, deadlines: Deadlines) -> None:
        """Broadcast the weights."""
        await self._in_thread(client, deadlines, self._senders[client.url].send_weights)

    def _meet(self, control: _Control, served: Served) -> Any:
        with undisturbed():
            transfer = importlib.import_module("vllm.distributed.weight_transfer")
            engine = importlib.import_module("vllm.distributed.weight_transfer.nccl_engine")
        host, port = _rendezvous(control.client.url)
        info = engine.NCCLTrainerInitInfo(master_address=host, master_port=port, world_size=1 + served.workers, rank=0)
        return transfer.WeightTransferTrainerFactory.trainer_init(info, client=control, source=_Source(self._model))

    async def _in_thread(self, client: ServerClient, deadlines: Deadlines, work: Callable[[], Any]) -> Any:
        """Run a call of vLLM's that blocks; one that fails ends the group."""
        device = causal_lm(self._model).device

        def on_device() -> Any:
            with torch.cuda.device(device):  # each thread has its own
                return work()

        try:
            return await asyncio.wait_for(asyncio.to_thread(on_device), deadlines.sync)
        except BaseException as error:
            self._leave(client.url)
            if isinstance(error, ServerLost | ServerRefused) or not isinstance(error, Exception):
                raise
            reason = f"within {deadlines.sync:g} s" if isinstance(error, TimeoutError) else f"({error})"
            raise ServerLost(f"{client.url} did not take its weights by NCCL {reason}.") from error

    def _leave(self, url: str) -> None:
        """Abort a server's group, which ends a broadcast that waits for a dead one."""
        if (sender := self._senders.pop(url, None)) is not None:
            sender.shutdown()


class _Control:
    """The calls of vLLM's `VLLMWeightSyncClient`, from a thread to one server."""

    def __init__(self, client: ServerClient, loop: asyncio.AbstractEventLoop, deadline: float) -> None:
        self.client, self._loop, self._deadline = client, loop, deadline

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        self._post("/init_weight_transfer_engine", {"init_info": init_info})

    def start_weight_update(self) -> None:
        self._post("/start_weight_update", {})

    def update_weights(self, update_info: dict[str, Any]) -> None:
        self._post("/update_weights", {"update_info": update_info})

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        self._post("/finish_weight_update", {} if weight_version is None else {"weight_version": weight_version})

    def _post(self, path: str, body: dict[str, Any]) -> None:
        work = self.client.post(path, body, deadline=self._deadline)
        asyncio.run_coroutine_threadsafe(work, self._loop).result()


@dataclass(frozen=True, slots=True)
class _Described:
    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]


class _Source:
    """The trainer's weights as vLLM's `WeightSource`."""

    def __init__(self, model: Any) -> None:
        self._model = model

    def metadata(self) -> list[_Described]:
        return [_Described(name, value.dtype, tuple(value.shape)) for name, value in self]

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        for name, value in checkpoint_weights(self._model).items():
            yield name, value.detach()


def _rendezvous(url: str) -> tuple[str, int]:
    """Return this machine's address on the way to a server, and a free port."""
    parts = urlsplit(url)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as way:
        way.connect((parts.hostname or "127.0.0.1", parts.port or 80))  # sends nothing
        host = str(way.getsockname()[0])
    with socket.socket() as found:
        found.bind((host, 0))
        return host, int(found.getsockname()[1])
