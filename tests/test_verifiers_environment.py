"""Environments of verifiers: turns, tools, rewards as the package gives them, rows, and what goes wrong."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import re
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset

from burnish import GRPOConfig, GRPOTrainer
from burnish.cli.main import main
from burnish.data import load_rows
from burnish.environments import ToolCall
from burnish.environments.verifiers import VerifiersEnvironment, loaded_environment
from burnish.errors import ConfigError, EngineError
from burnish.rewards.calls import shared_loop
from burnish.types import Completion, Group, StopReason
from dialects import DIALECTS, save_speaker
from test_environment_files import TRAINING
from test_episodes import Budget, Environments, Script, request, setup

pytest.importorskip("verifiers", minversion="0.1.14")

import verifiers as vf

QUESTIONS = [{"question": f"What is {a} + 3?", "answer": str(a + 3)} for a in range(2, 8)]


def right(completion: Any, answer: str) -> float:
    *_, last = (message["content"] for message in completion if message["role"] == "assistant")
    return float(last.strip() == answer)


async def brief(completion: Any, parser: Any) -> float:
    return 1.0 / len(parser.parse_answer(completion) or "x")


def rubric(*funcs: Any, **options: Any) -> Any:
    return vf.Rubric(funcs=list(funcs) or [right, brief], weights=[1.0, 0.25][: len(funcs) or 2], **options)


@pytest.fixture(autouse=True)
def handlers() -> Iterator[None]:
    """Give back the signals that every environment of verifiers takes."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def single(**options: Any) -> Any:
    options = {"rubric": rubric(), "system_prompt": "Be brief.", **options}
    return vf.SingleTurnEnv(dataset=Dataset.from_list(QUESTIONS), **options)


class Guess(vf.MultiTurnEnv):
    """Says how a guess compares with the answer, and ends with the right one."""

    cleaned: int = 0

    def __init__(self, **options: Any) -> None:
        rows = [{"question": "Guess.", "answer": str(n), "info": json.dumps({"hint": n % 2})} for n in range(6)]
        super().__init__(dataset=Dataset.from_list(rows), **{"rubric": rubric(), "max_turns": 6, **options})

    async def env_response(self, messages: Any, state: Any, **kwargs: Any) -> Any:
        said = messages[-1].content.strip()
        if said == state["answer"]:
            state["final_env_response"] = [vf.UserMessage(content="Right.")]
        return [vf.UserMessage(content=f"Not {said}, hint {state['info']['hint']}.")]

    @vf.cleanup
    async def count(self, state: Any) -> None:
        type(self).cleaned += 1


def add(a: int, b: int) -> int:
    """Add two numbers."""
    return a + b


def tools(**options: Any) -> Any:
    rows = Dataset.from_list([{"question": "What is 2 + 3?", "answer": "5"}])
    return vf.ToolEnv(dataset=rows, tools=[add], **{"rubric": rubric(), "max_turns": 5, **options})


class Scripted(vf.Client):
    """A client that gives written turns, for the package's own way of running a rollout."""

    def __init__(self, turns: list[Any]) -> None:
        super().__init__(None)
        self.turns = iter(turns)

    async def get_response(self, prompt: Any, model: str, sampling_args: Any, tools: Any = None, **kwargs: Any) -> Any:
        turn = next(self.turns)
        text, calls = turn if isinstance(turn, tuple) else (turn, None)
        message = vf.ResponseMessage(content=text, tool_calls=calls, finish_reason="stop", is_truncated=False)
        return vf.Response(id="", created=0, model=model, message=message)

    async def _unused(self, *args: Any) -> Any: ...

    setup_client = to_native_tool = to_native_prompt = get_native_response = _unused
    raise_from_native_response = from_native_response = close = _unused


def their_reward(environment: Any, row: Any, turns: list[Any]) -> float:
    return asyncio.run(environment.run_rollout(row, Scripted(turns), "m", {}))["reward"]


def play(
    environment: Any, turns: list[str] | Callable[..., str], *, row: int = 0, samples: int = 1, **options: Any
) -> tuple[Environments, Script, list[Completion]]:
    """Play the episodes of a row, whose turns are given."""
    dialect, max_tokens = options.pop("dialect", "chatml"), options.pop("max_tokens", None)
    environments, script, engine = setup(dialect, None, factory=loaded_environment(environment), **options)
    written = turns if callable(turns) else lambda index, sample, number: turns[number]
    script.turns = lambda *where: (written(*where), StopReason.EOS)
    asked = request(environments, samples=samples, **environment.get_dataset()[row])
    if max_tokens is not None:
        asked = dataclasses.replace(asked, params=dataclasses.replace(asked.params, max_new_tokens=max_tokens))
    [found] = engine.generate([asked], seed=0, step=0)
    engine.end([Group([], found)])
    assert not asyncio.all_tasks(shared_loop("verifiers"))
    return environments, script, found


