"""Cost of the token path: gateway, postproc and Redis as they ship, a synthetic engine and a raw client.

    python -m benchmarks.pipeline [--streams 256] [--json out.json] [--guarantees 3]

Three measurements, all on one machine, the client included in its load but not in its figures:
  first token   one request at a time: request sent -> first token read, over every hop
  paced         every stream gets `--steps-per-s` tokens a second: CPU us per token by process, emit -> read p50 / p99
  flat out      closed loop: the most tokens a second that arrive with a bounded number in flight
With --guarantees N, instead: the paced measurement N times each with all guarantees and Redis on disk, with all
guarantees and Redis in memory, and with a postproc that has none (benchmarks/bare_postproc.py) and Redis in memory, in
turns; and the ratios of the medians of CPU per token.
CPU is user + system time of each process between the first and the last token, from /proc. Nothing is asserted.
"""

import argparse
import contextlib
import json
import os
import platform
import selectors
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, Protocol

import numpy as np
import redis
from numpy.typing import NDArray

from benchmarks.synthetic_engine import Board
from cli.demo import write_demo
from cli.redis_server import RedisServer
from shared.model.tokenizer import Tokenizer

MARK = "~"  # one token of this text per emitted token; it occurs nowhere else in an event
NAMESPACE = "bench"


