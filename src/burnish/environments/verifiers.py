"""Environments of the package verifiers: their rollouts ask a client for every turn, and the policy is the client.

A rollout of verifiers is a coroutine that runs from the first request to the last answer. Here it runs as a task on an
event loop of its own, and waits in each request until the episode has sampled the turn.
"""

from __future__ import annotations

import asyncio
import copy
import functools
import importlib
import inspect
import time
from collections.abc import Callable, Coroutine, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, TypeVar, cast

from burnish.data.formats import Message
from burnish.data.verifiers_rows import load_verifiers, release_signals, require_verifiers
from burnish.environments.conventions import ToolCall, decode_json, dump_json
from burnish.environments.environment import Environment, Reply
from burnish.errors import ConfigError, show
from burnish.rewards.calls import shared_loop

__all__ = ["VerifiersEnvironment", "loaded_environment", "verifiers_environment"]

_T = TypeVar("_T")
_failures: ContextVar[list[tuple[str, Exception]]] = ContextVar("failures")
"""Errors of the reward functions that the running score has called."""


def verifiers_environment(*, env_id: str, options: Mapping[str, Any] | None = None) -> Callable[[], Environment]:
    """Play an environment of verifiers 0.1 that derives from its MultiTurnEnv: single turns, several, or tools.

    Its rows are those of the source `verifiers`, or any with its columns; the reward is that of its own rubric.

    Args:
        env_id: name of the environment, whose package is installed.
        options: arguments of its `load_environment`.

    Returns:
        A factory of environments.

    Raises:
        ConfigError: verifiers is not installed; the factory raises it where the environment cannot be loaded or played.
    """
    require_verifiers()
    if not env_id.strip():
        raise ConfigError(f"env_id = {env_id!r}: use the name of an environment, as for verifiers.load_environment.")
    # Loaded with the first environment, in the main thread: verifiers installs signal handlers.
    factory = functools.cache(lambda: loaded_environment(load_verifiers(env_id, options or {})))
    return lambda: factory()()


def loaded_environment(environment: Any) -> Callable[[], Environment]:
    """Play an environment of verifiers that is loaded already; its rows are `environment.get_dataset()`.

    Args:
        environment: a `verifiers.MultiTurnEnv`.

    Returns:
        A factory of environments.

    Raises:
        ConfigError: it cannot be played, or scored, one episode at a time.
    """
    require_verifiers()
    release_signals()
    verifiers: Any = importlib.import_module("verifiers")
    name = getattr(environment, "env_id", "") or type(environment).__name__
    where = f"the environment {name!r} of verifiers"
    if isinstance(environment, verifiers.EnvGroup):
        raise ConfigError(f"{where} is an EnvGroup: make an [[environment]] of each member, with rows of its own.")
    if not isinstance(environment, verifiers.MultiTurnEnv):
        raise ConfigError(
            f"{where} is a {type(environment).__name__}, which does not play turn by turn: use one that derives from "
            "verifiers.MultiTurnEnv."
        )
    if environment.requires_group_rollouts or environment.provides_advantages:
        raise ConfigError(
            f"{where} scores the rollouts of a group together, and episodes are scored one by one: leave out its group "
            "reward functions, and write them as criteria with per_group = true."
        )
    schemas = [_schema(tool) for tool in environment.tool_defs or ()]
    rubric = _strict(environment.rubric, verifiers.Rubric, where) if environment.score_rollouts else None
    tasks = _Tasks(environment, name, schemas, rubric)
    return lambda: VerifiersEnvironment(tasks)


@dataclass(frozen=True, slots=True)
class _Tasks:
    """What the episodes of an environment share.

    Attributes:
        environment: the environment of verifiers.
        name: its name in metrics.
        schemas: the tools that it offers.
        rubric: its rubric, which notes the errors of reward functions; None where it is not to score.
    """

    environment: Any
    name: str
    schemas: list[dict[str, Any]]
    rubric: Any


