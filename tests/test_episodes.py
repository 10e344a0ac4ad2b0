# ruff: noqa: RUF001 (control tokens of DeepSeek)
"""Episodes of several turns: token-exact, masked, concurrent, bounded, and contained where they fail."""

from __future__ import annotations

import contextlib
import dataclasses
import random
import re
import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, InvalidStateError
from pathlib import Path
from typing import Any

import pytest

from burnish.environments import Environment, Reply, ToolCall
from burnish.environments.dialogue import certify
from burnish.environments.episodes import Budget, episode_engine, share_openings
from burnish.environments.setup import Environments
from burnish.errors import ConfigError, DataError, EngineError
from burnish.model.packing import pack
from burnish.rollout.engine import Engine, OverlappingEngine, Request, SamplingParams
from burnish.rollout.prompts import Shard
from burnish.types import Completion, Group, StopReason
from dialects import DIALECTS, speaker

TEMPLATES = sorted(Path(__file__).parent.parent.glob(".venv-trl/lib/*/site-packages/trl/chat_templates/*.jinja"))


def add(a: int, b: int) -> int:
    """Add two numbers."""
    return a + b


def fail(reason: str) -> str:
    """Raise an error."""
    raise ValueError(reason)


class Script(Engine):
    """An engine that writes given turns: `turns(index, sample, number) -> (text, reason)`."""

    def __init__(self, tokenizer: Any, end: int, turns: Any) -> None:
        self.tokenizer, self.end, self.turns = tokenizer, end, turns
        self.asked: list[tuple[Request, list[Completion]]] = []

    def generate(self, requests: Sequence[Request], *, seed: int, step: int) -> list[list[Completion]]:
        return [self.play(request) for request in requests]

    def play(self, request: Request) -> list[Completion]:
        made = [self.completion(request, request.first_sample + i) for i in range(request.num_samples)]
        self.asked.append((request, [dataclasses.replace(c, token_ids=list(c.token_ids)) for c in made]))
        return made

    def completion(self, request: Request, sample: int) -> Completion:
        text, reason = self.turns(request.index, sample % (1 << 20), sample >> 20)
        ids = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        ids += [self.end] if reason is StopReason.EOS else []
        if len(ids) > request.params.max_new_tokens:
            ids, reason = ids[: request.params.max_new_tokens], StopReason.LENGTH
        logprobs = [-0.001 * (i + 1 + sample) for i in range(len(ids))]
        version = {"policy_version": [float(sample >> 20)] * len(ids)}
        return Completion(
            ids, text=text, stop_reason=reason, sampler_logprobs=logprobs, policy_logprobs=list(logprobs), token=version
        )

    def sync(self, version: int) -> None: ...

    def close(self) -> None: ...


class Rounds(Environment):
    """Answers a number of turns, which differs by episode, and counts them."""

    def __init__(self, rounds: int = 2) -> None:
        self.rounds, self.seen = rounds, list[str]()

    def step(self, text: str) -> Reply:
        self.seen.append(text)
        done = len(self.seen) >= self.rounds
        return Reply(
            [{"role": "user", "content": f"Answer {len(self.seen)}."}], done=done, reward=float(len(self.seen))
        )

    def reward(self) -> float:
        return 10.0 * len(self.seen)


PARAMS = SamplingParams(max_new_tokens=4000, stop=("STOP",))


def setup(dialect: str, turns: Any, **options: Any) -> tuple[Environments, Script, Any]:
    tokenizer, end = speaker(dialect)
    environments = Environments(tokenizer, [end], **options)
    script = Script(tokenizer, end, turns)
    return environments, script, environments.engine(script, [end], None)


def request(environments: Environments, *, index: int = 0, samples: int = 1, **row: Any) -> Request:
    row = environments.prepared({"prompt": [{"role": "user", "content": "What is 2 + 3?"}], **row})
    name = row.get("environment") if environments.is_mixed else None
    ids = environments.dialogue.opening(row["prompt"], environments.schemas[name])
    ends = environments.dialogue.ends
    return Request(ids, samples, dataclasses.replace(PARAMS, eos_token_ids=ends), index=index, row=row)


