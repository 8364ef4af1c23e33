"""Trial of one grammar: it is compiled, and followed for some tokens, as the engine will."""

from collections.abc import Collection

import numpy as np
from llguidance import LLMatcher

from shared.grammar.compiler import GrammarCompiler, GrammarError

STEPS = 256  # tokens. Most of what is too complex shows within a few; what matches in many ways takes longer each time


def try_grammar(compiler: GrammarCompiler, text: str) -> None:
    """Compile a grammar and take some tokens that it allows.

    Raises:
        GrammarError: it cannot be compiled, nothing matches it, or its masks are too complex.
    """
    matcher = compiler.compile(text)
    for step in range(STEPS):
        if matcher.is_stopped() or not _take_token(matcher, step, compiler.end_ids):
            break
    if matcher.is_error():
        raise GrammarError(matcher.get_error())


def _take_token(matcher: LLMatcher, step: int, end_ids: Collection[int]) -> bool:
    """Append one of the tokens that are allowed, another of them at each step, and an end only if nothing else is."""
    bits = np.unpackbits(np.frombuffer(matcher.compute_bitmask(), np.uint8), bitorder="little")
    allowed = np.flatnonzero(bits)
    if matcher.is_error():
        return False
    going_on = allowed[~np.isin(allowed, list(end_ids))]
    some = going_on if len(going_on) else allowed
    return matcher.consume_token(int(some[step * 7919 % len(some)]))
