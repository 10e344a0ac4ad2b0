"""Ways of full weights to servers, against local HTTP servers; CUDA and NCCL are stood in for.

Of the way by CUDA IPC and of that by NCCL nothing here has run on a GPU: the tests marked `gpu` would.
"""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import tiny
from burnish import GRPOConfig, vllm_plugin
from burnish.errors import CheckFailed, ConfigError, EngineError
from burnish.model.scoring import prepare_for_scoring
from burnish.rollout import Request, SamplingParams
from burnish.rollout.validation import check_completions
from burnish.rollout.vllm import ServerPool, VLLMServerEngine, transfer
from burnish.rollout.vllm.delivery import prove
from burnish.rollout.vllm.identity import Served
from burnish.rollout.vllm.registry import forget, register
from burnish.rollout.vllm.transfer import check_transport, choose_transport
from burnish.rollout.vllm.weights import checkpoint_weights
from burnish.vllm_plugin import BACKEND, FolderTransferEngine
from local_server import LocalServer
from test_vllm_pool import DEADLINES, REQUESTS, tokens


class Died(Exception):
    """A worker has ended."""


def plug(server: LocalServer) -> None:
    """Give a server burnish's plug-in, as `burnish serve` does."""
    model = SimpleNamespace(load_weights=lambda pairs: server.load_tensors(dict(pairs)), modules=lambda: iter(()))
    config = SimpleNamespace(model_config=SimpleNamespace(hf_text_config=server.model.config))
    server.backend, server.plugin = BACKEND, FolderTransferEngine(None, config, None, model)


