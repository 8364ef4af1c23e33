"""Supervision of one service: starts its process, passes its log on, and starts it again when it dies."""

import asyncio
import secrets
import signal
import sys
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence

from cli.output import WRITER
from shared.errors import MillraceError

STEADY_S = 30.0  # a process that lived this long did not die of the same cause as the one before
RESTARTS = 5  # in a row, none of which became steady
BACKOFF_S = (0.5, 10.0)  # doubled from the first, up to the second
LAST_LINES = 20


class GaveUp(MillraceError):
    """Error of a service that cannot be kept running: what happened, and the last lines of its log."""

    def __init__(self, what: str, last_lines: Sequence[str] = ()) -> None:
        super().__init__("\n  ".join([f"{what}. Its last lines:", *last_lines]) if last_lines else what)
        self.what = what


class Child:
    """Supervised service. `name` is the replica that runs now: each start is a new replica with a lease of its own."""

    def __init__(
        self,
        service: str,
        command: Sequence[str],
        environ: Mapping[str, str],
        report: Callable[[str], None],
        on_end: Callable[[int], None],
        descriptors: Sequence[int] = (),
    ) -> None:
        """Make one that does not run yet.

        Args:
            report: called with lines for a person.
            on_end: called with the id of each ended process.
            descriptors: of ours, that each process has too, by the same numbers.
        """
        self.service = service
        self.name = ""
        self.ending = "was not started"  # or how the process that ran last has ended
        self._command = command
        self._environ = environ
        self._report = report
        self._on_end = on_end
        self._descriptors = tuple(descriptors)
        self._ready_name = ""
        self._started = time.monotonic()
        self._process: asyncio.subprocess.Process | None = None
        self._stopping = asyncio.Event()
        self._ended = asyncio.Event()
        self._last_lines: deque[bytes] = deque(maxlen=LAST_LINES)

    @property
    def ready(self) -> bool:
        """True if the process that runs now was seen ready."""
        return self._ready_name == self.name != ""

    @property
    def age_s(self) -> float:
        """Return the seconds since its process was started."""
        return time.monotonic() - self._started

    def mark_ready(self) -> None:
        """Note that its lease says it takes work."""
        self._ready_name = self.name

    async def run(self) -> None:
        """Keep the service running until `stop` or `kill`.

        Raises:
            GaveUp: it died before any of its processes was ready (what stopped the first would stop the second), or
                too often in a row.
        """
        try:
            await self._keep_running()
        finally:
            self._ended.set()

    async def stop(self, drain_until: float, close_s: float, in_vain: asyncio.Event) -> bool:
        """Terminate the process; return True if it ended in order.

        It may finish what it runs until `drain_until`, on the clock `time.monotonic`, or until `in_vain` is set, since
        nothing can be finished any more; and is killed `close_s` later.
        """
        self._stopping.set()
        asked = time.monotonic()
        self._send(signal.SIGTERM)
        if not await self._ended_within(drain_until - asked, in_vain):
            self._send(signal.SIGUSR1)  # which ends the drain
            if not await self._ended_within(close_s):
                self._report(f"{self.service} did not end within {time.monotonic() - asked:.0f} s and was killed")
                self.kill()
                await self._ended.wait()
        # A process that is not ready may not have installed its handlers yet.
        orderly = (0,) if self.ready else (0, -signal.SIGTERM)
        return self._process is not None and self._process.returncode in orderly

    def kill(self) -> None:
        """Kill the process."""
        self._stopping.set()
        self._send(signal.SIGKILL)

    def _send(self, number: signal.Signals) -> None:
        if self._process and self._process.returncode is None:
            self._process.send_signal(number)

    async def _ended_within(self, seconds: float, *cut_short_by: asyncio.Event) -> bool:
        waiting = [asyncio.create_task(event.wait()) for event in (self._ended, *cut_short_by)]
        await asyncio.wait(waiting, timeout=max(0.0, seconds), return_when=asyncio.FIRST_COMPLETED)
        for each in waiting:
            each.cancel()
        return self._ended.is_set()

    async def _keep_running(self) -> None:
        quick = 0
        while not self._stopping.is_set():
            self._started = time.monotonic()
            ending = await self._run_once()
            if self._stopping.is_set():
                return
            quick = 1 if self.age_s >= STEADY_S else quick + 1
            if not self._ready_name:
                raise self._gave_up(f"{self.service} {ending} before it was ready")
            if quick > RESTARTS:
                raise self._gave_up(f"{self.service} {ending}, for the {quick}th time in a row")
            delay = min(BACKOFF_S[0] * 2 ** (quick - 1), BACKOFF_S[1])
            self._report(f"{self.service} {ending}; starting it again in {delay:g} s")
            await self._pause(delay)

    async def _run_once(self) -> str:
        """Run one process from start to end, and return how it ended, in words."""
        self.name = f"{self.service}-{secrets.token_hex(4)}"
        self._process = await asyncio.create_subprocess_exec(
            *self._command,
            env={**self._environ, "MILLRACE_NAME": self.name},
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
            pass_fds=self._descriptors,
            start_new_session=True,  # so that Ctrl-C in a terminal reaches us alone, and we stop services in order
        )
        if self._stopping.is_set():
            self._process.terminate()
        assert self._process.stdout is not None
        await self._pass_on(self._process.stdout)
        status = await self._process.wait()
        self._on_end(self._process.pid)
        self.ending = f"was ended by {signal.Signals(-status).name}" if status < 0 else f"ended with status {status}"
        return self.ending

    async def _pass_on(self, output: asyncio.StreamReader) -> None:
        """Copy whole lines to our standard error, so that those of several services never mix."""
        rest = b""
        while chunk := await output.read(1 << 16):
            *lines, rest = (rest + chunk).split(b"\n")
            self._pass_on_lines(lines)
        self._pass_on_lines([rest] if rest else [])

    def _pass_on_lines(self, lines: list[bytes]) -> None:
        self._last_lines.extend(lines)
        WRITER.put(sys.stderr, "".join(line.decode(errors="replace") + "\n" for line in lines))

    async def _pause(self, seconds: float) -> None:
        try:
            async with asyncio.timeout(seconds):
                await self._stopping.wait()
        except TimeoutError:
            return

    def _gave_up(self, what: str) -> GaveUp:
        lines = [line.decode(errors="replace") for line in self._last_lines]
        return GaveUp(what if lines else f"{what}, and logged nothing", lines)
