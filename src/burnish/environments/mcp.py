"""Tools of servers that speak the Model Context Protocol, started by a command or reached by a URL."""

from __future__ import annotations

import asyncio
import atexit
import logging
import os
import re
import weakref
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from burnish.environments.conventions import dump_json
from burnish.environments.tool_sets import ToolSet
from burnish.environments.tools import BadArguments, Tool
from burnish.errors import ConfigError, show
from burnish.rewards.calls import shared_loop
from burnish.rewards.verifiers import require

__all__ = ["MCPServer", "MCPSession", "mcp_environment"]

logger = logging.getLogger(__name__)

_END_SECONDS = 5.0
"""Time that servers have to end when the process does."""


def mcp_environment(
    *,
    command: Sequence[str] | None = None,
    url: str | None = None,
    tools: Sequence[str] | None = None,
    per_episode: bool = False,
    start_seconds: float = 60.0,
    key_variable: str | None = None,
    environment: Mapping[str, str] | None = None,
    folder: Path | None = None,
) -> Callable[[], ToolSet]:
    """Offer the tools of an MCP server; calls of all episodes run concurrently.

    Args:
        command: program and arguments that start a server on its standard input and output.
        url: address of a running server (streamable HTTP) instead.
        tools: names of the tools to offer; None for all.
        per_episode: give every episode a session of its own, and with `command` a server of its own, for tools with a
            state; False shares one over the run.
        start_seconds: time limit of a start.
        key_variable: environment variable of the bearer token for `url`.
        environment: environment variables of the command, beside a few such as PATH.
        folder: folder of the run file, in which the command runs.

    Returns:
        A factory of tool sets, for `environment_factory`.

    Raises:
        ConfigError: the package mcp is not installed, or an invalid option; the factory raises it where the server
            cannot be reached or lacks a tool.
    """
    require("mcp", "mcp", "mcp")
    if (command is None) == (url is None):
        raise ConfigError("command, url: give one of them.")
    if command is not None and not command:
        raise ConfigError("command = []: name a program, such as ['python', 'server.py'].")
    if not start_seconds > 0:
        raise ConfigError(f"start_seconds = {start_seconds:g}: use a positive number of seconds.")
    beside = {"command": ("key_variable", key_variable), "url": ("environment", environment)}
    name, value = beside["command" if url is None else "url"]
    if value is not None:
        raise ConfigError(f"{name} = {show(value)} is for {'url' if url is None else 'command'}: remove it.")
    server = MCPServer(
        command=tuple(command or ()),
        url=url,
        tools=None if tools is None else tuple(tools),
        start_seconds=start_seconds,
        key_variable=key_variable,
        environment=dict(environment or {}),
        folder=folder,
    )
    first = MCPSession(server)

    def make() -> ToolSet:
        first.list_tools()  # once, before the first episode
        return MCPSession(server, first.listed) if per_episode else ToolSet(first.tools, "mcp")

    return make


@dataclass(frozen=True)
class MCPServer:
    """How a server is reached; see `mcp_environment` for the attributes."""

    command: tuple[str, ...]
    url: str | None
    tools: tuple[str, ...] | None
    start_seconds: float
    key_variable: str | None
    environment: Mapping[str, str]
    folder: Path | None

    @property
    def where(self) -> str:
        """The field that names the server, and its value."""
        return f"url = {self.url!r}" if self.url is not None else f"command = {list(self.command)!r}"

    def client(self) -> Any:
        """Return a client, which is entered to connect."""
        import mcp
        from mcp.client.streamable_http import streamable_http_client

        if self.url is None:
            program, *arguments = self.command
            return mcp.Client(
                mcp.StdioServerParameters(
                    command=program, args=arguments, env=dict(self.environment) or None, cwd=self.folder
                )
            )
        if self.key_variable is None:
            return mcp.Client(self.url)
        import httpx2

        if not (key := os.environ.get(self.key_variable)):
            raise ConfigError(f"key_variable = {self.key_variable!r}: this environment variable is not set; set it.")
        headers = {"Authorization": f"Bearer {key}"}
        return mcp.Client(streamable_http_client(self.url, http_client=httpx2.AsyncClient(headers=headers)))


@dataclass(frozen=True, slots=True)
class _SchemaTool(Tool):
    """A tool whose arguments are checked against the server's own JSON schema."""

    def check(self, arguments: Mapping[str, Any]) -> dict[str, Any]:
        from jsonschema.validators import validator_for

        kinds = {"required": "missing_argument", "additionalProperties": "unknown_argument"}
        schema = self.schema["function"]["parameters"]
        problems = [
            (
                kinds.get(str(error.validator), "invalid_argument"),
                ".".join(map(str, error.absolute_path)),
                f"{self.name}: {error.message[:200]}",
            )
            for error in validator_for(schema)(schema).iter_errors(dict(arguments))
        ]
        if problems:
            raise BadArguments(problems)
        return dict(arguments)


