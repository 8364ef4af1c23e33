"""Small proxy before a Redis, whose links can fall silent and whose address can move."""

import asyncio
from pathlib import Path


class Proxy:
    """Listener on a unix socket; each connection is one to `target`, which may change for those that come later."""

    def __init__(self, path: Path, target: Path) -> None:
        self.path = path
        self.target = target
        self._links: set[_Link] = set()
        self._server: asyncio.Server | None = None

    @property
    def url(self) -> str:
        return f"unix://{self.path}"

    async def start(self) -> None:
        self._server = await asyncio.get_running_loop().create_unix_server(
            lambda: _Link(self._links, self.target), self.path
        )

    def swallow(self) -> int:
        """Make links that are open half-open: they stay, and nothing comes through any more. Return their number."""
        for link in self._links:
            link.silent = True
        return len(self._links)

    async def close(self) -> None:
        if self._server is not None:
            self._server.close()
        for link in list(self._links):
            link.close()


class _Link(asyncio.Protocol):
    """A client's side of a link."""

    def __init__(self, links: "set[_Link]", target: Path) -> None:
        self.silent = False
        self._links = links
        self._target = target
        self._early: list[bytes] = []  # what came before there was a connection to the target
        self._client: asyncio.Transport | None = None
        self._server: asyncio.Transport | None = None
        self._connecting: asyncio.Task[None] | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._client = transport
        self._links.add(self)
        self._connecting = asyncio.ensure_future(self._connect())

    def data_received(self, data: bytes) -> None:
        if self.silent:
            return
        if self._server is None:
            self._early.append(data)
        else:
            self._server.write(data)

    def connection_lost(self, _: Exception | None) -> None:
        self._links.discard(self)
        if self._server is not None:
            self._server.close()

    def close(self) -> None:
        for side in (self._client, self._server):
            if side is not None:
                side.close()

    def from_server(self, data: bytes) -> None:
        if not self.silent and self._client is not None:
            self._client.write(data)

    def server_lost(self) -> None:
        if not self.silent:
            self.close()

    async def _connect(self) -> None:
        try:
            loop = asyncio.get_running_loop()
            transport, _ = await loop.create_unix_connection(lambda: _ServerSide(self), self._target)
        except OSError:
            self.close()
            return
        self._server = transport
        if self._client is None or self._client.is_closing():
            transport.close()
        transport.writelines(self._early)


class _ServerSide(asyncio.Protocol):
    def __init__(self, link: _Link) -> None:
        self._link = link

    def data_received(self, data: bytes) -> None:
        self._link.from_server(data)

    def connection_lost(self, _: Exception | None) -> None:
        self._link.server_lost()
