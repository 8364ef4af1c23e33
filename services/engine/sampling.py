"""What the sampler is to do in one step, as flat arrays: built on the host, moved to the device once each.

Requests ask for different things, so what only some rows want is a list of (row, token, ...) entries, and is empty
where no row wants it.
"""

from collections.abc import Sequence as Ordered
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from services.engine.sequence import Ids, Sequence

GREEDY_BELOW = 1e-5  # temperatures under this take the most likely token
SMALLEST_TOP_P = 1e-5  # 0 would leave no token at all
MOST_LOGPROBS = 20  # of alternatives to one token

Floats = NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Entries:
    """Logits by place: `rows[i], tokens[i]`."""

    rows: Ids
    tokens: Ids

    def __len__(self) -> int:
        return len(self.rows)


@dataclass(frozen=True, slots=True)
class SamplingPlan:
    """R rows, one for each sequence that gets a token."""

    temperature: Floats  # [R]
    top_k: Ids  # [R], 0: off
    top_p: Floats  # [R]
    min_p: Floats  # [R]
    seeds: NDArray[np.uint64]  # [R]
    indices: NDArray[np.uint64]  # [R] which generated token is drawn
    biased: Entries
    bias: Floats  # [len(biased)] added
    too_early: Entries  # end tokens before min_tokens
    penalised: Entries  # tokens seen
    repetition: Floats  # [len(penalised)] logits divide by it, or multiply if negative
    subtracted: Floats  # [len(penalised)] presence and frequency
    bad: Entries  # would complete a bad word
    close_ids: Ids  # [R] what an end token becomes; -1: stays what it is
    must_close: NDArray[np.bool_]  # [R] the token is close_ids[r], whatever is drawn
    logprobs: Ids  # [R] how many of the most likely tokens to report besides the sampled one; -1: report nothing

    @property
    def greedy(self) -> NDArray[np.bool_]:
        return self.temperature < GREEDY_BELOW

    def __len__(self) -> int:
        return len(self.temperature)


def plan_sampling(sequences: Ordered[Sequence]) -> SamplingPlan:
    """The plan of one step."""
    asked = [s.sampling for s in sequences]
    thinking = [s.budget if s.thinking else None for s in sequences]
    seen = [(row, s) for row, s in enumerate(sequences) if s.seen is not None]
    return SamplingPlan(
        temperature=np.array([a.temperature for a in asked], np.float32),
        top_k=np.array([a.top_k for a in asked], np.int64),
        top_p=np.array([max(a.top_p, SMALLEST_TOP_P) for a in asked], np.float32),
        min_p=np.array([a.min_p for a in asked], np.float32),
        seeds=np.array([a.seed % 2**64 for a in asked], np.uint64),
        indices=np.array([s.num_generated for s in sequences], np.uint64),
        biased=_entries([(row, list(a.logit_bias)) for row, a in enumerate(asked)]),
        bias=np.array([value for a in asked for value in a.logit_bias.values()], np.float32),
        too_early=_entries([(row, _too_early(s)) for row, s in enumerate(sequences)]),
        penalised=_entries([(row, s.seen.ids) for row, s in seen if s.seen is not None]),
        repetition=_floats([np.full(len(s.seen.ids), s.sampling.repetition_penalty) for _, s in seen if s.seen]),
        subtracted=_floats([_subtracted(s) for _, s in seen]),
        bad=_entries([(row, _bad(s)) for row, s in enumerate(sequences)]),
        close_ids=np.array([-1 if budget is None else budget.close_id for budget in thinking], np.int64),
        must_close=np.array(
            [b is not None and b.exhausted(s.num_generated) for b, s in zip(thinking, sequences, strict=True)]
        ),
        logprobs=np.array([-1 if a.logprobs is None else a.logprobs for a in asked], np.int64),
    )


def heaviest(rows: int) -> SamplingPlan:
    """The plan of a step that asks for everything that takes memory with the vocabulary."""
    nobody = Entries(np.empty(0, np.int64), np.empty(0, np.int64))
    nothing = np.empty(0, np.float32)
    return SamplingPlan(
        temperature=np.full(rows, 0.8, np.float32),
        top_k=np.full(rows, 50, np.int64),
        top_p=np.full(rows, 0.9, np.float32),
        min_p=np.full(rows, 0.01, np.float32),
        seeds=np.zeros(rows, np.uint64),
        indices=np.zeros(rows, np.uint64),
        biased=nobody,
        bias=nothing,
        too_early=nobody,
        penalised=nobody,
        repetition=nothing,
        subtracted=nothing,
        bad=nobody,
        close_ids=np.full(rows, -1, np.int64),
        must_close=np.zeros(rows, np.bool_),
        logprobs=np.full(rows, MOST_LOGPROBS, np.int64),
    )


def _too_early(sequence: Sequence) -> list[int]:
    """Every token that could end a sequence which must go on."""
    if sequence.num_generated >= sequence.sampling.min_tokens:
        return []
    return [*sequence.eos_ids, *sequence.sampling.stop_token_ids]


def _bad(sequence: Sequence) -> list[int]:
    """Last tokens of the bad words whose other tokens are the end of the answer so far."""
    return [word[-1] for word in sequence.sampling.bad_words if _ends_with(sequence.generated, word[:-1])]


def _ends_with(generated: Ids, tail: tuple[int, ...]) -> bool:
    return len(generated) >= len(tail) and generated[len(generated) - len(tail) :].tolist() == list(tail)


def _subtracted(sequence: Sequence) -> NDArray[np.float64]:
    assert sequence.seen is not None
    counts, sampling = sequence.seen.counts, sequence.sampling
    return counts * sampling.frequency_penalty + (counts > 0) * sampling.presence_penalty


def _entries(asked: list[tuple[int, list[int]]] | list[tuple[int, Ids]]) -> Entries:
    tokens = [np.asarray(ids, np.int64) for _, ids in asked]
    rows = np.repeat(np.array([row for row, _ in asked], np.int64), [len(ids) for ids in tokens])
    return Entries(rows, np.concatenate(tokens) if tokens else np.empty(0, np.int64))


def _floats(parts: list[NDArray[np.float64]]) -> Floats:
    return np.concatenate(parts).astype(np.float32) if parts else np.empty(0, np.float32)