class VerifiersEnvironment(Environment):
    """An episode of an environment of verifiers; see `verifiers_environment`."""

    def __init__(self, tasks: _Tasks) -> None:
        self._tasks = tasks
        self._rollout: _Rollout | None = None
        self._shown: list[Message] = []
        self._calls: dict[str, ToolCall] = {}

    @property
    def name(self) -> str:
        """The name of the environment."""
        return self._tasks.name

    @property
    def state(self) -> Any:
        """The state of the rollout, as the environment and its rubric see it; None outside an episode."""
        return None if self._rollout is None else self._rollout.state

    def schemas(self) -> Sequence[dict[str, Any]]:
        """Return the schemas of the environment's tools."""
        return self._tasks.schemas

    def message(self, text: str) -> Message:
        """Return a turn, with its tool calls where the environment offers tools."""
        if not self._tasks.schemas or self.tool_format is None:
            return super().message(text)
        return self.tool_format.message(text, self._tasks.schemas)

    async def reset(self, row: Mapping[str, Any], seed: int) -> Sequence[Message]:
        """Run the rollout of a row up to its first request, and return the messages of that."""
        await self.close()
        self._rollout, self._shown, self._calls = _Rollout(self._tasks), [], {}
        asked = await _on_loop(self._rollout.begin(row))
        if asked is None:
            raise RuntimeError("the rollout has ended before its first turn")
        return self._news(asked)

    async def step(self, text: str) -> Reply:
        """Answer the request, and run the rollout up to the next one or its end."""
        asked, calls = await self._answer(text)
        news = [] if asked is None else self._news(asked)
        if asked is not None and not news:
            raise RuntimeError("the environment asks for another turn without saying anything")
        failed = sum(call.problem is not None for call in calls)
        return Reply(news, done=asked is None, calls=len(calls), failed_calls=failed)

    async def cut(self, text: str) -> None:
        """Answer the request with a turn that is marked as truncated."""
        await self._answer(text, is_truncated=True)

    async def reward(self) -> float | None:
        """Score the episode with the environment's rubric; end it first where a limit has stopped the policy."""
        assert self._rollout is not None
        return await _on_loop(self._rollout.score())

    async def close(self) -> None:
        """Cancel what still runs, and let the rubric clean up."""
        rollout, self._rollout = self._rollout, None
        if rollout is not None:
            await _on_loop(rollout.close())

    async def _answer(self, text: str, *, is_truncated: bool = False) -> tuple[list[Message] | None, list[ToolCall]]:
        assert self._rollout is not None
        calls: list[ToolCall] = []
        if self._tasks.schemas and self.tool_format is not None:  # else JSON may be an answer, not a call
            calls = self.tool_format.parse(text, self._tasks.schemas)
            text = self.tool_format.strip(text) if calls else text
        named: dict[str, ToolCall] = {}
        for call in calls:  # identifiers are the policy's: it may give none, or one twice
            is_new = call.id is not None and call.id not in named
            named[str(call.id) if is_new else f"call_{len(self._calls) + len(named)}"] = call
        response = _response(text, named, is_truncated)
        self._calls |= named
        self._shown = [*self._shown, _plain(response.message)]
        return await _on_loop(self._rollout.answer(response)), calls

    def _news(self, asked: list[Message]) -> list[Message]:
        """Return the messages behind those that the policy knows, as templates read them."""
        known, self._shown = self._shown, asked
        if asked[: len(known)] != known:
            raise RuntimeError(
                "the environment rewrites earlier messages, and training needs the conversation as it was sampled"
            )
        return [_as_read(message, self._calls) for message in asked[len(known) :]]