def said(completion: Completion, role: str = "user") -> list[str]:
    assert completion.episode is not None
    return [message["content"] for message in completion.episode.messages if message["role"] == role]


@pytest.mark.parametrize("dialect", DIALECTS)
def test_a_single_turn_is_scored_as_verifiers_does(dialect: str) -> None:
    environment = single()
    for row, turn in ((0, "5"), (1, " 6 "), (2, "five")):
        environments, script, [completion] = play(environment, [turn], row=row, dialect=dialect)
        episode = completion.episode
        assert episode is not None
        assert (episode.error, len(episode.turns)) == (None, 1)
        assert environments.rewarding == ["SingleTurnEnv"]
        assert episode.reward == their_reward(environment, environment.get_dataset()[row], [turn])
        opening = script.tokenizer.decode(episode.opening)
        assert "Be brief." in opening
        assert f"What is {row + 2} + 3?" in opening


def test_several_turns_reach_their_own_rows_answer_and_end_with_it() -> None:
    environment = Guess()
    theirs, before = their_reward(environment, environment.get_dataset()[3], list("0123")), Guess.cleaned
    _, script, found = play(environment, lambda index, sample, number: str(number), row=3, samples=3)
    for completion in found:
        episode = completion.episode
        assert episode is not None
        assert (episode.error, len(episode.turns)) == (None, 4)
        assert said(completion) == [f"Not {n}, hint 1." for n in range(3)]
        assert episode.reward == theirs == 1.25
        mask = completion.loss_mask
        assert mask is not None
        trained = [token for token, kept in zip(completion.token_ids, mask, strict=True) if kept]
        assert script.tokenizer.decode(trained, skip_special_tokens=True) == "0123"
    assert Guess.cleaned == before + 3
    _, _, [given_up] = play(environment, lambda *where: "9", row=3)  # by the environment's max_turns
    assert given_up.episode is not None
    assert (len(given_up.episode.turns), given_up.episode.error) == (6, None)


@pytest.mark.parametrize("dialect", DIALECTS)
def test_tools_are_the_environments(dialect: str) -> None:
    environment = tools()
    environments, _, _ = setup(dialect, None, factory=loaded_environment(environment))
    write = environments.tool_format.render
    call, text = ToolCall("add", {"a": 2, "b": 3}, id="abcdef123"), '{"a": 2, "b": 3}'
    turns = [write([call]), write([ToolCall("sub", {}, id="abcdef124")]), write([call]).replace("2", "2,,"), "5"]
    environments, script, [completion] = play(environment, turns, dialect=dialect)
    episode = completion.episode
    assert episode is not None
    assert episode.error is None
    [schema] = environments.schemas[None]
    assert schema["function"]["name"] == "add"
    assert "Add two numbers" in script.tokenizer.decode(episode.opening)
    given = [message.get("tool_call_id", "abcdef123") for message in episode.messages if message["role"] == "tool"]
    assert all(identifier.startswith("abcdef") for identifier in given)  # ours are not shown
    answers = said(completion, "tool")
    assert answers[:2] == ["5", "'sub'"]
    places = zip(episode.turns, episode.turns[1:], strict=False)
    shown = [script.tokenizer.decode(completion.token_ids[before[1] : after[0]]) for before, after in places]
    assert all(answer in text for answer, text in zip(answers, shown, strict=True))
    if len(answers) == 3:  # broken JSON is a malformed call in most formats, and plain text in one
        assert episode.num_failed_calls == 1
        assert "line 1 column" in answers[2]
    theirs = [("", [vf.ToolCall(id="x", name="add", arguments=text)]), "5"]
    _, _, [brief] = play(environment, [turns[0], "5"], dialect=dialect)
    assert brief.episode is not None
    assert brief.episode.num_calls == 1
    assert brief.episode.reward == their_reward(environment, environment.get_dataset()[0], theirs) == 1.25


