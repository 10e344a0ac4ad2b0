"""Environments of OpenEnv servers: each episode is a session, and the policy's turn is the action."""

from __future__ import annotations

import importlib
import json
import re
import urllib.error
import urllib.request
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast
from urllib.parse import urlsplit

from burnish.data.formats import Message
from burnish.environments.conventions import decode_json, dump_json
from burnish.environments.environment import Environment, Reply
from burnish.environments.turns import behind_prompt, without_reasoning
from burnish.errors import ConfigError, show
from burnish.rewards.verifiers import require

__all__ = ["OpenEnvEnvironment", "OpenEnvServer", "openenv_environment"]

_KEEPS: dict[str, Callable[[list[float]], float]] = {"last": lambda rewards: rewards[-1], "sum": sum}
_TEXT_FIELDS = ("text", "message", "prompt", "observation", "output", "result", "content", "feedback", "echoed_message")
"""Fields of observations that hold the text to read, as environments commonly name them."""
_ALL = "*"
_REFUSED = "(code: VALIDATION_ERROR)"
"""What the package's client writes at the end of an error where an action does not fit the server's type."""


def openenv_environment(
    *,
    url: str,
    action: str | None = None,
    observation: str | None = None,
    keep: str = "sum",
    unfinished_reward: float | None = None,
    columns: Sequence[str] = (),
    options: Mapping[str, Any] | None = None,
    timeout_seconds: float = 60.0,
) -> Callable[[], OpenEnvEnvironment]:
    """Play an environment of a running OpenEnv server, with a session of its own for each episode.

    A turn without its `<think>...</think>` is the action: a JSON object is its fields, other text is one of them. A
    server needs room for all sessions that are open at a time (its `max_concurrent_envs`): all completions of a step.

    Args:
        url: address of the server, for example "http://localhost:8000".
        action: field of the action that text goes to; None for "message", or the only one that the action requires.
        observation: field of the observation that the policy reads; None for the first of the usual ones ("text",
            "message", "prompt", "observation", "output", "result", "content", "feedback", "echoed_message") that holds
            text, or else all fields as JSON; "*" for all fields as JSON.
        keep: the episode's reward: the "sum" of those of its turns, or the "last" of them.
        unfinished_reward: reward of an episode that a limit ended; None for what its turns have been given, 0 if
            nothing.
        columns: columns of the row that the environment's reset receives, beside the seed.
        options: further arguments of the environment's reset.
        timeout_seconds: time limit of a connection, and of each answer.

    Returns:
        A factory of environments.

    Raises:
        ConfigError: openenv-core is not installed, or an invalid option; the factory raises it where no server answers
            or a field does not exist.
    """
    require("openenv", "openenv", "openenv")
    if not re.match(r"(https?|wss?)://[^/]", url):
        raise ConfigError(f"url = {url!r}: use the address of a running server, such as 'http://localhost:8000'.")
    if keep not in _KEEPS:
        raise ConfigError(f"keep = {keep!r}: use one of {', '.join(_KEEPS)}.")
    if not timeout_seconds > 0:
        raise ConfigError(f"timeout_seconds = {timeout_seconds:g}: use a positive number of seconds.")
    given = {"seed", *(options or {})}
    if repeated := [name for name in columns if name in given]:
        raise ConfigError(f"columns = {show(list(columns))}: {repeated[0]!r} is set already; leave it out.")
    if "seed" in (options or {}):
        raise ConfigError("options: seed is drawn for each prompt; leave it out.")
    server = OpenEnvServer(url, action, observation, timeout_seconds)

    def make() -> OpenEnvEnvironment:
        server.look()
        return OpenEnvEnvironment(server, keep, unfinished_reward, tuple(columns), dict(options or {}))

    return make


