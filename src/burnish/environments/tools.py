"""Tools: typed Python functions that a model calls, and their concurrent, time-limited execution."""

from __future__ import annotations

import asyncio
import contextlib
import copy
import inspect
import json
import re
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

from pydantic import TypeAdapter, ValidationError
from pydantic_core import to_json, to_jsonable_python

from burnish.data.formats import Message
from burnish.environments.conventions import ToolCall, decode_json, dump_json
from burnish.environments.schemas import describe_type, parse_docstring
from burnish.errors import ConfigError, show
from burnish.rewards.calls import Call, CallTimeout

__all__ = ["BadArguments", "Tool", "ToolResult", "Toolbox"]

_LONGEST_ERROR = 500


@dataclass(frozen=True, slots=True)
class ToolResult:
    """Result of a tool call, as the model reads it.

    Attributes:
        content: text; for a failed call, JSON such as `{"error": {"type": "timeout", "message": ...}}`.
        name: name of the tool that was called.
        id: the call's identifier.
        failed: True if the call has no result.
        error: type of the failure: "malformed_call", "unknown_tool", "missing_argument", "unknown_argument",
            "invalid_argument", "tool_error" or "timeout"; None for a result.
    """

    content: str
    name: str
    id: str | None = None
    failed: bool = False
    error: str | None = None

    def message(self) -> Message:
        """Return the result as a message with the role `tool`."""
        identifier = {} if self.id is None else {"tool_call_id": self.id}
        return {"role": "tool", "name": self.name, "content": self.content, **identifier}


class BadArguments(Exception):
    """Arguments that a tool cannot take.

    Args:
        problems: the type of each error, the argument, and what to tell the model.
    """

    def __init__(self, problems: Sequence[tuple[str, str, str]]) -> None:
        self.error, self.argument, _ = problems[0]
        super().__init__("; ".join(message for *_, message in problems[:5]))


@dataclass(frozen=True, slots=True)
class Tool:
    """A typed Python function that a model can call.

    Attributes:
        function: plain or async function, or bound method.
        name: name of the function.
        description: the docstring up to its first section; "" without one.
        schema: JSON schema in OpenAI's shape.
        validators: parameter -> its type, which validates and converts arguments.
    """

    function: Callable[..., Any]
    name: str
    description: str
    schema: dict[str, Any]
    validators: Mapping[str, TypeAdapter[Any]] = field(repr=False)

    @classmethod
    def of(cls, function: Callable[..., Any] | Tool) -> Tool:
        """Describe a function by its signature and, where it has one, its Google-style docstring.

        Raises:
            ConfigError: the function has no name that a model can write, or a parameter that cannot be described.
        """
        if isinstance(function, Tool):
            return function
        name = str(getattr(function, "__name__", ""))
        if not callable(function) or inspect.isclass(function) or not re.fullmatch(r"[A-Za-z_]\w{0,63}", name, re.A):
            raise ConfigError(
                f"tools: {show(function)} is not a function with a name of up to 64 letters, digits and underscores, "
                "by which a model could call it: write `def name(...)`."
            )
        try:
            parameters = inspect.signature(function).parameters
            hints = typing.get_type_hints(function, include_extras=True)
        except (NameError, TypeError, ValueError) as error:
            raise ConfigError(
                f"tools: the signature of {name!r} cannot be read ({error}): annotate it with types that its module "
                "defines or imports."
            ) from error
        description, documented = parse_docstring(function)
        validators: dict[str, TypeAdapter[Any]] = {}
        properties: dict[str, Any] = {}
        definitions: dict[str, Any] = {}
        for key, parameter in parameters.items():
            stars = {parameter.VAR_POSITIONAL: "*", parameter.VAR_KEYWORD: "**"}.get(parameter.kind, "")
            where = f"tools: {name!r} has the parameter '{stars}{key}'"
            if parameter.kind not in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY):
                raise ConfigError(f"{where}, but a model passes arguments by name: make it a plain parameter.")
            if key not in hints:
                fix = "pass the method of an object" if key == "self" else f"write {key}: str, or what it is"
                raise ConfigError(f"{where} without a type, by which a model would know what to pass: {fix}.")
            validators[key], properties[key] = describe_type(hints[key], where, definitions)
            if key in documented:
                properties[key]["description"] = documented[key]
            if parameter.default is not parameter.empty and parameter.default is not None:
                with contextlib.suppress(ValueError):  # a default that JSON cannot hold; the function knows it
                    properties[key]["default"] = to_jsonable_python(parameter.default)
        schema: dict[str, Any] = {"type": "object", "properties": properties}
        if required := [key for key, parameter in parameters.items() if parameter.default is parameter.empty]:
            schema["required"] = required
        if definitions:
            schema["$defs"] = definitions
        shown = {"name": name, "description": description, "parameters": schema}
        return cls(function, name, description, {"type": "function", "function": shown}, validators)

    @property
    def is_async(self) -> bool:
        """True if calling the function returns a coroutine."""
        return inspect.iscoroutinefunction(self.function)

    def check(self, arguments: Mapping[str, Any]) -> dict[str, Any]:
        """Return arguments converted to the parameters' types; only conversions that lose nothing are made.

        Raises:
            BadArguments: an argument is missing, unknown or of another type.
        """
        schema = self.schema["function"]["parameters"]
        known = ", ".join(self.validators) or "none"
        problems = [
            ("missing_argument", key, f"{self.name} needs the argument {key!r}: {_expected(schema['properties'][key])}")
            for key in schema.get("required", ())
            if key not in arguments
        ]
        converted: dict[str, Any] = {}
        for key, value in arguments.items():
            if (validator := self.validators.get(key)) is None:
                problems.append(("unknown_argument", key, f"{self.name} has no argument {key!r}; it has: {known}"))
                continue
            try:
                if isinstance(value, bool) and schema["properties"][key].get("type") in ("integer", "number"):
                    raise ValueError("a boolean is not a number")
                converted[key] = _convert(validator, value)
            except (ValueError, RecursionError) as error:
                said = f"expected {_expected(schema['properties'][key])}, got {show(value, 100)}{_where(error)}"
                problems.append(("invalid_argument", key, f"{self.name}, argument {key!r}: {said}"))
        if problems:
            raise BadArguments(problems)
        return converted


