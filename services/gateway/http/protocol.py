"""HTTP protocol of one connection: uvicorn's, with bounds on heads, trailers, pipelined requests, and waiting."""

import asyncio
import socket
import sys
from collections.abc import Iterable
from typing import Any

from httptools import HttpParserError, HttpRequestParser
from starlette.responses import Response
from starlette.types import ASGIApp
from uvicorn.config import Config
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol, RequestResponseCycle
from uvicorn.server import ServerState

from services.gateway.errors import FailureBodies, error_response
from services.gateway.http.connections import Connections, network_of
from services.gateway.http.context import find_context
from services.gateway.http.direct import attach_body
from services.gateway.http.unframed import UnframedApp
from shared.errors import Failure

# Paths that are answered whatever state the server is in.
HEALTH_PATHS = frozenset({"/health", "/health/live", "/health/ready", "/ping"})
MAX_HEAD_BYTES = 64 << 10  # also of what else is no body: trailers, and framing without a byte in it
MAX_HEADERS = 256
MAX_PIPELINED = 16

_SLICE = 64 << 10
_INTERIM = b"HTTP/1.1 100 Continue\r\n\r\n"
_TELLS_RESETS = hasattr(socket, "TCP_INFO")  # elsewhere a client that sends nothing more is taken for one that left
_TCP_CLOSE = 7  # the first byte of Linux's TCP_INFO, the state, once a reset has come
_INVALID = Failure(400, "This is no valid HTTP request.", code="invalid_http")
_HTTP_2 = Failure(400, "This server speaks HTTP/1.1, not HTTP/2.", code="invalid_http")
_HTTP_2_PREFACE = b"PRI * HTTP/2.0\r\n"
_HEAD_TOO_LARGE = Failure(
    431,
    f"A request's head and its trailers may have {MAX_HEAD_BYTES} bytes and {MAX_HEADERS} fields each.",
    code="head_too_large",
)


class TooManyHeadersError(Exception):
    """Head or trailers of too many fields."""


class ChunkedBody:
    """Body of a response in chunks (services/gateway/http/direct.py:DirectBody)."""

    __slots__ = ("_cycle", "_write", "abort", "is_ready")

    def __init__(self, cycle: RequestResponseCycle) -> None:
        self._cycle = cycle
        self._write = cycle.transport.write
        self.abort = cycle.transport.abort
        # The connection keeps this one, since a token is worth no look at cycle and flow.
        self.is_ready = not (cycle.flow.write_paused or cycle.disconnected)

    @property
    def is_chunked(self) -> bool:
        return bool(self._cycle.chunked_encoding)

    def write(self, data: bytes) -> None:
        if data:  # an empty chunk would be the end
            self._write(b"%x\r\n%b\r\n" % (len(data), data))


