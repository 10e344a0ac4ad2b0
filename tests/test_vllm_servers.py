"""Real vLLM servers on a CPU, started by `burnish serve`: the contract of an engine, syncs, and faults.

`make servers` runs them; they need .venv-vllm (`make vllm`).
"""

from __future__ import annotations

import copy
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from transformers import TrainerCallback

import tiny
from burnish.errors import CheckFailed, ConfigError
from burnish.model.adapters import add_adapters
from burnish.model.packing import pack
from burnish.model.scoring import prepare_for_scoring, score
from burnish.rollout import NativeEngine, Request, SamplingParams
from burnish.rollout.validation import check_completions
from burnish.rollout.vllm import Deadlines, ServerPool, VLLMServerEngine
from burnish.rollout.vllm.registry import token_of
from burnish.types import Completion, Group, StopReason
from test_staleness import trained_prompts
from test_vllm_config import ROWS, logged, trainer
from test_vllm_pool import versions_of
from vllm_proxy import Proxy

pytestmark = pytest.mark.vllm

ROOT = Path(__file__).resolve().parent.parent
VOCAB = len(tiny.tokenizer())
SIZES = {"vocab_size": VOCAB, "hidden_size": 64, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 32}
"""vLLM's CPU attention takes heads of 32 and more; a server also samples columns that are no token of the tokenizer."""

DEADLINES = Deadlines(start=900.0, call=60.0, heartbeat=2.0, stall=60.0, slow=600.0)
START_SECONDS = 1200.0
PARAMS = SamplingParams(12, eos_token_ids=(0,))
REQUESTS = [Request([5 + i, 6, 7], 4, PARAMS, index=i) for i in range(6)]


def fresh(**changes: Any) -> Any:
    model = tiny.model(**SIZES, **changes)
    prepare_for_scoring(model)
    return model


class Served:
    """A `burnish serve` process."""

    def __init__(self, folder: Path, log: Path, *words: str) -> None:
        with socket.socket() as found:
            found.bind(("127.0.0.1", 0))
            self.port = int(found.getsockname()[1])
        self.url, self.log = f"http://127.0.0.1:{self.port}", log
        line = "from burnish.cli.main import console; raise SystemExit(console())"
        command = [sys.executable, "-c", line, "serve", str(folder), "--port", str(self.port), "--dtype", "float32"]
        program = os.environ.get("BURNISH_VLLM", str(ROOT / ".venv-vllm" / "bin" / "vllm"))
        if shutil.which(program) is None:
            pytest.skip("no vLLM here: make vllm")
        environment = {**os.environ, "VLLM_CPU_KVCACHE_SPACE": "1"}
        with log.open("w") as file:
            self.process = subprocess.Popen(
                [*command, "--vllm", program, "--lora-rank", "8", *words, "--", "--enforce-eager"],
                stdout=file,
                stderr=subprocess.STDOUT,
                env=environment,
            )

    def wait(self) -> None:
        ServerPool.connected([self.url], tiny.tokenizer(), START_SECONDS).close()

    def pids(self, word: str) -> list[int]:
        """Processes of the server, without the watch, whose title holds a word."""
        listed = subprocess.run(["ps", "-eo", "pid,ppid,args"], capture_output=True, text=True, check=True).stdout
        rows = [line.split(None, 2) for line in listed.splitlines()[1:]]
        family = {self.process.pid}
        for _ in range(4):
            family |= {int(pid) for pid, parent, _ in rows if int(parent) in family}
        return [int(pid) for pid, _, args in rows if int(pid) in family - {self.process.pid} and word in args]

    def stop(self) -> None:
        self.process.send_signal(signal.SIGTERM)
        try:
            self.process.wait(60)
        except subprocess.TimeoutExpired:
            self.process.kill()


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


def lora(model: Any) -> Any:
    config = LoraConfig(r=8, target_modules=["q_proj", "v_proj", "down_proj"], task_type="CAUSAL_LM")
    adapted, _ = add_adapters(model, config, seed=0)
    prepare_for_scoring(adapted)
    return adapted


def tokens(groups: list[list[Completion]]) -> list[list[int]]:
    return [completion.token_ids for group in groups for completion in group]


# The contract of an engine.


def test_greedy_tokens_are_those_of_the_trainer(server: Served, engine: Any) -> None:
    model = fresh(seed=11)
    made = engine(model, server.url)
    made.sync(0)
    params = SamplingParams(40, temperature=0.0, eos_token_ids=(0,))
    requests = [Request([5 + i, 6, 7 + i], 2, params, index=i) for i in range(8)]
    native = NativeEngine(model, tiny.tokenizer()).generate(requests, seed=0, step=0)
    found = made.generate(requests, seed=0, step=0)
    check_completions(requests, found, vocab_size=VOCAB)
    for ours, theirs in zip(native, found, strict=True):
        assert theirs[0].token_ids == theirs[1].token_ids
        assert ours[0].stop_reason == theirs[0].stop_reason
        assert ours[0].text == theirs[0].text
        assert ours[0].token_ids == theirs[0].token_ids
        assert theirs[0].policy_logprobs == pytest.approx(ours[0].policy_logprobs, abs=1e-4)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 1.7])