@pytest.fixture
def stand_ins(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """What the ways call of vLLM and CUDA."""
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    reload = SimpleNamespace(initialize_layerwise_reload=lambda m: None, finalize_layerwise_reload=lambda m, c: None)
    platforms = SimpleNamespace(current_platform=SimpleNamespace(is_cpu=lambda: False))
    monkeypatch.setitem(sys.modules, "vllm.model_executor.model_loader.reload", reload)
    monkeypatch.setitem(sys.modules, "vllm.platforms", platforms)
    monkeypatch.setattr(transfer, "_uuid", lambda device: "GPU-1")
    monkeypatch.setattr(transfer.reductions, "reduce_tensor", lambda value: (None, value.clone()))
    for name, stand_in in {
        "synchronize": lambda device: None,
        "ipc_collect": lambda: None,
        "device": lambda device: contextlib.nullcontext(),
        "is_available": lambda: True,
    }.items():
        monkeypatch.setattr(torch.cuda, name, stand_in)
    monkeypatch.setitem(
        sys.modules, "vllm.distributed.weight_transfer", SimpleNamespace(WeightTransferTrainerFactory=Factory)
    )
    engine = SimpleNamespace(NCCLTrainerInitInfo=lambda **info: SimpleNamespace(**info))
    monkeypatch.setitem(sys.modules, "vllm.distributed.weight_transfer.nccl_engine", engine)


class Factory:
    """vLLM's trainer side: what is broadcast reaches the server of the same port."""

    servers: dict[str, LocalServer] = {}
    made: list[Any] = []
    shut: list[Any] = []

    @classmethod
    def trainer_init(cls, info: Any, *, client: Any, source: Any) -> Any:
        client.init_weight_transfer_engine({"master_port": info.master_port, "world_size": info.world_size})

        def send_weights() -> None:
            described = [(one.name, one.dtype, one.shape) for one in source.metadata()]
            client.start_weight_update()
            client.update_weights({"names": [name for name, _, _ in described]})
            sent = dict(source)
            assert described == [(name, value.dtype, tuple(value.shape)) for name, value in sent.items()]
            cls.servers[client.client.url].load_tensors(sent)
            client.finish_weight_update()

        cls.made.append(SimpleNamespace(send_weights=send_weights, info=info))
        cls.made[-1].shutdown = lambda made=cls.made[-1]: cls.shut.append(made)
        return cls.made[-1]


WAYS = ["folder", "ipc", "nccl"]


@pytest.fixture
def servers(stand_ins: None) -> Iterator[list[LocalServer]]:
    made = [LocalServer(tiny.model(seed=seed), tiny.tokenizer()) for seed in (3, 4)]
    Factory.servers, Factory.made, Factory.shut = {server.url: server for server in made}, [], []
    yield made
    for server in made:
        server.faults.clear()
        server.stop()


@pytest.fixture
def model() -> Any:
    made = tiny.model()
    prepare_for_scoring(made)
    return made


@pytest.fixture
def engine() -> Iterator[Any]:
    opened: list[VLLMServerEngine] = []

    def start(model: Any, servers: list[LocalServer], way: str, **options: Any) -> VLLMServerEngine:
        for server in servers:
            if way == "folder":
                plug(server)
            else:
                server.backend = way
        pool = ServerPool([(server.url, server.token) for server in servers], tiny.tokenizer(), DEADLINES)
        pool.call(pool.connect())
        opened.append(VLLMServerEngine(model, tiny.tokenizer(), pool, bound=1e-6, transport=way, **options))
        return opened[-1]

    yield start
    for made in opened:
        made.close()


@pytest.mark.parametrize("way", WAYS)
def test_servers_sample_from_what_was_sent(servers: list[LocalServer], model: Any, engine: Any, way: str) -> None:
    made = engine(model, servers, way)
    for step in range(3):
        tiny.move(model, 1e-2, seed=step)
        metrics = made.sync(step)
        assert metrics["sampling/servers"] == 2
        assert metrics["sampling/probe/difference"] < 1e-5
        check_completions(REQUESTS, made.generate(REQUESTS, seed=1, step=step), vocab_size=96)
    assert all("/collective_rpc" not in server.calls for server in servers)
    assert len(Factory.made) == (2 if way == "nccl" else 0), "a group is met once"
    assert (made._folders is None) == (way != "folder"), "nothing is written that nothing reads"


@pytest.mark.parametrize("way", WAYS)
def test_the_first_phase_changes_nothing_and_the_second_is_paused(
    servers: list[LocalServer], model: Any, engine: Any, way: str
) -> None:
    seen: list[tuple[str, bool, str]] = []
    server = servers[0]
    made = engine(model, [server], way)
    server.before_answer = lambda path, body: seen.append((path, server.paused, server.weight_version))
    made.sync(3)
    at = {path: (paused, version) for path, paused, version in seen}
    assert at["/init_weight_transfer_engine"] == (False, "default")
    for path in ("/start_weight_update", "/update_weights", "/finish_weight_update", "/reset_prefix_cache"):
        assert at[path] == (True, f"{server.weight_version}, on its way")
    assert not server.paused


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(
    ("fault", "cause"),
    [("ignore_reload", "bit for bit"), ("keep_head", "part of the weights was left behind|has another model")],
)
def test_weights_that_do_not_arrive_are_found_at_once(
    servers: list[LocalServer], model: Any, engine: Any, way: str, fault: str, cause: str
) -> None:
    made = engine(model, servers, way)
    made.sync(0)
    servers[1].faults.add(fault)
    tiny.move(model, 1e-2)
    with pytest.raises(CheckFailed, match=cause) as error:
        made.sync(1)
    assert servers[1].url in str(error.value)


@pytest.mark.parametrize("way", WAYS)
def test_a_server_that_fails_half_way_answers_nothing_until_it_is_restarted(
    servers: list[LocalServer], model: Any, engine: Any, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = engine(model, servers, way)
    made.sync(0)
    victim = servers[1]

    def refuse(path: str, body: Any) -> None:
        raise ConnectionResetError

    def die(status: int) -> None:
        victim.before_answer = refuse
        raise Died(status)

    monkeypatch.setattr(vllm_plugin.os, "_exit", die)
    victim.faults.add("half")
    tiny.move(model, 1e-2)
    assert made.sync(1)["sampling/servers"] == 1
    assert victim.paused
    if way != "folder":
        # It lives: another attempt would mix two versions, so it is left alone, with a note to restart it.
        victim.faults.clear()
        victim.calls.clear()
        assert victim.weight_version.endswith(", failed")
        tiny.move(model, 1e-2, seed=8)
        assert made.sync(2)["sampling/servers"] == 1
        assert "/start_weight_update" not in victim.calls
        assert "only a part of burnish-" in made._pool.servers[1].reason
    victim.restart(tiny.model(seed=9))
    victim.faults.clear()
    victim.before_answer = lambda path, body: None
    tiny.move(model, 1e-2, seed=9)
    assert made.sync(3)["sampling/servers"] == 2
    check_completions(REQUESTS, made.generate(REQUESTS, seed=1, step=3), vocab_size=96)
    if way == "nccl":
        assert len(Factory.made) == 3, "a restarted server is met again"
        assert len(Factory.shut) == 1, "a group that failed is aborted"


@pytest.mark.parametrize("way", WAYS)
def test_a_trainer_that_ended_in_the_middle_leaves_no_mixture(
    servers: list[LocalServer], model: Any, engine: Any, way: str
) -> None:
    """The plug-in has loaded the whole version or ended; of vLLM's own back ends nobody knows."""
    for server in servers:
        server.is_updating, server.paused, server.weight_version = True, True, "burnish-0-3-1, on its way"
    made = engine(model, servers, way)
    if way == "folder":
        assert made.sync(0)["sampling/servers"] == 2
        return
    servers[0].restart(tiny.model(seed=9))
    assert made.sync(0)["sampling/servers"] == 1
    assert servers[1].weight_version == "burnish-0-3-1, failed"
    assert servers[1].paused


def damage(made: VLLMServerEngine) -> None:
    """Leave a file out of every version from now on."""
    write = made._folders.write

    def write_less(*args: Any) -> Path:
        folder = write(*args)
        (folder / "config.json").unlink()
        return folder

    made._folders.write = write_less


def test_a_mixture_stays_paused_when_nothing_can_be_prepared(
    servers: list[LocalServer], model: Any, engine: Any
) -> None:
    server = servers[0]
    server.paused, server.weight_version = True, "burnish-0-3-1, on its way"
    made = engine(model, [server], "folder")
    damage(made)
    with pytest.raises(EngineError, match="keeps its weights"):
        made.sync(0)
    assert server.paused


def test_a_restarted_server_is_met_in_a_group_again(servers: list[LocalServer], model: Any, engine: Any) -> None:
    made = engine(model, servers, "nccl")
    made.sync(0)
    servers[1].restart(tiny.model(seed=9))
    tiny.move(model, 1e-2)
    assert made.sync(1)["sampling/servers"] == 2
    assert len(Factory.made) == 3


def test_weights_that_cannot_be_prepared_leave_the_version_before(
    servers: list[LocalServer], model: Any, engine: Any, tmp_path: Path
) -> None:
    made = engine(model, servers, "folder", weights_dir=str(tmp_path / "weights"))
    made.sync(0)
    before = made._updates.newest
    for server in servers:
        server.token_seconds = 0.05
    made.start([replace(request, params=SamplingParams(60)) for request in REQUESTS], seed=1, step=0)
    time.sleep(0.3)
    damage(made)
    tiny.move(model, 1e-2)
    with pytest.raises(EngineError, match=r"keeps its weights.*No such file.*set vllm_weights_dir"):
        made.sync(1)
    for held, server in zip(made._pool.servers, servers, strict=True):
        assert server.weight_version == before.tag
        assert not server.paused
        made._pool.call(prove(held, before, DEADLINES))


def test_a_file_that_changed_on_its_way_is_not_loaded(
    servers: list[LocalServer], model: Any, engine: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = engine(model, servers[:1], "folder")
    monkeypatch.setattr(transfer, "folder_checksum", lambda folder: 7)
    with pytest.raises(EngineError, match=r"checksum of .* is \d+, not 7"):
        made.sync(0)
    assert servers[0].weight_version == "default"


def test_groups_go_on_while_a_version_is_prepared(servers: list[LocalServer], model: Any, engine: Any) -> None:
    made = engine(model, servers, "folder")
    made.sync(3)
    for server in servers:
        server.token_seconds = 0.05
    requests = [Request([5 + i, 6, 7], 2, SamplingParams(30), index=i) for i in range(4)]
    begun = made.start(requests, seed=1, step=0)
    time.sleep(0.5)
    tiny.move(model, 0.1)
    made.sync(4)
    found = [samples.result() for samples in begun]
    check_completions(requests, found, vocab_size=96)
    versions = {version for group in found for one in group for version in one.token["policy_version"]}
    assert versions == {3.0, 4.0}


def test_a_server_without_the_plug_in_is_reloaded(servers: list[LocalServer], model: Any, engine: Any) -> None:
    made = engine(model, servers, "folder")
    wanted = engine(model, [LocalServer(tiny.model(), tiny.tokenizer())], "folder")
    servers[0].backend = None
    made._pool.servers[0].served = None
    made.sync(0)
    wanted.sync(0)
    assert "/collective_rpc" in servers[0].calls
    assert "/update_weights" in servers[1].calls
    assert tokens(made.generate(REQUESTS, seed=1, step=0)) == tokens(wanted.generate(REQUESTS, seed=1, step=0))


def test_an_update_by_ipc_has_the_shape_that_vllm_reads(servers: list[LocalServer], model: Any, engine: Any) -> None:
    """The fields of vLLM 0.32's `IPCWeightTransferUpdateInfo`; `test_vllm_reads_the_body` asks vLLM itself."""
    engine(model, servers[:1], "ipc").sync(0)
    assert servers[0].init_info == {"packed": False}
    info, weights = servers[0].update_info, checkpoint_weights(model)
    assert info.keys() == {"names", "dtype_names", "shapes", "ipc_handles_pickled"}
    assert info["names"] == list(weights)
    assert info["dtype_names"] == ["float32"] * len(weights)
    assert info["shapes"] == [list(value.shape) for value in weights.values()]


def test_a_server_on_another_gpu_is_refused_before_anything_changes(
    servers: list[LocalServer], model: Any, engine: Any
) -> None:
    port = int(servers[0].url.rsplit(":", 1)[1])
    register(port, {"gpus": ["GPU-2", "GPU-1"]})
    made = engine(model, servers[:1], "ipc")
    with pytest.raises(EngineError, match=r'runs on GPU-2 and the trainer on GPU-1.*or use "nccl"'):
        made.sync(0)
    assert "/pause" not in servers[0].calls
    forget(port)


@pytest.mark.parametrize("way", ["ipc", "nccl"])
def test_a_server_with_another_back_end_is_refused_with_the_fix(
    servers: list[LocalServer], model: Any, engine: Any, way: str
) -> None:
    made = engine(model, servers[:1], way)
    servers[0].backend = None
    made._pool.servers[0].served = None
    with pytest.raises(EngineError, match=rf"back end None.*burnish serve MODEL --weight-transfer {way}"):
        made.sync(0)


CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)


@pytest.mark.parametrize(
    ("device", "backends", "gpus", "by", "way"),
    [
        (GPU, ["ipc"], ["GPU-1"], {}, "ipc"),
        (GPU, ["ipc"], ["GPU-2"], {}, "folder"),
        (GPU, ["ipc"], [], {}, "folder"),
        (GPU, ["ipc"], ["GPU-1"], {"ranks": 2}, "folder"),
        (GPU, ["ipc"], ["GPU-1"], {"overlaps": True}, "folder"),
        (GPU, ["nccl"], ["GPU-2"], {}, "nccl"),
        (GPU, ["nccl"], [], {"ranks": 2}, "nccl"),
        (GPU, ["nccl"], ["GPU-1"], {}, "folder"),
        (GPU, ["nccl", "ipc"], ["GPU-2"], {}, "folder"),
        (GPU, ["burnish"], ["GPU-1"], {}, "folder"),
        (GPU, [None], ["GPU-1"], {}, "folder"),
        (GPU, [], [], {}, "folder"),
        (CPU, ["ipc"], ["GPU-1"], {}, "folder"),
    ],
)
def test_the_way_is_chosen_by_where_the_weights_are(
    stand_ins: None,
    monkeypatch: pytest.MonkeyPatch,
    device: torch.device,
    backends: list[str | None],
    gpus: list[str],
    by: dict[str, Any],
    way: str,
) -> None:
    monkeypatch.setattr(transfer.importlib.util, "find_spec", lambda name: name == "vllm")
    register(8000, {"gpus": gpus})
    servers = [
        SimpleNamespace(client=SimpleNamespace(url="http://127.0.0.1:8000"), served=Served("m", "m", None, backend))
        for backend in backends
    ]
    options = {"ranks": 1, "overlaps": False, **by}
    assert choose_transport("auto", device, servers, **options) == way
    assert choose_transport("ipc", device, servers, **options) == "ipc"
    monkeypatch.setattr(transfer.importlib.util, "find_spec", lambda name: None)
    if way == "nccl":
        assert choose_transport("auto", device, servers, **options) == "folder"
        with pytest.raises(ConfigError, match=r"\"nccl\" needs vLLM's communicator .*pip install"):
            check_transport("nccl")
    check_transport("ipc")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("way", ["ipc", "nccl"])
def test_a_way_that_needs_a_gpu_is_refused_without_one(way: str) -> None:
    with pytest.raises(ConfigError, match=rf'vllm_weight_transfer = "{way}": the trainer has no GPU.*"folder"'):
        check_transport(way)
    check_transport("auto")
    check_transport("folder")


def test_weights_that_change_while_servers_sample_go_by_the_folder() -> None:
    fields = {"use_vllm": True, "vllm_mode": "server", "max_staleness": 1}
    with pytest.raises(ConfigError, match=r'vllm_weight_transfer = "nccl" with max_staleness = 1.*"folder"'):
        GRPOConfig(**fields, vllm_weight_transfer="nccl")
    GRPOConfig(**fields, vllm_weight_transfer="folder")
    with pytest.raises(ConfigError, match=r"vllm_weight_transfer = 'carrier pigeon'"):
        GRPOConfig(**fields, vllm_weight_transfer="carrier pigeon")


@pytest.mark.vllm
def test_vllm_reads_the_body(monkeypatch: pytest.MonkeyPatch) -> None:
    """In the environment of vLLM: its own classes take what is sent."""
    ipc = pytest.importorskip("vllm.distributed.weight_transfer.ipc_engine")
    nccl = pytest.importorskip("vllm.distributed.weight_transfer.nccl_engine")
    monkeypatch.setenv("VLLM_ALLOW_INSECURE_SERIALIZATION", "1")
    monkeypatch.setattr(transfer.reductions, "reduce_tensor", lambda value: (None, (1, 2)))
    info = ipc.IPCWeightTransferUpdateInfo(**transfer.ipc_update_info({"a": torch.zeros(2, 3)}, "GPU-1"))
    assert info.ipc_handles == [{"GPU-1": (1, 2)}]
    assert ipc.IPCWeightTransferInitInfo(packed=False) is not None
    host, port = transfer._rendezvous("http://127.0.0.1:8000")
    assert nccl.NCCLTrainerInitInfo(master_address=host, master_port=port, world_size=2, rank=0).is_sender
    # vLLM's own `update_weights` alone calls the last one.
    assert set(vars(FolderTransferEngine)) >= ipc.WeightTransferEngine.__abstractmethods__ - {"receive_weights"}


@pytest.mark.gpu
@pytest.mark.vllm
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("way", WAYS)
def test_real_servers_on_gpus_take_weights_by_every_way(way: str, tmp_path: Path) -> None:
    from burnish.rollout.vllm.registry import token_of
    from vllm_sources import Served as Started
    from vllm_sources import fresh

    if way == "nccl" and torch.cuda.device_count() < 2:
        pytest.skip("NCCL needs two GPUs")
    trained = fresh(tie_word_embeddings=True).cuda(1 if way == "nccl" else 0)
    trained.save_pretrained(tmp_path / "model")
    tiny.tokenizer().save_pretrained(tmp_path / "model")
    options = ["--weight-transfer", way]
    server = Started(tmp_path / "model", tmp_path / "log", *options, environment={"CUDA_VISIBLE_DEVICES": "0"})
    try:
        server.wait()
        pool = ServerPool([(server.url, token_of(server.url))], tiny.tokenizer(), DEADLINES)
        pool.call(pool.connect())
        assert choose_transport("auto", trained.device, pool.servers, ranks=1, overlaps=False) == way
        made = VLLMServerEngine(trained, tiny.tokenizer(), pool, bound=1e-5, transport=way)
        for step in range(3):
            tiny.move(trained, 1e-2, seed=step)
            started = time.monotonic()
            print(way, made.sync(step), f"{time.monotonic() - started:.2f} s")
            check_completions(REQUESTS, made.generate(REQUESTS, seed=1, step=step), vocab_size=96)
        made.close()
    finally:
        server.stop()
