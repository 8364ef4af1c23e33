"""Server of OpenAI's API that answers by a script, and of metrics, for what measures one."""

import json
import math
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from machine import PATIENCE_S
from server_thread import served

WORD = b'data: {"choices": [{"index": 0, "text": " w", "finish_reason": null}]}\n\n'
PART_OF_A_CHARACTER = b'data: {"choices": [{"text": "", "finish_reason": null}], "usage": null}\n\n'
LAST_WORD = b'data: {"choices": [{"text": " w", "finish_reason": "length"}]}\r\n\r\n'
END = b'data: {"choices": [{"text": "", "finish_reason": "length"}]}\n\n'
USAGE = b'data: {"choices": [], "usage": {"prompt_tokens": 5, "completion_tokens": 3}}\n\n'
DONE = b"data: [DONE]\n\n"
STREAM = b": a sign of life\n\n" + WORD + PART_OF_A_CHARACTER + LAST_WORD + END + USAGE + DONE


class Scripted(BaseHTTPRequestHandler):
    """Handler that answers every request with `pieces`, each a chunk, and notes bodies and connections."""

    protocol_version = "HTTP/1.1"
    status = 200
    pieces: tuple[bytes, ...] = (STREAM,)
    breaks_off = False
    came = threading.Event()  # a request that is held
    held: threading.Event | None = None  # what answers wait for
    metrics = ""  # with {} for the number of requests so far
    metrics_until = math.inf  # so many requests; then they are no HTTP
    bodies: list[dict[str, Any]]
    headers_seen: list[dict[str, str]]
    connections: set[Any]

    def do_POST(self) -> None:
        self.connections.add(self.client_address)
        self.headers_seen.append({name.lower(): value for name, value in self.headers.items()})
        self.bodies.append(json.loads(self.rfile.read(int(self.headers["content-length"]))))
        self.send_response(self.status)
        self.send_header("transfer-encoding", "chunked")
        self.end_headers()
        if self.held is not None:
            self.came.set()
            self.held.wait(PATIENCE_S)
        for piece in self.pieces:
            self.wfile.write(b"%x\r\n%b\r\n" % (len(piece), piece))
            self.wfile.flush()
        self.close_connection = self.breaks_off
        if not self.breaks_off:
            with suppress(OSError):  # of a client that could not read on
                self.wfile.write(b"0\r\n\r\n")

    def do_GET(self) -> None:
        """Answer with counters that grow by the number of requests."""
        if len(self.bodies) >= self.metrics_until:
            self.wfile.write(b"no HTTP\r\n")
            self.close_connection = True
            return
        told = self.metrics.format(len(self.bodies)).encode()
        self.send_response(200)
        self.send_header("content-length", f"{len(told)}")
        self.end_headers()
        self.wfile.write(told)

    def log_message(self, *_: object) -> None:
        return


@contextmanager
def scripted(**script: Any) -> Iterator[tuple[str, type[Scripted]]]:
    """Serve a script, and yield the URL and the handler that has seen what came."""
    handler = type("Handler", (Scripted,), {"bodies": [], "headers_seen": [], "connections": set(), **script})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server, served(server):
        yield f"http://127.0.0.1:{server.server_port}", handler