def test_log_probabilities_are_the_trainers(server: Served, engine: Any, temperature: float) -> None:
    model = fresh(seed=11)
    made = engine(model, server.url)
    made.sync(0)
    params = SamplingParams(30, temperature=temperature, eos_token_ids=(0,))
    requests = [Request(request.prompt_ids, 4, params, index=request.index) for request in REQUESTS]
    found = made.generate(requests, seed=3, step=1)
    check_completions(requests, found, vocab_size=VOCAB)
    groups = [Group(list(r.prompt_ids), completions) for r, completions in zip(requests, found, strict=True)]
    batch = pack(groups)
    with torch.no_grad():
        ours = score(model, batch, temperature=temperature).logprobs
    difference = (batch.token["policy_logprobs"] - ours).abs()
    assert float(difference.max()) < 2e-4
    assert torch.equal(batch.token["policy_logprobs"], batch.token["sampler_logprobs"])


def test_samples_follow_the_distribution_and_their_seeds(server: Served, engine: Any) -> None:
    """Chi-square of the first token, 1,600 draws in groups of 8; the same seeds give the same samples."""
    model = fresh(seed=11)
    made = engine(model, server.url)
    made.sync(0)
    params = SamplingParams(1, temperature=0.7)
    requests = [Request([9, 8, 7], 8, params, index=index) for index in range(200)]
    found = made.generate(requests, seed=5, step=0)
    counts = Counter(ids[0] for ids in tokens(found))
    with torch.no_grad():
        probabilities = (model(input_ids=torch.tensor([[9, 8, 7]])).logits[0, -1] / 0.7).softmax(-1).double()
    likely = [token for token in range(VOCAB) if 1600 * float(probabilities[token]) >= 5]
    rest = 1600 - sum(counts[token] for token in likely)
    expected = [1600 * float(probabilities[token]) for token in likely]
    statistic = sum((counts[t] - e) ** 2 / e for t, e in zip(likely, expected, strict=True))
    left = 1600 - sum(expected)
    statistic += (rest - left) ** 2 / max(left, 1e-9) if left > 5 else 0.0
    # Mean k, variance 2k: five standard deviations.
    assert statistic < len(likely) + 5 * (2 * len(likely)) ** 0.5
    assert tokens(made.generate(requests[:20], seed=5, step=0)) == tokens(found[:20])
    assert tokens(made.generate(requests[:20], seed=6, step=0)) != tokens(found[:20])


def test_a_group_split_over_ranks_has_the_same_samples(server: Served, engine: Any) -> None:
    made = engine(fresh(seed=11), server.url)
    made.sync(0)
    whole = tokens(made.generate([Request([5, 6, 7], 4, PARAMS, index=3)], seed=1, step=2))
    parts = [Request([5, 6, 7], 2, PARAMS, index=3, first_sample=first) for first in (0, 2)]
    assert [ids for part in parts for ids in tokens(made.generate([part], seed=1, step=2))] == whole


def test_truncated_samples_stay_inside_their_set(server: Served, engine: Any) -> None:
    model = fresh(seed=11)
    made = engine(model, server.url)
    made.sync(0)
    for changes, keeps in (({"top_k": 3}, 3), ({"top_p": 0.4}, None), ({"min_p": 0.5}, None)):
        params = SamplingParams(1, **changes)
        found = made.generate([Request([9, 8, 7], 64, params)], seed=1, step=0)
        check_completions([Request([9, 8, 7], 64, params)], found, vocab_size=VOCAB)
        with torch.no_grad():
            row = model(input_ids=torch.tensor([[9, 8, 7]])).logits[0, -1].softmax(-1)
        order = row.argsort(descending=True).tolist()
        if keeps is None and "top_p" in changes:
            keeps = int((row.sort(descending=True).values.cumsum(0) < 0.4).sum()) + 1
        elif keeps is None:
            keeps = int((row >= 0.5 * row.max()).sum())
        seen = {ids[0] for ids in tokens(found)}
        assert seen <= set(order[:keeps])
        total = float(row[order[:keeps]].sum())
        for completion in found[0]:
            assert completion.policy_logprobs is None
            wanted = float((row[completion.token_ids[0]] / total).log())
            assert completion.sampler_logprobs == [pytest.approx(wanted, abs=1e-4)]


def test_stop_strings_end_a_completion(server: Served, engine: Any) -> None:
    tokenizer = tiny.tokenizer()
    made = engine(fresh(seed=11), server.url)
    made.sync(0)
    params = SamplingParams(60, stop=("a", "7"), eos_token_ids=(0,))
    requests = [Request([5, 6, 7], 16, params)]
    found = made.generate(requests, seed=1, step=0)
    check_completions(requests, found, vocab_size=VOCAB)
    reasons = Counter(completion.stop_reason for completion in found[0])
    assert reasons[StopReason.STOP] > 0
    for completion in found[0]:
        assert not any(stop in completion.text for stop in params.stop)
        if completion.stop_reason is StopReason.STOP:
            assert tokenizer.decode(completion.token_ids)[-1] in params.stop


