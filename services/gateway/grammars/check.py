"""Check of grammars before anything is sent: what the engine could not compile is the client's error, said at once."""

import asyncio
import json
import sys
from collections import OrderedDict
from pathlib import Path

from shared.errors import RequestError, internal, invalid
from shared.log import logger
from shared.messages import Grammar

WORKERS = 2  # one may be busy with a hostile grammar
KEPT = 1024  # verdicts

_log = logger(__name__)

Verdict = str | None  # why a grammar is refused


class GrammarCheck:
    """Verdicts on grammars, by processes that are started when the first grammar comes."""

    def __init__(self, model: Path) -> None:
        self._idle: asyncio.LifoQueue[_Worker] = asyncio.LifoQueue()
        for _ in range(WORKERS):
            self._idle.put_nowait(_Worker(model))
        self._verdicts: OrderedDict[str, asyncio.Task[Verdict]] = OrderedDict()
        self._tasks: set[asyncio.Task[Verdict]] = set()

    async def check(self, grammar: Grammar) -> None:
        """Return if the grammar can be compiled and followed.

        Raises:
            RequestError: 400, it cannot; 500, no process could tell.
        """
        try:
            # Shielded: others may wait for it when the first to ask goes away.
            verdict = await asyncio.shield(self._find(grammar.text))
        except (OSError, EOFError) as error:
            _log.error("the process that tries grammars ended", extra={"error": str(error)})
            raise internal("The grammar could not be checked.", "grammar_error") from error
        if verdict is not None:
            raise _refusal(grammar, verdict)

    async def close(self) -> None:
        """End the processes."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        while not self._idle.empty():
            await self._idle.get_nowait().stop()

    def _find(self, text: str) -> asyncio.Task[Verdict]:
        found = self._verdicts.get(text)
        if found is None or (found.done() and (found.cancelled() or found.exception() is not None)):
            found = self._verdicts[text] = asyncio.create_task(self._ask(text), name="grammar check")
            self._tasks.add(found)
            found.add_done_callback(self._tasks.discard)
            if len(self._verdicts) > KEPT:
                self._verdicts.popitem(last=False)
        self._verdicts.move_to_end(text)
        return found

    async def _ask(self, text: str) -> Verdict:
        worker = await self._idle.get()
        try:
            return await worker.ask(text)
        finally:
            self._idle.put_nowait(worker)


class _Worker:
    """One such process (`services/gateway/grammars/worker.py`), started again where it has ended."""

    def __init__(self, model: Path) -> None:
        self._model = model
        self._process: asyncio.subprocess.Process | None = None

    async def ask(self, text: str) -> Verdict:
        """Return the verdict on a grammar.

        Raises:
            OSError: the process could not be started, or has ended meanwhile.
            EOFError: the same.
        """
        answered = False
        try:
            process = self._process or await self._start()
            assert process.stdin is not None
            process.stdin.write(json.dumps(text).encode() + b"\n")
            await process.stdin.drain()
            verdict: Verdict = await _read(process)
            answered = True
            return verdict
        finally:
            if not answered:  # what it says next would be taken for the answer to something else
                await self.stop()

    async def stop(self) -> None:
        process, self._process = self._process, None
        if process is not None:
            if process.returncode is None:
                process.kill()
            await process.wait()

    async def _start(self) -> asyncio.subprocess.Process:
        command = (sys.executable, "-m", "services.gateway.grammars.worker", str(self._model))
        pipe = asyncio.subprocess.PIPE
        self._process = await asyncio.create_subprocess_exec(*command, stdin=pipe, stdout=pipe)
        await _read(self._process)
        return self._process


async def _read(process: asyncio.subprocess.Process) -> Verdict:
    assert process.stdout is not None
    line = await process.stdout.readline()
    if not line:
        raise EOFError(f"status {await process.wait()}")
    value: Verdict = json.loads(line)
    return value


def _refusal(grammar: Grammar, verdict: str) -> RequestError:
    return invalid(f"`{grammar.param}`: {verdict}", grammar.param)
