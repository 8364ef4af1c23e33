"""Proxy that ends TLS before a Redis that has none, in a thread of its own, and whose links break as a test asks."""

import asyncio
import contextlib
import ssl
import threading
from collections.abc import Coroutine, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import certificates
from machine import PATIENCE_S

PIECE = 1 << 16


class TlsProxy:
    """Listener on a port of 127.0.0.1. All methods may be called from other threads."""

    def __init__(self, directory: Path, target: str) -> None:
        """Make the certificates in `directory`; `target` is the path of a Redis's socket."""
        certificates.make(directory, ["IP:127.0.0.1"])
        self._directory = directory
        self._target = target
        self._loop = asyncio.new_event_loop()
        self._writers: set[asyncio.StreamWriter] = set()
        self._to_clients: list[asyncio.StreamWriter] = []  # of the links that are open, oldest first
        self._replied: int | None = None  # bytes of a reply that go through before the next link breaks
        self._silent = False
        self._more = b""
        self.accepted = 0

    def url(self, authority: str = "ca.crt") -> str:
        """Return the URL for clients that trust a file of the directory."""
        return f"rediss://127.0.0.1:{self._port}?ssl_ca_certs={self._directory / authority}"

    def break_links(self, politely: bool) -> None:
        """Close all links: with TLS's word of farewell, or by a reset."""
        self._run(self._break(politely))

    def break_in_reply(self, after: int) -> None:
        """Break one link by a reset when so many bytes of what Redis says next have gone through."""
        self._run(self._set("_replied", after))

    def fall_silent(self, silent: bool) -> None:
        """Drop whatever comes from Redis, and leave the links open; or end that."""
        self._run(self._set("_silent", silent))

    def say(self, data: bytes) -> None:
        """Send bytes to the client of the oldest link, which Redis has not said."""
        self._run(self._say(data))

    def say_after_reply(self, data: bytes) -> None:
        """Send such bytes together with what Redis says next."""
        self._run(self._set("_more", data))

    @contextmanager
    def running(self) -> Iterator["TlsProxy"]:
        thread = threading.Thread(target=self._loop.run_forever)
        thread.start()
        try:
            self._port = self._run(self._listen())
            yield self
        finally:
            self._run(self._close())
            self._loop.call_soon_threadsafe(self._loop.stop)
            thread.join()
            self._loop.close()

    def _run(self, work: Coroutine[Any, Any, Any]) -> Any:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(PATIENCE_S)

    async def _listen(self) -> int:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(self._directory / "tls.crt", self._directory / "tls.key")
        self._server = await asyncio.start_server(self._carry, "127.0.0.1", 0, ssl=context)
        port: int = self._server.sockets[0].getsockname()[1]
        return port

    async def _close(self) -> None:
        self._server.close()
        tasks = asyncio.all_tasks() - {asyncio.current_task()}
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for writer in self._writers:
            writer.transport.abort()
        await asyncio.sleep(0)

    async def _set(self, name: str, value: object) -> None:
        setattr(self, name, value)

    async def _say(self, data: bytes) -> None:
        self._to_clients[0].write(data)

    async def _break(self, politely: bool) -> None:
        for writer in [*self._to_clients]:
            if politely:
                writer.close()
            else:
                writer.transport.abort()

    async def _carry(self, from_client: asyncio.StreamReader, to_client: asyncio.StreamWriter) -> None:
        self.accepted += 1
        from_redis, to_redis = await asyncio.open_unix_connection(self._target)
        self._writers |= {to_client, to_redis}
        self._to_clients.append(to_client)
        pumps = [
            asyncio.create_task(_pump(from_client, to_redis)),
            asyncio.create_task(self._reply(from_redis, to_client)),
        ]
        try:
            await asyncio.wait(pumps, return_when=asyncio.FIRST_COMPLETED)
        finally:
            self._to_clients.remove(to_client)
            for pump in pumps:
                pump.cancel()
            await asyncio.gather(*pumps, return_exceptions=True)
            for writer in (to_client, to_redis):
                writer.close()
                self._writers.discard(writer)

    async def _reply(self, source: asyncio.StreamReader, client: asyncio.StreamWriter) -> None:
        while data := await source.read(PIECE):
            if self._silent:
                continue
            if self._replied is not None:
                data, self._replied = data[: self._replied], self._replied - len(data)
                if self._replied <= 0:
                    self._replied = None
                    client.write(data)
                    await client.drain()
                    client.transport.abort()
                    return
            client.write(data + self._more)
            self._more = b""
            await client.drain()


async def _pump(source: asyncio.StreamReader, target: asyncio.StreamWriter) -> None:
    with contextlib.suppress(OSError):
        while data := await source.read(PIECE):
            target.write(data)
            await target.drain()
