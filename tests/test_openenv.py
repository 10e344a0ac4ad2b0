"""OpenEnv: sessions of real servers, actions, what is read and rewarded, and what a server refuses or breaks."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from burnish.environments.environment import Reply
from burnish.environments.openenv import OpenEnvEnvironment, OpenEnvServer, openenv_environment
from burnish.errors import ConfigError
from burnish.types import Episode, Group, StopReason
from test_episodes import request, setup

pytest.importorskip("openenv.core")

import uvicorn
from openenv.core.env_server import create_app
from openenv.core.env_server.interfaces import Environment
from openenv.core.env_server.types import Action, Observation, State
from pydantic import Field

ROW: dict[str, Any] = {"prompt": [{"role": "user", "content": "Play."}]}


class Move(Action):
    number: int = Field(ge=0, le=9)
    note: str = ""


class Seen(Observation):
    text: str
    note: str = ""


class Guess(Environment[Move, Seen, State]):
    """A number is guessed: 1 for it, and -0.25 for another one; 9 breaks the environment."""

    SUPPORTS_CONCURRENT_SESSIONS = True
    playing: set[int] = set()

    def reset(self, seed: int | None = None, episode_id: str | None = None, **kwargs: Any) -> Seen:
        assert seed is not None
        self.playing.add(id(self))
        self.target = seed % 3
        return Seen(text=f"Guess below 3, {kwargs.get('level', 'easy')}, {kwargs.get('style', 'plain')}.", reward=7.0)

    def step(self, action: Move, timeout_s: float | None = None, **kwargs: Any) -> Seen:
        if action.number == 9:
            raise RuntimeError("the board fell off the table")
        is_right = action.number == self.target
        return Seen(text=f"Not {action.number}.", note=action.note, done=is_right, reward=1.0 if is_right else -0.25)

    def close(self) -> None:
        self.playing.discard(id(self))

    @property
    def state(self) -> State:
        return State()


class Say(Action):
    message: str
    volume: int = 1


class Heard(Observation):
    echoed_message: str
    length: int


class Echo(Environment[Say, Heard, State]):
    """Repeats what is said, without a reward; its reset takes no seed."""

    SUPPORTS_CONCURRENT_SESSIONS = True

    def reset(self) -> Heard:  # type: ignore[override]
        return Heard(echoed_message="Speak.", length=0)

    def step(self, action: Say, timeout_s: float | None = None, **kwargs: Any) -> Heard:
        return Heard(
            echoed_message=action.message * action.volume, length=len(action.message), done=action.message == "bye"
        )

    @property
    def state(self) -> State:
        return State()


def serve(app: Any) -> tuple[str, Callable[[], None]]:
    """Start a server in a thread; return its address, and what stops it."""
    listening = socket.socket()
    listening.bind(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(app, log_level="error", timeout_graceful_shutdown=1))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]}, daemon=True)
    thread.start()
    deadline = time.monotonic() + 30
    while not server.started and time.monotonic() < deadline:
        time.sleep(0.02)

    def stop() -> None:
        server.should_exit = True
        thread.join(30)

    return f"http://127.0.0.1:{listening.getsockname()[1]}", stop


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    app = create_app(Guess, Move, Seen, max_concurrent_envs=16)
    app.mount("/small", create_app(Guess, Move, Seen))
    app.mount("/echo", create_app(Echo, Say, Heard, max_concurrent_envs=4))
    found, stop = serve(app)
    yield found
    stop()


def play(environment: OpenEnvEnvironment, turns: list[str], seed: int = 2) -> tuple[str, list[Reply], float | None]:
    """Play one episode: its opening, the replies to the turns, and the reward."""

    async def episode() -> tuple[str, list[Reply], float | None]:
        opening = await environment.reset(ROW, seed)
        try:
            replies = [await environment.step(text) for text in turns]
            return opening[-1]["content"], replies, environment.reward()
        finally:
            if (ended := environment.close()) is not None:
                await ended

    return asyncio.run(episode())


def texts(replies: list[Reply]) -> list[str]:
    return [message["content"] for reply in replies for message in reply.messages]


def wait_until_closed() -> None:
    deadline = time.monotonic() + 10
    while Guess.playing and time.monotonic() < deadline:  # the server hears of it later
        time.sleep(0.02)
    assert not Guess.playing


def test_a_group_plays_one_task_in_sessions_of_their_own(url: str) -> None:
    make = openenv_environment(url=url, columns=["level"], options={"style": "terse"})
    environments, script, engine = setup("chatml", None, factory=make)
    script.turns = lambda index, sample, number: (f"<think>9</think> {number}", StopReason.EOS)
    assert environments.rewarding == ["openenv"]
    lengths: list[int] = []
    for step in range(4):
        [found] = engine.generate([request(environments, samples=3, level="hard")], seed=0, step=step)
        played = [c.episode for c in found if c.episode is not None]
        for episode in played:
            number = len(episode.turns)
            assert (episode.error, episode.reward) == (None, 1.0 - 0.25 * (number - 1))
            assert episode.rewards == [-0.25] * (number - 1) + [1.0]
            answers = [m["content"] for m in episode.messages if m["role"] == "user"]
            assert answers == [f"Not {n}." for n in range(number - 1)]
            assert "What is 2 + 3?\n\nGuess below 3, hard, terse." in script.tokenizer.decode(episode.opening)
        wait_until_closed()  # sessions end with their episodes, not with the scoring
        [length] = {len(episode.turns) for episode in played}
        lengths.append(length)
        engine.end([])
    assert len(set(lengths)) > 1


def test_turns_are_fields_or_text_and_refusals_are_told(url: str) -> None:
    played = openenv_environment(url=url)()
    turns = ['<think>{"number": 2}</think>{"number": 1, "note": "x"}', "two", '{"note": "x", "numbr": 1}',
             '{"number": 10}', '{"number": 1, "note": "\\ud800"}', "2"]  # fmt: skip
    opening, replies, reward = play(played, turns)
    assert opening == "Play.\n\nGuess below 3, easy, plain."
    assert [reply.reward for reply in replies] == [-0.25, None, None, None, None, 1.0]
    assert [reply.done for reply in replies] == [False] * 5 + [True]
    assert reward == 0.75  # what reset gives is not the policy's
    first, *refused = texts(replies)
    assert first == "Not 1."
    told = [json.loads(text)["error"] for text in refused]
    assert {error["type"] for error in told} == {"invalid_action"}
    assert told[0]["message"] == "a field does not have the type or value that it should"
    assert told[1]["message"] == "the field 'number' is missing; there is no field 'numbr'"
    assert told[0]["required"] == ["number"]
    assert told[0]["fields"]["number"] == {"type": "integer", "minimum": 0, "maximum": 9}
    assert played.observation == {"text": "Not 2.", "note": ""}


def test_the_reward_of_an_episode(url: str) -> None:
    turns = ["0", "1", "2"]
    for options, count, expected in (
        ({}, 3, 0.5),
        ({"keep": "last"}, 3, 1.0),
        ({"keep": "last"}, 2, -0.25),
        ({}, 2, -0.5),
        ({}, 0, 0.0),
        ({"unfinished_reward": -1.0}, 2, -1.0),
        ({"unfinished_reward": -1.0}, 3, 0.5),
    ):
        assert play(openenv_environment(url=url, **options)(), turns[:count])[2] == expected
    assert play(openenv_environment(url=f"{url}/echo")(), ["hi", "bye"])[2] is None  # it gives none
    assert play(openenv_environment(url=f"{url}/echo")(), ["hi"])[2] == 0.0


def test_text_is_the_message_and_json_is_read_where_nothing_is_text(url: str) -> None:
    address = f"ws{url.removeprefix('http')}/echo/"
    opening, replies, _ = play(openenv_environment(url=address)(), ["[1, 2]", '{"message": "a", "volume": 2}'])
    assert (opening, texts(replies)) == ("Play.\n\nSpeak.", ["[1, 2]", "aa"])
    read = openenv_environment(url=address, observation="length")()
    assert texts(play(read, ["four"])[1]) == ["4"]
    read = openenv_environment(url=address, observation="*", action="message")()
    assert texts(play(read, ["é"])[1]) == ['{"echoed_message": "é", "length": 1}']


@pytest.mark.parametrize(
    ("chosen", "found", "shown"),
    [
        (None, {"result": "r", "text": "", "message": "m"}, "m"),
        (None, {"message": 3, "board": [1]}, '{"message": 3, "board": [1]}'),
        ("board", {"message": "m", "board": [1]}, "[1]"),
        ("board", {"board": ""}, ""),
        ("*", {"message": "m"}, '{"message": "m"}'),
    ],
)
def test_what_is_shown_of_an_observation(chosen: str | None, found: dict[str, Any], shown: str) -> None:
    assert OpenEnvServer("http://x", None, chosen, 1.0).shown(found) == shown


def test_failures_exclude_the_episode(url: str) -> None:
    def episodes(url: str, turns: Any, samples: int, **row: Any) -> list[Episode]:
        make = openenv_environment(url=url, **({"columns": ["level"]} if row else {}))
        environments, _, engine = setup("chatml", turns, factory=make)
        row = {name: value for name, value in row.items() if value is not None}
        [found] = engine.generate([request(environments, samples=samples, **row)], seed=0, step=0)
        engine.end([Group([], found)])
        return [c.episode for c in found if c.episode is not None]

    [broken] = episodes(url, lambda i, s, n: ("9", StopReason.EOS), 1)
    assert "the board fell off the table" in (broken.error or "")
    [lacking] = episodes(url, None, 1, level=None)
    assert "columns: the row has no 'level'" in (lacking.error or "")
    wait_until_closed()
    both = episodes(f"{url}/small", lambda i, s, n: (str(n), StopReason.EOS), 2)
    assert sum(episode.error is None for episode in both) == 1  # the server has room for one
    assert any("max_concurrent_envs" in (episode.error or "") for episode in both)

    other, stop = serve(create_app(Guess, Move, Seen, max_concurrent_envs=4))

    def lose(index: int, sample: int, number: int) -> tuple[str, StopReason]:
        if number == 1:
            stop()
        return '{"number": 5}', StopReason.EOS

    [lost] = episodes(other, lose, 1)
    assert (lost.error or "").startswith("turn 2")
    with pytest.raises(ConfigError, match="no OpenEnv server answers"):
        openenv_environment(url=other)()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"url": "localhost:8000"}, "url = 'localhost:8000': use the address"),
        ({"url": "http://x", "keep": "best"}, "keep = 'best': use one of last, sum"),
        ({"url": "http://x", "timeout_seconds": 0}, "timeout_seconds = 0: use a positive"),
        ({"url": "http://x", "columns": ["seed"]}, "'seed' is set already"),
        ({"url": "http://x", "columns": ["a"], "options": {"a": 1}}, "'a' is set already"),
        ({"url": "http://x", "options": {"seed": 1}}, "seed is drawn"),
        ({"action": "move"}, "action = 'move': the server's action has the fields number, note"),
        ({"observation": "board"}, "observation = 'board': the server's observation has the fields text, note"),
        ({"action": "*"}, r"action = '\*': the server's"),
    ],
)
def test_what_cannot_be_played_is_refused(url: str, options: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        openenv_environment(**{"url": url, **options})()
