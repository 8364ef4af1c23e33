"""Trial of one grammar: it is compiled, and followed for some tokens, as the engine will."""

import numpy as np
from llguidance import LLMatcher

from shared.grammar.compiler import GrammarCompiler, GrammarError

STEPS = 32  # tokens; what is too complex mostly shows within a few


def try_grammar(compiler: GrammarCompiler, text: str) -> None:
    """Compile a grammar and take some tokens that it allows.

    Raises:
        GrammarError: it cannot be compiled, nothing matches it, or its masks are too complex.
    """
    matcher = compiler.compile(text)
    for step in range(STEPS):
        if matcher.is_stopped() or not _take_token(matcher, step):
            break
    if matcher.is_error():
        raise GrammarError(matcher.get_error())


def _take_token(matcher: LLMatcher, step: int) -> bool:
    """Append one of the tokens that are allowed, another of them at each step."""
    bits = np.unpackbits(np.frombuffer(matcher.compute_bitmask(), np.uint8), bitorder="little")
    allowed = np.flatnonzero(bits)
    return not matcher.is_error() and matcher.consume_token(int(allowed[step * 7919 % len(allowed)]))