def turns_of(environments: Environments, seed: int) -> Any:
    """Random turns: calls that work, fail or make no sense, reasoning, plain answers, turns that a string ends."""
    write = environments.tool_format.render

    def turn(index: int, sample: int, number: int) -> tuple[str, StopReason]:
        draw = random.Random(f"{seed} {index} {sample} {number}")
        call = ToolCall("add", {"a": draw.randint(0, 9), "b": number}, id="abcdef123")
        kinds = {
            "call": write([call]),
            # Some templates want an identifier, or take one call a turn: the policy may write something else.
            "bare": write([ToolCall("add", {"a": number, "b": 1})]),
            "two": write([call, ToolCall("add", {"a": 0, "b": number})]),
            "failing": write([ToolCall("fail", {"reason": "é <|im_end|> [INST]"}, id="abcdef124")]),
            "unknown": write([ToolCall("other", {}, id="abcdef125")]),
            "thinking": f"<think>\nHm.\n</think>\n\n{write([call])}",
            "cut": write([call])[:-3],
            "plain": "It is 5.",
        }
        weights = [4, 2, 2, 2, 1, 3, 1, 1] if number < 5 else [0] * 7 + [1]
        text = draw.choices(list(kinds.values()), weights)[0]
        return (text + "STOP", StopReason.STOP) if draw.random() < 0.2 else (text, StopReason.EOS)

    return turn


@pytest.mark.parametrize("dialect", DIALECTS)
@pytest.mark.parametrize("seed", range(4))
def test_trained_tokens_are_the_sampled_ones_and_no_others(dialect: str, seed: int) -> None:
    environments, script, engine = setup(dialect, None, tools=[add, fail])
    script.turns = turns_of(environments, seed)
    requests = [request(environments, index=i, samples=3) for i in range(3)]
    found = engine.generate(requests, seed=0, step=0)
    turns: dict[tuple[int, int], list[tuple[list[int], Completion]]] = {}
    for asked, completions in script.asked:
        for i, completion in enumerate(completions, asked.first_sample):
            key = (asked.index, i % (1 << 20))
            turns.setdefault(key, []).append((list(asked.prompt_ids), completion))
    assert max(map(len, turns.values())) > 2
    for i, (asked, completions) in enumerate(zip(requests, found, strict=True)):
        for sample, completion in enumerate(completions):
            episode, sampled = completion.episode, turns[i, sample]
            assert episode is not None
            assert episode.error is None
            mask = completion.loss_mask or [True] * len(completion.token_ids)
            trained = [t for t, kept in zip(completion.token_ids, mask, strict=True) if kept]
            assert trained == [token for _, turn in sampled for token in turn.token_ids]
            assert completion.num_scored_tokens == len(trained)
            assert len(episode.turns) == len(sampled)
            for (start, end), (context, turn) in zip(episode.turns, sampled, strict=True):
                # What the engine read is what training reads: the prompt and all tokens so far.
                assert context == [*asked.prompt_ids, *completion.token_ids[:start]]
                assert completion.token_ids[start:end] == turn.token_ids
                assert all(mask[start:end])
                for name in ("sampler_logprobs", "policy_logprobs"):
                    assert getattr(completion, name)[start:end] == getattr(turn, name)
                assert completion.token["policy_version"][start:end] == turn.token["policy_version"]
            ours = [v for v, kept in zip(completion.policy_logprobs or [], mask, strict=True) if not kept]
            assert set(ours) <= {0.0}
            # Every turn that another one follows ends with the token that the template ends it with.
            ends = [end for _, end in episode.turns[:-1]]
            stop = environments.dialogue.ends[0]
            assert all(stop in (completion.token_ids[end - 1], completion.token_ids[end]) for end in ends)
            assert [m["role"] for m in episode.messages].count("assistant") == len(sampled)
    groups = [Group(list(asked.prompt_ids), completions) for asked, completions in zip(requests, found, strict=True)]
    batch = pack(groups)
    assert batch.target_ids.tolist() == [
        t for i in range(3) for s in range(3) for _, turn in turns[i, s] for t in turn.token_ids
    ]


