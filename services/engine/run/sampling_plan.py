"""Sampling of one step as flat arrays, built on the host and moved to the device once each.

Requests ask for different things, so every array lists the rows that want one thing, and is empty where no row does.
"""

from collections.abc import Sequence as Ordered
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from services.engine.run.grammar_masks import GrammarMasks, Masks, forbid
from services.engine.run.philox import uniform
from services.engine.schedule.grammar_state import GrammarState
from services.engine.schedule.plan import Chunk
from services.engine.schedule.seen_tokens import Ids
from services.engine.schedule.sequence import Sequence

GREEDY_BELOW = 1e-5  # temperatures under this take the most likely token
SMALLEST_TOP_P = 1e-5  # 0 would leave no token at all
MOST_LOGPROBS = 20  # of alternatives to one token

Floats = NDArray[np.float32]
Doubles = NDArray[np.float64]
Flags = NDArray[np.bool_]
Arrays = dict[str, Any]  # fields of a SamplingPlan


_NO_IDS: Ids = np.empty(0, np.int64)
_NO_FLOATS: Floats = np.empty(0, np.float32)
_NO_DOUBLES: Doubles = np.empty(0, np.float64)
_NO_FLAGS: Flags = np.empty(0, np.bool_)
_NO_MASKS: Masks = np.empty((0, 0), np.uint8)


class SamplingPlan(msgspec.Struct, frozen=True, kw_only=True):
    """Arrays for R rows, one for each sequence that samples a token."""

    # D rows that draw at random; the others take their most likely token.
    drawing: Ids = _NO_IDS
    temperature: Floats = _NO_FLOATS
    top_k: Ids = _NO_IDS  # 0: off
    top_p: Doubles = _NO_DOUBLES
    min_p: Floats = _NO_FLOATS
    numbers: Doubles = _NO_DOUBLES  # in [0, 1)
    # Single logits by row and token, and the bias added to them.
    biased_rows: Ids = _NO_IDS
    biased_tokens: Ids = _NO_IDS
    bias: Floats = _NO_FLOATS
    # End tokens before min_tokens.
    early_rows: Ids = _NO_IDS
    early_tokens: Ids = _NO_IDS
    # Tokens seen: their logits divide by `repetition`, or multiply if negative, and lose `subtracted`.
    penalised_rows: Ids = _NO_IDS
    penalised_tokens: Ids = _NO_IDS
    repetition: Floats = _NO_FLOATS
    subtracted: Floats = _NO_FLOATS
    # Tokens that would complete a bad word.
    bad_rows: Ids = _NO_IDS
    bad_tokens: Ids = _NO_IDS
    # Rows with an open thinking part, the token that closes it, one that becomes it (or -1), and whether the next must.
    thinking: Ids = _NO_IDS
    close_ids: Ids = _NO_IDS
    call_ids: Ids = _NO_IDS
    must_close: Flags = _NO_FLAGS
    # Rows that allow only some tokens, as a grammar does, and the bits of these.
    masked_rows: Ids = _NO_IDS
    masks: Masks = _NO_MASKS
    # Rows that report log-probabilities, and of how many of the most likely tokens besides the sampled one.
    wanted: Ids = _NO_IDS
    logprobs: Ids = _NO_IDS

    def arrays(self) -> dict[str, NDArray[Any]]:
        """Return the arrays that are not empty, by name."""
        named = ((name, getattr(self, name)) for name in self.__struct_fields__)
        return {name: array for name, array in named if len(array)}


def plan_sampling(chunks: Ordered[Chunk], grammar_masks: GrammarMasks) -> SamplingPlan:
    """Return the plan of the step in which these chunks sample, once all tokens before it are known."""
    parts = (_draws, _biased, _early, _penalised, _bad, _thinking, _reports)
    arrays = {name: array for part in parts for name, array in part(chunks).items()}
    return SamplingPlan(**arrays, **_masked(chunks, grammar_masks))


