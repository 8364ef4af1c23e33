"""A rank that is killed or halted ends its replica, which names it; another goes on, byte for byte; nothing outlives
the replica."""

import asyncio
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from engine_bench import Reader, eventually, submit
from engine_cases import generate
from engine_loop import Bench
from machine import PATIENCE_S
from near_ties import NEAR_TIE, judging
from rank_cases import DRAWN, Loaded, settings_for, write_checkpoint
from redis.asyncio import Redis

from services.engine.loop.mailbox import Add
from services.engine.ranks.processes import LOST, MODULE, Lost, Ranks, without_secrets
from services.engine.schedule.sequence import EngineFacts, build
from shared.bus.keys import Keys
from shared.config import variable
from shared.errors import ConfigError
from shared.messages import Generate
from shared.model.config import load_model_config
from shared.service import MISCONFIGURED
from shared.tether import tethered

pytestmark = pytest.mark.system
LENGTH, REQUESTS = 60, 4
HALFWAY = "engine.tokens.before:12:stop"  # with many tokens said and many to come, however long we stand still
SOON = "6"  # as a step's timeout: half of that a rank may be silent
TOLD = {
    "lease_ms": "1000",
    "step_timeout_s": str(2 * PATIENCE_S),
    "max_num_batched_tokens": "64",
    "namespace": "test",
    "max_deliveries": "10",
}


class Replica:
    """An engine of two ranks; `crash_at` says where rank 0 halts."""

    def __init__(self, directory: Path, redis_url: str, log: Path, crash_at: str = "", **changes: str) -> None:
        settings = settings_for(directory, 2)
        names = ("model", "device", "max_model_len", "block_size", "max_num_seqs", "num_gpu_blocks_override")
        told = {name: str(getattr(settings, name)) for name in (*names, "tensor_parallel_size")} | TOLD
        told |= {"redis_url": redis_url, "crash_at": crash_at, **changes}
        environ = {variable(name): value for name, value in told.items()}
        self._log = log
        with log.open("wb") as output:
            self.process = subprocess.Popen(
                tethered([sys.executable, "-P", "-m", "services.engine"]),
                env={**os.environ, **environ, "PYTHONPATH": str(Path(__file__).parents[3])},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
            )

    @property
    def rank(self) -> int:
        """Process of rank 1."""
        [child] = [
            int(pid)
            for children in Path(f"/proc/{self.process.pid}/task").glob("*/children")
            for pid in children.read_text().split()
        ]
        return child

    async def halted(self) -> int:
        """Return the process of rank 1 once rank 0 is halted."""

        async def is_halted() -> bool:
            assert self.process.poll() is None, self.said
            return state(self.process.pid) == "T"

        await eventually(is_halted)
        return self.rank

    def wake(self) -> None:
        self.process.send_signal(signal.SIGCONT)

    @property
    def said(self) -> str:
        return self._log.read_text(errors="replace")

    async def ended(self) -> int:
        return await asyncio.to_thread(self.process.wait, PATIENCE_S)


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("faults") / "checkpoint"
    write_checkpoint(made)
    return made


@pytest.fixture
def replicas() -> Iterator[list[Replica]]:
    started: list[Replica] = []
    yield started
    for replica in started:
        replica.process.kill()
        replica.process.wait()


def steady(directory: Path, capsys: pytest.CaptureFixture[str]) -> dict[str, tuple[Generate, list[int]]]:
    """Return requests of which no token hangs on how sums are rounded, and their tokens."""
    config, found = load_model_config(directory), dict[str, tuple[Generate, list[int]]]()
    facts = EngineFacts(config, 256, think_close_id=9)
    with judging(), Loaded(directory, 1) as runner:
        for seed in range(60):
            ids = [300 + (seed * 37 + i * i) % 700 for i in range(4 + seed % 9)]
            message = generate(f"r{seed}", ids, LENGTH, seed=seed, ignore_eos=True, **(DRAWN if seed % 2 else {}))
            capsys.readouterr()
            bench = Bench({0: [Add(build(message, 1, [], (), facts))]}, runner=runner, max_num_batched_tokens=64)
            if NEAR_TIE not in capsys.readouterr().err:
                found[f"r{seed}"] = message, bench.answer(f"r{seed}")
            if len(found) == REQUESTS:
                return found
    raise AssertionError("there is a near tie in too many answers; take other prompts")


def state(pid: int) -> str:
    """The letter of a process's state; that of one that has ended and that nobody waits for, too."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return "Z"


async def gone(pid: int) -> None:
    """Return when a process has ended."""
    await eventually(lambda: asyncio.sleep(0, state(pid) == "Z"))


def test_a_rank_that_cannot_start_is_a_setting_to_correct(directory: Path) -> None:
    lost: list[Lost] = []
    with (
        pytest.raises(ConfigError, match="needs 64 cache blocks"),
        Loaded(directory, 2, lost.append, num_gpu_blocks_override=63),
    ):
        raise AssertionError("it has started")
    assert [(one.rank, one.status) for one in lost] == [(1, MISCONFIGURED)]


def test_what_keeps_a_rank_from_starting_is_said(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[subprocess.Popen[bytes]] = []
    start = subprocess.Popen

    def first_only(command: list[str], **options: Any) -> subprocess.Popen[bytes]:
        if started:
            raise OSError("no room for another process")
        waits = "import socket, sys; sys.exit(len(socket.socket(fileno=int(sys.argv[1])).recv(1)))"
        started.append(start([sys.executable, "-c", waits, command[command.index(MODULE) + 2]], **options))
        return started[0]

    monkeypatch.setattr(subprocess, "Popen", first_only)
    ranks = Ranks(settings_for(directory, 3), os.environ)
    with pytest.raises(OSError, match="no room for another process"):
        ranks.start("cpu", load_model_config(directory))
    ranks.close()
    assert started[0].returncode == 0, "it ends with its socket"


def test_ranks_are_not_told_of_redis(directory: Path) -> None:
    settings = settings_for(directory, 2, blob_redis_url="redis://u:secret@127.0.0.1:1/1")
    assert b"secret" in msgspec.json.encode(settings)
    assert b"secret" not in msgspec.json.encode(without_secrets(settings))


async def test_requests_outlive_lost_ranks(
    directory: Path, redis: Redis, redis_url: str, keys: Keys, tmp_path: Path, replicas: list[Replica],
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    asked = steady(directory, capsys)
    reader = Reader(redis, keys)

    def another(crash_at: str = "", **changes: str) -> Replica:
        log = tmp_path / f"{len(replicas)}.log"
        replicas.append(Replica(directory, redis_url, log, crash_at, **changes))
        return replicas[-1]

    await submit(redis, keys, *(message for message, _ in asked.values()))
    first = another(HALFWAY)
    killed = await first.halted()
    for name in asked:
        await reader.reached(name, 4)
    os.kill(killed, signal.SIGKILL)
    first.wake()
    assert await first.ended() == LOST + 1, first.said
    assert re.search(r"rank 1 is lost: killed by SIGKILL", first.said)

    second = another(HALFWAY, step_timeout_s=SOON)
    halted = await second.halted()
    for name in asked:
        await reader.reached(name, 12)
    os.kill(halted, signal.SIGSTOP)
    second.wake()
    assert await second.ended() == LOST + 1, second.said
    assert re.search(r"rank 1 is lost: silent for \d", second.said)
    await gone(halted)

    third = another()
    for name, seen in zip(asked, await reader.finished(*asked), strict=True):
        assert seen.tokens == asked[name][1]
        assert seen.epoch == 3
    rank = third.rank
    third.process.kill()
    await gone(rank)