@pytest.mark.parametrize("dialect", DIALECTS)
def test_tools_answer_behind_the_turn_and_control_tokens_stay_text(dialect: str) -> None:
    environments, script, engine = setup(dialect, None, tools=[add, fail])
    write, end = environments.tool_format.render, environments.dialogue.ends[0]
    texts = [
        write([ToolCall("add", {"a": 2, "b": 3}, id="abcdef123")]),
        write([ToolCall("fail", {"reason": f"now {script.tokenizer.eos_token} now"}, id="abcdef123")]),
        "Done.",
    ]
    script.turns = lambda index, sample, number: (texts[number], StopReason.EOS)
    [[completion]] = engine.generate([request(environments)], seed=0, step=0)
    episode, (start, stop) = completion.episode, (0, 1)
    assert episode is not None
    answers = [completion.token_ids[a[1] : b[0]] for a, b in zip(episode.turns, episode.turns[1:], strict=False)]
    shown = [script.tokenizer.decode(ids) for ids in answers]
    assert "5" in shown[0]
    assert "tool_error" in shown[1]
    # The reason holds the token that ends a turn: in the answer it is text, so that no turn ends there.
    assert [ids.count(end) for ids in answers] == [answers[0].count(end)] * 2
    assert (episode.num_calls, episode.num_failed_calls) == (2, 1)
    assert completion.stop_reason is StopReason.EOS
    assert [m["role"] for m in episode.messages] == ["assistant", "tool", "assistant", "tool", "assistant"]
    assert (start, stop) == (0, 1)


def test_a_stop_string_may_end_a_call() -> None:
    environments, script, engine = setup("chatml", None, tools=[add])
    call = environments.tool_format.render([ToolCall("add", {"a": 2, "b": 3})])
    stopped = call.removesuffix("</tool_call>")

    def turn(index: int, sample: int, number: int) -> tuple[str, StopReason]:
        return (call, StopReason.STOP) if number == 0 else ("It is 5.", StopReason.EOS)

    def cut(request: Request, sample: int) -> Completion:
        made = Script.completion(script, request, sample)
        return dataclasses.replace(made, text=made.text.replace(call, stopped))  # as engines do

    script.turns, script.completion = turn, cut  # type: ignore[method-assign]
    [[completion]] = engine.generate([request(environments)], seed=0, step=0)
    assert completion.episode is not None
    assert (completion.episode.num_calls, completion.episode.num_failed_calls) == (1, 0)
    assert completion.episode.messages[1]["content"] == "5"


def test_all_turns_of_a_group_begin_as_one_request_and_random_numbers_differ_by_turn() -> None:
    environments, script, engine = setup(
        "chatml", lambda i, s, n: (f"turn {n}", StopReason.EOS), factory=lambda: Rounds(3)
    )
    found = engine.generate([request(environments, samples=4)], seed=0, step=0)
    first, *later = [asked for asked, _ in script.asked]
    assert first.num_samples == 4
    assert [asked.num_samples for asked in later] == [1] * 8
    keys = [asked.first_sample + i for asked in (first, *later) for i in range(asked.num_samples)]
    assert len(set(keys)) == len(keys) == 12
    for completion in found[0]:
        assert completion.episode is not None
        assert completion.episode.rewards == [1.0, 2.0, 3.0]
        assert completion.episode.reward == 30.0
        assert len(completion.episode.turns) == 3
        # The answer to the last turn is read by nobody.
        assert completion.episode.messages[-1] == {"role": "assistant", "content": "turn 2"}


@pytest.mark.parametrize(
    ("budget", "turns"), [({"turns": 2}, 2), ({"turns": 1}, 1), ({"positions": 180}, 3), ({"seconds": 1e-9}, 1)]
)
def test_budgets_end_an_episode_where_a_turn_ends(budget: dict[str, Any], turns: int) -> None:
    environments, script, _ = setup(
        "chatml", lambda i, s, n: ("A turn of some length.", StopReason.EOS), factory=lambda: Rounds(50)
    )
    engine = episode_engine(script, environments.dialogue, environments.make, Budget(**budget))
    [[completion]] = engine.generate([request(environments)], seed=0, step=0)
    assert completion.stop_reason is StopReason.BUDGET
    assert completion.is_truncated
    assert completion.episode is not None
    assert len(completion.episode.turns) == turns
    assert completion.episode.turns[-1][1] == len(completion.token_ids)


