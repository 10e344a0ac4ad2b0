"""Tools: schemas of functions, and what happens when a model calls them."""

from __future__ import annotations

import asyncio
import dataclasses
import enum
import functools
import json
import math
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable
from datetime import date
from typing import Annotated, Any, Literal, Optional, Union

import pydantic
import pytest
from transformers.utils import get_json_schema

from burnish.environments import Tool, Toolbox, ToolCall, ToolResult
from burnish.errors import ConfigError
from burnish.rewards.calls import Call, CallTimeout


class Unit(enum.Enum):
    """Units of temperature."""

    CELSIUS = "celsius"
    KELVIN = "kelvin"


class Thing:
    def __repr__(self) -> str:
        return "Thing()"


@dataclasses.dataclass
class Point:
    x: float
    y: float = 0.0


class Node(pydantic.BaseModel):
    value: int
    children: list[Node] = []


def weather(city: str, days: int = 3, unit: Literal["C", "F"] = "C") -> str:
    """Look up the weather.

    It is made up.

    Args:
        city: name of the city, with
            its country
        days (int, optional): number of days: at most 7
        unit: unit of temperature

    Returns:
        text: the forecast
    """
    return f"{city}: {days} days in {unit}"


def call(name: str, arguments: dict[str, Any] | None = None, **more: Any) -> ToolCall:
    return ToolCall(name, {} if arguments is None else arguments, **more)


def run_one(function: Callable[..., Any], arguments: dict[str, Any] | None = None, **options: Any) -> ToolResult:
    return Toolbox([function], **options).run([call(Tool.of(function).name, arguments)])[0]


def error_of(result: ToolResult) -> dict[str, Any]:
    assert result.failed
    error = json.loads(result.content)["error"]
    assert result.error == error["type"]
    return error


def test_a_schema_by_hand() -> None:
    assert Tool.of(weather).schema == {
        "type": "function",
        "function": {
            "name": "weather",
            "description": "Look up the weather.\n\nIt is made up.",
            "parameters": {
                "type": "object",
                "properties": {
                    "city": {"type": "string", "description": "name of the city, with its country"},
                    "days": {"type": "integer", "description": "number of days: at most 7", "default": 3},
                    "unit": {
                        "type": "string",
                        "enum": ["C", "F"],
                        "description": "unit of temperature",
                        "default": "C",
                    },
                },
                "required": ["city"],
            },
        },
    }


def forecast(city: str, days: int = 3, unit: Literal["C", "F"] = "C") -> str:
    """Look up the weather.

    Args:
        city: name of the city, with
            its country
        days: number of days
        unit: unit of temperature

    Returns:
        the forecast
    """
    return ""


def simple(a: int, b: float, c: str, d: bool) -> None:
    """Do it.

    Args:
        a: A
        b: B
        c: C
        d: D
    """


def containers(a: list[int], b: dict[str, float], c: list[dict[str, Any]], d: dict) -> None:  # type: ignore[type-arg]
    """Do it.

    Args:
        a: A
        b: B
        c: C
        d: D
    """


def optional(a: int | None, b: Optional[str] = None, c: Union[int, str] = 1, d: list[int] | None = None) -> None:  # noqa: UP007, UP045
    """Do it.

    Args:
        a: A
        b: B
        c: C
        d: D
    """


def nothing() -> None:
    """Do nothing."""


@pytest.mark.parametrize("function", [forecast, simple, containers, optional, nothing])
def test_schemas_mean_what_transformers_ones_do(function: Callable[..., Any]) -> None:
    ours, theirs = Tool.of(function).schema["function"], get_json_schema(function)["function"]
    assert ours["name"] == theirs["name"]
    assert ours["description"] == theirs["description"]
    assert ours["parameters"].get("required", []) == theirs["parameters"].get("required", [])
    assert ours["parameters"]["properties"].keys() == theirs["parameters"]["properties"].keys()
    for name, schema in theirs["parameters"]["properties"].items():
        own = dict(ours["parameters"]["properties"][name])
        own.pop("default", None)  # transformers leaves defaults out
        for part in (schema, schema.get("items", {})):
            if part.get("additionalProperties") == {}:  # the same as saying nothing
                del part["additionalProperties"]
        if isinstance(own.get("type"), list):
            own["type"] = sorted(own["type"])
            schema["type"] = sorted(schema["type"])
        assert own == schema, name


def test_no_docstring_is_needed() -> None:
    def bare(x: int) -> int:
        return x

    assert Tool.of(bare).schema["function"] == {
        "name": "bare",
        "description": "",
        "parameters": {"type": "object", "properties": {"x": {"type": "integer"}}, "required": ["x"]},
    }


