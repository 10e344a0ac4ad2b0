"""The pool of servers and the engine on it, against local HTTP servers that fail on order."""

from __future__ import annotations

import asyncio
import copy
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
import torch
from peft import LoraConfig

import tiny
from burnish.errors import CheckFailed, ConfigError, EngineError, RewardError
from burnish.model.adapters import add_adapters
from burnish.model.scoring import prepare_for_scoring
from burnish.rollout import Request, SamplingParams
from burnish.rollout.validation import check_completions
from burnish.rollout.vllm import Deadlines, ServerPool, VLLMServerEngine
from burnish.rollout.vllm.client import ServerClient
from burnish.rollout.vllm.registry import forget, register, token_of
from local_server import LocalServer

# Short, but a machine that is busy elsewhere must not lose a healthy server.
DEADLINES = Deadlines(start=20.0, call=10.0, sync=20.0, heartbeat=0.5, misses=3, stall=3.0, slow=60.0)
PARAMS = SamplingParams(6, eos_token_ids=(0,))
REQUESTS = [Request([5 + i, 6, 7], 3, PARAMS, index=i) for i in range(5)]


@pytest.fixture
def servers() -> Iterator[list[LocalServer]]:
    made = [LocalServer(tiny.model(seed=seed), tiny.tokenizer()) for seed in (3, 4)]
    yield made
    for server in made:
        server.faults.clear()
        server.stop()


@pytest.fixture
def model() -> Any:
    made = tiny.model()
    prepare_for_scoring(made)
    return made


_OPEN: list[VLLMServerEngine] = []


@pytest.fixture(autouse=True)
def _closing() -> Iterator[None]:
    yield
    while _OPEN:
        _OPEN.pop().close()


def engine(
    model: Any, servers: list[LocalServer], deadlines: Deadlines = DEADLINES, **collectives: Any
) -> VLLMServerEngine:
    pool = ServerPool([(server.url, server.token) for server in servers], tiny.tokenizer(), deadlines)
    pool.call(pool.connect())
    _OPEN.append(VLLMServerEngine(model, tiny.tokenizer(), pool, bound=1e-6, **collectives))
    return _OPEN[-1]


def tokens(groups: list[Any]) -> list[list[int]]:
    return [completion.token_ids for group in groups for completion in group]


def test_servers_share_the_groups_and_sample_from_the_trainers_weights(servers: list[LocalServer], model: Any) -> None:
    made = engine(model, servers)
    metrics = made.sync(0)
    assert metrics["sampling/servers"] == 2
    assert metrics["sampling/probe/difference"] < 1e-5
    groups = made.generate(REQUESTS, seed=1, step=0)
    check_completions(REQUESTS, groups, vocab_size=96)
    assert [len(server.sampled) for server in servers] in ([3, 2], [2, 3])
    assert {body["model"] for server in servers for body in server.sampled} == {"base"}
    # The same on one server: samples are keyed by (seed, step, prompt, sample).
    alone = engine(model, servers[:1])
    alone.sync(0)
    assert tokens(alone.generate(REQUESTS, seed=1, step=0)) == tokens(groups)
    assert tokens(alone.generate(REQUESTS, seed=1, step=1)) != tokens(groups)
    later = [Request(r.prompt_ids, 1, PARAMS, index=r.index, first_sample=2) for r in REQUESTS]
    assert tokens(alone.generate(later, seed=1, step=0)) == tokens(groups)[2::3]
    made.close()


def test_a_sync_without_a_change_delivers_nothing(servers: list[LocalServer], model: Any) -> None:
    made = engine(model, servers)
    made.sync(0)
    for server in servers:
        server.calls.clear()
    assert made.sync(0) == {}
    assert all("/collective_rpc" not in server.calls for server in servers)
    tiny.move(model, 1e-3)
    assert made.sync(1)["sampling/probe/moved"] > 0
    assert all("/collective_rpc" in server.calls for server in servers)


def test_a_change_that_the_probe_cannot_see_is_delivered(servers: list[LocalServer]) -> None:
    """Rows of untied embeddings that no probe token reads change nothing that the probe measures."""
    model = tiny.model(tie_word_embeddings=False)
    prepare_for_scoring(model)
    made = engine(model, servers)
    made.sync(0)
    used = {token for ids in made._updates.sequences for token in ids}
    row = next(token for token in range(96) if token not in used)
    with torch.no_grad():
        model.get_input_embeddings().weight[row] += 1.0
    assert made.sync(1)["sampling/probe/moved"] == 0
    wanted = model.get_input_embeddings().weight[row]
    assert all(torch.equal(server.model.get_input_embeddings().weight[row], wanted) for server in servers)