@pytest.mark.parametrize("limit", range(10, 200, 7))
def test_no_episode_exceeds_its_tokens(limit: int) -> None:
    environments, _, engine = setup(
        "chatml", lambda i, s, n: ("A turn of some length.", StopReason.EOS), factory=lambda: Rounds(50)
    )
    asked = request(environments)
    asked = dataclasses.replace(asked, params=dataclasses.replace(asked.params, max_new_tokens=limit))
    [[completion]] = engine.generate([asked], seed=0, step=0)
    assert len(completion.token_ids) <= limit
    assert completion.stop_reason in (StopReason.LENGTH, StopReason.BUDGET)


class Faulty(Rounds):
    """Fails at a place: an exception, a hang, or an attempt to end the program."""

    def __init__(self, place: str, fault: str) -> None:
        super().__init__(2)
        self.place, self.fault = place, fault

    def _at(self, place: str) -> None:
        if place == self.place:
            if self.fault == "hang":
                threading.Event().wait(60)
            raise SystemExit(3) if self.fault == "exit" else RuntimeError("broken")

    def reset(self, row: Mapping[str, Any], seed: int) -> None:
        self._at("reset")

    def step(self, text: str) -> Reply:
        self._at("step")
        return super().step(text)

    def reward(self) -> float:
        self._at("reward")
        return super().reward()


@pytest.mark.parametrize("place", ["reset", "step", "reward"])
@pytest.mark.parametrize("fault", ["raise", "exit", "hang"])
def test_a_failing_environment_fails_its_episode_only(place: str, fault: str) -> None:
    made = iter(range(100))
    environments, script, _ = setup(
        "chatml",
        lambda i, s, n: ("Hi.", StopReason.EOS),
        factory=lambda: Faulty(place, fault) if next(made) == 2 else Rounds(2),
    )
    engine = episode_engine(script, environments.dialogue, environments.make, Budget(step_seconds=1.0))
    [found] = engine.generate([request(environments, samples=4)], seed=0, step=0)
    errors = [c.episode.error for c in found if c.episode is not None]
    assert sum(error is not None for error in errors) == 1
    [error] = [error for error in errors if error is not None]
    assert {"raise": "broken", "exit": "would end the program", "hang": "longer than 1 s"}[fault] in error
    assert all(len(c.token_ids) >= 1 for c in found)
    engine.end([Group([], found)])
    assert all(c.episode is not None and c.episode.environment is None for c in found)


def test_a_slow_tool_does_not_hold_up_other_episodes() -> None:
    others_done = threading.Event()

    class Slow(Rounds):
        def step(self, text: str) -> Reply:
            assert others_done.wait(60)
            return super().step(text)

    made = iter(range(100))
    environments, script, engine = setup("chatml", None, factory=lambda: Slow(2) if next(made) == 1 else Rounds(3))

    def turn(index: int, sample: int, number: int) -> tuple[str, StopReason]:
        if number == 2:
            others_done.set()
        return "Hi.", StopReason.EOS

    script.turns = turn
    [found] = engine.generate([request(environments, samples=3)], seed=0, step=0)
    assert sorted(len(c.episode.turns) for c in found if c.episode) == [2, 3, 3]


class Closing(Rounds):
    """Notes the turns that are cut off, the calls of the others, and its end."""

    cuts, calls, closed = list[str](), list[str](), list[Environment]()

    async def cut(self, text: str) -> None:
        self.cuts.append(text)
        if self.rounds == 9:
            raise ValueError("nothing may be cut")

    def step(self, text: str) -> Reply:
        assert self.tool_format is not None
        self.calls.extend(call.name for call in self.tool_format.parse(text))
        return super().step(text)

    def close(self) -> None:
        self.closed.append(self)