def rich(
    unit: Unit,
    point: Point,
    tree: Node,
    when: date | None = None,
    level: Annotated[int, pydantic.Field(ge=0, le=9, description="level, 0 to 9")] = 0,
) -> str:
    return f"{unit.name} {point} {tree!r} {when!r} {level}"


def test_enums_dataclasses_models_and_constraints() -> None:
    schema = Tool.of(rich).schema["function"]["parameters"]
    properties = schema["properties"]
    assert properties["unit"]["enum"] == ["celsius", "kelvin"]
    assert properties["point"]["properties"] == {"x": {"type": "number"}, "y": {"type": "number", "default": 0.0}}
    assert properties["when"] == {"type": "string", "format": "date", "nullable": True}
    assert properties["level"] == {
        "type": "integer",
        "minimum": 0,
        "maximum": 9,
        "description": "level, 0 to 9",
        "default": 0,
    }
    # Only what refers to itself is a reference.
    assert properties["tree"]["properties"]["children"]["items"] == {"$ref": "#/$defs/Node"}
    assert schema["$defs"]["Node"]["properties"]["value"] == {"type": "integer"}
    arguments = {"unit": "kelvin", "point": {"x": 1}, "tree": {"value": 1, "children": [{"value": "2"}]}}
    result = run_one(rich, {**arguments, "when": "2024-02-29"})
    assert result.content == (
        "KELVIN Point(x=1.0, y=0.0) Node(value=1, children=[Node(value=2, children=[])]) datetime.date(2024, 2, 29) 0"
    )
    assert error_of(run_one(rich, {**arguments, "level": 10}))["argument"] == "level"
    assert (
        "children.0.value" in error_of(run_one(rich, {**arguments, "tree": {"value": 1, "children": [{}]}}))["message"]
    )


class Counter:
    def __init__(self) -> None:
        self.count = 0

    def add(self, amount: int) -> int:
        """Add an amount.

        Args:
            amount: what to add
        """
        self.count += amount
        return self.count

    def self_less(self, amount: int) -> None: ...


def test_bound_methods_are_tools_with_state() -> None:
    counter = Counter()
    box = Toolbox([counter.add])
    assert box.schemas[0]["function"]["parameters"]["required"] == ["amount"]
    assert [box.run([call("add", {"amount": i})])[0].content for i in (1, 2)] == ["1", "3"]


def var_positional(*args: int) -> None: ...
def var_keyword(**kwargs: int) -> None: ...
def positional_only(x: int, /) -> None: ...
def unannotated(x) -> None: ...  # type: ignore[no-untyped-def]
def no_schema(x: Callable[[int], int]) -> None: ...
def unknown_type(x: Missing) -> None: ...  # type: ignore[name-defined]  # noqa: F821


@pytest.mark.parametrize(
    ("function", "match"),
    [
        (var_positional, r"'var_positional' has the parameter '\*args', but a model passes arguments by name"),
        (var_keyword, r"'var_keyword' has the parameter '\*\*kwargs', but"),
        (positional_only, "make it a plain parameter"),
        (unannotated, "'unannotated' has the parameter 'x' without a type.*write x: str"),
        (Counter.self_less, "'self' without a type.*pass the method of an object"),
        (lambda x: x, "write `def name"),
        (functools.partial(weather, days=1), "not a function with a name"),
        (Counter, "not a function with a name"),
        (no_schema, "'no_schema' has the parameter 'x.*no JSON schema.*use str, int"),
        (unknown_type, "the signature of 'unknown_type' cannot be read"),
        (3, "is not a function with a name"),
    ],
)
def test_functions_that_cannot_be_tools(function: Any, match: str) -> None:
    with pytest.raises(ConfigError, match=match):
        Toolbox([function])


def test_bad_toolboxes() -> None:
    with pytest.raises(ConfigError, match="two are named 'weather': rename"):
        Toolbox([weather, weather])
    with pytest.raises(ConfigError, match="timeout_seconds = 0"):
        Toolbox([weather], timeout_seconds=0)
    with pytest.raises(ConfigError, match="max_result_chars = 0"):
        Toolbox([weather], max_result_chars=0)


def echo(value: Any) -> Any:
    return value


@pytest.mark.parametrize(
    ("hint", "given", "wanted"),
    [
        (int, "3", 3),
        (int, 3.0, 3),
        (float, "1.5", 1.5),
        (float, 2, 2.0),
        (bool, "true", True),
        (list[int], "[1, 2]", [1, 2]),
        (list[int], ["1", 2], [1, 2]),
        (dict[str, int], '{"a": 1}', {"a": 1}),
        (int | None, None, None),
        (str, "[1]", "[1]"),
        (Any, "[1]", "[1]"),
        (Any, {"a": [1]}, {"a": [1]}),
        (tuple[int, str], [1, "a"], [1, "a"]),
    ],
)
def test_conversions_that_lose_nothing(hint: Any, given: Any, wanted: Any) -> None:
    def tool(value):
        return value  # type: ignore[no-untyped-def]

    tool.__annotations__["value"] = hint
    result = run_one(tool, {"value": given})
    assert not result.failed
    assert (result.content if isinstance(wanted, str) else json.loads(result.content)) == wanted


