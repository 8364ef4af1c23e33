"""Bodies of unknown length for clients of HTTP/1.0, who know no chunks: the end of the connection is the body's."""

from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.protocols.http.httptools_impl import RequestResponseCycle


class UnframedApp:
    """App whose answers without a length go out as they are; uvicorn sends chunks to every client."""

    def __init__(self, app: ASGIApp, cycle: RequestResponseCycle) -> None:
        self._app = app
        self._cycle = cycle
        self._unframed = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def send_unframed(message: Message) -> None:
            self._prepare(message)
            await send(message)

        await self._app(scope, receive, send_unframed)

    def _prepare(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self._unframed = all(name.lower() != b"content-length" for name, _ in message.get("headers", ()))
            if self._unframed:
                self._cycle.chunked_encoding = False
        elif self._unframed:
            self._cycle.expected_content_length = len(message.get("body", b""))
