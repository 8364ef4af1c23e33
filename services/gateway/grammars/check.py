"""Check of grammars before anything is sent: what the engine could not compile is the client's error, said at once."""

import asyncio
import json
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from pathlib import Path

from shared.errors import RequestError, internal, invalid
from shared.log import logger
from shared.messages import Grammar
from shared.workers.pool import NoWorkerError, WorkerPool
from shared.workers.process import DiedError, TooSlowError

MODULE = "services.gateway.grammars.worker"
PROCESSES = 2  # one may be busy with a hostile grammar
KEPT = 1024  # verdicts

_log = logger(__name__)

Verdict = str | None  # why a grammar is refused


class GrammarCheck:
    """Verdicts on grammars, by processes that are started when the first grammar comes."""

    def __init__(self, model: Path, environ: Mapping[str, str]) -> None:
        """`environ` is that of the processes."""
        self._pool = WorkerPool(MODULE, str(model).encode(), environ, PROCESSES)
        self._verdicts: OrderedDict[str, asyncio.Task[Verdict]] = OrderedDict()
        self._tasks: set[asyncio.Task[Verdict]] = set()

    async def check(self, grammar: Grammar, parts: Sequence[Grammar] = ()) -> None:
        """Return if the grammar can be compiled and followed.

        Raises:
            RequestError: 400, it cannot; of its `parts`, the first that cannot either is named; 500, its check crashes
                or hangs; 503, there is no process to check it.
        """
        verdict = await self._verdict(grammar)
        if verdict is None:
            return
        for part in parts:
            if (of_part := await self._verdict(part)) is not None:
                raise _refusal(part, of_part)
        raise _refusal(grammar, verdict)

    async def _verdict(self, grammar: Grammar) -> Verdict:
        try:
            # Shielded: others may wait for it when the first to ask goes away.
            return await asyncio.shield(self._find(grammar.text))
        except NoWorkerError as error:
            _log.error("no process tries grammars", extra={"error": str(error)})
            raise internal("The server has no process that could check the grammar now.", "overloaded", 503) from error
        except (DiedError, TooSlowError) as error:
            _log.error("the process that tries grammars ended", extra={"error": str(error)})
            raise internal("The grammar could not be checked.", "grammar_error") from error

    async def close(self) -> None:
        """End the processes."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._pool.close()

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
        verdict: Verdict = json.loads(await self._pool.call(json.dumps(text).encode()))
        return verdict


def _refusal(grammar: Grammar, verdict: str) -> RequestError:
    return invalid(f"`{grammar.param}`: {verdict}", grammar.param)