@dataclass(slots=True)
class OpenEnvServer:
    """A server, and the types of its actions and observations; see `openenv_environment` for the first attributes.

    Attributes:
        action_schema: JSON schema of actions; empty where the server does not tell.
        required: fields that an action must have.
    """

    url: str
    action: str | None
    observation: str | None
    timeout_seconds: float
    action_schema: dict[str, Any] = field(default_factory=dict[str, Any])
    required: list[str] = field(default_factory=list[str])
    _client: Any = None

    def look(self) -> None:
        """Import the package and ask the server for its types, once.

        Raises:
            ConfigError: no server answers, or it has no field of a given name.
        """
        if self._client is not None:
            return
        client: Any = importlib.import_module("openenv.core.generic_client").GenericEnvClient
        schemas = self._schemas()
        for name, chosen in (("action", self.action), ("observation", self.observation)):
            schema = schemas.get(name, {})
            fields = _fields(schema)
            is_closed = bool(fields) and schema.get("additionalProperties") is False
            if is_closed and chosen not in (None, _ALL if name == "observation" else None, *fields):
                raise ConfigError(f"{name} = {chosen!r}: the server's {name} has the fields {', '.join(fields)}.")
        self.action_schema = schemas.get("action", {})
        fields = _fields(self.action_schema)
        self.required = [name for name in self.action_schema.get("required", ()) if name in fields]
        if self.action is None:
            only = self.required or list(fields)
            self.action = only[0] if len(only) == 1 and "message" not in fields else "message"
        self._client = client

    def _schemas(self) -> dict[str, Any]:
        """Ask for the JSON schemas of actions and observations; empty if the server does not know the question."""
        address = f"{re.sub('^ws', 'http', self.url.rstrip('/'))}/schema"
        # As the package's client: a server on this machine is not behind the proxy.
        is_local = urlsplit(address).hostname in ("localhost", "127.0.0.1")
        handlers = [urllib.request.ProxyHandler({})] if is_local else []
        try:
            with urllib.request.build_opener(*handlers).open(address, timeout=self.timeout_seconds) as answer:
                found = json.load(answer)
        except (urllib.error.HTTPError, ValueError):
            return {}
        except OSError as error:
            raise ConfigError(
                f"url = {self.url!r}: no OpenEnv server answers ({' '.join(str(error).split())[:200]}); start it, or "
                "correct the address."
            ) from error
        return cast("dict[str, Any]", found) if isinstance(found, dict) else {}

    def connect(self) -> Any:
        """Return a client, which is a session once it is connected."""
        seconds = self.timeout_seconds
        return self._client(base_url=self.url, connect_timeout_s=seconds, message_timeout_s=seconds)

    def action_of(self, text: str) -> dict[str, Any]:
        """Return the action of a turn: its fields, where it is a JSON object, or else its text as one of them."""
        said = without_reasoning(text)
        value, end, problem = decode_json(said)
        is_whole = problem is None and isinstance(value, dict) and end == len(said)
        # Servers cannot write back half a character, as an escape may be, and would end the session.
        if is_whole and _is_encodable(dump_json(value)):
            return cast("dict[str, Any]", value)
        return {str(self.action): said}

    def refusal(self, action: Mapping[str, Any]) -> str:
        """Tell the policy what an action that the server has refused should be."""
        fields = _fields(self.action_schema)
        problems = [f"the field {name!r} is missing" for name in self.required if name not in action]
        problems += [f"there is no field {name!r}" for name in action if fields and name not in fields]
        message = "; ".join(problems) or "a field does not have the type or value that it should"
        told: dict[str, Any] = {"type": "invalid_action", "message": message[:500]}
        if fields:
            told |= {"fields": fields, "required": self.required}
        return dump_json({"error": told}).encode("utf-8", "replace").decode()  # no tokenizer takes half a character

    def shown(self, found: Mapping[str, Any]) -> str:
        """Return what the policy reads of an observation.

        Raises:
            ValueError: the observation lacks the field.
        """
        chosen = self.observation
        if chosen is None:
            texts = (found[name] for name in _TEXT_FIELDS if isinstance(found.get(name), str) and found[name])
            return next(texts, None) or dump_json(found)
        if chosen == _ALL:
            return dump_json(found)
        if chosen not in found:
            raise ValueError(f"observation = {chosen!r}: an observation has the fields {', '.join(found) or '(none)'}")
        return found[chosen] if isinstance(found[chosen], str) else dump_json(found[chosen])


