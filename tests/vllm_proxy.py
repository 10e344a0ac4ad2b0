"""A proxy in front of a real vLLM server that breaks what passes through it, on order."""

from __future__ import annotations

import http.client
import json
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from safetensors.torch import load_file, save_file

from burnish.vllm_plugin import folder_checksum
from http_server import JsonHandler, ThreadServer

_SESSION = ("/init_weight_transfer_engine", "/start_weight_update", "/update_weights", "/finish_weight_update")


class Proxy(ThreadServer):
    """Forwards to `target`; `faults` change what arrives.

    ignore_reload, keep_head, drop_adapter: weights that do not arrive, in whole or in part, and are acknowledged.
    hot: samples at twice the temperature asked for. deaf: answers nothing. dribble: passes answers byte by
    byte.
    """

    def __init__(self, target: str, name: str) -> None:
        self.target, self.name = urlsplit(target), name
        self.faults: set[str] = set()
        self.head: Path | None = None
        self.own = Path(tempfile.mkdtemp())
        super().__init__(_Handler)

    def server_close(self) -> None:
        super().server_close()
        shutil.rmtree(self.own, ignore_errors=True)

    def changed(self, path: str, body: dict[str, Any]) -> dict[str, Any] | None:
        """The body to forward, or None for a call that is acknowledged and dropped."""
        if "ignore_reload" in self.faults and path in ("/collective_rpc", *_SESSION):
            return None
        if path in ("/collective_rpc", "/init_weight_transfer_engine"):
            where, name = (
                (body["kwargs"], "weights_path") if path == "/collective_rpc" else (body["init_info"], "folder")
            )
            folder = Path(where[name])
            if "keep_head" in self.faults:
                assert self.head is not None
                where[name] = str(self._with_old_head(folder))
                if "checksum" in where:
                    where["checksum"] = folder_checksum(where[name])
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


class _Handler(JsonHandler):
    server: Proxy

    def handle_json(self, body: dict[str, Any] | None) -> None:
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
        self.send_head(status, len(data))
        pieces = [data] if "dribble" not in self.server.faults else [bytes([byte]) for byte in data]
        for piece in pieces:
            self.wfile.write(piece)
            self.wfile.flush()
            time.sleep(0 if len(pieces) == 1 else 0.05)
