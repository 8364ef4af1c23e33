"""Trial of one grammar: it is compiled, and followed for some tokens, as the engine will."""

from collections.abc import Collection

import numpy as np
from llguidance import LLMatcher
from numpy.typing import NDArray

from shared.grammar.compiler import GrammarCompiler, GrammarError

STEPS = 256  # tokens. Most of what is too complex shows within a few; what matches in many ways takes longer each time
_NOTHING_MATCHES = "NoExtensionBias"  # the library's word for it


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
        error = matcher.get_error()
        raise GrammarError("No text matches the grammar." if error.startswith(_NOTHING_MATCHES) else error)


def _take_token(matcher: LLMatcher, step: int, end_ids: Collection[int]) -> bool:
    """Append one of the tokens that are allowed, another of them at each step, and an end only if nothing else is."""
    allowed = np.frombuffer(matcher.compute_bitmask(), np.uint8)  # bit b of byte i is token 8 i + b
    if matcher.is_error():
        return False
    going_on = allowed.copy()
    for end in end_ids:
        going_on[end // 8] &= ~np.uint8(1 << end % 8)
    some = going_on if going_on.any() else allowed
    byte = _one_of(np.flatnonzero(some), step)
    return matcher.consume_token(8 * byte + _one_of(np.flatnonzero(some[byte] >> np.arange(8) & 1), step))


def _one_of(places: NDArray[np.intp], step: int) -> int:
    return int(places[step * 7919 % len(places)])
