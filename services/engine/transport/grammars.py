"""Grammars of requests, compiled once for all requests that have the same."""

import asyncio
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

from llguidance import LLMatcher

from services.engine.schedule.grammar_state import GrammarState
from shared.errors import RequestError, invalid
from shared.grammar.compiler import GrammarError
from shared.messages import Grammar

KEPT = 64  # compiled grammars; one takes a megabyte or a few

Compile = Callable[[str], LLMatcher]


class Grammars:
    """Compiled grammars, the ones used last. A grammar is compiled in a thread, without the interpreter lock."""

    def __init__(self, compile_text: Compile, threads: int = 2) -> None:
        self._compile_text = compile_text
        self._threads = ThreadPoolExecutor(threads, "grammar")
        self._compiled: OrderedDict[str, asyncio.Future[LLMatcher]] = OrderedDict()

    async def begin(self, grammar: Grammar) -> GrammarState:
        """Return the state of an answer without tokens.

        Raises:
            RequestError: 400, the grammar cannot be compiled, which the gateway has mostly found already.
        """
        try:
            # Shielded: others may wait for it when the first to ask is cancelled.
            matcher = await asyncio.shield(self._find(grammar.text))
        except GrammarError as error:
            raise _refusal(grammar, error) from None
        return GrammarState(matcher.deep_copy())

    def _find(self, text: str) -> asyncio.Future[LLMatcher]:
        found = self._compiled.get(text)
        if found is None:
            found = asyncio.get_running_loop().run_in_executor(self._threads, self._compile_text, text)
            self._compiled[text] = found
            if len(self._compiled) > KEPT:
                self._compiled.popitem(last=False)
        self._compiled.move_to_end(text)
        return found


def _refusal(grammar: Grammar, error: GrammarError) -> RequestError:
    return invalid(f"`{grammar.param}`: {error}", grammar.param)
