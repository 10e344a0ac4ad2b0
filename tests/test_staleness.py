"""Sampling ahead of training: the bound, the order of prompts, overlap, and resuming."""

from __future__ import annotations

import json
import random
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest
from transformers import TrainerCallback

import tiny
from burnish.errors import CheckFailed, ConfigError, EngineError
from burnish.rollout import NativeEngine
from burnish.rollout.prompts import Shard
from burnish.stages.lookahead import Lookahead
from burnish.types import Group
from local_server import LocalServer
from test_vllm_config import ROWS, logged, trainer
from vllm_rank_worker import in_order, run_ranks
from vllm_sources import fresh


@pytest.fixture
def server() -> Iterator[LocalServer]:
    with LocalServer(tiny.model(seed=5), tiny.tokenizer()) as made:
        yield made


def trained_prompts(folder: Path) -> list[str]:
    """Prompts in the order of training, each once a group."""
    lines = [json.loads(line) for line in (folder / "transcripts.jsonl").read_text().splitlines()]
    prompts = [" ".join(line["prompt"].split()) for line in lines]
    return prompts[::4]


def closed(made: Any) -> Any:
    made.stage.sampler.engine.close()
    return made


@pytest.mark.parametrize(
    ("bound", "fields"),
    [
        (1, {}),
        (2, {}),
        (3, {"max_steps": 4}),
        (1, {"num_iterations": 2, "max_steps": 6}),
        (2, {"steps_per_generation": 2, "per_device_train_batch_size": 4, "max_steps": 7}),
        (1, {"dynamic_sampling": True, "max_sampling_rounds": 3}),
    ],
)
def test_no_token_is_staler_than_the_bound(
    server: LocalServer, tmp_path: Path, bound: int, fields: dict[str, Any]
) -> None:
    changes = {"max_steps": 5, "shuffle_dataset": False, "log_completions": True, **fields}
    made = trainer(tmp_path, server.url, max_staleness=bound, **changes)
    made.train()
    steps = changes.get("steps_per_generation", 1) * changes.get("num_iterations", 1)
    stalest = logged(made, "sampling/staleness/max")
    assert 0 < max(stalest) <= bound * steps
    assert stalest[0] == 0
    assert made.state.global_step == changes["max_steps"]
    assert len(made.stage.sampler.ahead) == 0, "nothing is sampled beyond the last step"
    if "dynamic_sampling" not in fields:
        rollouts = -(-changes["max_steps"] // steps)
        assert made.stage.sampler.source.position == 2 * rollouts
        order = [row["prompt"] for row in ROWS] * 2
        assert trained_prompts(tmp_path) == order[: 2 * rollouts]
    closed(made)


def test_a_bound_of_0_is_the_synchronous_run(server: LocalServer, tmp_path: Path) -> None:
    made = [closed(trainer(tmp_path / name, server.url, **changes)) for name, changes in
            (("a", {}), ("b", {"max_staleness": 0}))]  # fmt: skip
    assert all(one.stage.sampler.ahead is None for one in made)


def test_the_server_samples_while_the_trainer_trains(server: LocalServer, tmp_path: Path) -> None:
    """At each update, the next rollout's groups have been asked for."""
    seen: list[int] = []

    class Watch(TrainerCallback):
        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            seen.append(len(server.sampled))

    made = trainer(tmp_path, server.url, max_staleness=1, max_steps=4)
    made.add_callback(Watch())
    made.train()
    # Two groups a rollout; a request that a sync ends is asked for again.
    assert seen[0] >= 3
    assert len(server.sampled) >= 8
    closed(made)


def test_stale_samples_are_weighted_and_fresh_ones_checked(server: LocalServer, tmp_path: Path) -> None:
    made = trainer(tmp_path, server.url, max_staleness=1, learning_rate=3e-2, max_steps=4)
    made.train()
    weights = logged(made, "sampling/correction/mean")
    assert weights[0] == pytest.approx(1, abs=1e-4), "the first samples are fresh"
    assert max(abs(weight - 1) for weight in weights[1:]) > 1e-3
    assert logged(made, "sampling/logprob_difference/max")[0] < 1e-4
    closed(made)
    server.faults.add("hot")
    made = trainer(tmp_path / "hot", server.url, max_staleness=1)
    with pytest.raises(CheckFailed, match="sampler and trainer mismatch"):
        made.train()
    closed(made)


@pytest.mark.parametrize("fields", [{"top_k": 4}, {"top_k": 90}])
def test_first_weights_are_1_under_truncation(server: LocalServer, tmp_path: Path, fields: dict[str, Any]) -> None:
    made = trainer(tmp_path, server.url, max_staleness=1, **fields)
    with pytest.raises(ConfigError, match="burnish serve MODEL --raw-logprobs"):
        made.train()
    closed(made)
    server.faults.add("raw")
    made = trainer(tmp_path, server.url, max_staleness=1, **fields)
    made.train()
    assert logged(made, "sampling/correction/mean")[0] == pytest.approx(1, abs=1e-4)
    assert logged(made, "sampling/logprob_difference/max")[0] < 1e-4
    closed(made)


def test_a_resumed_run_loses_no_group_and_repeats_none(server: LocalServer, tmp_path: Path) -> None:
    fields: dict[str, Any] = {
        "max_staleness": 2, "max_steps": 6, "shuffle_dataset": False, "log_completions": True, "save_strategy": "steps",
        "save_steps": 1,
    }  # fmt: skip

    class Stop(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 3:
                raise KeyboardInterrupt

    broken = trainer(tmp_path, server.url, **fields)
    broken.add_callback(Stop())
    with pytest.raises(KeyboardInterrupt):
        broken.train()
    assert len(broken.stage.sampler.ahead) > 0
    closed(broken)
    resumed = trainer(tmp_path, server.url, **fields)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == 6
    order = [row["prompt"] for row in ROWS] * 2
    assert trained_prompts(tmp_path) == order[:12]
    closed(resumed)


@pytest.mark.slow
@pytest.mark.parametrize("per_device", [4, 2])
def test_two_ranks_sample_ahead(tmp_path: Path, per_device: int) -> None:
    """With whole groups on a rank, and with groups that lie on both."""
    with LocalServer(fresh(seed=5), tiny.tokenizer()) as server:
        server.token_seconds = 0.01
        fields = {"vllm_server_base_url": server.url, "shuffle_dataset": False, "max_steps": 4}
        fields |= {"per_device_train_batch_size": per_device, "gradient_accumulation_steps": 4 // per_device}
        now, _ = run_ranks(1, tmp_path / "one", **{**fields, "per_device_train_batch_size": 2 * per_device})
        if per_device == 4:  # a server numbers the samples of each request
            same, _ = run_ranks(2, tmp_path / "two", **fields)
            assert in_order(same) == in_order(now)
        ahead, logs = run_ranks(2, tmp_path / "ahead", max_staleness=2, **fields)
    assert [row[:3] for row in in_order(ahead)] == [row[:3] for row in in_order(now)]
    assert 0 < max(logs["sampling/staleness/max"]) <= 2
    assert max(logs["sampling/logprob_difference/max"]) < 1e-4


@pytest.mark.kills
@pytest.mark.parametrize("seed", range(4))
def test_a_killed_run_loses_no_group_and_repeats_none(server: LocalServer, tmp_path: Path, seed: int) -> None:
    """kill -9 at a random moment of a run two rollouts ahead, and again while it resumes."""
    server.token_seconds = 0.02
    draw = random.Random(seed)
    command = [sys.executable, str(Path(__file__).with_name("staleness_worker.py")), str(tmp_path), server.url]
    for step in sorted(draw.sample(range(1, 7), 2)):
        process = subprocess.Popen(command)
        while process.poll() is None and not (tmp_path / f"checkpoint-{step}").exists():
            time.sleep(0.01)
        time.sleep(draw.uniform(0, 0.5))
        process.kill()
        process.wait()
    assert subprocess.run(command, check=False).returncode == 0
    assert trained_prompts(tmp_path) == [row["prompt"] for row in ROWS] * 2


def test_a_run_that_was_interrupted_trains_again(server: LocalServer, tmp_path: Path) -> None:
    """What was begun long ago is sampled again."""
    made = trainer(tmp_path, server.url, max_staleness=1, max_steps=3)

    class Stop(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            control.should_training_stop = True

    made.add_callback(Stop())
    made.train()
    made.pop_callback(Stop)
    made.stage.sampler.ahead._spans[0].version = -5
    made.train()
    assert max(logged(made, "sampling/staleness/max")) <= 1
    closed(made)


def test_an_engine_that_ignores_a_sync_is_found(server: LocalServer, tmp_path: Path) -> None:
    made = trainer(tmp_path, server.url, max_staleness=1, max_steps=4)
    engine = made.stage.sampler.engine
    sync, engine.sync = engine.sync, lambda version: sync(0)
    with pytest.raises(CheckFailed, match=r"sampled 2 optimizer steps ago, and max_staleness = 1 allows 1"):
        made.train()
    closed(made)


def test_an_engine_that_does_not_name_its_weights_is_refused(server: LocalServer, tmp_path: Path) -> None:
    made = trainer(tmp_path, server.url, max_staleness=1, max_steps=2)
    ahead = made.stage.sampler.ahead
    take = ahead.take

    def unnamed(number: int) -> Any:
        shards, requests, found = take(number)
        for completion in found[0]:
            completion.token.clear()
        return shards, requests, found

    ahead.take = unnamed
    with pytest.raises(EngineError, match="VLLMServerEngine returns completions without the stream policy_version"):
        made.train()
    closed(made)


def test_what_cannot_overlap_is_refused(tmp_path: Path) -> None:
    model = tiny.model()
    with pytest.raises(ConfigError, match=r"max_staleness = 1: the native engine samples in the trainer's process"):
        trainer(tmp_path, "http://127.0.0.1:9", model=model, use_vllm=False, max_staleness=1)
    engine = NativeEngine(model, tiny.tokenizer())
    with pytest.raises(ConfigError, match=r"max_staleness = 1: NativeEngine samples in"):
        trainer(tmp_path, "http://127.0.0.1:9", model=model, use_vllm=False, max_staleness=1, engine=engine)
    with pytest.raises(ConfigError, match=r"top_p = 0\.9 with max_staleness = 1 and temperature = 0\.7: .* use 1\.0"):
        trainer(tmp_path, "http://127.0.0.1:9", model=model, max_staleness=1, top_p=0.9, temperature=0.7)


class Promises:
    """An engine whose completions are there at once, or never."""

    def __init__(self, *, kept: bool) -> None:
        self.kept, self.given_up = kept, list[Any]()

    def start(self, requests: Any, *, seed: int, step: int) -> Any:
        begun: list[Any] = [Future() for _ in requests]
        for samples in begun if self.kept else []:
            samples.set_result([])
        return begun

    def cancel(self, begun: Any) -> None:
        self.given_up.extend(begun)


def test_a_rank_counts_prompts_of_which_it_has_no_samples() -> None:
    ahead = Lookahead(Promises(kept=True), list, seed=0)  # type: ignore[arg-type]
    ahead.begin([Shard(7, 0, Group([1], []))], range(6, 8), step=0, version=4)
    ahead.begin([Shard(8, 0, Group([1], []))], range(8, 10), step=0, version=5)
    assert (len(ahead), ahead.oldest()) == (4, 4)
    assert ahead.take(1)[0] == []
    assert [shard.position for shard in ahead.take(2)[0]] == [7, 8]
    assert (len(ahead), ahead.oldest()) == (1, 5)
    assert ahead.take(1)[0] == []
    assert (len(ahead), ahead.oldest()) == (0, None)


def test_groups_that_are_given_up_are_cancelled() -> None:
    engine = Promises(kept=False)
    shards = [Shard(position, 0, Group([1], [])) for position in (7, 8, 9)]
    ahead = Lookahead(engine, list, seed=0)  # type: ignore[arg-type]
    ahead.begin(shards, range(7, 10), step=0, version=4)
    assert (len(ahead), ahead.oldest()) == (3, 4)
    assert ahead.give_up() == 3
    assert (len(ahead), ahead.oldest(), len(engine.given_up)) == (0, None, 3)