def cpu_seconds(pid: int) -> float:
    """Return the user and system time of a process."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


class System:
    """Deployment of Redis, gateway and postproc as processes."""

    def __init__(
        self,
        redis_server: RedisServer,
        model: Path,
        port: int,
        shards: int,
        postproc: str = "services.postproc",
        gateway: Mapping[str, str] = MappingProxyType({}),
    ) -> None:
        """`gateway`: variables of the gateway alone."""
        self.port = port
        self.redis_url = redis_server.url
        common = {
            **{k: v for k, v in os.environ.items() if not k.startswith("MILLRACE_")},
            "MILLRACE_REDIS_URL": redis_server.url,
            "MILLRACE_MODEL": str(model),
            "MILLRACE_NAMESPACE": NAMESPACE,
            "MILLRACE_SHARDS": str(shards),
            "MILLRACE_LOG_LEVEL": "warning",
        }
        gateway = {
            **{"MILLRACE_HOST": "127.0.0.1", "MILLRACE_PORT": str(port), "MILLRACE_MAX_CONCURRENCY": "4096"},
            **gateway,
        }
        self.processes = {
            "gateway": self._start("services.gateway", common | gateway),
            "postproc": self._start(postproc, common),
        }
        with redis.Redis.from_url(redis_server.url) as client:
            self.redis_pid = int(client.info("server")["process_id"])
        self._wait_for_gateway()

    @staticmethod
    def _start(module: str, env: dict[str, str]) -> subprocess.Popen[bytes]:
        return subprocess.Popen([sys.executable, "-m", module], env=env)

    def _wait_for_gateway(self) -> None:
        deadline = time.monotonic() + 30
        while time.monotonic() < deadline:
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", self.port), 1):
                return
            if any(p.poll() is not None for p in self.processes.values()):
                break
            time.sleep(0.05)
        self.stop()
        raise SystemExit("gateway or postproc did not start within 30 s; their output is above")

    def cpu(self) -> dict[str, float]:
        """Return the CPU seconds so far, by process."""
        seconds = {name: cpu_seconds(p.pid) for name, p in self.processes.items()}
        return seconds | {"redis": cpu_seconds(self.redis_pid)}

    @contextlib.contextmanager
    def engine(self, board: Board, token: int, **options: float) -> Iterator[None]:
        """Run the synthetic engine as a process."""
        command = [sys.executable, "-m", "benchmarks.synthetic_engine", "--redis-url", self.redis_url]
        command += ["--namespace", NAMESPACE, "--board", str(board.path), "--token", str(token)]
        for name, value in options.items():
            command += [f"--{name.replace('_', '-')}", str(value)]
        process = subprocess.Popen(command)
        try:
            yield
            if process.wait(60):
                raise SystemExit("the synthetic engine failed; its output is above")
        finally:
            if process.poll() is None:
                process.kill()
                process.wait()

    def stop(self) -> None:
        for process in self.processes.values():
            process.terminate()
        for process in self.processes.values():
            process.wait(30)


def body(tokens: int) -> bytes:
    """Return a streaming chat request as raw HTTP."""
    payload = json.dumps(
        {
            "model": "default",
            "messages": [{"role": "user", "content": "Hello"}],
            "stream": True,
            "max_tokens": tokens,
            "chat_template_kwargs": {"enable_thinking": False},
        }
    ).encode()
    head = "POST /v1/chat/completions HTTP/1.1\r\nHost: bench\r\nContent-Type: application/json\r\n"
    return f"{head}Content-Length: {len(payload)}\r\n\r\n".encode() + payload


class Measured(Protocol):
    """System, or a process in its place."""

    port: int

    def cpu(self) -> dict[str, float]:
        """Return the CPU seconds so far, by process."""

    @property
    def engine(self) -> Callable[..., contextlib.AbstractContextManager[None]]:
        """Run what emits the tokens."""


class Reader:
    """Client of all streams in one thread: records when each token arrives, by counting marks."""

    def __init__(self, port: int, streams: int, tokens: int) -> None:
        self.tokens = tokens
        self.total = 0
        self.counts = [0] * streams
        self.arrivals = [np.zeros(tokens) for _ in range(streams)]
        self.selector = selectors.DefaultSelector()
        self.sockets: list[socket.socket] = []
        for i in range(streams):
            connection = socket.create_connection(("127.0.0.1", port))
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self.selector.register(connection, selectors.EVENT_READ, i)
            self.sockets.append(connection)

    def send(self) -> None:
        request = body(self.tokens)
        for connection in self.sockets:
            connection.sendall(request)

    def read_all(self, board: Board) -> None:
        """Read until every stream has all its tokens."""
        want = self.tokens * len(self.sockets)
        mark = MARK.encode()
        while self.total < want:
            for key, _ in self.selector.select(10):
                data = key.fileobj.recv(1 << 16)  # type: ignore[union-attr]
                if not data:
                    raise SystemExit("the gateway closed a stream early")
                marks = data.count(mark)
                if marks:
                    i = key.data
                    before = self.counts[i]
                    self.arrivals[i][before : before + marks] = time.monotonic()
                    self.counts[i] = before + marks
                    self.total += marks
            board.received = self.total

    def close(self) -> None:
        for connection in self.sockets:
            connection.close()
        self.selector.close()


def percentiles(values: NDArray[np.float64]) -> dict[str, float]:
    """Return p50 and p99 in milliseconds, of values in seconds."""
    return {f"p{q}": round(float(np.percentile(values, q)) * 1e3, 2) for q in (50, 99)}


def throughput(system: Measured, board: Board, token: int, streams: int, tokens: int, **pace: float) -> dict[str, Any]:
    """Measure one batch of streams, paced or in closed loop."""
    board.cpu_s = 0.0
    with system.engine(board, token, streams=streams, tokens=tokens, **pace):
        reader = Reader(system.port, streams, tokens)
        before = system.cpu()
        reader.send()
        reader.read_all(board)
        after = system.cpu()
    emitted = board.emitted_at()[:tokens].copy()
    reader.close()
    arrived = np.stack(reader.arrivals)
    count = streams * tokens
    seconds = float(arrived.max() - emitted[0])
    cpu = {name: round((after[name] - before[name]) / count * 1e6, 2) for name in before}
    cpu["engine side"] = round(board.cpu_s / count * 1e6, 2)
    return {
        "tokens_per_s": round(count / seconds),
        "cpu_us_per_token": cpu | {"total": round(sum(cpu.values()), 2)},
        "emit_to_read_ms": percentiles((arrived - emitted[None, :]).ravel()),
    }


def first_token(system: System, board: Board, token: int, rounds: int) -> dict[str, float]:
    """Measure one request at a time, from sent to first token read, with an engine that takes no time."""
    waits = []
    with system.engine(board, token, streams=1, tokens=1, rounds=rounds):
        for _ in range(rounds):
            reader = Reader(system.port, 1, 1)
            start = time.monotonic()
            reader.send()
            reader.read_all(board)
            waits.append(reader.arrivals[0][0] - start)
            reader.close()
    return percentiles(np.array(waits[len(waits) // 10 :])) | {"mean": round(statistics.mean(waits) * 1e3, 2)}


@contextlib.contextmanager
def started(
    root: Path,
    model: Path,
    shards: int,
    postproc: str = "services.postproc",
    gateway: Mapping[str, str] = MappingProxyType({}),
    persistence: bool = False,
) -> Iterator[tuple[System, Board, int]]:
    """Start a system; yield it, the board that its engines read, and the token that they give."""
    token = Tokenizer.load(model).encode_text(MARK)[-1]
    board = Board(root / "board")
    with RedisServer(root / "redis", persistence=persistence) as server:
        system = System(server, model, free_port(), shards, postproc, gateway)
        try:
            yield system, board, token
        finally:
            system.stop()


def measure(args: argparse.Namespace, root: Path) -> dict[str, Any]:
    """Run all measurements on one system."""
    model = root / "model"
    write_demo(model)
    with started(root, model, args.shards) as (system, board, token):
        n, tokens = args.streams, args.tokens
        throughput(system, board, token, n, 50, steps_per_s=args.steps_per_s)  # warm-up
        return {
            "machine": {"python": platform.python_version(), "cpus": os.cpu_count(), "streams": n},
            "first_token_ms": first_token(system, board, token, args.rounds),
            "paced": {
                "offered_tokens_per_s": round(n * args.steps_per_s),
                **throughput(system, board, token, n, tokens, steps_per_s=args.steps_per_s),
            },
            "flat_out": throughput(system, board, token, n, tokens, window=n * args.ahead),
        }


SHIPPED, BARE = "services.postproc", "benchmarks.bare_postproc"
WAYS = {"guarantees, on disk": (SHIPPED, True), "guarantees": (SHIPPED, False), "none": (BARE, False)}


def paced_cost(args: argparse.Namespace, root: Path, model: Path, postproc: str, on_disk: bool) -> dict[str, float]:
    """Return CPU us per token by process, of a system started for it."""
    with started(root, model, args.shards, postproc, persistence=on_disk) as (system, board, token):
        throughput(system, board, token, args.streams, 50, steps_per_s=args.steps_per_s)  # warm-up
        paced = throughput(system, board, token, args.streams, args.tokens, steps_per_s=args.steps_per_s)
    cost: dict[str, float] = paced["cpu_us_per_token"]
    return cost


def guarantees(args: argparse.Namespace, root: Path) -> dict[str, Any]:
    """Measure the cost of the guarantees, in turns, so that a busy minute of the machine affects all of them."""
    model = root / "model"
    write_demo(model)
    costs: dict[str, list[dict[str, float]]] = {way: [] for way in WAYS}
    for repetition in range(args.guarantees):
        for way, (postproc, on_disk) in WAYS.items():
            directory = root / f"{repetition} {way}"
            directory.mkdir()
            costs[way].append(paced_cost(args, directory, model, postproc, on_disk))
    median = {
        way: {name: statistics.median(cost[name] for cost in each) for name in each[0]} for way, each in costs.items()
    }
    ratios = {way: round(cost["total"] / median["none"]["total"], 3) for way, cost in median.items()}
    return {"cpu_us_per_token": median, "against none": ratios}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--streams", type=int, default=256)
    parser.add_argument("--tokens", type=int, default=1000, help="tokens per stream")
    parser.add_argument("--steps-per-s", type=float, default=100.0)
    parser.add_argument("--ahead", type=int, default=32, help="flat out: tokens per stream in flight")
    parser.add_argument("--rounds", type=int, default=200, help="first token: requests")
    parser.add_argument("--shards", type=int, default=1)
    parser.add_argument(
        "--guarantees", type=int, default=0, metavar="N", help="only the cost of the guarantees, N times"
    )
    parser.add_argument("--json", type=Path, help="also write the result here")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as root:
        result = guarantees(args, Path(root)) if args.guarantees else measure(args, Path(root))
    text = json.dumps(result, indent=2)
    print(text)
    if args.json:
        args.json.write_text(text + "\n")


if __name__ == "__main__":
    main()