class BoundedProtocol(HttpToolsProtocol):
    """One connection. What is wrong with HTTP itself is answered in OpenAI's form, too."""

    def __init__(
        self,
        config: Config,
        server_state: ServerState,
        app_state: dict[str, Any],
        _loop: asyncio.AbstractEventLoop | None = None,
        *,
        connections: Connections,
        bodies: FailureBodies,
    ) -> None:
        super().__init__(config, server_state, app_state, _loop)
        self.address = ""
        self._registry = connections
        self._bodies = bodies
        self._refusal: Failure | None = None  # of every request on this connection
        self._in_message = False  # a request has begun, and has not arrived to its end
        self._in_head = False
        self._no_body_bytes = 0  # since the message began, or since its last byte of body
        self._fields = 0
        self._running: RequestResponseCycle | None = None  # `cycle` is the newest, which may wait for this one
        self._body: ChunkedBody | None = None  # of `_running`
        self._piece = b""  # what the parser was given last
        self._replays = False  # the parser is given the head of a request again
        self._half_closed = False  # the client sends nothing more
        self._discards = False  # an answer to what is no HTTP has been sent: nothing is read any more

    # ------------------------------------------------------------------------------------------- the connection

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self.address = network_of(self.client[0]) if self.client else ""
        self._refusal = self._registry.enter(self)
        self._update()

    def connection_lost(self, exc: Exception | None) -> None:
        self._registry.leave(self)
        super().connection_lost(exc)
        if self._running is not None:
            self._running.disconnected = True
            self._running.message_event.set()
        self._set_ready(False)

    def pause_writing(self) -> None:
        super().pause_writing()
        self._set_ready(False)

    def resume_writing(self) -> None:
        super().resume_writing()
        self._set_ready(self._running is not None and not self._running.disconnected)

    def abort(self) -> None:
        self.transport.abort()

    def eof_received(self) -> bool:  # type: ignore[override]
        """Keep the connection of a client that sends nothing more but waits for its answers.

        One that has left sends the same. Its system answers what we write with a reset, so something is written: a
        sign of life in a stream, and where no answer has begun an interim response, which HTTP/1.1 lets a server send
        at any time.
        """
        if self._in_message or not self._is_busy() or not _TELLS_RESETS or self.cycle.scope["http_version"] != "1.1":
            return False
        self._half_closed = True
        self._registry.watch(self)
        if self._running is not None:
            context = find_context(self._running.scope)  # type: ignore[arg-type]
            if not self._running.response_started:
                self.transport.write(_INTERIM)
            elif context is not None and context.ask_client is not None:
                context.ask_client()
        return True

    def has_left(self) -> bool:
        found: bytes = self.transport.get_extra_info("socket").getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 1)
        return found[0] == _TCP_CLOSE

    def data_received(self, data: bytes) -> None:
        for start in range(0, len(data), _SLICE):
            if self._discards or self.transport.is_closing():
                return
            piece = data[start : start + _SLICE]
            self._no_body_bytes += len(piece)
            self._piece = piece
            super().data_received(piece)
            if self._no_body_bytes > MAX_HEAD_BYTES and not self._discards:
                self._refuse(_HEAD_TOO_LARGE)

    def send_400_response(self, msg: str) -> None:
        invalid = _HTTP_2 if self._piece.startswith(_HTTP_2_PREFACE) else _INVALID
        self._refuse(_HEAD_TOO_LARGE if self._fields > MAX_HEADERS else invalid)

    def _refuse(self, failure: Failure) -> None:
        """Answer what is no request, and read nothing more. The client may close, once it has read that."""
        self._discards = True
        if self._is_busy() or not self.transport.can_write_eof():
            self._registry.close_invalid(self)
            return
        self.transport.write(_raw(error_response(failure, {"connection": "close"})))
        self.transport.write_eof()  # not close: with bytes of the client unread, that would reset what we wrote
        self._registry.wait(self, self._registry.limits.head_s)

    def _unsupported_upgrade_warning(self) -> None:
        """Go on with HTTP/1.1 after a head that offers another protocol, as Java's client does in every request.

        The parser takes what follows for that protocol. A new one is told only how long the body is.
        """
        upgrade = sys.exception()
        assert upgrade is not None
        rest = self._piece[upgrade.args[0] :]
        framing = (field for field in self.headers if field[0] in (b"content-length", b"transfer-encoding"))
        self.parser = HttpRequestParser(self)
        self._replays = True
        try:
            self.parser.feed_data(b"POST / HTTP/1.1\r\n" + _lines(framing) + b"\r\n")
        except HttpParserError:  # a length that the first one did not look at, since it took what follows for no body
            self._refuse(_INVALID)
            return
        if rest:
            super().data_received(rest)

    # ------------------------------------------------------------------------------------------- the parser's calls

    def on_message_begin(self) -> None:
        if self._replays:
            return
        super().on_message_begin()
        self._in_message = self._in_head = True
        self._no_body_bytes = self._fields = 0
        self._update()

    def on_header(self, name: bytes, value: bytes) -> None:
        if self._replays:
            return
        self._fields += 1
        if self._fields > MAX_HEADERS:
            raise TooManyHeadersError
        if self._in_head:  # trailers say nothing to us
            super().on_header(name, value)

    def on_headers_complete(self) -> None:
        if self._replays:
            self._replays = False
            return
        self._in_head, self._fields = False, 0
        super().on_headers_complete()
        if len(self.pipeline) > MAX_PIPELINED and not self.transport.is_closing():
            self._registry.close_invalid(self)
        elif self.pipeline:
            self.flow.resume_reading()  # a client that leaves is noticed by reading alone
        self._update()

    def on_body(self, body: bytes) -> None:
        self._no_body_bytes = 0
        super().on_body(body)

    def on_message_complete(self) -> None:
        if self.parser.should_upgrade():
            return  # so it seems to the parser; the body is still to come
        super().on_message_complete()
        self._in_message = False
        self._update()

    # ------------------------------------------------------------------------------------------- requests

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if self._half_closed and not self._is_busy():
            self.transport.close()
        self._update()

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: ASGIApp) -> None:  # type: ignore[override]
        if self._refusal is not None:
            cycle.keep_alive = False
            path = cycle.scope["path"]
            if path not in HEALTH_PATHS:
                app = error_response(self._refusal, body=self._bodies.of(path))
        if cycle.scope["http_version"] == "1.0":
            app = UnframedApp(app, cycle)
        self._running = cycle
        self._body = ChunkedBody(cycle)
        attach_body(cycle.scope, self._body)  # type: ignore[arg-type]
        super()._start_asgi_task(cycle, app)  # type: ignore[arg-type]

    def _set_ready(self, ready: bool) -> None:
        if self._body is not None:
            self._body.is_ready = ready

    def _is_busy(self) -> bool:
        return self.cycle is not None and not self.cycle.response_complete

    def _update(self) -> None:
        """Say whether this connection waits for its client."""
        if self._is_busy():
            self._registry.work(self)
        else:
            limits = self._registry.limits
            self._registry.wait(self, limits.head_s if self._in_message else limits.idle_s)


def _raw(response: Response) -> bytes:
    return STATUS_LINE[response.status_code] + _lines(response.raw_headers) + b"\r\n" + bytes(response.body)


def _lines(fields: Iterable[tuple[bytes, bytes]]) -> bytes:
    return b"".join(b"%b: %b\r\n" % field for field in fields)
