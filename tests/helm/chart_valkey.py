"""The chart's Valkey, really run: its rendered configuration and users, on loopback, in a directory of the test's."""

import contextlib
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from helm_chart import Object, find, secret_data
from machine import PATIENCE_S

from cli.redis_server import find_server

POLL_S = 0.02


@contextlib.contextmanager
def valkey(items: list[Object], directory: Path, port: int) -> Iterator[dict[str, str]]:
    """Run a server and yield its Secret, with URLs that lead to it."""
    with serving(items, directory, ["--port", str(port)], lambda: b"PONG" in say(port, "PING")):
        yield {
            key: value.replace("millrace-redis.models.svc:6379", f"127.0.0.1:{port}")
            for key, value in secret_data(items, "millrace-redis").items()
        }


@contextlib.contextmanager
def serving(items: list[Object], directory: Path, options: list[str], up: Callable[[], bool]) -> Iterator[None]:
    """Run a server with the chart's configuration and users, whose paths are `directory`'s, until the end."""
    users, data, config = directory / "users.acl", directory / "data", directory / "valkey.conf"
    users.write_text(secret_data(items, "millrace-redis")["users.acl"])
    data.mkdir()
    text = find(items, "ConfigMap", "millrace-redis")["data"]["valkey.conf"]
    for path, ours in (
        ("/etc/valkey-users/users.acl", str(users)),
        ("dir /data", f"dir {data}"),
        ("/etc/millrace/redis-tls", str(directory)),
    ):
        text = text.replace(path, ours)
    config.write_text(text)
    command = [find_server(), str(config), *options, "--bind", "127.0.0.1"]
    with (directory / "valkey.log").open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
    try:
        _wait(process, up, directory / "valkey.log")
        yield
    finally:
        process.terminate()
        process.wait(PATIENCE_S)


def say(port: int, line: str) -> bytes:
    """Return the reply to an inline command without a password; empty if nothing listens."""
    try:
        with socket.create_connection(("127.0.0.1", port), timeout=PATIENCE_S) as connection:
            connection.sendall(f"{line}\r\n".encode())
            return connection.recv(4096)
    except OSError:
        return b""


def _wait(process: "subprocess.Popen[bytes]", up: Callable[[], bool], log: Path) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not up():
        assert process.poll() is None, log.read_text()
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(POLL_S)
