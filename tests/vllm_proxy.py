"""A proxy in front of a real vLLM server that breaks what passes through it, on order."""

from __future__ import annotations

import http.client
import json
import shutil
import tempfile
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from safetensors.torch import load_file, save_file


class Proxy(ThreadingHTTPServer):
    """Forwards to `target`; `faults` change what arrives.

    ignore_reload, keep_head, drop_adapter: weights that do not arrive, in whole or in part, and are acknowledged.
    hot: samples at twice the temperature asked for. deaf: answers nothing. dribble: passes answers byte by
    byte.
    """

    daemon_threads = True

    def __init__(self, target: str, name: str) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.target, self.name = urlsplit(target), name
        self.faults: set[str] = set()
        self.head: Path | None = None
        self.own = Path(tempfile.mkdtemp())
        threading.Thread(target=self.serve_forever, args=(0.05,), daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def server_close(self) -> None:
        super().server_close()
        shutil.rmtree(self.own, ignore_errors=True)

    def handle_error(self, *args: object) -> None:
        """Clients that hang up are part of the tests."""

    def changed(self, path: str, body: dict[str, Any]) -> dict[str, Any] | None:
        """The body to forward, or None for a call that is acknowledged and dropped."""
        if path == "/collective_rpc":
            if "ignore_reload" in self.faults:
                return None
            folder = Path(body["kwargs"]["weights_path"])
            if "keep_head" in self.faults:
                assert self.head is not None
                body["kwargs"]["weights_path"] = str(self._with_old_head(folder))
            else:
                self.head = self.own / "head"
                shutil.copytree(folder, self.head, dirs_exist_ok=True)
        if "drop_adapter" in self.faults:
            if path.endswith("lora_adapter"):
                return None
            if str(body.get("model", "")).startswith("burnish-"):
                body["model"] = self.name
        if "hot" in self.faults and "stop_token_ids" in body:
            body["temperature"] *= 2
        return body

    def _with_old_head(self, folder: Path) -> Path:
        mixed = self.own / "mixed"
        shutil.copytree(folder, mixed, dirs_exist_ok=True)
        assert self.head is not None
        weights, old = load_file(folder / "model.safetensors"), load_file(self.head / "model.safetensors")
        weights["lm_head.weight"] = old["lm_head.weight"]
        save_file(weights, mixed / "model.safetensors", metadata={"format": "pt"})
        return mixed


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Proxy

    def log_message(self, *args: object) -> None:
        pass

    def do_GET(self) -> None:
        self._forward(None)

    def do_POST(self) -> None:
        self._forward(json.loads(self.rfile.read(int(self.headers.get("Content-Length", 0))) or b"{}"))

    def _forward(self, body: dict[str, Any] | None) -> None:
        proxy = self.server
        while "deaf" in proxy.faults:
            time.sleep(0.1)
        if body is not None and (body := proxy.changed(self.path.split("?")[0], body)) is None:
            return self._send(200, b"{}")
        headers = {name: value for name, value in self.headers.items() if name.lower() in ("authorization",)}
        headers["Content-Type"] = "application/json"
        forward = http.client.HTTPConnection(proxy.target.hostname or "", proxy.target.port, timeout=600)
        try:
            forward.request(self.command, self.path, None if body is None else json.dumps(body), headers)
            answer = forward.getresponse()
            return self._send(answer.status, answer.read())
        finally:
            forward.close()

    def _send(self, status: int, data: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        pieces = [data] if "dribble" not in self.server.faults else [bytes([byte]) for byte in data]
        for piece in pieces:
            self.wfile.write(piece)
            self.wfile.flush()
            time.sleep(0 if len(pieces) == 1 else 0.05)