class _Rollout:
    """A rollout of verifiers that waits in each request for its answer; all but `state` belongs to its event loop.

    Attributes:
        state: the rollout's state, known from its first request on.
    """

    def __init__(self, tasks: _Tasks) -> None:
        self._tasks = tasks
        self._task: asyncio.Task[Any] | None = None
        self._asked: asyncio.Future[list[Message]] | None = None
        self._turn: asyncio.Future[Any] | None = None
        self.state: Any = None

    async def begin(self, row: Mapping[str, Any]) -> list[Message] | None:
        """Start, and wait for the first request."""
        client = _client_type()(self._ask)
        inputs = {"example_id": 0, **row}
        self._task = asyncio.create_task(self._tasks.environment.rollout(inputs, client, "policy", {}))
        return await self._next()

    async def answer(self, response: Any) -> list[Message] | None:
        """Answer the request, and return the messages of the next one; None once the rollout has ended.

        Args:
            response: a response of verifiers, or an exception for the rollout to handle.

        Raises:
            RuntimeError: the environment has failed.
            TimeoutError: it took longer than its own `timeout_seconds`.
        """
        assert self._turn is not None
        if not self._turn.done():  # cancelled by a limit of the environment's own
            end = self._turn.set_exception if isinstance(response, Exception) else self._turn.set_result
            end(response)
        return await self._next()

    async def _next(self) -> list[Message] | None:
        assert self._task is not None
        self._asked = asyncio.get_running_loop().create_future()
        await asyncio.wait((self._task, self._asked), return_when=asyncio.FIRST_COMPLETED)
        if not self._task.done():
            return self._asked.result()
        self.state = state = self._task.result()
        if (error := state.get("error")) is not None:
            raise RuntimeError(_chain(error)) from error
        if state.get("timed_out"):
            raise TimeoutError("the environment took longer than its own timeout_seconds")
        return None

    async def _ask(self, prompt: Sequence[Any], tools: Sequence[Any] | None, state: Any) -> Any:
        """Wait for a turn: the client's part of a request."""
        assert self._asked is not None
        self.state = state
        if self._asked.done():
            raise RuntimeError("the environment asks for several turns at a time")
        offered = [_schema(tool) for tool in tools or ()]
        if offered != self._tasks.schemas:
            names = [[schema["function"]["name"] for schema in schemas] for schemas in (offered, self._tasks.schemas)]
            raise RuntimeError(f"this episode has the tools {names[0]}, and the environment {names[1]} at its start")
        self._turn = asyncio.get_running_loop().create_future()
        self._asked.set_result([_plain(message) for message in prompt])  # copies: the environment may change its own
        return await self._turn

    async def score(self) -> float | None:
        """Return the reward that the environment's rubric gives; None if it does not score.

        Raises:
            RuntimeError: the environment, or a reward function, has failed.
        """
        errors: Any = importlib.import_module("verifiers.errors")
        # Ends a rollout that still waits for a turn, as verifiers does where a conversation becomes too long.
        if await self.answer(errors.OverlongPromptError("a limit has ended the episode")) is not None:
            raise RuntimeError("the environment goes on after a limit has ended the episode")
        if self._tasks.rubric is None:
            return None
        failures: list[tuple[str, Exception]] = []
        _failures.set(failures)
        await self._tasks.rubric.score_rollout(self.state)
        if failures:
            name, error = failures[0]
            raise RuntimeError(f"its reward function {name!r} raised {_chain(error)}") from error
        return float(self.state["reward"])

    async def close(self) -> None:
        """Cancel the rollout if it still runs, and let the rubric clean up."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
        if self.state is not None:
            await self._tasks.environment.rubric.cleanup(self.state)


async def _on_loop(work: Coroutine[Any, Any, _T]) -> _T:
    """Run a coroutine on the loop of verifiers: what blocks it, such as a plain tool, holds up no other episodes."""
    return await asyncio.wrap_future(asyncio.run_coroutine_threadsafe(work, shared_loop("verifiers")))


@functools.cache
def _client_type() -> Any:
    """Return the type of clients of verifiers that are made of a function to ask for turns."""
    base: Any = importlib.import_module("verifiers.clients").Client

    async def get_response(self: Any, prompt: Any, *args: Any, tools: Any = None, state: Any = None, **kw: Any) -> Any:
        return await self.client(prompt, tools, state)

    async def unused(self: Any, *args: Any, **kw: Any) -> None:
        """Stand in for a conversion to a provider's types: `get_response` makes none."""

    methods = {**dict.fromkeys(base.__abstractmethods__, unused), "get_response": get_response}
    return type("PolicyClient", (base,), methods)