class Account(vf.StatefulToolEnv):
    """Each episode has a sum of its own, which its tool adds to."""

    def __init__(self) -> None:
        function = {"name": "deposit", "arguments": '{"amount": 1}'}
        call = {"id": "abcdef120", "type": "function", "function": function}
        shown = [
            {"role": "user", "content": "Add 1."},
            {"role": "assistant", "content": "", "tool_calls": [call]},
            {"role": "tool", "tool_call_id": "abcdef120", "content": "1"},
            {"role": "assistant", "content": "Done."},
        ]
        rows = Dataset.from_list([{"question": "Add 5.", "answer": "5"}])
        super().__init__(dataset=rows, few_shot=shown, rubric=rubric(self.total))
        self.add_tool(self.deposit, args_to_skip=["state"])

    def deposit(self, amount: int, state: dict[str, Any]) -> int:
        """Add to the sum."""
        state["sum"] = state.get("sum", 0) + amount
        return state["sum"]

    def update_tool_args(self, tool_name: str, tool_args: Any, messages: Any, state: Any, **kwargs: Any) -> Any:
        return {**tool_args, "state": state}

    def total(self, state: Any) -> float:
        assert state["completion"][0]["content"] == ""  # the calls are not in the text as well
        return float(state["sum"])


@pytest.mark.parametrize("dialect", ["chatml", "mistral"])
def test_tools_may_have_a_state_and_prompts_hold_calls(dialect: str) -> None:
    environment = Account()
    environments, _, _ = setup(dialect, None, factory=loaded_environment(environment))
    # The policy may give two calls one identifier.
    calls = [ToolCall("deposit", {"amount": amount}, id="abcdef123") for amount in (2, 3)]
    turns = [environments.tool_format.render(calls), "Done."]
    _, script, found = play(environment, turns, dialect=dialect, samples=2)
    for completion in found:
        assert completion.episode is not None
        assert (completion.episode.error, completion.episode.reward) == (None, 5.0)
        assert said(completion, "tool") == ["2", "5"]
        opening = script.tokenizer.decode(completion.episode.opening)
        assert '"arguments": {"amount": 1}' in opening
        assert '"state"' not in opening


def test_json_is_text_where_no_tools_are_offered() -> None:
    _, _, [completion] = play(single(rubric=rubric(right)), ['{"name": "add", "arguments": {}}'], dialect="llama")
    assert completion.episode is not None
    assert completion.episode.messages[-1] == {"role": "assistant", "content": '{"name": "add", "arguments": {}}'}
    assert completion.episode.num_calls == 0


class Broken(Guess):
    """Fails in the way of its `kind` when it answers the second turn."""

    def __init__(self, kind: str, **options: Any) -> None:
        super().__init__(**options)
        self.kind = kind

    async def setup_state(self, state: Any) -> None:
        if self.kind == "setup":
            raise vf.SandboxError("no room") from ValueError("0 machines")

    async def get_prompt_messages(self, state: Any) -> Any:
        messages = await super().get_prompt_messages(state)
        if len(state["trajectory"]) == 2:
            if self.kind == "drops":
                return messages[-1:]
            if self.kind == "edits":
                messages[1]["content"] = "A better turn."
            if self.kind == "silent":
                return messages[:-1]
            if self.kind == "image":
                part = {"type": "image_url", "image_url": {"url": "data:,"}}
                return [*messages, vf.UserMessage(content=[part])]
            if self.kind == "hangs":
                await asyncio.sleep(60)
            if self.kind == "blocks":
                time.sleep(3)
            if self.kind == "tools":
                state["tool_defs"] = [vf.Tool(name="late", description="", parameters={})]
            if self.kind == "twice":
                await asyncio.gather(*(self.get_model_response(state, messages) for _ in range(2)))
            if self.kind == "error":
                raise vf.ToolError("the board fell off the table")
            if self.kind == "bug":
                raise KeyError("board")
        return messages


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("setup", "reset: RuntimeError: SandboxError: no room from ValueError: 0 machines"),
        ("drops", "turn 2: RuntimeError: the environment rewrites earlier messages"),
        ("edits", "turn 2: RuntimeError: the environment rewrites earlier messages"),
        ("silent", "turn 2: RuntimeError: the environment asks for another turn without saying anything"),
        ("image", "turn 2: ValueError: a message holds 'image_url': only text can be played"),
        ("hangs", "turn 2: TimeoutError: it took longer than 1 s"),
        ("blocks", "turn 2: TimeoutError: it took longer than 1 s"),
        ("tools", r"turn 2: RuntimeError: this episode has the tools \['late'\], and the environment \[\]"),
        ("twice", "turn 3: RuntimeError: the environment asks for several turns at a time"),
        ("error", "turn 2: RuntimeError: ToolError: the board fell off the table"),
        ("bug", "turn 2: KeyError: 'board'"),
    ],
)
def test_what_fails_excludes_its_episode(kind: str, words: str) -> None:
    make, rows = loaded_environment(Broken(kind)), Guess().get_dataset()
    environments, _, engine = setup("chatml", nine, factory=make, budget=Budget(step_seconds=1.0))
    before = Broken.cleaned
    [[completion]] = engine.generate([request(environments, **rows[0])], seed=0, step=0)
    time.sleep(3.0 if kind == "blocks" else 0.0)  # until the loop is free again
    engine.end([Group([], [completion])])
    assert not asyncio.all_tasks(shared_loop("verifiers"))
    assert Broken.cleaned == before + 1
    assert completion.episode is not None
    assert completion.episode.reward is None
    assert re.match(words, completion.episode.error or ""), completion.episode.error


