"""HTTP servers in a thread of the tests' process."""

from __future__ import annotations

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class ThreadServer(ThreadingHTTPServer):
    """Serves on a port of the loopback interface until `stop`."""

    daemon_threads = True
    request_queue_size = 128

    def __init__(self, handler: type[JsonHandler], port: int = 0) -> None:
        super().__init__(("127.0.0.1", port), handler)
        threading.Thread(target=self.serve_forever, args=(0.02,), daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def __enter__(self) -> Any:
        return self

    def __exit__(self, *error: object) -> None:
        self.stop()

    def stop(self) -> None:
        self.shutdown()
        self.server_close()

    def handle_error(self, *args: object) -> None:
        """Clients that hang up are part of the tests."""


class JsonHandler(BaseHTTPRequestHandler):
    """Reads a body of JSON and passes it to `handle_json`, None for a GET."""

    protocol_version = "HTTP/1.1"

    def log_message(self, *args: object) -> None:
        pass

    def do_GET(self) -> None:
        self.handle_json(None)

    def do_POST(self) -> None:
        self.handle_json(json.loads(self.rfile.read(int(self.headers.get("Content-Length", 0))) or b"{}"))

    def handle_json(self, body: dict[str, Any] | None) -> None:
        raise NotImplementedError

    def send_head(self, status: int, length: int) -> None:
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(length))
        self.end_headers()