@pytest.mark.parametrize("rounds", [2, 9])
def test_an_environment_hears_of_a_turn_that_is_cut_off_and_reads_calls(rounds: int) -> None:
    environments, script, engine = setup("chatml", None, factory=lambda: Closing(rounds))
    Closing.cuts.clear()
    Closing.calls.clear()
    texts = [environments.tool_format.render([ToolCall("add", {})]), "It is five."]
    script.turns = lambda index, sample, number: (texts[number], [StopReason.EOS, StopReason.LENGTH][number])
    [[completion]] = engine.generate([request(environments)], seed=0, step=0)
    assert (Closing.cuts, Closing.calls) == (["It is five."], ["add"])
    assert completion.episode is not None
    assert completion.episode.error == (None if rounds == 2 else "turn 2: ValueError: nothing may be cut")
    assert completion.episode.reward == (10.0 if rounds == 2 else None)


def test_an_error_of_the_engine_ends_the_rollout() -> None:
    environments, script, engine = setup("chatml", None, factory=lambda: Closing(3))
    Closing.closed.clear()

    def turn(index: int, sample: int, number: int) -> tuple[str, StopReason]:
        if number == 1:
            raise EngineError("no server is left")
        return "Hi.", StopReason.EOS

    script.turns = turn
    with pytest.raises(EngineError, match="no server is left"):
        engine.generate([request(environments, samples=3)], seed=0, step=0)
    deadline = time.monotonic() + 10
    while len(Closing.closed) < 3 and time.monotonic() < deadline:
        time.sleep(0.01)
    assert len(Closing.closed) == 3  # nobody else would


class Opening(Rounds):
    """Writes the prompt itself."""

    def __init__(self, differs: bool) -> None:
        super().__init__(2)
        self.differs = differs

    def reset(self, row: Mapping[str, Any], seed: int) -> list[dict[str, Any]]:
        own = random.random() if self.differs else seed % 1000
        return [{"role": "user", "content": f"A long board that all share, then {own}."}]


@pytest.mark.parametrize("differs", [False, True])
def test_openings_become_the_prompt_of_the_group(differs: bool) -> None:
    environments, script, engine = setup(
        "chatml", lambda i, s, n: (f"{s}", StopReason.EOS), factory=lambda: Opening(differs)
    )
    asked = request(environments, index=7, samples=4)
    [found] = engine.generate([asked], seed=0, step=0)
    openings = [c.episode.opening for c in found if c.episode is not None and c.episode.opening is not None]
    assert len(openings) == 4
    assert len(set(map(tuple, openings))) == (4 if differs else 1)
    assert [request.num_samples for request, _ in script.asked][:1] == ([1] if differs else [4])
    contexts = {tuple(request.prompt_ids) for request, _ in script.asked}
    shards = [Shard(7, 0, Group([1], found[:2])), Shard(7, 2, Group([1], found[2:]))]
    before = [c.num_scored_tokens for c in found]
    for shard in shards:  # two ranks, each with its part of the group
        share_openings([shard], lambda own: [(7, opening) for opening in openings])
    assert shards[0].group.prompt_ids == shards[1].group.prompt_ids
    prompt = shards[0].group.prompt_ids
    assert (prompt == openings[0]) is not differs
    assert "A long board" in script.tokenizer.decode(prompt)
    assert [c.num_scored_tokens for c in found] == before
    for completion in found:
        assert completion.episode is not None
        for start, _ in completion.episode.turns:
            assert (*prompt, *completion.token_ids[:start]) in contexts
        assert completion.policy_logprobs is not None
        assert len(completion.policy_logprobs) == len(completion.token_ids)


class Server(Script, OverlappingEngine):
    """The script as a server, which samples while its caller does something else."""

    asking = 0

    def start(self, requests: Sequence[Request], *, seed: int, step: int) -> list[Future[list[Completion]]]:
        futures = [Future[list[Completion]]() for _ in requests]
        self.asking += len(futures)

        def serve() -> None:
            for asked, future in zip(requests, futures, strict=True):
                with contextlib.suppress(InvalidStateError):  # nobody waits any more
                    future.set_result(self.play(asked))

        threading.Thread(target=serve, daemon=True).start()
        return futures

    def cancel(self, begun: Sequence[Future[list[Completion]]]) -> None:
        self.given_up = [*begun]