def nine(index: int, sample: int, number: int) -> tuple[str, StopReason]:
    return "9", StopReason.EOS


def test_an_error_of_a_reward_function_is_no_reward() -> None:
    def broken(completion: Any) -> float:
        raise ZeroDivisionError("no such answer")

    async def empty(completion: Any) -> Any:
        return None

    for function, words in ((broken, "ZeroDivisionError: no such answer"), (empty, "TypeError")):
        _, _, [completion] = play(single(rubric=rubric(right, function)), ["5"])
        assert completion.episode is not None
        assert completion.episode.reward is None
        assert f"reward: RuntimeError: its reward function '{function.__name__}' raised {words}" in str(
            completion.episode.error
        )
    measured = rubric(right)
    measured.add_metric(broken)  # of weight 0: it changes no reward
    _, _, [completion] = play(single(rubric=measured), ["5"])
    assert completion.episode is not None
    assert (completion.episode.error, completion.episode.reward) == (None, 1.0)


@pytest.mark.parametrize("tokens", [9, 400])
def test_an_episode_that_a_limit_ends_is_scored_as_it_stands(tokens: int) -> None:
    scored: list[tuple[list[str], bool]] = []

    def told(completion: Any, state: Any) -> float:
        scored.append(([message["content"] for message in completion], state["trajectory"][0]["is_truncated"]))
        return 0.5

    budget = Budget(turns=2)
    _, _, [completion] = play(
        Guess(rubric=rubric(told)), lambda *where: "I think it is 9", budget=budget, max_tokens=tokens
    )
    assert completion.episode is not None
    assert (completion.episode.error, completion.episode.reward) == (None, 0.5)
    cut = completion.stop_reason is StopReason.LENGTH
    assert cut == (tokens == 9)
    texts, is_truncated = scored[0]
    assert (texts[0], is_truncated) == ("I think it is 9", cut)
    assert len(texts) == (1 if cut else 3)


def test_a_time_limit_of_the_environment_excludes_the_episode() -> None:
    def slow(index: int, sample: int, number: int) -> str:
        time.sleep(0.3)
        return "9"

    _, _, [completion] = play(Guess(timeout_seconds=0.1), slow)
    assert completion.episode is not None
    assert "turn 1: TimeoutError: the environment took longer than its own timeout" in str(completion.episode.error)


def test_episodes_that_are_given_up_leave_nothing_behind() -> None:
    environments, script, engine = setup("chatml", None, factory=loaded_environment(Guess()))
    before = Guess.cleaned

    def lost(index: int, sample: int, number: int) -> tuple[str, StopReason]:
        if number == 1:
            raise EngineError("the engine is lost")
        return "9", StopReason.EOS

    script.turns = lost
    rows = Guess().get_dataset()
    with pytest.raises(EngineError, match="the engine is lost"):
        engine.generate([request(environments, index=i, samples=2, **rows[i]) for i in range(2)], seed=0, step=0)
    deadline = time.monotonic() + 10
    while asyncio.all_tasks(shared_loop("verifiers")) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not asyncio.all_tasks(shared_loop("verifiers"))
    assert Guess.cleaned == before + 4


def test_the_rubrics_clean_up_and_the_state_reaches_reward_functions() -> None:
    cleaned: list[Any] = []

    class Tidy(vf.Rubric):
        @vf.cleanup
        async def tidy(self, state: Any) -> None:
            cleaned.append(state["reward"])

    environments, _, engine = setup(
        "chatml", nine, factory=loaded_environment(Guess(rubric=Tidy(funcs=[right]), max_turns=1))
    )
    [found] = engine.generate([request(environments, **Guess().get_dataset()[0])], seed=0, step=0)
    played = found[0].episode.environment  # type: ignore[union-attr]
    assert isinstance(played, VerifiersEnvironment)
    assert played.exposed.state["metrics"] == {"right": 0.0, "num_turns": 1.0}
    assert cleaned == []
    engine.end([Group([], found)])
    assert cleaned == [0.0]
    assert played.state is None


