"""Real vLLM servers on a CPU, started by `burnish serve`: what only servers have, and how they are lost.

`make servers` runs them; they need .venv-vllm (`make vllm`).
"""

from __future__ import annotations

import copy
import json
import os
import shutil
import signal
import time
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from transformers import TrainerCallback

import tiny
from burnish.errors import CheckFailed, ConfigError, EngineError
from burnish.rollout import Request, SamplingParams
from burnish.rollout.validation import check_completions
from burnish.rollout.vllm import Deadlines, ServerPool, VLLMServerEngine
from burnish.rollout.vllm.delivery import prove
from burnish.rollout.vllm.registry import token_of
from burnish.types import Completion
from test_staleness import trained_prompts
from test_vllm_config import ROWS, logged, trainer
from test_vllm_pool import versions_of
from vllm_proxy import Proxy
from vllm_sources import DEADLINES, VOCAB, Served, fresh, lora

pytestmark = pytest.mark.vllm

PARAMS = SamplingParams(12, eos_token_ids=(0,))
REQUESTS = [Request([5 + i, 6, 7], 4, PARAMS, index=i) for i in range(6)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("model")
    fresh(tie_word_embeddings=True).save_pretrained(made)
    tiny.tokenizer().save_pretrained(made)
    return made


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[Served]:
    made = Served(folder, folder.parent / "server.log")
    try:
        made.wait()
        yield made
    finally:
        made.stop()


@pytest.fixture(scope="module")
def other(folder: Path, server: Served) -> Iterator[Served]:
    """A second server, which the tests kill and stop."""
    made = Served(folder, folder.parent / "other.log", "--restarts", "9")
    try:
        made.wait()
        yield made
    finally:
        made.stop()


@pytest.fixture
def opened() -> Iterator[list[VLLMServerEngine]]:
    made: list[VLLMServerEngine] = []
    yield made
    for engine in made:
        engine.close()


@pytest.fixture
def engine(opened: list[VLLMServerEngine]) -> Any:
    def start(model: Any, *urls: str, token: str | None = None, deadlines: Deadlines = DEADLINES) -> VLLMServerEngine:
        pool = ServerPool([(url, token or token_of(url)) for url in urls], tiny.tokenizer(), deadlines)
        pool.call(pool.connect())
        opened.append(VLLMServerEngine(model, tiny.tokenizer(), pool, bound=1e-6))
        return opened[-1]

    return start


def tokens(groups: list[list[Completion]]) -> list[list[int]]:
    return [completion.token_ids for group in groups for completion in group]


def with_base(server: Served, engine: Any) -> None:
    """Give the server the base weights of the adapters' tests again."""
    engine(fresh(tie_word_embeddings=True), server.url).sync(0)


def test_another_base_than_the_adapters_is_found(server: Served, engine: Any) -> None:
    engine(fresh(seed=12, tie_word_embeddings=True), server.url).sync(0)
    made = engine(lora(fresh(tie_word_embeddings=True)), server.url)
    with pytest.raises(CheckFailed, match="another model"):
        made.sync(0)
    with_base(server, engine)


def test_another_tokenizer_is_refused(server: Served) -> None:
    other = tiny.tokenizer()
    state = json.loads(other.backend_tokenizer.to_str())
    vocabulary = state["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    swapped = type(other)(
        tokenizer_object=type(other.backend_tokenizer).from_str(json.dumps(state)), eos_token="<eos>", unk_token="<unk>"
    )
    with pytest.raises(ConfigError, match="another tokenizer"):
        ServerPool.connected([server.url], swapped, 30.0)


def test_another_temperature_stops_the_run(server: Served, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    proxy = Proxy(server.url, "")
    monkeypatch.setenv("VLLM_API_KEY", token_of(server.url) or "")
    for fault in ("", "hot"):
        proxy.faults = {fault}
        made = trainer(tmp_path, proxy.url, fresh(seed=11))
        with pytest.raises(CheckFailed, match="step 0: sampler and trainer mismatch") if fault else nullcontext():
            made.train()
        made.stage.sampler.engine.close()
    proxy.stop()


@pytest.mark.parametrize("with_adapters", [False, True])
def test_groups_go_on_over_a_change_of_weights(
    server: Served, engine: Any, with_adapters: bool, caplog: pytest.LogCaptureFixture
) -> None:
    with_base(server, engine)
    requests = [replace(request, index=i) for i, request in enumerate(4 * LONG)]
    trained = lora(fresh(tie_word_embeddings=True)) if with_adapters else fresh(seed=14)
    made = engine(trained, server.url)
    made.sync(3)
    timed(made, REQUESTS)
    before = copy.deepcopy(trained)
    sampled = server.sampled_tokens()
    begun = made.start(requests, seed=1, step=0)
    while server.sampled_tokens() < sampled + 5_000:  # of 76,800
        assert not all(samples.done() for samples in begun)
        time.sleep(0.05)
    tiny.move(trained, 0.1)
    started = time.monotonic()
    made.sync(4)
    print(f"sync with {len(requests)} groups running: {time.monotonic() - started:.1f} s")
    found = [samples.result() for samples in begun]
    check_completions(requests, found, vocab_size=VOCAB)
    assert (3.0, 4.0) in versions_of(requests, found, {3: before, 4: trained}, within=2e-4)
    assert "lost" not in caplog.text


def test_a_run_ahead_outlives_a_killed_server(
    server: Served, other: Served, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """GRPO two rollouts ahead: kill -9 of one of two servers loses no group, repeats none, and keeps the bound."""
    tokens_of = {url: token_of(url) for url in (server.url, other.url)}
    assert len(tokens_of) == 2
    model = fresh(seed=15)

    class Kill(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 2:
                for pid in other.pids("vllm") + other.pids("VLLM"):
                    os.kill(pid, signal.SIGKILL)

    made = trainer(
        tmp_path, [server.url, other.url], model, max_staleness=2, max_steps=8, max_completion_length=60,
        shuffle_dataset=False, log_completions=True, vllm_server_timeout=300.0,
    )  # fmt: skip
    made.add_callback(Kill())
    made.train()
    assert max(logged(made, "sampling/staleness/max")) <= 2
    assert trained_prompts(tmp_path) == [row["prompt"] for row in ROWS] * 2
    made.stage.sampler.engine.close()
    other.wait()


# Servers that die, stop or slow down.


def timed(made: VLLMServerEngine, requests: list[Request]) -> tuple[list[list[int]], float]:
    started = time.monotonic()
    found = made.generate(requests, seed=1, step=0)
    check_completions(requests, found, vocab_size=VOCAB)
    return tokens(found), time.monotonic() - started


LONG = [Request([5 + i, 6, 7], 8, SamplingParams(200), index=i) for i in range(12)]


def disturbed(made: VLLMServerEngine, action: Any, after: float = 1.0) -> tuple[list[list[int]], float]:
    """Generate while something happens a moment later."""
    import threading

    timer = threading.Timer(after, action)
    timer.start()
    try:
        return timed(made, LONG)
    finally:
        timer.join()


def test_two_servers_share_the_work(server: Served, other: Served, engine: Any) -> None:
    made = engine(fresh(seed=14), server.url, other.url)
    assert made.sync(0)["sampling/servers"] == 2
    timed(made, REQUESTS)
    assert [len(s.client.url) > 0 and s.version is not None for s in made._pool.servers] == [True, True]


def test_kill_9_loses_no_group_and_the_server_rejoins(server: Served, other: Served, engine: Any) -> None:
    model = fresh(seed=14)
    made = engine(model, server.url, other.url)
    made.sync(0)

    def kill() -> None:
        for pid in other.pids("vllm") + other.pids("VLLM"):
            os.kill(pid, signal.SIGKILL)

    _, seconds = disturbed(made, kill)
    print(f"kill -9: {seconds:.1f} s for {len(LONG)} groups")
    started = time.monotonic()
    other.wait()
    print(f"`burnish serve` had it up again {time.monotonic() - started:.1f} s later")
    tiny.move(model, 1e-2)
    assert made.sync(1)["sampling/servers"] == 2


def test_a_stopped_server_is_dropped_and_rejoins(server: Served, other: Served, engine: Any) -> None:
    model = fresh(seed=14)
    made = engine(model, server.url, other.url, deadlines=Deadlines(start=900.0, call=20.0, heartbeat=2.0, misses=2))
    made.sync(0)
    stopped = other.pids("")

    def signal_all(number: int) -> None:
        for pid in stopped:
            os.kill(pid, number)

    try:
        _, seconds = disturbed(made, lambda: signal_all(signal.SIGSTOP))
        print(f"SIGSTOP: {seconds:.1f} s for {len(LONG)} groups")
        tiny.move(model, 1e-2)
        assert made.sync(1)["sampling/servers"] == 1
    finally:
        signal_all(signal.SIGCONT)
    tiny.move(model, 1e-2, seed=8)
    assert made.sync(2)["sampling/servers"] == 2


@pytest.mark.parametrize("fault", ["deaf", "dribble"])
def test_a_slow_socket_is_left(server: Served, other: Served, engine: Any, fault: str) -> None:
    model = fresh(seed=14)
    proxy = Proxy(other.url, "")
    pool = ServerPool(
        [(server.url, token_of(server.url)), (proxy.url, token_of(other.url))],
        tiny.tokenizer(),
        Deadlines(start=900.0, call=20.0, heartbeat=2.0, misses=2),
    )
    pool.call(pool.connect())
    made = VLLMServerEngine(model, tiny.tokenizer(), pool, bound=1e-6)
    made.sync(0)
    _, seconds = disturbed(made, lambda: proxy.faults.add(fault))
    print(f"{fault} socket: {seconds:.1f} s for {len(LONG)} groups")
    assert [server.version is not None for server in pool.servers] == [True, False]
    proxy.faults.clear()
    tiny.move(model, 1e-2)
    assert made.sync(1)["sampling/servers"] == 2
    made.close()
    proxy.stop()


def test_a_death_in_the_middle_of_a_sync_is_no_mixture(server: Served, other: Served, engine: Any) -> None:
    """The worker dies while it loads: the server answers nothing until it is restarted and has all weights."""
    model = fresh(seed=14)
    made = engine(model, server.url, other.url)
    made.sync(0)
    tiny.move(model, 1e-2)
    victim = made._pool.servers[1].client
    post = victim.post

    async def dying(path: str, body: Any, **options: Any) -> Any:
        if path == "/update_weights":
            victim.post = post
            for pid in other.pids("VLLM::Worker") or other.pids("multiprocessing"):
                os.kill(pid, signal.SIGKILL)
        return await post(path, body, **options)

    victim.post = dying
    assert made.sync(1)["sampling/servers"] == 1
    timed(made, REQUESTS)
    other.wait()
    tiny.move(model, 1e-2, seed=8)
    assert made.sync(2)["sampling/servers"] == 2
    timed(made, REQUESTS)


def test_weights_that_cannot_be_prepared_leave_the_version_before(server: Served, engine: Any) -> None:
    model = fresh(seed=14)
    made = engine(model, server.url)
    made.sync(0)
    before, write = made._updates.newest, made._folders.write

    def damage(*args: Any) -> Path:
        folder = write(*args)
        file = folder / "model.safetensors"
        os.truncate(file, file.stat().st_size - 64)
        return folder

    made._folders.write = damage
    tiny.move(model, 1e-2)
    with pytest.raises(EngineError, match=r"keeps its weights.*is damaged"):
        made.sync(1)
    (held,) = made._pool.servers
    made._pool.call(prove(held, before, DEADLINES))
    made._folders.write = write
    tiny.move(model, 1e-2, seed=8)
    assert made.sync(2)["sampling/servers"] == 1


def test_a_commit_that_fails_ends_the_server_which_comes_back(
    server: Served, other: Served, engine: Any, tmp_path: Path
) -> None:
    model = fresh(seed=14)
    engine(model, server.url, other.url).sync(0)
    made = engine(model, server.url, other.url)
    prepare = made._pool.transfer.prepare

    async def with_another_tensor(client: Any, served: Any, update: Any, deadlines: Any) -> None:
        """Nothing tells at the first version of a run which tensors the model has."""
        if client.url == other.url:
            update = replace(update, folder=str(shutil.copytree(update.folder, tmp_path / "changed")))
            save_file({"model.layers.9.norm.weight": torch.zeros(1)}, tmp_path / "changed" / "another.safetensors")
        await prepare(client, served, update, deadlines)

    made._pool.transfer.prepare = with_another_tensor
    assert made.sync(1)["sampling/servers"] == 1
    made._pool.transfer.prepare = prepare
    other.wait()
    tiny.move(model, 1e-2)
    assert made.sync(2)["sampling/servers"] == 2
    timed(made, REQUESTS)


def test_a_raw_server_reports_the_policys_log_probabilities(folder: Path) -> None:
    """Under truncation and a penalty, of which another server's are not the policy's."""
    made, model = Served(folder, folder.parent / "raw.log", "--raw-logprobs"), fresh(tie_word_embeddings=True)
    try:
        made.wait()
        pool = ServerPool([(made.url, token_of(made.url))], tiny.tokenizer(), DEADLINES, ("raw",))
        pool.call(pool.connect())
        engine = VLLMServerEngine(model, tiny.tokenizer(), pool, bound=1e-6)
        tiny.move(model, 0.05)
        engine.sync(0)
        params = SamplingParams(12, top_k=4, top_p=0.9, repetition_penalty=1.3)
        for completion in engine.generate([Request([5, 6, 7], 4, params)], seed=1, step=0)[0]:
            ids = torch.tensor([[5, 6, 7, *completion.token_ids]])
            with torch.no_grad():
                rows = model(input_ids=ids).logits[0, 2:-1].log_softmax(-1)
            expected = rows.gather(1, ids[0, 3:, None])[:, 0].tolist()
            assert completion.policy_logprobs == pytest.approx(expected, abs=2e-4)
            assert completion.sampler_logprobs is None
        engine.close()
    finally:
        made.stop()