def _expected(schema: Mapping[str, Any]) -> str:
    shown = {key: value for key, value in schema.items() if key not in ("description", "default")}
    return dump_json(shown)[:300] if shown else "any value"


def _where(error: Exception) -> str:
    """Say what is wrong, and where inside the value."""
    if not isinstance(error, ValidationError):
        return f" ({error})"
    first = error.errors(include_url=False, include_input=False)[0]
    place = ".".join(map(str, first["loc"]))
    return f" ({place}: {first['msg']})" if place else f" ({first['msg']})"


def _convert(validator: TypeAdapter[Any], value: Any) -> Any:
    try:
        return validator.validate_python(value)
    except ValidationError:
        if isinstance(value, str):  # models write lists and objects as JSON text, too
            decoded, end, problem = decode_json(text := value.strip())
            if problem is None and end == len(text) and isinstance(decoded, list | dict):
                return validator.validate_python(cast("Any", decoded))
        raise


class Toolbox:
    """The tools of a run.

    Args:
        tools: functions or `Tool`s.
        timeout_seconds: time limit of each call, from its own start.
        max_result_chars: longest result; the rest is cut and counted.
        max_concurrent_calls: calls that run at once; more wait for these to end.

    Raises:
        ConfigError: a function that cannot be a tool, two tools with one name, or a limit below 1.
    """

    def __init__(
        self,
        tools: Sequence[Callable[..., Any] | Tool],
        *,
        timeout_seconds: float = 30.0,
        max_result_chars: int = 10_000,
        max_concurrent_calls: int = 256,
    ) -> None:
        limits = {"max_result_chars": max_result_chars, "max_concurrent_calls": max_concurrent_calls}
        for name, limit in limits.items():
            if limit < 1:
                raise ConfigError(f"{name} = {limit}: use at least 1.")
        if not timeout_seconds > 0:
            raise ConfigError(f"timeout_seconds = {timeout_seconds}: use a positive number of seconds.")
        self.timeout_seconds = timeout_seconds
        self.max_result_chars = max_result_chars
        self.max_concurrent_calls = max_concurrent_calls
        self.tools: dict[str, Tool] = {}
        for tool in map(Tool.of, tools):
            if tool.name in self.tools:
                raise ConfigError(f"tools: two are named {tool.name!r}: rename one function.")
            self.tools[tool.name] = tool

    @property
    def schemas(self) -> list[dict[str, Any]]:
        """JSON schemas, for chat templates."""
        return [tool.schema for tool in self.tools.values()]

    def run(self, calls: Sequence[ToolCall]) -> list[ToolResult]:
        """Run calls concurrently; each gets a result, in order, whatever goes wrong.

        A plain function runs in a thread of its own, which is abandoned at the deadline; async ones share an event
        loop, and are cancelled.
        """
        results: list[ToolResult] = []
        for first in range(0, len(calls), self.max_concurrent_calls):
            started = [(call, self._start(call)) for call in calls[first : first + self.max_concurrent_calls]]
            results += [self._finish(call, running) for call, running in started]
        return results

    def _start(self, call: ToolCall) -> Call | ToolResult:
        """Start a call; return its failure where it cannot be started."""
        if call.problem is not None or call.arguments is None:
            return _failure(call, "malformed_call", call.problem or "the call has no arguments")
        if (tool := self.tools.get(call.name)) is None:
            return _failure(call, "unknown_tool", f"there is no tool {call.name!r}", tools=list(self.tools))
        try:
            arguments = tool.check(copy.deepcopy(call.arguments))  # a tool may change its arguments
        except BadArguments as error:
            return _failure(call, error.error, str(error), argument=error.argument)
        except Exception as error:  # a validator of the user's own types
            return _failure(call, "tool_error", _describe(error))
        running = Call(tool.name, 0, self.timeout_seconds, "tool")
        context = {"tool": tool, "call": call, "arguments": arguments}
        if tool.is_async:
            running.start(self._run_async, context)
        else:
            running.start_in_thread(self._run_plain, context)
        return running

    def _finish(self, call: ToolCall, running: Call | ToolResult) -> ToolResult:
        if isinstance(running, ToolResult):
            return running
        try:
            return running.result()
        except CallTimeout as error:
            return _failure(call, "timeout", f"{call.name} did not answer within {self.timeout_seconds:g} s ({error})")
        except Exception as error:
            return _failure(call, "tool_error", _describe(error))

    def _run_plain(self, tool: Tool, call: ToolCall, arguments: dict[str, Any]) -> ToolResult:
        try:
            value = tool.function(**arguments)
            if inspect.isawaitable(value):  # a plain function that returns a coroutine, such as a decorated one
                return asyncio.run(self._awaited(call, value))
            return ToolResult(self._text(value), call.name, call.id)
        except BaseException as error:  # sys.exit() in a tool must not end the run
            return _failure(call, "tool_error", _describe(error))

    async def _run_async(self, tool: Tool, call: ToolCall, arguments: dict[str, Any]) -> ToolResult:
        return await self._awaited(call, tool.function(**arguments))

    async def _awaited(self, call: ToolCall, value: Any) -> ToolResult:
        try:
            return ToolResult(self._text(await value), call.name, call.id)
        except asyncio.CancelledError:
            raise
        except BaseException as error:
            return _failure(call, "tool_error", _describe(error))

    def _text(self, value: Any) -> str:
        """Write a result: a string as it is, JSON for what has one, else its repr."""
        if not isinstance(value, str):
            try:
                plain = json.loads(to_json(value, inf_nan_mode="strings", bytes_mode="utf8", fallback=show))
                value = plain if isinstance(plain, str) else dump_json(plain)
            except Exception:  # cycles, undecodable bytes, broken methods of the value
                value = show(value, self.max_result_chars)
        text = value.encode("utf-8", "replace").decode()  # no tokenizer takes half a character
        if len(text) <= self.max_result_chars:
            return text
        return f"{text[: self.max_result_chars]}\n[{len(text) - self.max_result_chars} more characters were cut]"


def _describe(error: BaseException) -> str:
    try:
        message = " ".join(str(error).split())
    except Exception:
        message = "(its message cannot be printed)"
    shown = f"{type(error).__name__}: {message}" if message else type(error).__name__
    return shown.encode("utf-8", "replace").decode()


def _failure(call: ToolCall, error: str, message: str, **more: Any) -> ToolResult:
    content = dump_json({"error": {"type": error, "message": message[:_LONGEST_ERROR], **more}})
    return ToolResult(content.encode("utf-8", "replace").decode(), call.name, call.id, True, error)