def test_a_server_is_paused_while_its_weights_change(servers: list[LocalServer], model: Any) -> None:
    seen: list[tuple[str, bool, str]] = []
    server = servers[0]
    server.before_answer = lambda path, body: seen.append((path, server.paused, server.weight_version))
    made = engine(model, [server])
    made.sync(3)
    at = {path: (paused, version) for path, paused, version in seen}
    between = f"{server.weight_version}, on its way"
    assert at["/collective_rpc"] == (True, between)
    assert at["/reset_prefix_cache"] == (True, between)
    assert server.weight_version.startswith("burnish-")
    assert not server.paused


@pytest.mark.parametrize(
    ("fault", "size", "cause"),
    [
        ("ignore_reload", 1e-4, "bit for bit"),
        ("ignore_reload", 1e-2, "bit for bit"),
        ("keep_head", 1e-2, "part of the weights was left behind|has another model"),
    ],
)
def test_weights_that_do_not_arrive_are_found_at_once(
    servers: list[LocalServer], model: Any, fault: str, size: float, cause: str
) -> None:
    made = engine(model, servers)
    made.sync(0)
    servers[1].faults.add(fault)
    tiny.move(model, size)
    with pytest.raises(CheckFailed, match=cause) as error:
        made.sync(1)
    assert servers[1].url in str(error.value)


def test_another_model_is_found_at_the_first_sync(servers: list[LocalServer], model: Any) -> None:
    servers[0].faults.add("ignore_reload")
    made = engine(model, servers)
    with pytest.raises(CheckFailed, match=r"does not sample from the weights .* another model, another dtype"):
        made.sync(0)


