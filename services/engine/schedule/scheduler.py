"""Scheduler: decides what each step computes. Values in, a Plan out; no tensors, no clocks, no IO.

One quantity drives it: every sequence has `num_computed` tokens in the cache and knows `num_tokens`, and each step
lets the first chase the second. Decoding is being one token behind; a new prompt, a prefix found in the cache, a
preempted sequence and one resumed from its journal differ only in how far behind they start.

Both count a step when it is planned. Its tokens are known when it is read, and the next step may be planned before
that: see `schedule_ahead`.

Order of service is order of arrival, in three rounds a step: sequences that decode, sequences still in their prefill,
and then waiting ones. With a `PrefillBudget` prefills share what a step has for them by their length instead, and that
is no more than suits the sequences that decode beside them. A sequence takes blocks for all its known tokens when it is
admitted, so only decoding can run out of blocks; then the latest arrival is preempted: it gives all of its blocks back
and waits to be computed again. The earliest arrival is never preempted while another runs, so it always progresses, and
in turn so does every sequence.

A prompt is computed up to the first media whose embeddings are still being made, and is passed over while it stands
there. It waits for them with blocks for all of its tokens only where half of the cache, and of the places of running
sequences, are left to others; where they are not, later arrivals overtake it until its embeddings are here.
"""

from bisect import insort
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from operator import attrgetter
from typing import NamedTuple

from services.engine.schedule.blocks import BlockPool
from services.engine.schedule.embeds import Embeds
from services.engine.schedule.plan import Chunk, Plan
from services.engine.schedule.prefill_budget import PrefillBudget, reaches, shares
from services.engine.schedule.prompt_scores import ScoredRows
from services.engine.schedule.sequence import Sequence
from services.engine.schedule.speculation import Speculation, Speculator, accept
from shared.errors import Failure
from shared.messages import Finish


@dataclass(frozen=True, slots=True)
class Limits:
    """Limits of a step."""

    max_num_seqs: int
    max_num_batched_tokens: int
    chunked_prefill: bool
    block_size: int
    prefill: PrefillBudget | None = None  # with chunked_prefill only; None: prefill gets all that is left of a step
    speculation: Speculation | None = None  # None: no token is ever guessed


class Progress(NamedTuple):
    """Tokens that a step has appended to a sequence."""

    sequence: Sequence
    row: int  # index of the first among the step's tokens
    appended: int
    finish: Finish | None  # why the sequence has ended with the last one


_by_arrival = attrgetter("arrival")