class OpenEnvEnvironment(Environment):
    """An environment of an OpenEnv server; see `openenv_environment` for the arguments.

    Attributes:
        observation: the fields of the last observation, for reward functions.
    """

    def __init__(
        self,
        server: OpenEnvServer,
        keep: str,
        unfinished_reward: float | None,
        columns: Sequence[str],
        options: Mapping[str, Any],
    ) -> None:
        self._server, self._keep, self._unfinished = server, _KEEPS[keep], unfinished_reward
        self._columns, self._options = columns, options
        self._session: Any = None
        self._rewards: list[float] = []
        self._is_done = False
        self.observation: dict[str, Any] = {}

    @property
    def name(self) -> str:
        """The kind in run files."""
        return "openenv"

    # Async, since a session belongs to the event loop that has opened it, and waits far more than it computes.
    async def reset(self, row: Mapping[str, Any], seed: int) -> Sequence[Message]:
        """Open a session; its first observation follows the prompt of the row."""
        await self._end()
        if missing := [name for name in self._columns if name not in row]:
            raise ValueError(f"columns: the row has no {missing[0]!r}")
        chosen = {name: row[name] for name in self._columns}
        self._rewards, self._is_done = [], False
        self._session = self._server.connect()
        try:
            result = await self._session.reset(seed=seed, **self._options, **chosen)
        except Exception as error:
            await self._end()
            said = " ".join(str(error).split()) or type(error).__name__
            raise RuntimeError(
                f"{self._server.url} does not begin an episode: {said}; it takes no more sessions at a time than its "
                "max_concurrent_envs"
            ) from error
        if result.done:
            raise RuntimeError(f"{self._server.url}: the episode is done before its first turn")
        self.observation = result.observation
        return behind_prompt(row, self._server.shown(self.observation))

    async def step(self, text: str) -> Reply:
        """Act; an action that the server refuses is told to the policy, and costs it a turn."""
        action = self._server.action_of(text)
        try:
            result = await self._session.step(action)
        except RuntimeError as error:
            if not str(error).endswith(_REFUSED):
                raise
            return Reply([{"role": "user", "content": self._server.refusal(action)}])
        reward = None if result.reward is None else float(result.reward)
        self._rewards += [] if reward is None else [reward]
        self.observation, self._is_done = result.observation, bool(result.done)
        if self._is_done:
            await self._end()  # makes room for another session, before the episode is scored
            return Reply(done=True, reward=reward)
        return Reply([{"role": "user", "content": self._server.shown(self.observation)}], reward=reward)

    def reward(self) -> float | None:
        """Return the sum of the turns' rewards, or the last; None if the environment has ended without any."""
        if not self._is_done and self._unfinished is not None:
            return self._unfinished
        if not self._rewards:
            return None if self._is_done else 0.0
        return float(self._keep(self._rewards))

    def close(self) -> Awaitable[None] | None:
        """End the session."""
        return None if self._session is None else self._end()

    async def _end(self) -> None:
        session, self._session = self._session, None
        if session is not None:
            await session.close()


def _is_encodable(text: str) -> bool:
    return text.encode("utf-8", "replace").decode() == text


def _fields(schema: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields that a schema names, with their types, but for those that every action and observation has."""
    found = cast("dict[str, dict[str, Any]]", schema.get("properties", {}))
    everywhere = ("done", "metadata", "reward")
    return {
        name: {key: value for key, value in kind.items() if key != "title"}
        for name, kind in found.items()
        if name not in everywhere
    }