def _response(text: str, calls: Mapping[str, ToolCall], is_truncated: bool) -> Any:
    """Return a turn as the answer of a client of verifiers."""
    types: Any = importlib.import_module("verifiers.types")
    message = types.ResponseMessage(
        content=text,
        tool_calls=[types.ToolCall(id=key, name=c.name, arguments=_arguments(c)) for key, c in calls.items()] or None,
        finish_reason="length" if is_truncated else "tool_calls" if calls else "stop",
        is_truncated=is_truncated,
    )
    return types.Response(id="turn", created=int(time.time()), model="policy", message=message)


def _arguments(call: ToolCall) -> str:
    """Return a call's arguments as JSON text; of a malformed call, text that the environment cannot take for some."""
    if call.problem is None:
        return dump_json(call.arguments or {})
    return call.raw if decode_json(call.raw)[2] is not None else dump_json(call.raw)


def _plain(message: Any) -> Message:
    """Copy what a template reads of a message of verifiers.

    Raises:
        ValueError: it holds images or other parts that are not text.
    """
    found: dict[str, Any] = dict(message) if isinstance(message, Mapping) else message.model_dump()
    content = found.get("content")
    if isinstance(content, list):
        parts = cast("list[Mapping[str, Any]]", content)
        if other := [part for part in parts if part.get("type") != "text"]:
            raise ValueError(f"a message holds {show(other[0].get('type'))}: only text can be played")
        content = "".join(str(part["text"]) for part in parts)
    text = str(content or "").encode("utf-8", "replace").decode()  # no tokenizer takes half a character
    plain: Message = {"role": found["role"], "content": text}
    return plain | {key: found[key] for key in ("tool_call_id", "tool_calls") if found.get(key)}


def _as_read(message: Message, calls: Mapping[str, ToolCall]) -> Message:
    """Return a message as templates read it: calls in their shape, answers with the names of their tools."""
    role, content = message["role"], message["content"]
    if role == "tool":
        call = calls.get(message["tool_call_id"])
        # Templates read the identifier that the policy has written, if any, and not ours.
        identifier = message["tool_call_id"] if call is None else call.id
        named = {} if call is None else {"name": call.name}
        return {"role": role, "content": content, **named} | ({"tool_call_id": identifier} if identifier else {})
    if "tool_calls" not in message:
        return {"role": role, "content": content}
    shaped = [
        {
            "type": "function",
            "id": call["id"],
            "function": {"name": call["name"], "arguments": decode_json(call["arguments"])[0] or {}},
        }
        for call in message["tool_calls"]
    ]
    return {"role": role, "content": content, "tool_calls": shaped}


def _schema(tool: Any) -> dict[str, Any]:
    """Return a tool of verifiers as templates read it."""
    function = {"name": tool.name, "description": tool.description, "parameters": dict(tool.parameters)}
    return {"type": "function", "function": function}


def _strict(rubric: Any, base: type, where: str) -> Any:
    """Copy a rubric, so that errors of its reward functions are noted: verifiers makes them rewards of 0."""
    strict = copy.copy(rubric)
    strict.funcs = [
        _noting(function) if weight else function for function, weight in zip(rubric.funcs, rubric.weights, strict=True)
    ]
    if hasattr(rubric, "rubrics"):
        strict.rubrics = [_strict(part, base, where) for part in rubric.rubrics]
    elif not strict.funcs and type(rubric) is base:
        raise ConfigError(f"{where} has a rubric without reward functions: give it a verifiers.Rubric(funcs=[...]).")
    return strict


def _noting(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    async def noting(*args: Any, **kwargs: Any) -> float:
        try:
            value = function(*args, **kwargs)
            return float(await value if inspect.isawaitable(value) else value)
        except Exception as error:
            _failures.get().append((function.__name__, error))
            raise

    return noting


def _chain(error: BaseException) -> str:
    """Write an error with its causes: those of verifiers often say nothing themselves."""
    told: list[str] = []
    cause: BaseException | None = error
    while cause is not None:
        told.append(f"{type(cause).__name__}: {' '.join(str(cause).split())}".removesuffix(": "))
        cause = cause.__cause__
    return " from ".join(told)[:500]