class Scheduler:
    """Waiting and running sequences, by arrival. Owns their blocks."""

    def __init__(self, pool: BlockPool, limits: Limits) -> None:
        assert limits.max_num_batched_tokens > 0, "decided by the device before"
        self._pool = pool
        self._limits = limits
        self._speculator = Speculator(limits.speculation)
        self._sequences: dict[str, Sequence] = {}
        self._waiting: deque[Sequence] = deque()
        self._running: list[Sequence] = []
        self._arrivals = 0

    @property
    def has_work(self) -> bool:
        return bool(self._sequences)

    @property
    def num_running(self) -> int:
        return len(self._running)

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    def add(self, sequence: Sequence) -> Failure | None:
        """Queue a sequence; return a failure if it can never run."""
        needed = self._blocks_for(sequence.max_cached)
        if needed > self._pool.num_blocks:
            return _never_fits(f"{sequence.max_cached} tokens", f"{self._pool.num_blocks * self._limits.block_size}")
        if not self._limits.chunked_prefill and sequence.max_cached > self._limits.max_num_batched_tokens:
            return _never_fits(f"a step of {sequence.max_cached} tokens", f"{self._limits.max_num_batched_tokens}")
        assert sequence.request_id not in self._sequences, "a request is scheduled once"
        sequence.arrival = self._arrivals
        self._arrivals += 1
        self._sequences[sequence.request_id] = sequence
        self._waiting.append(sequence)
        return None

    def remove(self, request_id: str) -> Sequence | None:
        """Forget a sequence in any state, and free its blocks. None: there is no such sequence."""
        sequence = self._sequences.pop(request_id, None)
        if sequence is None:
            return None
        if sequence in self._running:
            self._running.remove(sequence)
            self._free(sequence)
        else:
            self._waiting.remove(sequence)
        return sequence

    def supply(self, request_id: str, arrived: Mapping[int, Embeds]) -> None:
        """Give a sequence embeddings that it lacked, by index of their span. Does nothing if it is gone."""
        if (sequence := self._sequences.get(request_id)) is not None:
            sequence.embeds.add(arrived)

    def schedule(self) -> Plan:
        """Plan the next step, when all steps before have been committed.

        A plan without chunks and without preemptions stays the next one until a sequence is added, removed or supplied.
        """
        assert not any(s.in_flight for s in self._running)
        budget = self._limits.max_num_batched_tokens
        decoding = [s for s in self._running if s.backlog > 0 and s.num_tokens - s.num_computed == 1]
        preempted: list[Sequence] = []
        chunks = [
            _chunk(sequence, 1)
            for sequence in decoding[:budget]
            if sequence not in preempted and self._grow(sequence, preempted)
        ]
        prefilling = [s for s in self._running if s.backlog > 0 and s.num_tokens - s.num_computed > 1]
        # After a preemption the victim is first in the queue. It is admitted at once only if others hold its prefix.
        return self._with_prefill(chunks, prefilling, tuple(preempted))

    def schedule_ahead(self) -> Plan | None:
        """Plan the next step while the one before is not committed; return None where the commit has to come first.

        What the step computes must not depend on which tokens are in flight. So it is one token for each sequence that
        certainly continues, and prefill, whose tokens are known; and no block has to be taken from another sequence for
        it. How it samples may depend on them: then it `samples_later`. A sequence that turns out to have ended has a
        row in it all the same, which `commit` drops.

        Guesses need the token before: where they are in flight, or likely to be worth a step, the commit comes first.
        """
        continuing = [s for s in self._running if s.in_flight and s.can_continue]
        behind = [s for s in self._running if not s.in_flight and s.backlog > 0]
        budget = self._limits.max_num_batched_tokens - len(continuing)
        if any(s.drafts for s in self._running) or any(
            self._speculator.guess(continuing, len(continuing), budget, after=1)
        ):
            return None
        if budget < 0 or any(self._lacks_blocks(s) for s in behind):
            return None
        growing = [s for s in continuing if s.num_computed == len(s.blocks) * self._limits.block_size]
        if len(growing) > self._pool.available:
            return None
        for sequence, block in zip(growing, self._pool.allocate(len(growing)), strict=True):
            sequence.blocks.append(block)
        chunks = [Chunk(s, s.num_computed, 1, samples=True, source=s.row) for s in continuing]
        later = any(s.depends_on_tokens for s in continuing)
        plan = self._with_prefill(chunks, behind, samples_later=later)
        return plan if plan.chunks else None

    def _with_prefill(
        self,
        chunks: list[Chunk],
        prefilling: list[Sequence],
        preempted: tuple[Sequence, ...] = (),
        samples_later: bool = False,
    ) -> Plan:
        """Complete a step by prefill: of running sequences, and of waiting ones that it admits."""
        admitted: list[Sequence] = []
        if self._limits.prefill is None or not self._limits.chunked_prefill:
            budget = self._limits.max_num_batched_tokens - len(chunks)
            for sequence in prefilling:
                if budget > 0:
                    chunks.append(_chunk(sequence, budget))
                    budget -= chunks[-1].length
            while first := self._match_first(budget):
                admitted.append(self._admit(*first))
                chunks.append(_chunk(admitted[-1], budget))
                budget -= chunks[-1].length
        else:
            cached = sum(chunk.start for chunk in chunks)
            room = self._limits.prefill.room(len(chunks), cached, self._limits.max_num_batched_tokens)
            while first := self._match_first(room, partial(_is_reached, prefilling, room)):
                admitted.append(self._admit(*first))
                insort(prefilling, admitted[-1], key=_by_arrival)
            given = zip(prefilling, shares([s.backlog for s in prefilling], room), strict=True)
            chunks += [_chunk(sequence, tokens) for sequence, tokens in given if tokens]
        chunks = self._with_drafts(chunks)
        begun = tuple(s for s in admitted if not s.begun)
        asked_tokens = sum(s.num_tokens for s in admitted) if self._pool.caching else 0
        hit_tokens = sum(s.num_computed for s in admitted)
        for sequence in begun:
            sequence.begun = True
            sequence.cached_tokens = min(sequence.num_computed, sequence.prompt_len)
        drafts = sum(chunk.drafts for chunk in chunks)
        return _count_planned(
            Plan(tuple(chunks), begun, preempted, asked_tokens, hit_tokens, samples_later, drafts=drafts)
        )

    def _lacks_blocks(self, sequence: Sequence) -> bool:
        return len(sequence.blocks) < self._blocks_for(sequence.num_tokens)

    def commit(self, plan: Plan, tokens: list[int]) -> list[Progress]:
        """Account for a step that has run.

        Args:
            plan: the first that was not committed yet.
            tokens: as `plan.draws()` has them.

        Returns:
            What was appended to each sequence that got a token. Ended sequences are removed; one removed after the step
            was planned gets no token.
        """
        progress: list[Progress] = []
        row = 0
        for chunk in plan.chunks:
            sequence, first = chunk.sequence, row
            if chunk.samples:
                row += chunk.drafts + 1
                sequence.in_flight -= 1
            if not self._has(sequence):
                continue
            if not chunk.samples:
                self._remember(chunk, chunk.stop)
                continue
            appended, finish = accept(sequence, tokens[first:row])
            self._remember(chunk, sequence.num_computed if chunk.drafts else chunk.stop)
            progress.append(Progress(sequence, first, appended, finish))
            if finish is not None:
                self.remove(sequence.request_id)
        assert row == len(tokens), "as many tokens as are sampled"
        return progress

    def learn(self, plan: Plan, ms: float, own_ms: float) -> None:
        """Learn how long steps take, from one that was read `ms` after the one before and `own_ms` after it began. Not
        for steps beside other work of the device."""
        budget = self._limits.prefill
        if budget is not None and budget.learns and plan.kinds[1]:
            budget.learn(plan.num_tokens, own_ms)
        if not plan.drafts:
            self._speculator.forget()
        elif all(chunk.samples and chunk.length == chunk.drafts + 1 for chunk in plan.chunks):
            self._speculator.learn(plan.num_tokens, sum(chunk.stop * chunk.length for chunk in plan.chunks), ms)

    def record_scores(self, sequence: Sequence, start: int, rows: ScoredRows) -> bool:
        """Record scores of a prompt from a step that has run; return True if this completes them."""
        if not self._has(sequence) or sequence.scores is None:
            return False
        sequence.scores.add(start, rows)
        return sequence.scores.complete

    def _admit(self, sequence: Sequence, matched: list[int]) -> Sequence:
        """Move a waiting sequence to the running ones, with the cached blocks that it begins with; return it."""
        self._waiting.remove(sequence)
        self._pool.share(matched)
        sequence.blocks.extend(matched)
        sequence.blocks.extend(self._pool.allocate(self._blocks_for(sequence.num_tokens) - len(matched)))
        sequence.num_computed = len(matched) * self._limits.block_size
        insort(self._running, sequence, key=_by_arrival)
        return sequence

    def _match_first(
        self, budget: int, reached: Callable[[Sequence, int], bool] = lambda sequence, start: True
    ) -> tuple[Sequence, list[int]] | None:
        """Return the first waiting sequence that may run, and the cached blocks that it begins with. None: nothing
        waits, or there is no room.

        A block for each running sequence stays free, so that the newcomer is not the next one to be preempted.

        Args:
            reached: tells of a sequence, and of its first token to compute, if it would get tokens in this step. Where
                it would not, later arrivals may.
        """
        if budget <= 0 or len(self._running) >= self._limits.max_num_seqs:
            return None
        for sequence in self._waiting:
            matched = self._match(sequence)
            taken = self._blocks_for(sequence.num_tokens) - len(matched) + self._pool.cost(matched)
            start = len(matched) * self._limits.block_size
            if not sequence.embeds.complete and self._waits_outside(sequence, start, taken):
                continue
            if not reached(sequence, start):
                continue
            if taken + len(self._running) > self._pool.available:
                return None
            fits = self._limits.chunked_prefill or sequence.num_tokens - start <= budget
            return (sequence, matched) if fits else None
        return None

    def _waits_outside(self, sequence: Sequence, start: int, taken: int) -> bool:
        """Return whether a sequence that lacks embeddings would have nothing to compute from `start` on, or would leave
        less than half of the cache or of the places to others."""
        nothing = sequence.embeds.reach(start, sequence.num_tokens) == start
        others = sum(not running.embeds.complete for running in self._running)
        crowded = 2 * (others + 1) > self._limits.max_num_seqs
        return nothing or crowded or self._pool.available - taken < self._pool.num_blocks // 2

    def _match(self, sequence: Sequence) -> list[int]:
        """Return the cached blocks of a prefix, leaving the tokens to compute whose logits are needed."""
        if not self._pool.caching:
            return []
        full = sequence.cacheable // self._limits.block_size
        return self._pool.match(sequence.block_hash(self._limits.block_size, nth) for nth in range(full))

    def _with_drafts(self, chunks: list[Chunk]) -> list[Chunk]:
        """Add guessed tokens to the chunks that are one token behind, where that is worth it and nobody else's room."""
        rows = sum(chunk.length for chunk in chunks)
        room = self._limits.max_num_batched_tokens - rows
        room = min(room, self._limits.max_num_seqs - sum(chunk.samples for chunk in chunks))
        decoding = [chunk.sequence for chunk in chunks if chunk.length == 1 and chunk.samples and chunk.source is None]
        guesses = self._speculator.guess(decoding, rows, room)
        for sequence, guessed in zip(decoding, guesses, strict=False):
            drafts = sequence.possible(guessed)
            missing = self._blocks_for(sequence.num_tokens + len(drafts)) - len(sequence.blocks)
            if missing + len(self._running) > self._pool.available:
                drafts = drafts[: len(sequence.blocks) * self._limits.block_size - sequence.num_tokens]
            elif missing > 0:
                sequence.blocks.extend(self._pool.allocate(missing))
            sequence.draft(drafts)
        return [
            Chunk(c.sequence, c.start, c.length + c.sequence.drafts, samples=True, drafts=c.sequence.drafts)
            if c.sequence.drafts
            else c
            for c in chunks
        ]

    def _grow(self, sequence: Sequence, preempted: list[Sequence]) -> bool:
        """Give a running sequence blocks for all its known tokens, by preempting later arrivals if need be.

        Returns False, and preempts the sequence itself, if it is the latest.
        """
        missing = self._blocks_for(sequence.num_tokens) - len(sequence.blocks)
        if missing <= 0:
            return True
        while missing > self._pool.available:
            victim = self._running.pop()
            self._free(victim)
            insort(self._waiting, victim, key=_by_arrival)
            preempted.append(victim)
            if victim is sequence:
                return False
        sequence.blocks.extend(self._pool.allocate(missing))
        return True

    def _remember(self, chunk: Chunk, stop: int) -> None:
        """Register the blocks that a chunk has filled up to token `stop`, once their content is in the cache and not
        before."""
        first, full = chunk.start // self._limits.block_size, stop // self._limits.block_size
        if not self._pool.caching or full == first:
            return
        for nth in range(first, full):
            self._pool.remember(chunk.sequence.blocks[nth], chunk.sequence.block_hash(self._limits.block_size, nth))

    def _has(self, sequence: Sequence) -> bool:
        return self._sequences.get(sequence.request_id) is sequence

    def _free(self, sequence: Sequence) -> None:
        self._pool.release(sequence.blocks)
        del sequence.blocks[:]
        sequence.num_computed = 0

    def _blocks_for(self, tokens: int) -> int:
        return -(-tokens // self._limits.block_size)


def _chunk(sequence: Sequence, budget: int) -> Chunk:
    """Return as much of a sequence's backlog as the budget allows."""
    length = min(sequence.backlog, budget)
    reached = sequence.num_computed + length
    return Chunk(sequence, sequence.num_computed, length, samples=reached == sequence.num_tokens)


def _is_reached(prefilling: list[Sequence], room: int, sequence: Sequence, start: int) -> bool:
    """Return True if a waiting sequence, once admitted, would get tokens in this step; the earliest always does."""
    if not prefilling or sequence.arrival < prefilling[0].arrival:
        return True
    newcomer = sequence.embeds.reach(start, sequence.num_tokens) - start
    return reaches([s.backlog for s in prefilling], newcomer, room)


def _count_planned(plan: Plan) -> Plan:
    """Count the plan in its sequences, and return it."""
    row = 0
    for chunk in plan.chunks:
        chunk.sequence.num_computed = chunk.stop
        if chunk.samples:
            chunk.sequence.row = row
            chunk.sequence.in_flight += 1
            row += chunk.drafts + 1
    return plan


def _never_fits(what: str, room: str) -> Failure:
    return Failure(
        400,
        f"The request needs room for {what}; this engine has room for {room}. Shorten the prompt or max_tokens.",
        param="max_tokens",
        code="context_length_exceeded",
    )
