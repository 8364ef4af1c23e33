"""Running deployment for tests: `millrace serve` as a person would start it, on free ports of this machine."""

import asyncio
import base64
import io
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import av
import numpy as np
import redis
from machine import PATIENCE_S, free_ports
from PIL import Image
from redis.asyncio import Redis
from server_thread import served

from cli.connection import scratch_prefix
from shared.bus.client import connect
from shared.bus.keys import ENCODE, GENERATE, Keys
from shared.tether import tethered

LOOK_S = 0.05
WORKER = re.compile(r"\.(decoding|templates|grammars)\b")  # processes of services themselves
CACHE_BYTES = 64 << 20  # 64 thousand tokens of the demo model in bfloat16
NOTHING: Mapping[str, str] = {}


class System:
    """Process of a running `millrace serve`, and its files and ports."""

    def __init__(
        self,
        arguments: list[str],
        directory: Path,
        environ: Mapping[str, str] = NOTHING,
        *,
        output: int | None = None,
        prepare: Callable[[], object] | None = None,
        below: Sequence[str] = (),
    ) -> None:
        """Start it. `output`: where it writes to instead of its log. `prepare`: called in its process before it.
        `below`: the command whose child it is."""
        self.port, self.metrics_port = free_ports(2)
        self.base_url = f"http://127.0.0.1:{self.port}"
        self.directory = directory
        self._temporary = Path(environ.get("TMPDIR", tempfile.gettempdir()))
        self._mark = f"TEST_SYSTEM={directory}\0".encode()
        self.log = directory / "serve.log"
        ports = ["--port", str(self.port), "--metrics-port", str(self.metrics_port)]
        ports += ["--host", "127.0.0.1"]
        ours = {name: value for name, value in os.environ.items() if not name.startswith(("MILLRACE_", "FD_"))}
        with self.log.open("wb") as log:
            self._process = subprocess.Popen(
                tethered([*below, str(Path(sys.executable).with_name("millrace")), "serve", *ports, *arguments]),
                cwd=directory,
                # One thread each: four processes share what may be two cores. Answers are kept for a moment only, so
                # that `left_behind` need not wait for them. The default cache is 1 GiB, and to zero it takes an engine
                # longer than all else that it does to start.
                env={
                    **ours,
                    "MILLRACE_RETAIN_S": "1",
                    "MILLRACE_KV_CACHE_BYTES": str(CACHE_BYTES),
                    **environ,
                    "OMP_NUM_THREADS": "1",
                    "TEST_SYSTEM": str(directory),
                },
                stdout=log if output is None else output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                preexec_fn=prepare,
            )

    def wait_until_ready(self) -> None:
        """Return when GET /health/ready answers 200."""
        self._until(lambda: self.get("/health/ready")[0] == 200, PATIENCE_S, "it was not ready")

    def wait_for(self, words: str, after: int = 0) -> None:
        """Return when it has written `words`, after its first `after` characters."""
        self._until(lambda: words in self.log.read_text()[after:], PATIENCE_S, f"it did not say {words!r}")

    def answers(self, port: int) -> bool:
        """Return True if anything listens on a port of this machine."""
        with socket.socket() as probe:
            return probe.connect_ex(("127.0.0.1", port)) == 0

    def children(self) -> list[str]:
        """Return the command lines of the processes it started that still run."""
        return [command for _, command in self._children()]

    def wait_until_childless(self) -> None:
        """Return when nothing that it started runs or listens. A process that ends has no command line any more while
        its sockets are still being closed."""
        deadline = time.monotonic() + PATIENCE_S
        ports = (self.port, self.metrics_port)
        while left := [*self.children(), *filter(self.answers, ports)]:
            assert time.monotonic() < deadline, f"still running: {left}\n{self.tail()}"
            time.sleep(LOOK_S)

    def kill_child(self, words: str) -> None:
        """kill -9 the one child whose command line has `words` in it, and return when it has ended. A service's own
        children are not among them."""
        [pid] = self.pids(words)
        self.kill_process(pid, words)

    def pids(self, words: str) -> list[int]:
        """Return the ids of the children whose command line has `words` in it, without a service's own children."""
        return [pid for pid, command in self._children() if words in command and not WORKER.search(command)]

    def kill_process(self, pid: int, words: str) -> None:
        """kill -9 one child, and return when it has ended."""
        os.kill(pid, signal.SIGKILL)
        self._until(lambda: pid not in dict(self._children()), PATIENCE_S, f"{words} was not killed")

    def signal(self, number: signal.Signals) -> None:
        self._process.send_signal(number)

    def wait(self, seconds: float) -> int:
        """Wait until it has ended and return its exit status."""
        try:
            return self._process.wait(seconds)
        except subprocess.TimeoutExpired:
            self.kill()
            raise AssertionError(f"it did not end within {seconds:.0f} s\n{self.tail()}") from None

    def get(self, path: str, port: int | None = None) -> tuple[int, str]:
        """Return status and body of a plain GET; status 0 if nothing answers."""
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port or self.port}{path}", timeout=PATIENCE_S) as reply:
                return reply.status, reply.read().decode()
        except urllib.error.HTTPError as error:
            with error:
                return error.code, error.read().decode()
        except OSError:
            return 0, ""

    def metric(self, name: str) -> float:
        """Return the sum of a metric over its labels."""
        status, text = self.get("/metrics", self.metrics_port)
        assert status == 200
        lines = [line for line in text.splitlines() if line.partition(" ")[0].partition("{")[0] == name]
        assert lines, f"no metric {name}"
        return sum(float(line.rpartition(" ")[2]) for line in lines)

    def wait_for_metric(self, name: str, value: float) -> None:
        """Return when a metric has this value: a client has its answer before the gateway has counted it."""
        self._until(lambda: self.metric(name) == value, PATIENCE_S, f"{name} was not {value}")

    @property
    def redis_url(self) -> str:
        """The URL of its Redis, with all rights."""
        return f"unix://{self._sockets()[-1]}"

    def check_rights(self) -> None:
        """Check that nobody was refused what it asked its Redis for (shared/bus/users.acl)."""
        for path in self._sockets()[-1:]:
            with redis.Redis.from_url(f"unix://{path}") as client:
                assert client.acl_log() == []

    def _sockets(self) -> list[Path]:
        """Its Redis's socket is the last; others are left of one that had the same port and was killed. None if the
        Redis is somebody else's."""
        found = self._temporary.glob(f"{scratch_prefix(self.port)}*/redis.sock")
        return sorted(found, key=lambda path: path.stat().st_mtime)

    async def running_requests(self) -> int:
        """Return the number of requests that the engine has, waiting or running."""
        client = connect(self.redis_url)
        try:
            return int(await client.xlen(Keys("millrace").stream(GENERATE)))
        finally:
            await client.aclose()

    async def left_behind(self) -> dict[str, int]:
        """Return what Redis still holds of requests, once it holds nothing or PATIENCE_S have passed: keys other than
        _LASTING, and the lengths of the work streams.
        """
        client = connect(self.redis_url)
        try:
            for _ in range(int(PATIENCE_S / LOOK_S)):
                if not (left := await _of_requests(client, Keys("millrace"))):
                    break
                await asyncio.sleep(LOOK_S)
            return left
        finally:
            await client.aclose()

    def stop(self) -> None:
        """Stop it as Ctrl-C does, and check that it ended as it should.

        Raises:
            AssertionError: another exit status than 0, or a traceback in what it wrote; or Redis refused something.
        """
        self.check_rights()
        self.signal(signal.SIGINT)
        status = self.wait(PATIENCE_S)
        assert status == 0, f"exit status {status}\n{self.tail()}"
        assert "Traceback" not in self.log.read_text(), self.tail()

    def kill(self) -> None:
        """Kill it and the processes it started, if it still runs."""
        if self._process.poll() is not None:
            return
        children = self._children()
        self._process.kill()
        self._process.wait()
        for pid, _ in children:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def tail(self) -> str:
        """Return the end of its output."""
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-60:])

    def _children(self) -> list[tuple[int, str]]:
        """List processes with our mark in their environment, even orphans; and Redis, which overwrites its own."""
        found = []
        for entry in Path("/proc").iterdir():
            with suppress(OSError, ValueError):  # not a process, or gone, or somebody else's
                pid, command = int(entry.name), (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode()
                ours = self._mark in (entry / "environ").read_bytes() or self._is_child(entry)
                if ours and command and pid != self._process.pid:
                    found.append((pid, command))
        return found

    def _is_child(self, entry: Path) -> bool:
        parent = (entry / "stat").read_text().rpartition(")")[2].split()[1]
        return int(parent) == self._process.pid

    def _until(self, done: Callable[[], bool], seconds: float, what: str) -> None:
        deadline = time.monotonic() + seconds
        while True:
            status = self._process.poll()  # before the look: it may be the last thing that a process does
            if done():
                return
            assert status is None, f"it ended with status {status}\n{self.tail()}"
            assert time.monotonic() < deadline, f"{what} within {seconds:.0f} s\n{self.tail()}"
            time.sleep(LOOK_S)


# Keys that may stay when nothing runs: streams, leases of replicas, owners of shards, and cached embeddings.
_LASTING = (
    "encode",
    "generate",
    "tokens:",
    "deltas:",
    "control",
    "replica:",
    "replicas:",
    "shards",
    "blob:embeds:",
    "blobs",
)


async def _of_requests(client: Redis, keys: Keys) -> dict[str, int]:
    prefix = keys.stream("")
    names = [key.decode().removeprefix(prefix) for key in await client.keys("*")]
    left = {name: 1 for name in names if not name.startswith(_LASTING)}
    lengths = {name: await client.xlen(keys.stream(name)) for name in (ENCODE, GENERATE)}
    return left | {name: length for name, length in lengths.items() if length}


@contextmanager
def started(
    arguments: list[str], directory: Path, environ: Mapping[str, str] = NOTHING, **how: Any
) -> Iterator[System]:
    """Start a system, which the test may stop; kill it at the end if it still runs. `how`: see System."""
    directory.mkdir(parents=True, exist_ok=True)
    system = System(arguments, directory, environ, **how)
    try:
        yield system
    finally:
        system.kill()


@contextmanager
def running(arguments: list[str], directory: Path, environ: Mapping[str, str] = NOTHING) -> Iterator[System]:
    """Start a system, wait until it is ready, and stop it in order at the end."""
    with started(arguments, directory, environ) as system:
        system.wait_until_ready()
        yield system
        system.stop()


# ------------------------------------------------------------------------------------------------------------ media


def picture(width: int, height: int, seed: int = 0) -> Image.Image:
    """Return a picture of noise that depends on the seed."""
    rng = np.random.default_rng(seed)
    return Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))


def encoded(image: Image.Image, form: str) -> bytes:
    """Return the file of an image, as PNG, JPEG, ..."""
    file = io.BytesIO()
    image.save(file, form)
    return file.getvalue()


def mp4(frames: int, width: int = 64, height: int = 48, fps: int = 4, seed: int = 0) -> bytes:
    """Return a small video of moving noise."""
    file = io.BytesIO()
    rng = np.random.default_rng(seed)
    with av.open(file, "w", format="mp4") as container:
        stream = container.add_stream("mpeg4", rate=fps)
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        for _ in range(frames):
            pixels = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode())
    return file.getvalue()


def data_url(data: bytes, media_type: str) -> str:
    return f"data:{media_type};base64,{base64.b64encode(data).decode()}"


@contextmanager
def file_server(files: dict[str, tuple[str, bytes]]) -> Iterator[str]:
    """Serve {path: (media type, bytes)} over http on 127.0.0.1 and yield its URL. Other paths are 404."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            media_type, data = files.get(self.path, ("text/plain", b""))
            self.send_response(200 if self.path in files else 404)
            self.send_header("Content-Type", media_type)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *_: object) -> None:
            """Tests print nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    with served(server):
        yield f"http://127.0.0.1:{server.server_address[1]}"