def test_turns_of_episodes_that_are_given_up_are_cancelled() -> None:
    environments, script, _ = setup("chatml", None, factory=lambda: Rounds(2))
    server, hold = Server(script.tokenizer, script.end, None), threading.Event()

    def turn(index: int, sample: int, number: int) -> tuple[str, StopReason]:
        hold.wait(60)
        return "Hi.", StopReason.EOS

    server.turns, server.given_up = turn, []
    over = environments.engine(server, environments.dialogue.ends, None)
    assert isinstance(over, OverlappingEngine)
    begun = over.start([request(environments, samples=2)], seed=0, step=0)
    while not server.asking:
        time.sleep(0.01)
    over.cancel(begun)
    while not server.given_up:
        time.sleep(0.01)
    hold.set()


def test_episodes_over_a_server_are_those_over_an_engine_and_overlap() -> None:
    environments, script, engine = setup("chatml", None, tools=[add, fail])
    script.turns = turns_of(environments, 1)
    requests = [request(environments, index=i, samples=3) for i in range(3)]
    server = Server(script.tokenizer, script.end, script.turns)
    over = environments.engine(server, environments.dialogue.ends, None)
    assert isinstance(over, OverlappingEngine)
    assert not isinstance(engine, OverlappingEngine)
    begun = over.start(requests, seed=0, step=0)
    there = [future.result() for future in begun]
    here = engine.generate(requests, seed=0, step=0)
    assert [[c.token_ids for c in group] for group in there] == [[c.token_ids for c in group] for group in here]


class Counter:
    """An environment of TRL's protocol."""

    instances = 0

    def __init__(self) -> None:
        type(self).instances += 1

    def reset(self, start: int = 0, **row: Any) -> str | None:
        self.count = start
        self.row = row
        return f" Count from {start}."

    def increment(self, by: int) -> int:
        """Add to the count.

        Args:
            by: how much.
        """
        self.count += by
        return self.count

    def get_reward(self) -> float:
        return float(self.count)

    def _hidden(self) -> None: ...


def test_environments_of_trl_have_methods_as_tools_and_are_used_again() -> None:
    Counter.instances = 0
    environments, script, engine = setup("chatml", None, factory=Counter)
    write = environments.tool_format.render
    texts = [write([ToolCall("increment", {"by": 2}), ToolCall("increment", {"by": "3"})]), "Done."]
    script.turns = lambda index, sample, number: (texts[number], StopReason.EOS)
    assert [s["function"]["name"] for s in environments.schemas[None]] == ["increment"]
    assert environments.rewarding == ["Counter"]
    asked = request(environments, samples=2, start=10)
    for _ in range(2):
        [found] = engine.generate([asked], seed=0, step=0)
        assert [c.episode.reward for c in found if c.episode] == [15.0, 15.0]
        opening = found[0].episode.opening if found[0].episode else None
        assert "What is 2 + 3? Count from 10." in script.tokenizer.decode(opening)
        assert found[0].episode is not None
        assert found[0].episode.environment.exposed.row["prompt"][-1]["content"] == "What is 2 + 3?"
        engine.end([Group([], found)])
    assert Counter.instances == 2


def test_several_environments_are_chosen_by_a_column() -> None:
    environments, script, engine = setup("chatml", None, factory={"count": Counter, "talk": Rounds}, tools=[add])
    script.turns = lambda index, sample, number: ("Fine.", StopReason.EOS)
    names = {name: [s["function"]["name"] for s in schemas] for name, schemas in environments.schemas.items()}
    assert names == {"count": ["add", "increment"], "talk": []}
    asked = [request(environments, index=i, environment=name) for i, name in enumerate(("talk", "count"))]
    found = engine.generate(asked, seed=0, step=0)
    assert [c.episode.name for [c] in found if c.episode] == ["Rounds", "Counter"]
    assert "increment" not in script.tokenizer.decode(list(asked[0].prompt_ids))
    assert "environment" not in found[1][0].episode.environment.exposed.row  # type: ignore[union-attr]
    with pytest.raises(DataError, match="environment holds 'walk': use one of 'count', 'talk'"):
        environments.prepared({"prompt": [], "environment": "walk"})


