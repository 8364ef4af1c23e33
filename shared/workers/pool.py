"""Pool of worker processes that do the same, each started when it is needed and kept."""

import asyncio
from collections.abc import Mapping, Sequence

from shared.log import logger
from shared.workers.process import DiedError, TooSlowError, WorkerProcess

# Time for which a task that nobody waits for any more may go on. To end its process and start another takes longer
# than most tasks, and clients that ask and leave would have all others wait for that.
SPARE_S = 1.0

_log = logger(__name__)


class NoWorkerError(Exception):
    """Error of a task that there is no process for: none can be started, none becomes ready, or they are killed."""


class WorkerPool:
    """Processes of `python -m module`; `size` is the most. All get the same first message.

    A process may be killed for what has nothing to do with its task, as where memory is short. So a task whose process
    dies is done once more, and so is a start: tasks must be such that twice is as good as once.
    """

    def __init__(self, module: str, setup: bytes, environ: Mapping[str, str], size: int) -> None:
        self._module = module
        self._setup = setup
        self._environ = environ
        self._room = asyncio.Semaphore(size)
        self._idle: list[WorkerProcess] = []

    async def start_one(self) -> bytes:
        """Have a process ready before the first task; return its answer to the first message.

        Raises:
            NoWorkerError: it cannot be started, or does not become ready.
        """
        async with self._room:
            process, answer = await self._start()
            self._idle.append(process)
            return answer

    async def call(self, task: bytes, fds: Sequence[int] = (), *, twice: bool = True) -> bytes:
        """Do a task in one of the processes, which ends if the task fails or is cancelled while it takes long.

        Raises:
            TooSlowError: it takes more than its time.
            DiedError: it made two processes crash; or one, if it is not to be done `twice`.
            NoWorkerError: there is no process for it.
        """
        async with self._room:
            if not twice:
                return await self._call_once(task, fds)
            try:
                return await self._call_twice(task, fds)
            except DiedError as error:
                if not error.killed:
                    raise
                raise NoWorkerError(f"processes of {self._module} are killed") from error

    async def close(self) -> None:
        """End all processes. Nobody waits for a task any more."""
        while self._idle:
            await self._idle.pop().kill()

    async def _call_twice(self, task: bytes, fds: Sequence[int]) -> bytes:
        try:
            return await self._call_once(task, fds)
        except DiedError as error:
            self._say_died("a worker process died; its task is done once more", error)
            return await self._call_once(task, fds)

    async def _call_once(self, task: bytes, fds: Sequence[int]) -> bytes:
        process = await self._take()
        call = asyncio.create_task(process.call(task, fds))
        try:
            return await asyncio.shield(call)
        except asyncio.CancelledError:
            await asyncio.wait([call], timeout=SPARE_S)
            raise
        finally:
            if _is_answered(call):
                self._idle.append(process)
            else:
                call.cancel()
                await process.kill()

    async def _take(self) -> WorkerProcess:
        """Return an idle process, or a new one. Those that died in the meantime are dropped."""
        while self._idle:
            process = self._idle.pop()
            if not process.ended:
                return process
            await process.kill()
        return (await self._start())[0]

    async def _start(self) -> tuple[WorkerProcess, bytes]:
        try:
            return await self._start_twice()
        except (DiedError, TooSlowError, OSError, RuntimeError) as error:  # RuntimeError: no thread can be started
            raise NoWorkerError(f"no process of {self._module} becomes ready: {error}") from error

    async def _start_twice(self) -> tuple[WorkerProcess, bytes]:
        try:
            return await WorkerProcess.start(self._module, self._setup, self._environ)
        except DiedError as error:
            self._say_died("a worker process died before it was ready; another is started", error)
            return await WorkerProcess.start(self._module, self._setup, self._environ)

    def _say_died(self, what: str, error: DiedError) -> None:
        _log.warning(what, extra={"worker": self._module, "by": error.by})


def _is_answered(call: asyncio.Task[bytes]) -> bool:
    return call.done() and not call.cancelled() and call.exception() is None