@pytest.mark.parametrize(
    ("hint", "given"),
    [
        (int, 3.5),
        (int, "3.5"),
        (int, True),
        (float, False),
        (int, ""),
        (str, 3),
        (bool, 2),
        (list[int], "1, 2"),
        (list[int], '{"a": 1}'),
        (float, "nan"),
        (int, None),
        (Literal["a"], "b"),
    ],
)
def test_conversions_that_would_lose_something_are_errors(hint: Any, given: Any) -> None:
    def tool(value):
        return value  # type: ignore[no-untyped-def]

    tool.__annotations__["value"] = hint
    error = error_of(run_one(tool, {"value": given}))
    assert (error["type"], error["argument"]) == ("invalid_argument", "value")
    assert "tool, argument 'value': expected {" in error["message"]
    assert repr(given) in error["message"]


def test_a_model_learns_what_was_wrong() -> None:
    box = Toolbox([weather, echo])
    assert error_of(box.run([call("wether")])[0]) == {
        "type": "unknown_tool",
        "message": "there is no tool 'wether'",
        "tools": ["weather", "echo"],
    }
    assert error_of(box.run([call("weather")])[0]) == {
        "type": "missing_argument",
        "message": 'weather needs the argument \'city\': {"type": "string"}',
        "argument": "city",
    }
    error = error_of(box.run([call("weather", {"city": "Oslo", "day": 1, "days": "x"})])[0])
    assert (error["type"], error["argument"]) == ("unknown_argument", "day")
    assert "weather has no argument 'day'; it has: city, days, unit; " in error["message"]
    assert "argument 'days': expected {\"type\": \"integer\"}, got 'x'" in error["message"]
    malformed = ToolCall("weather", None, "raw", "id-1", "not valid JSON")
    result = box.run([malformed])[0]
    assert error_of(result) == {"type": "malformed_call", "message": "not valid JSON"}
    assert result.message() == {
        "role": "tool",
        "name": "weather",
        "content": result.content,
        "tool_call_id": "id-1",
    }
    assert box.run([call("weather", {"city": "Oslo"})])[0] == ToolResult("Oslo: 3 days in C", "weather")


class Broken(Exception):
    def __str__(self) -> str:
        raise RuntimeError("no message either")


def raising(kind: str) -> None:
    errors: dict[str, BaseException] = {
        "value": ValueError("bad\ncity"),
        "exit": SystemExit(3),
        "interrupt": KeyboardInterrupt(),
        "cancelled": asyncio.CancelledError(),
        "timeout": TimeoutError("its own"),
        "broken": Broken(),
        "long": ValueError("x" * 5000),
        "half": ValueError("\ud83d"),
    }
    raise errors[kind]


async def raising_async(kind: str) -> None:
    await asyncio.sleep(0)
    raising(kind)


@pytest.mark.parametrize("function", [raising, raising_async])
def test_whatever_a_tool_raises_is_a_result(function: Callable[..., Any]) -> None:
    kinds = {
        "value": "ValueError: bad city",
        "exit": "SystemExit: 3",
        "interrupt": "KeyboardInterrupt",
        "cancelled": "CancelledError",
        "timeout": "TimeoutError: its own",
        "broken": "Broken: (its message cannot be printed)",
        "long": "ValueError: " + "x" * 488,
        "half": "ValueError: ?",
    }
    box = Toolbox([function, echo])
    name = function.__name__
    results = box.run([call(name, {"kind": kind}) for kind in kinds] + [call("echo", {"value": "still here"})])
    for result, said in zip(results, kinds.values(), strict=False):
        assert error_of(result)["type"] == "tool_error"
        assert said in error_of(result)["message"]
        assert "Traceback" not in result.content
    assert results[-1].content == "still here"


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ("as it is\n", "as it is\n"),
        (None, "null"),
        (True, "true"),
        ({"ä": [1, 2.5, None]}, '{"ä": [1, 2.5, null]}'),
        ((1, "a"), '[1, "a"]'),
        ({1}, "[1]"),
        (math.inf, "Infinity"),
        ([math.nan], '["NaN"]'),
        (Point(1, 2), '{"x": 1, "y": 2}'),
        (Unit.KELVIN, "kelvin"),
        (date(2024, 2, 29), "2024-02-29"),
        (b"abc", "abc"),
        (b"\xff", "b'\\xff'"),
        (1j, "1j"),
        ([Thing()], '["Thing()"]'),
        (Thing(), "Thing()"),
        ("half \ud83d", "half ?"),
    ],
)
def test_results_are_text(value: Any, text: str) -> None:
    def tool() -> Any:
        return value

    result = run_one(tool)
    assert not result.failed
    assert result.content == text


