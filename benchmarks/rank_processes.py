"""Processes of `benchmarks.ranks`, each with an engine or one end of an exchange, as the one that has started them sees
them: it writes a line to ask for something, and they answer with lines of JSON."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

DECODE, DONE = "decode", "done"  # what an engine is asked for while ranks are lost, and the end of every answer
LAST_WORDS_S = 10.0


class Part:
    """This program, started again for one part."""

    def __init__(self, part: str, directory: Path, size: int, quantization: str, card: int | None = None) -> None:
        """`card`: the only one that it sees."""
        told = ["--part", part, "--directory", str(directory), "--sizes", str(size), "--quantization", quantization]
        environ = {**os.environ, "PYTHONFAULTHANDLER": "1"}
        if card is not None:
            environ["CUDA_VISIBLE_DEVICES"] = str(card)
        self.size, self.name = size, f"{size}.{quantization}"
        self.found: dict[str, Any] = {}
        self.process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.ranks", *sys.argv[1:], *told],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True, env=environ,
        )  # fmt: skip

    def ask(self, what: str, limit: float) -> None:
        """Have the process do something, unless it is ''; collect what it tells until that is done."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        given_up = threading.Timer(limit, self.give_up, [f"{what} took more than {limit:g} s"])
        given_up.start()
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.write(what and what + "\n")
            self.process.stdin.flush()
        done = False
        while not done and (line := self.process.stdout.readline()):
            if line.startswith("{"):
                told = json.loads(line)
                done = told.pop(DONE)
                self.found |= told
        given_up.cancel()
        if not done:
            self.found.setdefault("failed", self.process.wait())

    def give_up(self, why: str) -> None:
        """End the processes, which print their threads' stacks."""
        self.found["failed"] = why
        for pid in (*children(self.process.pid), self.process.pid):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGABRT)

    def end(self) -> None:
        assert self.process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(LAST_WORDS_S)
        self.process.kill()
        self.process.wait()

    def lose(self, number: signal.Signals, who: str, limit: float) -> dict[str, Any]:
        """Signal rank 1, or rank 0, while they decode; return how long all need to end, and with what status."""
        self.ask(DECODE, limit)
        if "failed" in self.found:
            return {"failed": self.found["failed"]}
        first, *_ = children(self.process.pid)
        time.sleep(1)  # some steps
        os.kill(self.process.pid if who == "rank 0" else first, number)
        started = time.perf_counter()
        while time.perf_counter() - started < limit and (self.process.poll() is None or lives(first)):
            time.sleep(0.01)
        seconds = round(time.perf_counter() - started, 2)
        self.process.kill()
        return {"all_gone_s": seconds, "status": self.process.wait()}


def children(pid: int) -> list[int]:
    """Return the processes that a process has started, the oldest first."""
    files = Path(f"/proc/{pid}/task").glob("*/children")
    return sorted(int(child) for file in files for child in file.read_text().split())


def lives(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False
