"""Requests and tokens a second of one gateway process by its number of streams, beside a bare uvloop writer.

    python -m benchmarks.gateway_streams [--streams 1 64 256 1024] [--json out.json]

Gateway, postproc and Redis are as they ship, the engine is `benchmarks/synthetic_engine.py`; the writer
(`benchmarks/bare_writer.py`) takes the place of all of them. For each number of streams, both in turns in one run:
  requests   answers of one token a second, as many at a time as there are streams
  paced      every stream gets 100 tokens a second, at most 25,600 in all: us of CPU a token, emitted to read
  flat out   closed loop: the most tokens a second that arrive
Nothing is asserted. Read ratios within one run.
"""

import argparse
import contextlib
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.pipeline import MARK, Reader, System, cpu_seconds, free_port, started, throughput
from benchmarks.synthetic_engine import REPORT_TOKENS, Board
from cli.demo import write_demo
from shared.open_files import raise_file_limit

OFFERED = 25_600  # tokens a second, at most
MOST_STEPS_PER_S = 100.0


class Writer:
    """The bare writer in the place of a `System`: its process is started for each measurement."""

    def __init__(self) -> None:
        self.port = 0
        self._pid = 0

    def cpu(self) -> dict[str, float]:
        """Return the CPU seconds so far."""
        return {"writer": cpu_seconds(self._pid)}

    @contextlib.contextmanager
    def engine(self, board: Board, _token: int, **options: float) -> Iterator[None]:
        """Run it as a process."""
        self.port = free_port()
        command = [sys.executable, "-m", "benchmarks.bare_writer", "--port", str(self.port), "--text", MARK]
        command += ["--board", str(board.path)]
        for name, value in options.items():
            command += [f"--{name.replace('_', '-')}", str(value)]
        process = subprocess.Popen(command)
        self._pid = process.pid
        try:
            self._wait(process)
            yield
        finally:
            process.kill()
            process.wait()

    def _wait(self, process: subprocess.Popen[bytes]) -> None:
        listening = f":{self.port:04X} 00000000:0000 0A"  # without a connection, which would count as a stream
        while listening not in Path("/proc/net/tcp").read_text():
            if process.poll() is not None:
                raise SystemExit("the bare writer did not start; its output is above")
            time.sleep(0.02)


def requests_per_s(system: System | Writer, board: Board, token: int, streams: int, rounds: int) -> float:
    """Measure answers of one token, `streams` at a time, each on a connection of its own.

    A round before them is not measured: the synthetic engine starts meanwhile.
    """
    started = 0.0
    with system.engine(board, token, streams=streams, tokens=1, rounds=1 + rounds):
        for number in range(1 + rounds):
            if number == 1:
                started = time.monotonic()
            reader = Reader(system.port, streams, 1)
            reader.send()
            reader.read_all(board)
            reader.close()
        return round(streams * rounds / (time.monotonic() - started), 1)


def rows(systems: dict[str, System | Writer], board: Board, token: int, streams: int, ahead: int) -> dict[str, Any]:
    """Measure both with one number of streams."""
    steps_per_s = min(MOST_STEPS_PER_S, OFFERED / streams)
    seconds = 8
    tokens = min(REPORT_TOKENS, int(steps_per_s * seconds))
    flat_tokens = min(REPORT_TOKENS, max(100, 200_000 // streams))
    found: dict[str, Any] = {}
    for name, system in systems.items():
        found[name] = {
            "requests_per_s": requests_per_s(system, board, token, streams, max(2, 400 // streams)),
            "paced": throughput(system, board, token, streams, tokens, steps_per_s=steps_per_s),
            "flat_out": throughput(system, board, token, streams, flat_tokens, window=streams * ahead),
        }
        print(f"{streams} streams, {name}: {found[name]}", file=sys.stderr, flush=True)
    return found


def measure(args: argparse.Namespace, root: Path) -> dict[str, Any]:
    """Measure every number of streams on one system."""
    model = root / "model"
    write_demo(model)
    most = {"MILLRACE_MAX_CONNECTIONS_PER_ADDRESS": "4096"}
    with started(root, model, 1, gateway=most) as (system, board, token):
        throughput(system, board, token, 64, 100, steps_per_s=MOST_STEPS_PER_S)  # warm-up
        both: dict[str, System | Writer] = {"gateway": system, "writer": Writer()}
        found = {str(streams): rows(both, board, token, streams, args.ahead) for streams in args.streams}
    machine = {"python": platform.python_version(), "cpus": os.cpu_count(), "load": os.getloadavg()}
    return {"machine": machine, "streams": found}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--streams", type=int, nargs="+", default=[1, 64, 256, 1024])
    parser.add_argument("--ahead", type=int, default=32, help="flat out: tokens per stream in flight")
    parser.add_argument("--json", type=Path, help="also write the result here")
    args = parser.parse_args()
    raise_file_limit()
    with tempfile.TemporaryDirectory(prefix="millrace-streams-") as root:
        text = json.dumps(measure(args, Path(root)), indent=1)
    print(text)
    if args.json:
        args.json.write_text(text + "\n")


if __name__ == "__main__":
    main()
