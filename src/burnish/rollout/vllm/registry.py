"""Servers that `burnish serve` started on this machine: URL and token, in files that only their user reads."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any, cast
from urllib.parse import urlsplit

from burnish.runs.files import write_json

__all__ = ["forget", "gpus_of", "register", "token_of"]


def _folder() -> Path:
    runtime = os.environ.get("XDG_RUNTIME_DIR")
    return Path(runtime, "burnish") if runtime else Path.home() / ".cache" / "burnish" / "servers"


def _file(port: int) -> Path:
    return _folder() / f"{port}.json"


def register(port: int, record: dict[str, Any]) -> Path:
    """Record a server before it starts; return the file, which its user alone may read."""
    folder = _folder()
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    file = _file(port)
    write_json(file, record)
    file.chmod(0o600)
    return file


def forget(port: int) -> None:
    """Remove the record of a server."""
    _file(port).unlink(missing_ok=True)


def token_of(url: str) -> str | None:
    """Return the token of a server: VLLM_API_KEY, or that of `burnish serve` on this machine and port."""
    if token := os.environ.get("VLLM_API_KEY"):
        return token
    return _record_of(url).get("token")


def gpus_of(url: str) -> list[str]:
    """Return the identities of the GPUs that a server sees; none where it was started elsewhere."""
    return _record_of(url).get("gpus", [])


def _record_of(url: str) -> dict[str, Any]:
    parts = urlsplit(url)
    if parts.hostname not in ("127.0.0.1", "localhost", "::1", "0.0.0.0"):
        return {}
    try:
        record = json.loads(_file(parts.port or 80).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return cast("dict[str, Any]", record)
