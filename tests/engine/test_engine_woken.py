"""A real engine process is halted for longer than its lease, another takes over, and the first wakes up."""

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from engine_bench import Reader, eventually
from engine_cases import generate
from machine import PATIENCE_S
from redis.asyncio import Redis

from cli.demo import write_demo
from shared.bus.keys import GENERATE, Keys
from shared.bus.leases import Lease, live
from shared.bus.records import Records
from shared.tether import tethered

ROOT = Path(__file__).resolve().parents[2]
LENGTH = 48
SETTINGS = {
    "namespace": "test",
    "device": "cpu",
    "lease_ms": 3000,  # one that is awake does not lose it, however busy the machine
    "max_model_len": 256,
    "block_size": 4,
    "num_gpu_blocks_override": 128,
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("woken") / "model"
    write_demo(directory, dtype="float32")  # in which what is computed again, in other steps, comes out the same
    return directory


class Engines:
    """Processes by name."""

    def __init__(self, redis_url: str, model: Path, log: Path) -> None:
        self._told = {**SETTINGS, "redis_url": redis_url, "model": model}
        self._log = log
        self._processes: dict[str, subprocess.Popen[bytes]] = {}

    def start(self, name: str, crash_at: str = "") -> None:
        told = {**self._told, "name": name, "crash_at": crash_at}
        ours = {key: value for key, value in os.environ.items() if not key.startswith("MILLRACE_")}
        environ = ours | {f"MILLRACE_{key.upper()}": str(value) for key, value in told.items()}
        with self._log.open("ab") as log:
            self._processes[name] = subprocess.Popen(
                tethered([sys.executable, "-m", "services.engine"]),
                cwd=ROOT,
                env=environ | {"OMP_NUM_THREADS": "1"},
                stdout=log,
                stderr=log,
            )

    def halted(self, name: str) -> bool:
        process = self._processes[name]
        assert process.poll() is None, self._log.read_text()
        stat = Path(f"/proc/{process.pid}/stat").read_text()
        return stat.rpartition(")")[2].split()[0] == "T"

    def wake(self, name: str) -> None:
        self._processes[name].send_signal(signal.SIGCONT)

    async def stop(self, name: str) -> int:
        """Its exit status after it was asked to drain."""
        self._processes[name].terminate()
        return await asyncio.to_thread(self._processes[name].wait, PATIENCE_S)

    def kill(self) -> None:
        for process in self._processes.values():
            process.kill()
            process.wait()


@pytest.fixture
def engines(redis_url: str, model: Path, tmp_path: Path) -> Iterator[Engines]:
    engines = Engines(redis_url, model, tmp_path / "log")
    yield engines
    engines.kill()


@pytest.mark.parametrize(
    ("halt_at", "epochs"),
    [
        ("engine.claim.before:1:stop", [1]),  # the other claims first, and is the only one that does
        ("engine.tokens.before:9:stop", [1, 2]),
        ("engine.finish.before:1:stop", [1]),  # the answer was complete, and the other sees it
    ],
)
async def test_nobody_hears_an_engine_that_slept_too_long(
    engines: Engines, redis: Redis, keys: Keys, halt_at: str, epochs: list[int]
) -> None:
    reader, records = Reader(redis, keys), Records(redis, keys)
    question = [30, 31, 32, 33]
    engines.start("sleeper", halt_at)
    await records.submit(GENERATE, generate("r", question, LENGTH, ignore_eos=True))
    await eventually(lambda: asyncio.sleep(0, engines.halted("sleeper")))
    await Lease(redis, keys, "engine", "sleeper", 1).release()  # sooner than it ends by itself
    engines.start("other")
    [seen] = await reader.finished("r")
    assert list(dict.fromkeys(begin.epoch for begin in seen.begins)) == epochs

    async def taken_over() -> bool:
        return int(await redis.xlen(keys.stream(GENERATE))) == 0

    await eventually(taken_over)
    before = len(reader.messages)
    engines.wake("sleeper")

    async def let_go() -> bool:
        loads = {replica.name: replica.load for replica in await live(redis, keys, "engine")}
        return loads.get("sleeper", {}).get("held") == 0

    await eventually(let_go)
    # Both are awake: what one of them says of a new request comes after all that the sleeper had to say of the old one.
    await records.submit(GENERATE, generate("again", question, LENGTH, ignore_eos=True))
    [again] = await reader.finished("again")
    assert seen.tokens == again.tokens, "as if nothing had happened"
    told, late = [
        [run for _, message in part for run in message.runs if run.request_id == "r"]
        for part in (reader.messages[:before], reader.messages[before:])
    ]
    # Said again where its connection did not outlive its sleep, and dropped by whoever reads: as postproc does.
    late = [run for run in late if run not in told]
    assert all(run.epoch < seen.epoch and run.finish is None for run in late), "it is out of date, and ends soon"
    assert (await records.get(["r"]))["r"].epoch == epochs[-1] + (halt_at.startswith("engine.finish"))
    assert [await engines.stop(name) for name in ("sleeper", "other")] == [0, 0]
    assert await redis.xinfo_consumers(keys.stream(GENERATE), "engine") == []
