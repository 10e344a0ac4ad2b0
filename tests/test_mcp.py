"""Tools of a real MCP server, started by a command or reached by a URL."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import burnish
from burnish.environments import Toolbox, ToolCall
from burnish.environments.mcp import mcp_environment
from burnish.errors import ConfigError
from burnish.types import Group, StopReason
from test_episodes import request, setup

pytest.importorskip("mcp")

SERVER = '''
import os, sys, time
import anyio
from mcp.server import MCPServer
from mcp.server.mcpserver.exceptions import ToolError

server = MCPServer("shop")
total = 0

@server.tool()
def add(a: int, b: int = 1) -> int:
    """Add two numbers."""
    return a + b

@server.tool(name="count-up")
def count_up(by: int) -> str:
    """Add to the count of this server."""
    global total
    total += by
    return f"{total} in {os.getpid()}"

@server.tool()
async def wait(seconds: float) -> str:
    """Wait."""
    await anyio.sleep(seconds)
    return "done"

@server.tool()
def fail(reason: str) -> str:
    """Raise an error."""
    raise ToolError(reason)

@server.tool()
def leave() -> str:
    """End the server."""
    os._exit(3)

@server.tool()
def variable(name: str) -> str:
    """Read an environment variable."""
    return os.environ.get(name, "unset")

if len(sys.argv) > 1:
    server.run("streamable-http", port=int(sys.argv[1]))
else:
    server.run()
'''


@pytest.fixture
def command(tmp_path: Path) -> list[str]:
    (tmp_path / "server.py").write_text(SERVER)
    return [sys.executable, "server.py"]


@pytest.fixture
def offer(command: list[str], tmp_path: Path) -> Iterator[Any]:
    made: list[Any] = []

    def toolbox(seconds: float = 30.0, **options: Any) -> Toolbox:
        made.append(mcp_environment(**{"command": command, "folder": tmp_path} | options)())
        return Toolbox(made[-1].tools, timeout_seconds=seconds)

    yield toolbox
    for tools in made:
        tools.close()


def call(name: str, /, **arguments: Any) -> ToolCall:
    return ToolCall(name, arguments)


def test_tools_are_offered_with_the_servers_own_schemas(offer: Any) -> None:
    box = offer()
    schemas = {schema["function"]["name"]: schema["function"] for schema in box.schemas}
    assert list(schemas) == ["add", "count_up", "wait", "fail", "leave", "variable"]
    assert schemas["add"]["description"] == "Add two numbers."
    assert schemas["add"]["parameters"]["properties"]["b"]["default"] == 1
    assert schemas["add"]["parameters"]["required"] == ["a"]
    results = box.run([call("add", a=2), call("count_up", by=3), call("add", a=2, b=5)])
    assert [result.failed for result in results] == [False] * 3
    assert [results[0].content, results[2].content] == ["3", "7"]
    assert results[1].content.startswith("3 in ")


def test_failures_are_structured_errors(offer: Any) -> None:
    box = offer(seconds=4.0)
    calls = [call("add"), call("add", a="two"), call("fail", reason="sold out"), call("wait", seconds=30.0)]
    found = box.run(calls)
    assert [result.error for result in found] == ["missing_argument", "invalid_argument", "tool_error", "timeout"]
    assert "'a' is a required property" in found[0].content
    assert "'two' is not of type 'integer'" in found[1].content
    assert "sold out" in found[2].content
    assert [result.content for result in box.run([call("add", a=1)])] == ["2"]  # the session goes on


def test_calls_run_concurrently(offer: Any) -> None:
    box = offer()
    box.run([call("add", a=1)])
    started = time.monotonic()
    results = box.run([call("wait", seconds=0.5)] * 6)
    assert [result.content for result in results] == ["done"] * 6
    assert time.monotonic() - started < 2.0


def test_a_server_that_has_gone_is_started_again(offer: Any) -> None:
    box = offer(seconds=20.0)
    assert box.run([call("count_up", by=2)])[0].content.startswith("2 in ")
    assert box.run([call("leave")])[0].error == "tool_error"
    assert box.run([call("count_up", by=2)])[0].content.startswith("2 in ")


def test_chosen_tools_and_variables(offer: Any) -> None:
    box = offer(tools=["variable", "count-up"], environment={"SHOP": "open"})
    assert list(box.tools) == ["count_up", "variable"]
    assert box.run([call("variable", name="SHOP")])[0].content == "open"


@pytest.mark.parametrize("per_episode", [False, True])
def test_a_session_is_for_the_run_or_for_each_episode(command: list[str], tmp_path: Path, per_episode: bool) -> None:
    factory = mcp_environment(command=command, folder=tmp_path, per_episode=per_episode, tools=["count-up"])
    environments, script, engine = setup("chatml", None, factory=factory)
    write = environments.tool_format.render
    texts = [write([call("count_up", by=1)]), write([call("count_up", by=1)]), "Done."]
    script.turns = lambda index, sample, number: (texts[number], StopReason.EOS)
    counts: list[list[str]] = []
    processes: set[str] = set()
    for step in range(2):
        [found] = engine.generate([request(environments, samples=3)], seed=0, step=step)
        for completion in found:
            assert completion.episode is not None
            assert (completion.episode.error, completion.episode.num_failed_calls) == (None, 0)
            answers = [m["content"].split(" in ") for m in completion.episode.messages if m["role"] == "tool"]
            counts.append([count for count, _ in answers])
            processes |= {process for _, process in answers}
        engine.end([Group([], found)])
    if per_episode:
        assert counts == [["1", "2"]] * 6
        assert len(processes) == 6
        for process in processes:
            _wait_for_end(int(process))
    else:
        assert len(processes) == 1
        assert {count for pair in counts for count in pair} == {str(i) for i in range(1, 13)}


def _wait_for_end(process: int) -> None:
    for _ in range(100):
        try:
            os.kill(process, 0)
        except ProcessLookupError:
            return
        time.sleep(0.1)
    raise AssertionError(f"server {process} still runs")


def test_servers_end_with_the_process(command: list[str], tmp_path: Path) -> None:
    script = (
        "from burnish.environments import Toolbox, ToolCall\n"
        "from burnish.environments.mcp import mcp_environment\n"
        f"box = Toolbox(mcp_environment(command={command!r})().tools)\n"
        "print(box.run([ToolCall('count_up', {'by': 1})])[0].content)\n"
    )
    variables = os.environ | {"PYTHONPATH": str(Path(burnish.__file__).parent.parent)}
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, cwd=tmp_path, timeout=60, env=variables
    )
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    _wait_for_end(int(done.stdout.split(" in ")[1]))


def test_a_server_at_a_url(command: list[str], tmp_path: Path, offer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    process = subprocess.Popen([*command, str(port)], cwd=tmp_path, stderr=subprocess.DEVNULL)
    monkeypatch.setenv("SHOP_KEY", "secret")
    try:
        for key in (None, "SHOP_KEY"):
            for attempt in range(100):
                try:
                    box = offer(command=None, url=f"http://127.0.0.1:{port}/mcp", key_variable=key)
                    break
                except ConfigError:
                    assert attempt < 99
                    time.sleep(0.2)
            assert [result.content for result in box.run([call("add", a=2)])] == ["3"]
    finally:
        process.kill()
        process.wait()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({}, "command, url: give one of them"),
        ({"command": ["x"], "url": "http://x"}, "command, url: give one of them"),
        ({"command": []}, "name a program"),
        ({"command": ["x"], "key_variable": "K"}, "key_variable = 'K' is for url: remove it"),
        ({"url": "http://x", "environment": {"K": "1"}}, "environment = .* is for command: remove it"),
        ({"command": ["x"], "start_seconds": 0.0}, "start_seconds = 0: use a positive number"),
        ({"url": "http://x", "key_variable": "UNSET_KEY"}, "'UNSET_KEY': this environment variable is not set"),
        ({"command": ["no-such-program"]}, "does not answer .*no-such-program"),
        ({"command": ["true"]}, "does not answer"),
        ({"command": ["sleep", "60"], "start_seconds": 0.5}, "does not answer .TimeoutError"),
    ],
)
def test_what_cannot_be_reached_is_refused(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        mcp_environment(**options)()


def test_a_missing_tool_is_refused(command: list[str], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"tools = \['sub'\]: the MCP server has add, count-up"):
        mcp_environment(command=command, folder=tmp_path, tools=["add", "sub"])()
