"""Pool of worker processes that do the same, each started when it is needed and kept."""

import asyncio
from collections.abc import Mapping, Sequence

from shared.workers.process import DiedError, TooSlowError, WorkerProcess


class WorkerPool:
    """Processes of `python -m module`; `size` is the most. All get the same first message."""

    def __init__(self, module: str, setup: bytes, environ: Mapping[str, str], size: int) -> None:
        self._module = module
        self._setup = setup
        self._environ = environ
        self._room = asyncio.Semaphore(size)
        self._idle: list[WorkerProcess] = []

    async def start_one(self) -> bytes:
        """Have a process ready before the first task; return its answer to the first message.

        Raises:
            RuntimeError: it does not become ready.
            OSError: it cannot be started.
        """
        async with self._room:
            process, answer = await self._start()
            self._idle.append(process)
            return answer

    async def call(self, task: bytes, cpu_s: float, fds: Sequence[int] = ()) -> bytes:
        """Do a task in one of the processes, which ends if the task fails or is cancelled.

        Raises:
            TooSlowError, DiedError: see `WorkerProcess.call`.
            RuntimeError, OSError: no process becomes ready, or can be started.
        """
        async with self._room:
            process = await self._take()
            try:
                reply = await process.call(task, fds, cpu_s)
            except BaseException:
                await process.kill()
                raise
            self._idle.append(process)
            return reply

    async def close(self) -> None:
        """End all processes. Nobody waits for a task any more."""
        while self._idle:
            await self._idle.pop().kill()

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
            return await WorkerProcess.start(self._module, self._setup, self._environ)
        except (DiedError, TooSlowError) as error:
            raise RuntimeError(f"a process of {self._module} does not become ready: {error}") from error
