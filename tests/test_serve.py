"""`burnish serve`: the command line of the server, and the watch over it, with a small program in vLLM's place."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import tiny
from burnish.cli.main import build_parser, split_overrides
from burnish.cli.serve import find_vllm, run, server_command, server_environment
from burnish.errors import ConfigError
from burnish.rollout.vllm.registry import token_of

PROGRAM = """#!{python}
import json, os, sys, time
from http.server import BaseHTTPRequestHandler, HTTPServer
with open({log!r}, "a") as file:
    names = ("VLLM_API_KEY", "VLLM_SERVER_DEV_MODE", "VLLM_ALLOW_RUNTIME_LORA_UPDATING")
    given = {{name: os.environ.get(name) for name in names}}
    file.write(json.dumps({{"argv": sys.argv[1:], "pid": os.getpid(), **given}}) + "\\n")
class Handler(BaseHTTPRequestHandler):
    def log_message(self, *args): pass
    def do_GET(self):
        while os.path.exists({hang!r}): time.sleep(0.1)
        self.send_response(200); self.end_headers()
        if self.path == "/weight_info":
            version = open({failed!r}).read() if os.path.exists({failed!r}) else "a"
            self.wfile.write(json.dumps({{"weight_version": version}}).encode())
words = sys.argv
HTTPServer((words[words.index("--host") + 1], int(words[words.index("--port") + 1])), Handler).serve_forever()
"""


def parsed(*words: str) -> Any:
    own, others = split_overrides(["serve", *words])
    return build_parser().parse_args(own, argparse.Namespace(overrides=others))


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


@pytest.fixture
def program(tmp_path: Path) -> Path:
    file = tmp_path / "vllm"
    places = {name: str(tmp_path / name) for name in ("log", "hang", "failed")}
    file.write_text(PROGRAM.format(python=sys.executable, **places))
    file.chmod(0o755)
    return file


def test_the_command_line_makes_a_sync_possible() -> None:
    args = parsed("m", "--port", "9", "--lora-rank", "12", "--max-model-len", "100", "--", "--seed", "3")
    command = server_command("vllm", "folder", args)
    line = " ".join(command)
    assert line.startswith("vllm serve folder --host 127.0.0.1 --port 9")
    assert "--logprobs-mode processed_logprobs" in line
    assert "--logprobs-mode raw_logprobs" in " ".join(server_command("vllm", "folder", parsed("m", "--raw-logprobs")))
    assert "--generation-config vllm" in line
    assert ("--no-enable-chunked-prefill" in line) is not torch.cuda.is_available()
    assert "--max-model-len 100" in line
    # The smallest of vLLM's ranks that holds 12, and room for the next adapter beside the one in use.
    assert "--enable-lora --max-loras 2 --max-cpu-loras 2 --max-lora-rank 16" in line
    assert command[-2:] == ["--seed", "3"]
    assert "--enable-lora" not in server_command("vllm", "folder", parsed("m"))
    environment = server_environment("secret", "folder", "plugins")
    assert environment["VLLM_API_KEY"] == "secret"
    assert environment["VLLM_SERVER_DEV_MODE"] == environment["VLLM_ALLOW_RUNTIME_LORA_UPDATING"] == "1"
    assert environment["PYTHONPATH"].split(os.pathsep)[0] == "plugins"
    assert "VLLM_ALLOW_INSECURE_SERIALIZATION" not in environment
    assert server_environment("secret", "ipc", "plugins")["VLLM_ALLOW_INSECURE_SERIALIZATION"] == "1"


@pytest.mark.parametrize(("way", "backend"), [("folder", "burnish"), ("ipc", "ipc"), ("nccl", "nccl")])
def test_the_back_end_of_the_weights_is_that_asked_for(way: str, backend: str) -> None:
    command = server_command("vllm", "folder", parsed("m", "--weight-transfer", way))
    assert json.loads(command[command.index("--weight-transfer-config") + 1]) == {"backend": backend}
    if way == "folder":
        assert command == server_command("vllm", "folder", parsed("m"))


def test_what_cannot_work_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match=r"--host 0\.0\.0\.0: .*without the token.*--expose"):
        run(parsed("m", "--host", "0.0.0.0"))
    with pytest.raises(ConfigError, match=r"--weight-transfer ipc with --expose: .*127"):
        run(parsed("m", "--host", "0.0.0.0", "--expose", "--weight-transfer", "ipc"))
    with pytest.raises(ConfigError, match="--lora-rank 1000: use 1 to 512"):
        server_command("vllm", "folder", parsed("m", "--lora-rank", "1000"))
    with pytest.raises(ConfigError, match="no such program"):
        find_vllm(str(tmp_path / "none"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("BURNISH_VLLM", raising=False)
    with pytest.raises(ConfigError, match=r"make vllm.*pip install vllm"):
        find_vllm(None)


def eventually(condition: Callable[[], Any], seconds: float = 600.0) -> Any:
    started = time.monotonic()
    while time.monotonic() - started < seconds:
        if found := condition():
            return found
        time.sleep(0.1)
    raise AssertionError("it did not happen")


class Watched:
    """A `burnish serve` process, and what its program recorded."""

    def __init__(self, folder: Path, program: Path, *words: str) -> None:
        self.folder, self.port = folder, free_port()
        model = folder / "model"
        tiny.model().save_pretrained(model)
        tiny.tokenizer().save_pretrained(model)
        line = "from burnish.cli.main import console; raise SystemExit(console())"
        command = [sys.executable, "-c", line, "serve", str(model), "--vllm", str(program), "--port", str(self.port)]
        environment = {**os.environ, "XDG_RUNTIME_DIR": str(folder / "run")}
        self.messages = folder / "messages"
        with self.messages.open("w") as file:  # not a pipe, which a server left behind would hold open
            self.process = subprocess.Popen([*command, "--interval", "0.2", *words], stderr=file, env=environment)

    def ended(self) -> str:
        """Wait for the watch; return its messages."""
        self.process.wait(300)
        return self.messages.read_text()

    def started(self) -> list[dict[str, Any]]:
        file = self.folder / "log"
        return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []

    def times_ready(self) -> int:
        """How often the watch has seen the server up: only then it counts a silence as hanging."""
        return self.messages.read_text().count("server ready")


@pytest.fixture
def watched(tmp_path: Path, program: Path) -> Iterator[Callable[..., Watched]]:
    made: list[Watched] = []

    def start(*words: str) -> Watched:
        made.append(Watched(tmp_path, program, *words))
        return made[-1]

    yield start
    for one in made:
        if one.process.poll() is None:
            one.process.kill()
        one.process.wait()
        for record in one.started():
            with contextlib.suppress(ProcessLookupError):
                os.kill(record["pid"], signal.SIGKILL)


def is_running(pid: int) -> bool:
    try:
        return Path("/proc", str(pid), "stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_a_killed_server_is_started_again_and_ends_with_its_watch(
    watched: Callable[..., Watched], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path / "run"))
    monkeypatch.delenv("VLLM_API_KEY", raising=False)
    one = watched()
    eventually(lambda: one.times_ready() == 1)
    (first,) = one.started()
    assert token_of(f"http://127.0.0.1:{one.port}") == first["VLLM_API_KEY"] != ""
    os.kill(first["pid"], signal.SIGKILL)
    eventually(lambda: one.times_ready() == 2)
    second = one.started()[1]
    assert second["argv"] == first["argv"]
    assert second["VLLM_API_KEY"] == first["VLLM_API_KEY"]
    one.process.send_signal(signal.SIGTERM)
    messages = one.ended()
    assert one.process.returncode == 0
    assert "the server ended with status -9: starting it again (2 restarts left)" in messages
    assert 'vllm_mode = "server"' in messages
    assert not is_running(second["pid"])
    assert token_of(f"http://127.0.0.1:{one.port}") is None


def test_a_hung_server_is_started_again(watched: Callable[..., Watched], tmp_path: Path) -> None:
    one = watched("--hung", "1")
    eventually(lambda: one.times_ready() == 1)
    (tmp_path / "hang").touch()
    eventually(lambda: len(one.started()) == 2)
    (tmp_path / "hang").unlink()
    eventually(lambda: one.times_ready() == 2)
    assert not is_running(one.started()[0]["pid"])
    one.process.send_signal(signal.SIGINT)
    assert "server ended" in one.ended()


def test_a_server_with_a_part_of_a_version_is_started_again(watched: Callable[..., Watched], tmp_path: Path) -> None:
    one = watched()
    eventually(lambda: one.times_ready() == 1)
    (tmp_path / "failed").write_text("burnish-1-2-3, failed")
    eventually(lambda: len(one.started()) == 2, 60.0)
    (tmp_path / "failed").unlink()
    eventually(lambda: one.times_ready() == 2)
    one.process.send_signal(signal.SIGINT)
    assert "the server could not load the whole of a version: starting it again" in one.ended()


def test_restarts_are_bounded(watched: Callable[..., Watched], program: Path) -> None:
    program.write_text("#!/bin/sh\necho boom >&2\nexit 3\n")
    one = watched("--restarts", "1")
    messages = one.ended()
    assert one.process.returncode == 2
    assert messages.count("boom") == 2
    assert "the server ended with status 3, after 1 restarts; its own messages are above" in messages