def test_many_tiny_requests_and_long_prompts(server: Served, engine: Any) -> None:
    made = engine(fresh(seed=11), server.url)
    made.sync(0)
    params = SamplingParams(2)
    requests = [Request([5 + i % 50], 1, params, index=i) for i in range(300)]
    requests.append(Request([9] * 254, 2, params, index=300))
    check_completions(requests, made.generate(requests, seed=0, step=0), vocab_size=VOCAB)
    with pytest.raises(ConfigError, match=r"exceeds the server's 256.*--max-model-len 257"):
        made.generate([Request([9] * 255, 1, params)], seed=0, step=0)


# Syncs, and what must not pass as one.


@pytest.mark.parametrize("size", [1e-4, 1e-2, 0.3])
def test_all_weights_arrive_the_tied_head_too(server: Served, engine: Any, size: float) -> None:
    model = fresh(seed=12, tie_word_embeddings=True)
    made = engine(model, server.url)
    for version in range(3):
        metrics = made.sync(version)
        assert metrics["sampling/probe/difference"] < 2e-5
        tiny.move(model, size, seed=version)
    made.sync(3)
    groups = [
        Group(list(r.prompt_ids), c) for r, c in zip(REQUESTS, made.generate(REQUESTS, seed=1, step=0), strict=True)
    ]
    batch = pack(groups)
    with torch.no_grad():
        assert float((batch.token["policy_logprobs"] - score(model, batch).logprobs).abs().max()) < 2e-4


def with_base(server: Served, engine: Any) -> None:
    """Give the server the base weights of the adapters' tests again."""
    engine(fresh(tie_word_embeddings=True), server.url).sync(0)


def test_adapters_arrive(server: Served, engine: Any) -> None:
    with_base(server, engine)
    adapted = lora(fresh(tie_word_embeddings=True))
    made = engine(adapted, server.url)
    made.sync(0)
    before = tokens(made.generate(REQUESTS, seed=1, step=0))
    for version in (1, 2, 3):
        tiny.move(adapted, 0.1, seed=version)
        assert made.sync(version)["sampling/probe/difference"] < 5e-5
    assert tokens(made.generate(REQUESTS, seed=1, step=0)) != before


@pytest.mark.parametrize(
    ("fault", "size", "cause"),
    [
        ("ignore_reload", 1e-4, "bit for bit as at"),
        ("ignore_reload", 1e-2, "bit for bit as at"),
        # From changes of about 6e-4 nats on: 4 sqrt(2) times the least noise that fp32 is taken to have.
        ("keep_head", 1e-3, "part of the weights was left behind|another model"),
        ("keep_head", 1e-2, "part of the weights was left behind|another model"),
    ],
)
def test_weights_left_behind_stop_the_run(server: Served, engine: Any, fault: str, cause: str, size: float) -> None:
    model = fresh(seed=13)
    proxy = Proxy(server.url, "")
    made = engine(model, proxy.url, token=token_of(server.url))
    made.sync(0)
    proxy.faults.add(fault)
    tiny.move(model, size)
    with pytest.raises(CheckFailed, match=cause):
        made.sync(1)
    proxy.faults.clear()
    made.sync(1)
    assert made._pool.servers[0].agreement.difference < 2e-5
    proxy.stop()


def test_an_adapter_that_never_arrives_stops_the_run(server: Served, folder: Path, engine: Any) -> None:
    with_base(server, engine)
    adapted = lora(fresh(tie_word_embeddings=True))
    proxy = Proxy(server.url, str(folder))
    made = engine(adapted, proxy.url, token=token_of(server.url))
    made.sync(0)
    proxy.faults.add("drop_adapter")
    tiny.move(adapted, 1e-2)
    with pytest.raises(CheckFailed, match="the adapter never arrived"):
        made.sync(1)
    proxy.stop()


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
def test_groups_go_on_over_a_change_of_weights(server: Served, engine: Any, with_adapters: bool) -> None:
    with_base(server, engine)
    trained = lora(fresh(tie_word_embeddings=True)) if with_adapters else fresh(seed=14)
    made = engine(trained, server.url)
    made.sync(3)
    timed(made, REQUESTS)
    before = copy.deepcopy(trained)
    begun = made.start(LONG, seed=1, step=0)
    time.sleep(1.0)
    tiny.move(trained, 0.1)
    started = time.monotonic()
    made.sync(4)
    print(f"sync with {len(LONG)} groups running: {time.monotonic() - started:.1f} s")
    found = [samples.result() for samples in begun]
    check_completions(LONG, found, vocab_size=VOCAB)
    assert (3.0, 4.0) in versions_of(LONG, found, {3: before, 4: trained}, within=2e-4)


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
        if path == "/collective_rpc":
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
