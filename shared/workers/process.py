"""Parent's end of a worker process: starts it, gives it one task at a time, and notices how it ends."""

import asyncio
import contextlib
import os
import signal
import socket
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from shared.config import PREFIX
from shared.tether import tethered
from shared.workers.link import LENGTH

START_S = 60.0  # the longest start; libraries may have to be read from a slow disk
# A task that has computed for its time is ended by the kernel, however long that takes on a busy machine. One that has
# computed nothing for this long, since it waits for a lock that nobody gives back say, is ended by us. Only Linux tells
# one from the other.
HANG_S = 60.0 if sys.platform == "linux" else 600.0


class TooSlowError(Exception):
    """Error of a task that took its time without an end."""


class DiedError(Exception):
    """Error of a task during which the process died. `by` names the signal or the exit status."""

    def __init__(self, by: str) -> None:
        super().__init__(f"the process died of {by}")
        self.by = by

    @property
    def killed(self) -> bool:
        """True if somebody killed it who knows nothing of its task, as where memory is short."""
        return self.by == signal.SIGKILL.name


class WorkerProcess:
    """Worker process that is ready. After any error of `call` it is of no use; `kill` ends it."""

    def __init__(
        self,
        process: asyncio.subprocess.Process,
        link: socket.socket,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
    ) -> None:
        self._process = process
        self._link = link
        self._reader = reader
        self._writer = writer

    @classmethod
    async def start(cls, module: str, setup: bytes, environ: Mapping[str, str]) -> tuple["WorkerProcess", bytes]:
        """Start `python -m module FD` and return it with its answer to `setup`, its first message.

        Raises:
            DiedError, TooSlowError: it does not answer.
            OSError: it cannot be started.
        """
        with contextlib.ExitStack() as unless_started:
            ours, theirs = map(unless_started.enter_context, socket.socketpair())
            link = unless_started.enter_context(ours.dup())  # asyncio's streams send no descriptors
            reader, writer = await asyncio.open_unix_connection(sock=ours)
            unless_started.callback(writer.close)
            command = tethered([sys.executable, "-P", "-m", module, str(theirs.fileno())])
            process = await asyncio.create_subprocess_exec(
                *command, env=environ, pass_fds=[theirs.fileno()], stdin=asyncio.subprocess.DEVNULL
            )
            unless_started.pop_all()
        theirs.close()
        started = cls(process, link, reader, writer)
        try:
            async with asyncio.timeout(START_S):
                return started, await started._exchange(setup, [])
        except TimeoutError:
            await started.kill()
            raise TooSlowError(f"no answer within {START_S:g} s") from None
        except BaseException:
            await started.kill()
            raise

    @property
    def ended(self) -> bool:
        """True if it has died, as far as is known."""
        return self._process.returncode is not None

    async def call(self, task: bytes, fds: Sequence[int]) -> bytes:
        """Return the answer to a task.

        Raises:
            TooSlowError: it takes more than the CPU time that the process has set itself, or hangs.
            DiedError: the process dies of something else.
        """
        exchange = asyncio.create_task(self._exchange(task, fds))
        try:
            before = -1.0
            while not (await asyncio.wait([exchange], timeout=HANG_S))[0]:
                before, earlier = computed_s(self._process.pid), before
                if before == earlier:
                    raise TooSlowError(f"it has computed nothing for {HANG_S:g} s")
            return exchange.result()
        finally:
            exchange.cancel()

    async def kill(self) -> None:
        """End the process, whatever it does, and wait for its end."""
        with contextlib.suppress(ProcessLookupError):
            self._process.kill()
        self._writer.close()
        self._link.close()
        await self._process.wait()

    async def _exchange(self, message: bytes, fds: Sequence[int]) -> bytes:
        try:
            socket.send_fds(self._link, [LENGTH.pack(len(message))], fds)  # the buffer is empty: it has answered
            self._writer.write(message)
            await self._writer.drain()
            (size,) = LENGTH.unpack(await self._reader.readexactly(LENGTH.size))
            return await self._reader.readexactly(size)
        except (EOFError, ConnectionError):
            raise await self._how_it_ended() from None

    async def _how_it_ended(self) -> TooSlowError | DiedError:
        status = await self._process.wait()
        if status == -signal.SIGXCPU:
            return TooSlowError("it has computed for its time")
        return DiedError(signal.Signals(-status).name if status < 0 else f"exit status {status}")


def computed_s(pid: int) -> float:
    """Return the seconds that a process of this machine has computed for; 0 if it has ended, or where nobody tells."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0.0
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def worker_environ(environ: Mapping[str, str]) -> dict[str, str]:
    """Return the environment of workers: our path, and none of our settings, which have keys and passwords.

    They search our path and not the working directory, where they might find other packages of the same names.
    """
    others = {name: value for name, value in environ.items() if not name.startswith(PREFIX)}
    return {**others, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
