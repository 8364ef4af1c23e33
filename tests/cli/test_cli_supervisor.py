"""A child is started, passed on, restarted, given up on and stopped: with small real processes."""

import asyncio
import os
import re
import sys
import time
from pathlib import Path

import pytest
from machine import PATIENCE_S

from cli import supervisor
from cli.output import WRITER
from cli.supervisor import Child, GaveUp


def child(script: str, said: list[str]) -> Child:
    return Child("engine", [sys.executable, "-c", script], {}, said.append, lambda pid: None)


async def until(path: Path, text: str) -> None:
    """Wait for a process to say so in a file."""

    def wait() -> None:
        deadline = time.monotonic() + PATIENCE_S
        while not path.exists() or text not in path.read_text():
            assert time.monotonic() < deadline, f"{path} never had {text!r}"
            time.sleep(0.01)

    await asyncio.to_thread(wait)


async def test_what_dies_before_it_was_ready_is_given_up_with_its_last_lines(
    capfd: pytest.CaptureFixture[str],
) -> None:
    one = child("print('loading'); raise SystemExit('no such tensor')", [])
    with pytest.raises(GaveUp) as gave_up:
        await one.run()
    words = str(gave_up.value)
    assert words.startswith("engine ended with status 1 before it was ready")
    assert "loading" in words
    assert "no such tensor" in words
    WRITER.flush(PATIENCE_S, PATIENCE_S)
    assert "no such tensor\n" in capfd.readouterr().err


async def test_what_dies_after_it_was_ready_is_started_again_under_another_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(supervisor, "BACKOFF_S", (0.01, 0.02))
    monkeypatch.setattr(supervisor, "STEADY_S", 3600.0)  # however long it takes one to start and die
    names, gate, said = tmp_path / "names", tmp_path / "gate", []
    script = f"""
import os, time
with open({str(names)!r}, "a") as names:
    names.write(os.environ["MILLRACE_NAME"] + " ")
while not os.path.exists({str(gate)!r}):
    time.sleep(0.01)
os.kill(os.getpid(), 9)
"""
    one = child(script, said)
    running = asyncio.create_task(one.run())
    await until(names, " ")
    one.mark_ready()
    gate.touch()
    with pytest.raises(GaveUp) as gave_up:
        await running
    assert "engine was ended by SIGKILL, for the 6th time in a row" in str(gave_up.value)
    started = names.read_text().split()
    assert len(set(started)) == 1 + supervisor.RESTARTS
    assert said[0] == "engine was ended by SIGKILL; starting it again in 0.01 s"
    assert len(said) == supervisor.RESTARTS


async def test_stop_lets_it_end_in_order(tmp_path: Path) -> None:
    up = tmp_path / "up"
    script = f"""
import signal, sys, time
signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
open({str(up)!r}, "w").write("up")
while True:
    time.sleep(0.01)
"""
    one = child(script, [])
    running = asyncio.create_task(one.run())
    await until(up, "up")
    one.mark_ready()
    assert await one.stop(time.monotonic() + PATIENCE_S, 0.0, asyncio.Event())
    await running


async def test_stop_ends_the_drain_of_what_takes_its_time(tmp_path: Path) -> None:
    up = tmp_path / "up"
    script = f"""
import signal, sys, time
signal.signal(signal.SIGTERM, lambda *_: None)
signal.signal(signal.SIGUSR1, lambda *_: sys.exit(0))
open({str(up)!r}, "w").write("up")
while True:
    time.sleep(0.01)
"""
    one = child(script, [])
    running = asyncio.create_task(one.run())
    await until(up, "up")
    one.mark_ready()
    assert await one.stop(time.monotonic() + 0.01, PATIENCE_S, asyncio.Event())
    await running


async def test_a_drain_in_vain_is_cut_short_whenever_that_is_known(tmp_path: Path) -> None:
    up, draining = tmp_path / "up", tmp_path / "draining"
    script = f"""
import signal, sys, time
signal.signal(signal.SIGTERM, lambda *_: open({str(draining)!r}, "w").write("draining"))
signal.signal(signal.SIGUSR1, lambda *_: sys.exit(0))
open({str(up)!r}, "w").write("up")
while True:
    time.sleep(0.01)
"""
    one, in_vain = child(script, []), asyncio.Event()
    running = asyncio.create_task(one.run())
    await until(up, "up")
    one.mark_ready()
    stopping = asyncio.create_task(one.stop(time.monotonic() + 3600, PATIENCE_S, in_vain))
    await until(draining, "draining")
    assert not stopping.done()
    in_vain.set()
    async with asyncio.timeout(PATIENCE_S):
        assert await stopping
    await running