def lora(model: Any, **changes: Any) -> Any:
    config = LoraConfig(r=8, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM", **changes)
    adapted, _ = add_adapters(model, config, seed=0)
    prepare_for_scoring(adapted)
    return adapted


@pytest.fixture
def base_servers() -> Iterator[list[LocalServer]]:
    """Servers that have the base model already, as for adapters."""
    made = [LocalServer(tiny.model(), tiny.tokenizer()) for _ in range(2)]
    yield made
    for server in made:
        server.stop()


def test_adapters_are_loaded_by_name_and_the_one_before_goes(base_servers: list[LocalServer]) -> None:
    servers, adapted = base_servers, lora(tiny.model())
    made = engine(adapted, servers)
    made.sync(0)
    tiny.move(adapted, 0.1)
    made.sync(1)
    groups = made.generate(REQUESTS, seed=1, step=0)
    check_completions(REQUESTS, groups, vocab_size=96)
    for server in servers:
        assert len(server.adapters) == 1
        assert server.calls.count("/v1/load_lora_adapter") == 2, "each arrives at the first attempt"
        assert "/collective_rpc" not in server.calls
        assert {body["model"] for body in server.sampled} == set(server.adapters)
    made.close()
    assert all(not server.adapters for server in servers)


def test_an_adapter_that_never_arrives_is_named(base_servers: list[LocalServer]) -> None:
    servers, adapted = base_servers, lora(tiny.model())
    made = engine(adapted, servers)
    made.sync(0)
    servers[0].faults.add("drop_adapter")
    tiny.move(adapted, 0.02)
    with pytest.raises(CheckFailed, match="the adapter never arrived"):
        made.sync(1)


def test_a_refused_adapter_says_how_to_start_the_server(base_servers: list[LocalServer]) -> None:
    servers, adapted = base_servers, lora(tiny.model())
    for server in servers:
        server.faults.add("refuse_rank")
    made = engine(adapted, servers)
    started = time.monotonic()
    with pytest.raises(EngineError, match=r"max_lora_rank 1.*burnish serve MODEL --lora-rank 8"):
        made.sync(0)
    assert time.monotonic() - started < DEADLINES.start


@pytest.mark.parametrize("fault", ["hang", "deaf", "break", "dribble"])
def test_groups_of_a_lost_server_are_replayed_on_the_other(
    servers: list[LocalServer], model: Any, fault: str, caplog: pytest.LogCaptureFixture
) -> None:
    made = engine(model, servers)
    made.sync(0)
    wanted = tokens(made.generate(REQUESTS, seed=1, step=0))
    servers[0].faults.add(fault)
    if fault == "dribble":
        servers[0].faults.add("hang")  # a socket so slow that no answer ends, with a process that makes no tokens
    assert tokens(made.generate(REQUESTS, seed=1, step=0)) == wanted
    assert "vLLM server lost" in caplog.text
    # It rejoins at a sync.
    servers[0].faults.clear()
    tiny.move(model, 1e-3)
    assert made.sync(1)["sampling/servers"] == 2


def test_a_server_that_comes_back_replays_its_own_groups(servers: list[LocalServer], model: Any) -> None:
    only = servers[0]
    made = engine(model, [only])
    made.sync(0)
    wanted = tokens(made.generate(REQUESTS, seed=1, step=0))

    def restart(path: str, body: dict[str, Any]) -> None:
        if "stop" in body:  # dies under its first request, and is started again with the weights of its folder
            only.before_answer = lambda path, body: None
            only.model, only.weight_version = tiny.model(seed=9), "default"
            raise ConnectionResetError

    only.before_answer = restart
    assert tokens(made.generate(REQUESTS, seed=1, step=0)) == wanted


def test_answers_of_a_server_restarted_in_between_are_not_used(servers: list[LocalServer], model: Any) -> None:
    made = engine(model, servers)
    made.sync(0)
    wanted = tokens(made.generate(REQUESTS, seed=1, step=0))
    servers[1].model, servers[1].weight_version = tiny.model(seed=9), "default"
    assert tokens(made.generate(REQUESTS, seed=1, step=0)) == wanted


def versions_of(
    requests: list[Request], groups: list[Any], weights: dict[int, Any], *, within: float
) -> set[tuple[float, ...]]:
    """Compare each token with the weights of its version, and with the others; return the versions of completions."""
    seen: set[tuple[float, ...]] = set()
    for request, group in zip(requests, groups, strict=True):
        for completion in group:
            versions = completion.token["policy_version"]
            assert versions == sorted(versions)
            seen.add(tuple(sorted(set(versions))))
            ids = torch.tensor([[*request.prompt_ids, *completion.token_ids]])
            length = len(request.prompt_ids)
            given = torch.tensor(completion.policy_logprobs)
            for number, model in weights.items():
                with torch.no_grad():
                    row = model(input_ids=ids).logits[0, length - 1 : -1].log_softmax(-1)
                expected = row.gather(1, ids[0, length:, None])[:, 0]
                mine = torch.tensor(versions) == number
                torch.testing.assert_close(given[mine], expected[mine], atol=within, rtol=0)
                assert bool(mine.all()) or float((given - expected).abs()[~mine].mean()) > 20 * within
    return seen


def test_a_connection_that_the_server_may_be_closing_is_not_used_again() -> None:
    """vLLM closes idle connections after 5 seconds: a request on its way then would count as a lost server."""
    connections: list[Any] = []

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def setup(self) -> None:
            super().setup()
            connections.append(self.client_address)

        def do_GET(self) -> None:
            self.send_response(200)
            self.send_header("Content-Length", "2")
            self.end_headers()
            self.wfile.write(b"{}")

        def log_message(self, *words: Any) -> None:
            """Print nothing."""

    async def ask(port: int) -> None:
        client = ServerClient(f"http://127.0.0.1:{port}", None, DEADLINES)
        for seconds, expected in ((0.0, 1), (0.0, 1), (3.0, 2)):
            await asyncio.sleep(seconds)
            await client.get("/health")
            assert len(connections) == expected
        await client.close()

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            asyncio.run(ask(server.server_port))
        finally:
            server.shutdown()
            thread.join()


@pytest.mark.parametrize("with_adapters", [False, True])
def test_groups_go_on_over_a_change_of_weights(
    servers: list[LocalServer], base_servers: list[LocalServer], model: Any, with_adapters: bool
) -> None:
    """Tokens before the change are of the old weights, those after it of the new ones, and say so."""
    used = base_servers if with_adapters else servers
    trained = lora(tiny.model()) if with_adapters else model
    made = engine(trained, used)
    made.sync(3)
    for server in used:
        server.token_seconds = 0.05
    requests = [Request([5 + i, 6, 7], 2, SamplingParams(30), index=i) for i in range(4)]
    before = copy.deepcopy(trained)
    begun = made.start(requests, seed=1, step=0)
    time.sleep(0.7)
    tiny.move(trained, 0.1)
    made.sync(4)
    found = [samples.result() for samples in begun]
    check_completions(requests, found, vocab_size=96)
    assert (3.0, 4.0) in versions_of(requests, found, {3: before, 4: trained}, within=1e-4)


class ThreadRanks:
    """Two ranks as threads of this process, with the collectives of `burnish.training.ranks`."""

    def __init__(self) -> None:
        self._barrier = threading.Barrier(2, timeout=60)
        self._slots: list[list[Any]] = [[], []]

    def of(self, rank: int) -> dict[str, Any]:
        def gathered(rows: list[Any]) -> list[Any]:
            self._slots[rank] = list(rows)
            self._barrier.wait()
            found = [*self._slots[0], *self._slots[1]]
            self._barrier.wait()
            return found

        def agreed(work: Any) -> Any:
            return gathered([work()] if rank == 0 else [])[0]

        return {"agreed": agreed, "gathered": gathered}

    def run(self, work: Callable[[int], Any]) -> list[Any]:
        with ThreadPoolExecutor(2) as threads:
            return list(threads.map(work, (0, 1)))


@pytest.mark.parametrize("lost", [False, True])
def test_ranks_change_the_weights_of_the_servers_that_they_share(
    servers: list[LocalServer], model: Any, lost: bool
) -> None:
    """Groups of both ranks end at the change and go on after it, also where a server is lost at that moment."""
    ranks = ThreadRanks()
    made = [engine(model, servers, **ranks.of(rank)) for rank in (0, 1)]
    for server in servers:
        server.token_seconds = 0.05
    requests = [Request([5 + i, 6, 7], 2, SamplingParams(30), index=i) for i in range(8)]
    before = copy.deepcopy(model)

    def sample(rank: int) -> list[Any]:
        made[rank].sync(3)
        begun = made[rank].start(requests[4 * rank :][:4], seed=1, step=0)
        if rank == 0:
            time.sleep(0.7)
            tiny.move(model, 0.1)
            if lost:
                servers[1].faults.add("deaf")
        made[rank].sync(4)
        return [samples.result() for samples in begun]

    for rank, found in enumerate(ranks.run(sample)):
        mine = requests[4 * rank :][:4]
        check_completions(mine, found, vocab_size=96)
        assert (3.0, 4.0) in versions_of(mine, found, {3: before, 4: model}, within=1e-4)
    assert servers[0].calls.count("/collective_rpc") == 2, "one rank delivers, for both"


def test_weights_change_only_once_every_rank_has_ended_its_groups(servers: list[LocalServer], model: Any) -> None:
    """The first rank has nothing to end, and the second takes its time."""
    ranks, server = ThreadRanks(), servers[0]
    made = [engine(model, [server], **ranks.of(rank)) for rank in (0, 1)]
    server.token_seconds = 0.05
    pool = made[1]._pool
    drain = pool.drain
    loads: list[int] = []

    async def slow_drain(lost: Any) -> None:
        await asyncio.sleep(1.0)
        loads.append(server.calls.count("/collective_rpc"))
        await drain(lost)

    pool.drain = slow_drain

    def sample(rank: int) -> list[Any]:
        made[rank].sync(3)
        begun = made[rank].start([Request([5, 6, 7], 1, SamplingParams(30))], seed=1, step=0) if rank == 1 else []
        if rank == 0:
            time.sleep(0.5)
            tiny.move(model, 0.1)
        made[rank].sync(4)
        return [samples.result() for samples in begun]

    (completion,) = ranks.run(sample)[1][0]
    assert loads == [0, 1]
    assert set(completion.token["policy_version"]) == {3.0, 4.0}


def test_every_rank_knows_which_log_probabilities_it_gets(servers: list[LocalServer], model: Any) -> None:
    """The first rank alone asks the servers."""
    ranks = ThreadRanks()
    for server in servers:
        server.faults.add("raw")
    made = [engine(model, servers, **ranks.of(rank)) for rank in (0, 1)]
    for each in made:
        each._pool._modes = ("raw",)

    def sample(rank: int) -> list[Any]:
        made[rank].sync(0)
        return made[rank].generate([Request([5, 6, 7], 2, SamplingParams(4, top_k=4))], seed=1, step=0)

    for (group,) in ranks.run(sample):
        assert all(completion.sampler_logprobs is None for completion in group)
        assert all(completion.policy_logprobs is not None for completion in group)


def test_a_server_that_another_rank_restores_is_waited_for(servers: list[LocalServer], model: Any) -> None:
    """Both ranks find that a server was restarted; only one loads its weights, and nothing runs meanwhile."""
    ranks = ThreadRanks()
    made = [engine(model, servers[:1], **ranks.of(rank)) for rank in (0, 1)]
    ranks.run(lambda rank: made[rank].sync(0))
    server = servers[0]
    server.model, server.weight_version, server.token_seconds = tiny.model(seed=9), "default", 0.02
    server.calls.clear()
    is_loading, was_seen = threading.Event(), threading.Event()

    def watch(path: str, body: dict[str, Any]) -> None:
        if path == "/collective_rpc":
            is_loading.set()
            was_seen.wait(20)
        elif path == "/weight_info" and is_loading.is_set():
            was_seen.set()

    server.before_answer = watch

    def sample(rank: int) -> list[Any]:
        if rank == 1:
            assert is_loading.wait(20)
        return made[rank].generate(REQUESTS, seed=1, step=0)

    found = ranks.run(sample)
    assert tokens(found[0]) == tokens(found[1])
    assert server.calls.count("/collective_rpc") == 1


def test_a_server_that_dies_while_weights_change_loses_no_group(servers: list[LocalServer], model: Any) -> None:
    made = engine(model, servers)
    made.sync(0)
    for server in servers:
        server.token_seconds = 0.05
    begun = made.start(REQUESTS, seed=1, step=0)
    time.sleep(0.2)
    servers[1].faults.add("deaf")
    tiny.move(model, 1e-2)
    assert made.sync(1)["sampling/servers"] == 1
    found = [samples.result() for samples in begun]
    check_completions(REQUESTS, found, vocab_size=96)


def test_groups_in_flight_end_with_an_error_and_with_the_engine(servers: list[LocalServer], model: Any) -> None:
    made = engine(model, servers)
    made.sync(0)
    for server in servers:
        server.token_seconds = 0.05
    begun = made.start(REQUESTS, seed=1, step=0)
    servers[0].faults.add("keep_head")
    tiny.move(model, 1e-2)
    with pytest.raises(CheckFailed):
        made.sync(1)
    made.close()
    for samples in begun:
        assert samples.done()


def test_groups_are_reported_as_they_finish_and_an_error_of_that_is_raised(
    servers: list[LocalServer], model: Any
) -> None:
    made = engine(model, servers)
    made.sync(0)
    told: dict[int, Any] = {}
    asked = [replace(request, on_done=partial(told.__setitem__, request.index)) for request in REQUESTS]
    found = made.generate(asked, seed=1, step=0)
    assert [told[request.index] for request in REQUESTS] == found

    def fails(_: Any) -> None:
        raise RewardError("no prompt")

    with pytest.raises(RewardError, match="no prompt"):
        made.generate([*REQUESTS[:2], replace(REQUESTS[2], on_done=fails)], seed=1, step=0)
    assert tokens(made.generate(REQUESTS, seed=1, step=0)) == tokens(found)


def test_no_server_is_an_error_with_the_fix() -> None:
    deadlines = Deadlines(start=0.5, call=1.0, heartbeat=0.2)
    pool = ServerPool([("http://127.0.0.1:9", None)], tiny.tokenizer(), deadlines)
    with pytest.raises(EngineError, match=r"no vLLM server is ready .*127\.0\.0\.1:9.*burnish serve MODEL"):
        pool.call(pool.connect())
    pool.close()


def test_a_slow_server_is_left_for_an_idle_one(servers: list[LocalServer], model: Any) -> None:
    made = engine(model, servers, Deadlines(start=20.0, call=10.0, heartbeat=1.0, stall=600.0, slow=2.0, slow_factor=2))
    made.sync(0)
    wanted = tokens(made.generate(REQUESTS, seed=1, step=0))
    servers[1].faults.add("hang")
    servers[1].before_answer = lambda path, body: setattr(servers[1], "tokens", servers[1].tokens + 1)
    assert tokens(made.generate(REQUESTS, seed=1, step=0)) == wanted


def test_another_tokenizer_is_refused_when_connecting() -> None:
    other = tiny.tokenizer()
    other.add_tokens(["<think>"])
    swapped = tiny.tokenizer()
    vocabulary = swapped.get_vocab()
    assert vocabulary["0"] != vocabulary["1"]
    with LocalServer(tiny.model(), tiny.tokenizer()) as server:
        pool = ServerPool([(server.url, None)], other, DEADLINES)
        with pytest.raises(ConfigError, match=r"another tokenizer.*burnish serve MODEL"):
            pool.call(pool.connect())
        pool.close()


@pytest.mark.parametrize(
    ("faults", "modes", "message"),
    [
        ("raw raw", ("processed",), "before temperature and truncation.*--logprobs-mode processed_logprobs"),
        ("- -", ("raw",), "after truncation, .*burnish serve MODEL --raw-logprobs.*no top_p"),
        (
            "raw -",
            ("processed", "raw"),
            "log-probabilities and another server .* start all of them with --raw-logprobs",
        ),
        ("logits logits", ("processed", "raw"), "neither those before .*--logprobs-mode processed_logprobs"),
    ],
)
def test_log_probabilities_that_the_run_cannot_use_are_refused(
    servers: list[LocalServer], model: Any, faults: str, modes: tuple[Any, ...], message: str
) -> None:
    for server, fault in zip(servers, faults.split(), strict=True):
        server.faults.add(fault)
    made = engine(model, servers)
    made._pool._modes = modes
    with pytest.raises(ConfigError, match=message):
        made.sync(0)


def test_raw_log_probabilities_are_the_policys_under_truncation(servers: list[LocalServer], model: Any) -> None:
    for server in servers:
        server.faults.add("raw")
    made = engine(model, servers)
    made._pool._modes = ("raw",)
    made.sync(0)
    request = Request([5, 6, 7], 3, SamplingParams(6, top_k=4))
    (found,) = made.generate([request], seed=1, step=0)
    for completion in found:
        with torch.no_grad():
            rows = model(input_ids=torch.tensor([[*request.prompt_ids, *completion.token_ids]])).logits[0, 2:-1]
        expected = rows.log_softmax(-1).gather(1, torch.tensor(completion.token_ids)[:, None])[:, 0]
        assert completion.policy_logprobs == pytest.approx(expected.tolist(), abs=1e-5)
        assert completion.sampler_logprobs is None


def test_the_token_of_a_server_is_found_by_its_port(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    monkeypatch.delenv("VLLM_API_KEY", raising=False)
    with LocalServer(tiny.model(), tiny.tokenizer(), token="secret") as server:
        port = int(server.url.rsplit(":", 1)[1])
        with pytest.raises(EngineError, match=r"refuses the token.*VLLM_API_KEY"):
            ServerPool.connected([server.url], tiny.tokenizer(), 5.0)
        file = register(port, {"token": "secret"})
        assert file.stat().st_mode & 0o077 == 0
        ServerPool.connected([server.url], tiny.tokenizer(), 5.0).close()
        forget(port)
        assert token_of(server.url) is None
        monkeypatch.setenv("VLLM_API_KEY", "other")
        assert token_of(server.url) == "other"


def test_requests_longer_than_the_server_takes_are_named(servers: list[LocalServer], model: Any) -> None:
    made = engine(model, servers)
    made.sync(0)
    long = [Request([5] * 10, 1, SamplingParams(191), index=0)]
    with pytest.raises(ConfigError, match=r"max_completion_length = 191.*--max-model-len 201"):
        made.generate(long, seed=0, step=0)
    with pytest.raises(EngineError, match="prompt_ids is empty"):
        made.generate([Request([], 1, PARAMS)], seed=0, step=0)


def test_weights_are_removed_when_the_engine_closes(servers: list[LocalServer], model: Any, tmp_path: Any) -> None:
    pool = ServerPool([(servers[0].url, None)], tiny.tokenizer(), DEADLINES)
    pool.call(pool.connect())
    left = tmp_path / f"burnish-weights-{__import__('socket').gethostname()}-999999999-x"
    left.mkdir()
    made = VLLMServerEngine(model, tiny.tokenizer(), pool, bound=1e-6, weights_dir=str(tmp_path))
    made.sync(0)
    tiny.move(model, 1e-2)
    made.sync(1)
    assert not left.exists()
    assert len(list(tmp_path.glob("*/burnish-*"))) == 1
    made.close()
    assert list(tmp_path.iterdir()) == []
