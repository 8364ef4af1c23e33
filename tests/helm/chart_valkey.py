"""The chart's Valkey, really run: its rendered configuration and users, on loopback, in a directory of the test's."""

import contextlib
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

from helm_chart import Object, find, secret_data
from machine import PATIENCE_S

from cli.redis_server import find_server

POLL_S = 0.02


@contextlib.contextmanager
def valkey(items: list[Object], directory: Path, port: int) -> Iterator[dict[str, str]]:
    """A running server; yields its Secret, with URLs that lead to it."""
    secret = secret_data(items, "millrace-redis")
    config = find(items, "ConfigMap", "millrace-redis")["data"]["valkey.conf"]
    users = directory / "users.acl"
    users.write_text(secret["users.acl"])
    data = directory / "data"
    data.mkdir()
    (directory / "valkey.conf").write_text(
        config.replace("/etc/valkey-users/users.acl", str(users)).replace("dir /data", f"dir {data}")
    )
    command = [find_server(), str(directory / "valkey.conf"), "--port", str(port), "--bind", "127.0.0.1"]
    with (directory / "valkey.log").open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
    try:
        _wait(process, port, directory / "valkey.log")
        yield {
            key: value.replace("millrace-redis.models.svc:6379", f"127.0.0.1:{port}") for key, value in secret.items()
        }
    finally:
        process.terminate()
        process.wait(PATIENCE_S)


def say(port: int, line: str) -> bytes:
    """The reply to one inline command of a stranger's; nothing where nobody listens."""
    try:
        with socket.create_connection(("127.0.0.1", port), timeout=PATIENCE_S) as connection:
            connection.sendall(f"{line}\r\n".encode())
            return connection.recv(4096)
    except OSError:
        return b""


def _wait(process: "subprocess.Popen[bytes]", port: int, log: Path) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while b"PONG" not in say(port, "PING"):
        assert process.poll() is None, log.read_text()
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(POLL_S)