def test_what_cannot_be_an_environment_is_refused() -> None:
    tokenizer, end = speaker("chatml")
    with pytest.raises(ConfigError, match="a list without reset"):
        Environments(tokenizer, [end], factory=list)
    with pytest.raises(ConfigError, match="'b' without a type"):
        Environments(tokenizer, [end], tools=[lambda_like])
    with pytest.raises(DataError, match="conversational prompts"):
        Environments(tokenizer, [end], tools=[add]).prepared({"prompt": "text"})


def lambda_like(b) -> int:  # type: ignore[no-untyped-def]
    return b


@pytest.mark.parametrize(
    ("template", "words"),
    [
        (
            "{% for m in messages %}[{{ m.content }}]{% endfor %}{% if add_generation_prompt %}[{% endif %}",
            "none of the",
        ),
        ("{% for m in messages %}{{ m.role }}{{ m.content }}<|im_end|>{% endfor %}", "ignores add_generation_prompt"),
        (
            "{% for m in messages %}{% if m.role != 'user' or loop.first %}{{ m.content }}<|im_end|>{% endif %}"
            "{% endfor %}"
            "{% if add_generation_prompt %}A{% endif %}",
            "leaves out what",
        ),
    ],
)
def test_templates_whose_turns_cannot_be_extended_are_refused(template: str, words: str) -> None:
    tokenizer, end = speaker("chatml")
    tokenizer.chat_template = template
    with pytest.raises(ConfigError, match=words):
        Environments(tokenizer, [end], factory=Rounds)


ENDS = {
    "qwen": "<|im_end|>", "nemotron": "<|im_end|>", "lfm2": "<|im_end|>", "llama3": "<|eot_id|>",
    "gemma3": "<end_of_turn>", "gemma4_v2": "<turn|>", "gemma4": "<|tool_response>", "phi3": "<|end|>",
    "deepseek": "<｜end▁of▁sentence｜>", "cohere": "<|END_OF_TURN_TOKEN|>", "gptoss": "<|call|>", "muse": "<|eot|>",
}  # fmt: skip
"""Families of templates that TRL ships, and the token that ends their turns."""
UNREADABLE = ("lfm2_2_5", "lfm2_2_5_v2")
"""Templates that write calls which nobody can read back exactly: strings in them are not escaped."""
CONTROL = re.compile(r"<\|[^|{}\s]+\|>|<｜[^｜{}\s]+｜>|<[a-z_]+>|</[a-z_]+>|<\|[a-z_]+>|<[a-z_]+\|>")


@pytest.mark.skipif(not TEMPLATES, reason="TRL is not installed (make trl)")
@pytest.mark.parametrize("file", TEMPLATES, ids=lambda file: file.stem)
def test_templates_in_the_field_are_certified(file: Path) -> None:
    end = next((token for family, token in ENDS.items() if file.stem.startswith(family)), None)
    if end is None or file.stem in UNREADABLE:
        pytest.skip("its turns end with no token of their own, or its calls cannot be read")
    template = file.read_text()
    controls = tuple(sorted({*CONTROL.findall(template), end, "<bos>"}))
    tokenizer, number = speaker(controls=controls, end=end, template=template)
    tokenizer.bos_token = "<bos>"
    environments = Environments(tokenizer, [number], tools=[add])
    dialogue, write = environments.dialogue, environments.tool_format.render
    question = {"role": "user", "content": "What is 2 + 3?"}
    text = write([ToolCall("add", {"x": 1}, id="burnish01")])
    turn = environments.tool_format.message(text)
    answer = {"role": "tool", "name": "add", "content": "six 6", "tool_call_id": "burnish01"}
    schemas = environments.schemas[None]
    reply = tokenizer.decode(dialogue.reply(turn, [answer], schemas, stop=number))
    assert "six 6" in reply
    certificate = certify(dialogue, environments.tool_format.message, text, schemas)
    if certificate.extends:
        prompt = tokenizer.decode(dialogue.opening([question], schemas))
        shown = dialogue.as_shown(answer, certificate.answer_role)
        asked, _ = dialogue.offering([question], schemas)
        assert prompt + text + certificate.stop + reply == dialogue.render([*asked, turn, shown], schemas)