def test_a_cycle_is_shown_not_raised() -> None:
    def tool() -> Any:
        own: list[Any] = []
        own.append(own)
        return own

    assert run_one(tool).content == "[[...]]"


def test_long_results_are_cut_and_say_so() -> None:
    def tool(size: int) -> str:
        return "x" * size

    assert run_one(tool, {"size": 20}, max_result_chars=20).content == "x" * 20
    assert run_one(tool, {"size": 25}, max_result_chars=20).content == "x" * 20 + "\n[5 more characters were cut]"


def sleep(seconds: float) -> str:
    time.sleep(seconds)
    return f"slept {seconds}"


async def sleep_async(seconds: float) -> str:
    await asyncio.sleep(seconds)
    return f"slept {seconds}"


def test_calls_run_at_once_each_with_its_own_limit() -> None:
    box = Toolbox([sleep, sleep_async], timeout_seconds=1.0)
    calls = [call(name, {"seconds": s}) for s in (30.0, 0.3, 0.31) for name in ("sleep", "sleep_async")] * 4
    began = time.monotonic()
    results = box.run(calls)
    assert time.monotonic() - began < 2.5  # one limit, and no grace
    for made, result in zip(calls, results, strict=True):
        assert made.arguments is not None
        if made.arguments["seconds"] == 30:
            assert error_of(result)["type"] == "timeout"
            assert "within 1 s" in error_of(result)["message"]
        else:
            assert result.content == f"slept {made.arguments['seconds']}"
        assert result.name == made.name


def test_more_calls_than_may_run_at_once() -> None:
    running, most = 0, 0
    lock = threading.Lock()

    def tool(n: int) -> int:
        nonlocal running, most
        with lock:
            running += 1
            most = max(most, running)
        time.sleep(0.02)
        with lock:
            running -= 1
        return n

    box = Toolbox([tool], max_concurrent_calls=3)
    assert [r.content for r in box.run([call("tool", {"n": n}) for n in range(8)])] == [str(n) for n in range(8)]
    assert 1 < most <= 3


def test_a_result_after_the_limit_is_late_whenever_it_is_read() -> None:
    running = Call("sleep", 0, 0.05, "tool")
    running.start_in_thread(sleep, {"seconds": 0.2})
    time.sleep(0.6)
    with pytest.raises(CallTimeout, match=r"longer than timeout_seconds = 0\.05"):
        running.result()


def test_an_async_tool_that_blocks_the_loop_costs_only_itself() -> None:
    async def blocking() -> None:
        time.sleep(6)

    box = Toolbox([blocking, sleep, sleep_async], timeout_seconds=0.5)
    results = box.run([call("blocking"), call("sleep", {"seconds": 0.1})])
    assert [result.error for result in results] == ["timeout", None]
    assert box.run([call("sleep_async", {"seconds": 0.1})])[0].content == "slept 0.1"


def test_a_plain_function_that_returns_a_coroutine() -> None:
    def tool(seconds: float) -> Any:
        return sleep_async(seconds)

    assert run_one(tool, {"seconds": 0.01}).content == "slept 0.01"
    assert error_of(run_one(tool, {"seconds": 9.0}, timeout_seconds=0.2))["type"] == "timeout"


def test_a_tool_that_changes_its_arguments_does_not_change_the_call() -> None:
    def tool(value: Any) -> int:
        value.append(1)
        return len(value)

    made = call("tool", {"value": []})
    assert Toolbox([tool]).run([made, made])[1].content == "1"
    assert made.arguments == {"value": []}


def test_calls_from_another_thread() -> None:
    found: list[ToolResult] = []
    thread = threading.Thread(
        target=lambda: found.extend(Toolbox([sleep_async]).run([call("sleep_async", {"seconds": 0})]))
    )
    thread.start()
    thread.join()
    assert found[0].content == "slept 0.0"


def test_a_hanging_tool_does_not_delay_the_exit() -> None:
    script = """
        import time
        from burnish.environments import Toolbox, ToolCall
        def hang() -> None:
            time.sleep(60)
        print(Toolbox([hang], timeout_seconds=0.2).run([ToolCall("hang", {})])[0].error)
    """
    began = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True, timeout=50, check=True
    )
    assert done.stdout == "timeout\n"
    assert time.monotonic() - began < 40