def heaviest(rows: int, vocab_size: int) -> SamplingPlan:
    """Return the plan of a step that asks for everything whose memory grows with the vocabulary."""
    return SamplingPlan(
        drawing=np.arange(rows),
        temperature=np.full(rows, 0.8, np.float32),
        top_k=np.full(rows, 50, np.int64),
        top_p=np.full(rows, 0.9, np.float64),
        min_p=np.full(rows, 0.01, np.float32),
        numbers=np.full(rows, 0.5, np.float64),
        masked_rows=np.arange(rows),
        masks=np.full((rows, -(-vocab_size // 32) * 4), 0xFF, np.uint8),
        wanted=np.arange(rows),
        logprobs=np.full(rows, MOST_LOGPROBS, np.int64),
    )


def _draws(chunks: Ordered[Chunk]) -> Arrays:
    drawing = [row for row, c in enumerate(chunks) if c.sequence.sampling.temperature >= GREEDY_BELOW]
    if not drawing:
        return {}
    asked = [chunks[row].sequence.sampling for row in drawing]
    seeds = np.array([a.seed % 2**64 for a in asked], np.uint64)
    # The random number depends on seed and index alone, not on when it is drawn or on the rest of the batch.
    indices = np.array([chunks[row].generated for row in drawing], np.uint64)
    return {
        "drawing": np.array(drawing, np.int64),
        "temperature": np.array([a.temperature for a in asked], np.float32),
        "top_k": np.array([a.top_k for a in asked], np.int64),
        "top_p": np.array([max(a.top_p, SMALLEST_TOP_P) for a in asked], np.float32).astype(np.float64),
        "min_p": np.array([a.min_p for a in asked], np.float32),
        "numbers": uniform(seeds, indices),
    }


def _biased(chunks: Ordered[Chunk]) -> Arrays:
    asked = [(row, c.sequence.sampling.logit_bias) for row, c in enumerate(chunks) if c.sequence.sampling.logit_bias]
    if not asked:
        return {}
    values = [value for _, bias in asked for value in bias.values()]
    return _places("biased", [(row, list(bias)) for row, bias in asked]) | {"bias": np.array(values, np.float32)}


def _early(chunks: Ordered[Chunk]) -> Arrays:
    """List every token that could end a sequence before its min_tokens."""
    early = [(row, c.sequence) for row, c in enumerate(chunks) if c.generated < c.sequence.sampling.min_tokens]
    return _places("early", [(row, list(s.ending_ids)) for row, s in early])


def _penalised(chunks: Ordered[Chunk]) -> Arrays:
    seen = [(row, c.sequence, c.sequence.seen) for row, c in enumerate(chunks) if c.sequence.seen is not None]
    if not seen:
        return {}
    repetition = [np.full(len(tokens.ids), s.sampling.repetition_penalty) for _, s, tokens in seen]
    return _places("penalised", [(row, tokens.ids) for row, _, tokens in seen]) | {
        "repetition": np.concatenate(repetition).astype(np.float32),
        "subtracted": np.concatenate([_subtracted(s, tokens.counts) for _, s, tokens in seen]).astype(np.float32),
    }


def _subtracted(sequence: Sequence, counts: Ids) -> Doubles:
    sampling = sequence.sampling
    return counts * sampling.frequency_penalty + (counts > 0) * sampling.presence_penalty


def _bad(chunks: Ordered[Chunk]) -> Arrays:
    """List the last tokens of bad words whose other tokens end the answer so far."""
    asked = [(row, c.sequence) for row, c in enumerate(chunks) if c.sequence.sampling.bad_words]
    return _places(
        "bad",
        [(row, [word[-1] for word in s.sampling.bad_words if _ends_with(s.generated, word[:-1])]) for row, s in asked],
    )


def _ends_with(generated: Ids, tail: tuple[int, ...]) -> bool:
    return len(generated) >= len(tail) and generated[len(generated) - len(tail) :].tolist() == list(tail)


def _thinking(chunks: Ordered[Chunk]) -> Arrays:
    asked = [(row, c, c.sequence.budget) for row, c in enumerate(chunks) if c.sequence.thinking]
    if not asked:
        return {}
    return {
        "thinking": np.array([row for row, _, _ in asked], np.int64),
        "close_ids": np.array([budget.close_id for _, _, budget in asked if budget], np.int64),
        "call_ids": np.array(
            [-1 if budget.call_id is None else budget.call_id for _, _, budget in asked if budget], np.int64
        ),
        "must_close": np.array(
            [budget.exhausted(c.generated) or c.sequence.loops_in_thinking for _, c, budget in asked if budget]
        ),
    }


def _masked(chunks: Ordered[Chunk], grammar_masks: GrammarMasks) -> Arrays:
    guided = [(row, c.sequence, c.sequence.open_grammar) for row, c in enumerate(chunks)]
    asked = [(row, sequence, grammar) for row, sequence, grammar in guided if grammar is not None]
    masks = [_grammars_masks([(s, grammar) for _, s, grammar in asked], grammar_masks)] if asked else []
    listed = [(row, c.sequence.open_allowed) for row, c in enumerate(chunks)]
    allowed = [(row, bits) for row, bits in listed if bits is not None]
    if allowed:
        masks.append(np.stack([bits for _, bits in allowed]))
    if not masks:
        return {}
    rows = [row for row, *_ in asked] + [row for row, _ in allowed]
    # Without a copy where all are of grammars: 64 are most of a megabyte a step.
    return {"masked_rows": np.array(rows, np.int64), "masks": masks[0] if len(masks) == 1 else np.concatenate(masks)}


def _grammars_masks(asked: list[tuple[Sequence, GrammarState]], grammar_masks: GrammarMasks) -> Masks:
    """Return the mask of each sequence's grammar."""
    masks = grammar_masks.compute([grammar for _, grammar in asked])
    for mask, (sequence, _) in zip(masks, asked, strict=True):
        if sequence.sampling.ignore_eos:
            forbid(mask, sequence.eos_ids)
    return masks


def _reports(chunks: Ordered[Chunk]) -> Arrays:
    asked = [(row, c.sequence.sampling.logprobs) for row, c in enumerate(chunks)]
    wanted = [(row, count) for row, count in asked if count is not None]
    if not wanted:
        return {}
    return dict(zip(("wanted", "logprobs"), np.array(wanted, np.int64).T, strict=True))


def _places(name: str, asked: list[tuple[int, list[int]]] | list[tuple[int, Ids]]) -> Arrays:
    """Return rows and tokens, one of each for every token that a row names."""
    if not asked:
        return {}
    tokens = [np.asarray(ids, np.int64) for _, ids in asked]
    rows = np.repeat(np.array([row for row, _ in asked], np.int64), [len(ids) for ids in tokens])
    return {f"{name}_rows": rows, f"{name}_tokens": np.concatenate(tokens)}