def test_signals_are_left_to_the_run() -> None:
    environment = single()
    assert signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL  # verifiers has taken it
    loaded_environment(environment)
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def of_a_group(completions: Any) -> list[float]:
    return [0.0 for _ in completions]


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: single(rubric=vf.Rubric(funcs=[of_a_group])), "scores the rollouts of a group together"),
        (lambda: single(rubric=vf.Rubric()), "has a rubric without reward functions"),
        (lambda: vf.EnvGroup([single(), Guess()]), r"is an EnvGroup: make an \[\[environment\]\] of each member"),
        (lambda: vf.Rubric(), "is a Rubric, which does not play turn by turn"),
    ],
)
def test_what_cannot_be_played_is_refused(make: Callable[[], Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        loaded_environment(make())


CODE = """
import verifiers as vf
from datasets import Dataset


def load_environment(size: int = 4, more: bool = False):
    if size > 100:
        raise ValueError("too many")
    rows = Dataset.from_list([{"question": f"Say {n}.", "answer": str(n)} for n in range(size)])
    held_out = Dataset.from_list([{"question": "Say 99.", "answer": "99"}]) if more else None
    parser = vf.Parser()

    def long(completion, answer):
        return len(parser.parse_answer(completion)) / 1000

    return vf.SingleTurnEnv(dataset=rows, eval_dataset=held_out, parser=parser, rubric=vf.Rubric(funcs=[long]))
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "say_numbers.py").write_text(CODE)
    monkeypatch.syspath_prepend(tmp_path)
    save_speaker(tmp_path / "model")
    return tmp_path


def test_rows_are_those_of_the_environment(folder: Path) -> None:
    source = {"source": "verifiers", "env_id": "say-numbers"}
    rows = load_rows({**source, "limit": 2})
    assert [row["prompt"] for row in rows] == [[{"role": "user", "content": f"Say {n}."}] for n in range(2)]
    assert [(row["answer"], row["example_id"]) for row in rows] == [("0", 0), ("1", 1)]
    [held_out] = load_rows({**source, "split": "eval", "options": {"more": True}})
    assert held_out["answer"] == "99"
    for spec, words in (
        ({"split": "eval"}, r"data.split = 'eval': the environment 'say-numbers' has no such rows; use \"train\""),
        ({"split": "test"}, "data.split = 'test': use 'train' or 'eval'"),
        ({"size": 3}, "data.size = 3: a source verifiers does not use it"),
        ({"env_id": "no-such"}, "data: env_id = 'no-such' with options = {}: verifiers cannot load it"),
        ({"options": {"size": 101}}, "RuntimeError: Failed to load environment 'say-numbers': too many"),
    ):
        with pytest.raises(ConfigError, match=words):
            load_rows({**source, **spec})
    with pytest.raises(ConfigError, match=r"data\.env_id is missing: a source verifiers needs env_id"):
        load_rows({"source": "verifiers"})


def test_a_run_of_a_file(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = folder / "run.toml"
    table = '[environment]\nkind = "verifiers"\nenv_id = "say-numbers"\n'
    data = 'data.train = { source = "verifiers", env_id = "say-numbers" }'
    path.write_text(f'model = "{folder}/model"\n{data}\n{table}{TRAINING.format(folder=folder)}')
    assert main(["grpo", str(path), "--dry-run"]) == 0
    assert "environment: say-numbers; tools: none\ncriteria: say-numbers\n" in capsys.readouterr().out
    assert main(["grpo", str(path)]) == 0
    assert json.loads((folder / "out" / "status.json").read_text())["state"] == "finished"
    records = [json.loads(line) for line in (folder / "out" / "transcripts.jsonl").read_text().splitlines()]
    assert len(records) == 8
    for record in records:
        assert record["criteria"] == {"say-numbers": len(record["messages"][-1]["content"]) / 1000}
    path.write_text(path.read_text().replace('"say-numbers"\n', '"no-such"\n'))
    assert main(["grpo", str(path)]) == 2
    assert "env_id = 'no-such' with options = {}: verifiers cannot load it" in capsys.readouterr().err


def test_a_loaded_environment_trains_over_several_turns(folder: Path) -> None:
    environment = Guess(rubric=rubric(brief))
    options = {"num_generations": 2, "per_device_train_batch_size": 4, "max_completion_length": 120, "bf16": False}
    config = GRPOConfig(output_dir=str(folder / "out"), max_steps=2, save_strategy="no", report_to="none", **options)
    trainer = GRPOTrainer(
        str(folder / "model"),
        None,
        config,
        environment.get_dataset(),
        environment_factory=loaded_environment(environment),
    )
    trainer.train()
    assert trainer.state.global_step == 2
    assert not asyncio.all_tasks(shared_loop("verifiers"))
