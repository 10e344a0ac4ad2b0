"""HTTP client of one vLLM server: every call has a deadline, every failure says what to do."""

from __future__ import annotations

import asyncio
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from burnish.errors import EngineError, MissingName
from burnish.rollout.vllm.registry import token_of

__all__ = ["Deadlines", "ServerClient", "ServerLost", "ServerRefused"]


class ServerLost(EngineError):
    """A server is dead, stopped, slow or restarting: its work is done elsewhere, or later."""


class ServerRefused(EngineError):
    """A server refused a request as wrong: another one would refuse it too."""

    def __init__(self, message: str, status: int) -> None:
        super().__init__(message)
        self.status = status


@dataclass(frozen=True, slots=True)
class Deadlines:
    """Deadlines in seconds.

    Attributes:
        start: until a server is up, when connecting or after all were lost.
        call: of a call that samples nothing.
        sync: of loading weights or adapters.
        heartbeat: between two looks at a server that samples.
        misses: looks in a row that may fail before a server counts as lost.
        stall: until a server that makes no tokens counts as lost.
        slow: least age of a group before it may be taken from a slow server, ...
        slow_factor: ... which takes this many times the median of the groups that are done.
    """

    start: float = 240.0
    call: float = 20.0
    sync: float = 600.0
    heartbeat: float = 5.0
    misses: int = 3
    stall: float = 60.0
    slow: float = 30.0
    slow_factor: float = 5.0


_IDLE_SECONDS = 2.0
"""Seconds that an unused connection is kept: vLLM closes it after 5, and a request that meets a closing one fails."""


def _http() -> Any:
    try:
        import httpx2
    except ImportError as error:
        raise MissingName("use_vllm = True needs an HTTP client: pip install 'burnish[vllm]'.") from error
    return httpx2


class ServerClient:
    """Client of one server. Its methods run in one event loop.

    Args:
        url: root of the server.
        token: API key; None looks it up at every request, since `burnish serve` may start after the run.
        deadlines: see `Deadlines`.
    """

    def __init__(self, url: str, token: str | None, deadlines: Deadlines) -> None:
        self.url = url
        self._deadlines = deadlines
        self._token = token
        self._client: Any = None

    async def close(self) -> None:
        """Close the connections."""
        client, self._client = self._client, None
        if client is not None:
            await client.aclose()

    async def get(self, path: str, *, deadline: float | None = None) -> Any:
        """Return the JSON at a path."""
        return _decoded(await self._send("GET", path, None, deadline or self._deadlines.call), path, self.url)

    async def post(self, path: str, body: Mapping[str, Any], *, deadline: float | None = None) -> Any:
        """Post JSON and return the answer, which may be empty.

        Raises:
            ServerLost: the server does not answer, or fails.
            ServerRefused: the server refuses the request.
        """
        return _decoded(await self._send("POST", path, body, deadline or self._deadlines.call), path, self.url)

    async def tell(self, path: str, body: Mapping[str, Any], *, deadline: float | None = None) -> None:
        """Post JSON to an endpoint that answers in a sentence, as vLLM's of adapters do; raises as `post`."""
        await self._send("POST", path, body, deadline or self._deadlines.call)

    async def progress(self) -> float:
        """Return the number of tokens read and written so far, from the server's metrics."""
        text = await self._send("GET", "/metrics", None, 2 * self._deadlines.heartbeat)
        names = ("vllm:generation_tokens_total", "vllm:prompt_tokens_total")
        lines = (line for line in text.splitlines() if line.startswith(names))
        return math.fsum(float(line.rsplit(" ", 1)[1]) for line in lines)

    async def _send(self, method: str, path: str, body: Mapping[str, Any] | None, deadline: float) -> str:
        http = _http()
        if self._client is None:
            limits = http.Limits(max_connections=None, max_keepalive_connections=32, keepalive_expiry=_IDLE_SECONDS)
            # The environment's proxies are for the internet; a server of rollouts is near.
            self._client = http.AsyncClient(limits=limits, timeout=None, trust_env=False)
        token = self._token or token_of(self.url)
        headers = {} if token is None else {"Authorization": f"Bearer {token}"}
        try:
            async with asyncio.timeout(deadline):
                answer = await self._client.request(method, f"{self.url}{path}", json=body, headers=headers)
        except TimeoutError as error:
            raise ServerLost(f"{self.url}{path} did not answer within {deadline:g} s.") from error
        except (http.TransportError, http.DecodingError, OSError) as error:
            reason = str(error) or type(error).__name__
            raise ServerLost(f"{self.url}{path} cannot be reached: {reason}.") from error
        status, text = int(answer.status_code), str(answer.text)
        if status in (401, 403):
            raise ServerRefused(
                f"{self.url} refuses the token (status {status}): set VLLM_API_KEY to the server's --api-key; a server "
                "of `burnish serve` on this machine is found without it.",
                status,
            )
        if status in (408, 429) or status >= 500:
            raise ServerLost(f"{self.url}{path} failed with status {status}: {_reason(text)}")
        if status >= 400:
            raise ServerRefused(f"{self.url}{path} refused the request (status {status}): {_reason(text)}", status)
        return text


def _decoded(text: str, path: str, url: str) -> Any:
    if not text.strip():
        return {}
    try:
        return json.loads(text)
    except ValueError as error:
        raise ServerLost(f"{url}{path} answered with something other than JSON: {text!r:.100}.") from error


def _reason(text: str) -> str:
    """Find the message in the body of an error."""
    try:
        found = json.loads(text)
    except ValueError:
        found = text
    while isinstance(found, dict):
        found = next((found[key] for key in ("error", "message", "detail") if key in found), str(found))
    return " ".join(str(found).split())[:500]