class MCPSession(ToolSet):
    """The tools of a server over one session, which begins with the first call of an episode, and after a breakdown.

    Args:
        server: the server.
        listed: its tools, as another session has listed them.
    """

    def __init__(self, server: MCPServer, listed: Sequence[Any] = ()) -> None:
        super().__init__([], "mcp")
        self._server, self.listed = server, list(listed)
        self.tools = [self._tool(tool) for tool in self.listed]
        self._connection: _Connection | None = None
        self._is_used = False
        _sessions.add(self)

    def list_tools(self) -> None:
        """Connect and ask for the tools, once; not on the event loop, which this waits for.

        Raises:
            ConfigError: the server cannot be reached, or lacks a tool.
        """
        if self.listed:
            return
        server = self._server
        try:
            found = asyncio.run_coroutine_threadsafe(self._list(), shared_loop()).result(server.start_seconds + 5.0)
        except ConfigError:
            raise
        except Exception as error:
            raise ConfigError(
                f"{server.where}: the MCP server does not answer ({type(error).__name__}: "
                f"{' '.join(str(_cause(error)).split())[:300]}); try the command by hand, and look at its messages."
            ) from error
        names = {tool.name for tool in found}
        if missing := [name for name in server.tools or () if name not in names]:
            raise ConfigError(f"tools = {missing!r}: the MCP server has {', '.join(sorted(names)) or 'no tools'}.")
        self.listed = [tool for tool in found if server.tools is None or tool.name in server.tools]
        if not self.listed:
            raise ConfigError(f"{server.where}: the MCP server has no tools.")
        self.tools = [self._tool(tool) for tool in self.listed]

    async def _list(self) -> list[Any]:
        client, cursor, found = await self._client(), None, list[Any]()
        while True:
            page = await client.list_tools(cursor=cursor)
            found += page.tools
            if (cursor := page.next_cursor) is None:
                return found

    def _tool(self, listed: Any) -> Tool:
        """Return a tool whose calls are forwarded, under a name that every format of calls can write."""

        async def forward(**arguments: Any) -> Any:
            return await self._forward(listed.name, arguments)

        name = re.sub(r"\W", "_", listed.name, flags=re.ASCII)[:64]
        description = listed.description or ""
        shown = {"name": name, "description": description, "parameters": listed.input_schema}
        return _SchemaTool(forward, name, description, {"type": "function", "function": shown}, {})

    async def _forward(self, name: str, arguments: dict[str, Any]) -> Any:
        """Call a tool; its error becomes an exception, whose text the model reads."""
        # The session belongs to one event loop, and a call may run on another one.
        loop = shared_loop() if self._connection is None else self._connection.loop
        call = asyncio.run_coroutine_threadsafe(self._call(name, arguments), loop)
        result = await asyncio.wrap_future(call)
        parts = [getattr(block, "text", None) or f"[{block.type}]" for block in result.content]
        text = "\n".join(parts) if parts or result.structured_content is None else dump_json(result.structured_content)
        if result.is_error:
            raise RuntimeError(text or "the tool failed without a message")
        return text

    async def _call(self, name: str, arguments: dict[str, Any]) -> Any:
        import mcp

        client, self._is_used = await self._client(), True
        try:
            return await client.call_tool(name, arguments)
        except mcp.MCPError as error:
            if error.code == mcp.types.CONNECTION_CLOSED:
                logger.warning("%s: the MCP server has gone; the next call starts it again.", self._server.where)
                self.close()
            raise

    async def _client(self) -> Any:
        """Return the connected client of this session; connect first where there is none."""
        if self._connection is None:
            self._connection = _Connection(self._server)
        return await asyncio.wrap_future(self._connection.ready)

    async def reset(self, **row: Any) -> None:
        """Begin an episode: its first call starts a session of its own."""
        if self._is_used:
            self.close()

    def close(self) -> None:
        """End the session, without waiting."""
        connection, self._connection, self._is_used = self._connection, None, False
        if connection is not None:
            connection.end()

    def wait_for_end(self, seconds: float) -> None:
        """End the session, and wait for it."""
        connection = self._connection
        self.close()
        if connection is not None:
            connection.task.exception(seconds)


class _Connection:
    """One session: a task that enters the client, and leaves it where it ends, as the package asks for."""

    def __init__(self, server: MCPServer) -> None:
        self._server, self.loop = server, shared_loop()
        self.ready: Future[Any] = Future()
        self._ended = asyncio.Event()
        self.task = asyncio.run_coroutine_threadsafe(self._serve(), self.loop)

    async def _serve(self) -> None:
        try:
            client = self._server.client()
            async with asyncio.timeout(self._server.start_seconds):
                await client.__aenter__()
        except BaseException as error:
            self.ready.set_exception(error)
            return
        self.ready.set_result(client)
        try:
            await self._ended.wait()
        finally:
            await client.__aexit__(None, None, None)

    def end(self) -> None:
        """Leave the client, and so end a server that a command started."""
        self.loop.call_soon_threadsafe(self._ended.set)


_sessions: weakref.WeakSet[MCPSession] = weakref.WeakSet()


@atexit.register
def _end_sessions() -> None:
    for session in list(_sessions):
        try:
            session.wait_for_end(_END_SECONDS)
        except Exception as error:
            logger.debug("an MCP session did not end: %s", error)


def _cause(error: BaseException) -> BaseException:
    """Return the first error of a group, which task groups raise."""
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error