async def test_stop_kills_what_does_not_end_and_says_so(tmp_path: Path) -> None:
    up, said = tmp_path / "up", []
    script = f"""
import signal, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
signal.signal(signal.SIGUSR1, signal.SIG_IGN)
open({str(up)!r}, "w").write("up")
while True:
    time.sleep(0.01)
"""
    one = child(script, said)
    running = asyncio.create_task(one.run())
    await until(up, "up")
    assert not await one.stop(0.0, 0.05, asyncio.Event())
    await running
    [line] = said
    assert re.fullmatch(r"engine did not end within \d+ s and was killed", line)


async def test_stop_before_it_is_ready_is_in_order_whatever_it_had_set_up(tmp_path: Path) -> None:
    up = tmp_path / "up"
    one = child(f"import signal; open({str(up)!r}, 'w').write('up'); signal.pause()", [])
    running = asyncio.create_task(one.run())
    await until(up, "up")
    assert await one.stop(time.monotonic() + PATIENCE_S, 0.0, asyncio.Event())
    await running


async def test_a_ready_process_that_fails_while_it_stops_did_not_end_in_order(tmp_path: Path) -> None:
    up = tmp_path / "up"
    script = f"""
import signal, sys, time
signal.signal(signal.SIGTERM, lambda *_: sys.exit(3))
open({str(up)!r}, "w").write("up")
while True:
    time.sleep(0.01)
"""
    one = child(script, [])
    running = asyncio.create_task(one.run())
    await until(up, "up")
    one.mark_ready()
    assert not await one.stop(time.monotonic() + PATIENCE_S, 0.0, asyncio.Event())
    await running


async def test_stop_during_the_pause_before_a_restart_starts_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(supervisor, "BACKOFF_S", (3600.0, 3600.0))
    names, gate, said = tmp_path / "names", tmp_path / "gate", asyncio.Event()
    script = f"""
import os, time
with open({str(names)!r}, "a") as names:
    names.write("x")
while not os.path.exists({str(gate)!r}):
    time.sleep(0.01)
raise SystemExit(1)
"""
    one = Child("engine", [sys.executable, "-c", script], {}, lambda _: said.set(), lambda pid: None)
    running = asyncio.create_task(one.run())
    await until(names, "x")
    one.mark_ready()
    gate.touch()
    async with asyncio.timeout(PATIENCE_S):
        await said.wait()
    assert not await one.stop(time.monotonic() + PATIENCE_S, 0.0, asyncio.Event())
    await running
    assert names.read_text() == "x"


async def test_lines_of_any_length_and_without_an_end_are_passed_on(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(GaveUp):
        await child("print('a' * 200_000); print('b', end='')", []).run()
    WRITER.flush(PATIENCE_S, PATIENCE_S)
    assert capfd.readouterr().err == "a" * 200_000 + "\nb\n"


async def test_whoever_asked_is_told_which_process_has_ended(capfd: pytest.CaptureFixture[str]) -> None:
    ended: list[int] = []
    with pytest.raises(GaveUp):
        await Child("engine", [sys.executable, "-c", "import os; print(os.getpid())"], {}, print, ended.append).run()
    WRITER.flush(PATIENCE_S, PATIENCE_S)
    assert ended == [int(capfd.readouterr().err)]


@pytest.mark.parametrize("gone", [True, False])
async def test_lines_that_nobody_reads_hold_nothing_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, gone: bool
) -> None:
    """A terminal that was closed, and one in which somebody has pressed Ctrl-S."""
    reader, writer = os.pipe()
    if gone:
        os.close(reader)
    up = tmp_path / "up"
    script = f"""
import signal, sys, time
signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
print("said" * 1_000_000, flush=True)
open({str(up)!r}, "w").write("up")
while True:
    time.sleep(0.01)
"""
    with os.fdopen(writer, "w") as nobody:
        monkeypatch.setattr(sys, "stderr", nobody)
        one = child(script, [])
        running = asyncio.create_task(one.run())
        await until(up, "up")
        one.mark_ready()
        assert await one.stop(time.monotonic() + PATIENCE_S, 0.0, asyncio.Event())
        await running
        if not gone:
            os.close(reader)
        WRITER.flush(PATIENCE_S, PATIENCE_S)
