"""Small HTTP server on loopback with answers by path."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

from stream_server import serving

Handler = Callable[[str, asyncio.StreamWriter], Awaitable[None]]


class Site:
    """Server's answers by path, and the heads of the requests it received."""

    def __init__(self) -> None:
        self.port = 0
        self.heads: list[str] = []
        self.answers: dict[str, bytes] = {}
        self.handlers: dict[str, Handler] = {}

    def url(self, path: str, host: str = "127.0.0.1") -> str:
        return f"http://{host}:{self.port}{path}"

    def serve(self, path: str, body: bytes, status: str = "200 OK", **headers: str) -> str:
        lines = [f"HTTP/1.1 {status}", f"Content-Length: {len(body)}"]
        lines += [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()]
        self.answers[path] = "\r\n".join([*lines, "Connection: close", "", ""]).encode() + body
        return self.url(path)

    def redirect(self, path: str, to: str, status: str = "302 Found") -> str:
        return self.serve(path, b"", status, Location=to)

    async def handle(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = (await reader.readuntil(b"\r\n\r\n")).decode()
        self.heads.append(head)
        path = head.split()[1]
        if path in self.handlers:
            await self.handlers[path](path, writer)
        else:
            writer.write(self.answers.get(path, b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n"))
            await writer.drain()


@asynccontextmanager
async def running_site() -> AsyncIterator[Site]:
    site = Site()
    async with serving(site.handle) as site.port:
        yield site
