"""Decides what each step computes. Values in, a Plan out; no tensors, no clocks, no IO.

One quantity drives it: every sequence has `num_computed` tokens in the cache and knows `num_tokens`, and each step
lets the first chase the second. Decoding is being one token behind; a new prompt, a prefix found in the cache, a
preempted sequence and one resumed from its journal differ only in how far behind they start.

Order of service is order of arrival, in three rounds a step: sequences that decode, sequences still in their prefill,
and then those waiting. A sequence takes blocks for all its known tokens when it is admitted, so only decoding can run
out of blocks; then the latest arrival gives all of its blocks back and waits to be computed again. The earliest
arrival is never the one to give way while another runs, so it always gets on, and so in turn does everyone.
"""

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass

from services.engine.blocks import BlockPool
from services.engine.sequence import Sequence
from shared.errors import Failure
from shared.messages import Finish


@dataclass(frozen=True, slots=True)
class Chunk:
    """One sequence's share of a step: tokens [start, start + length). `samples`: its last token is its last known."""

    sequence: Sequence
    start: int
    length: int
    samples: bool


@dataclass(frozen=True, slots=True)
class Plan:
    """One step. Chunks are in the order of their rows."""

    chunks: tuple[Chunk, ...]
    begun: tuple[Sequence, ...]  # scheduled for the first time
    preempted: tuple[Sequence, ...]  # lost their blocks and wait again
    asked_tokens: int  # looked for in the prefix cache by the sequences admitted
    hit_tokens: int  # and found

    @property
    def num_tokens(self) -> int:
        return sum(chunk.length for chunk in self.chunks)

    @property
    def sampling(self) -> list[Sequence]:
        """The sequences that get a token, in the order of their rows."""
        return [chunk.sequence for chunk in self.chunks if chunk.samples]


@dataclass(frozen=True, slots=True)
class Limits:
    """What bounds a step."""

    max_num_seqs: int
    max_num_batched_tokens: int
    chunked_prefill: bool
    block_size: int


class Scheduler:
    """Waiting and running sequences, by arrival. Owns their blocks."""

    def __init__(self, pool: BlockPool, limits: Limits) -> None:
        self._pool = pool
        self._limits = limits
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
        """Let a sequence wait for its turn, or say why its turn can never come."""
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
        """Forget a sequence, whatever it was doing, and free what it held. None: there is no such sequence."""
        sequence = self._sequences.pop(request_id, None)
        if sequence is None:
            return None
        if sequence in self._running:
            self._running.remove(sequence)
            self._free(sequence)
        else:
            self._waiting.remove(sequence)
        return sequence

    def schedule(self) -> Plan:
        """The next step. Without chunks only if there is nothing to do."""
        budget = self._limits.max_num_batched_tokens
        decoding = [s for s in self._running if s.num_tokens - s.num_computed == 1]
        prefilling = [s for s in self._running if s.num_tokens - s.num_computed > 1]
        preempted: list[Sequence] = []
        admitted: list[Sequence] = []
        chunks = [
            _chunk(sequence, 1)
            for sequence in decoding[:budget]
            if sequence not in preempted and self._grow(sequence, preempted)
        ]
        budget -= len(chunks)
        for sequence in prefilling:
            if budget > 0 and sequence not in preempted:
                chunks.append(_chunk(sequence, budget))
                budget -= chunks[-1].length
        # After a preemption the first to wait is the victim. It comes back at once only if others hold its prefix.
        while budget > 0 and (waiting := self._admit(budget)):
            admitted.append(waiting)
            chunks.append(_chunk(waiting, budget))
            budget -= chunks[-1].length
        begun = tuple(s for s in admitted if not s.begun)
        asked_tokens = sum(s.num_tokens for s in admitted) if self._pool.caching else 0
        hit_tokens = sum(s.num_computed for s in admitted)
        for sequence in begun:
            sequence.begun = True
            sequence.cached_tokens = min(sequence.num_computed, sequence.prompt_len)
        return Plan(tuple(chunks), begun, tuple(preempted), asked_tokens, hit_tokens)

    def commit(self, plan: Plan, tokens: Iterable[int]) -> list[tuple[Sequence, Finish | None]]:
        """Take in what a plan's step computed.

        Args:
            plan: the last one made.
            tokens: what `plan.sampling` got, in its order.

        Returns:
            those sequences, and why they have ended if they have; then they are forgotten.
        """
        for chunk in plan.chunks:
            chunk.sequence.num_computed += chunk.length
            self._remember(chunk.sequence, chunk.start // self._limits.block_size)
        progress: list[tuple[Sequence, Finish | None]] = []
        for sequence, token in zip(plan.sampling, tokens, strict=True):
            sequence.append(token)
            finish = sequence.finish()
            progress.append((sequence, finish))
            if finish is not None:
                self.remove(sequence.request_id)
        return progress

    def _admit(self, budget: int) -> Sequence | None:
        """Move the first waiting sequence to the running ones, if there is room for it.

        A block for each running sequence stays free, so that the newcomer is not the next one to give way.
        """
        if not self._waiting or len(self._running) >= self._limits.max_num_seqs:
            return None
        sequence = self._waiting[0]
        matched = self._match(sequence)
        known = len(matched) * self._limits.block_size
        fresh = self._blocks_for(sequence.num_tokens) - len(matched)
        if fresh + self._pool.cost(matched) + len(self._running) > self._pool.available:
            return None
        if not self._limits.chunked_prefill and sequence.num_tokens - known > budget:
            return None
        self._waiting.popleft()
        self._pool.share(matched)
        sequence.blocks.extend(matched)
        sequence.blocks.extend(self._pool.allocate(fresh))
        sequence.num_computed = known
        assert not self._running or self._running[-1].arrival < sequence.arrival
        self._running.append(sequence)
        return sequence

    def _match(self, sequence: Sequence) -> list[int]:
        """Cached blocks of a prefix. At least one token is left to compute: its logits are what is wanted."""
        if not self._pool.caching:
            return []
        full = (sequence.num_tokens - 1) // self._limits.block_size
        return self._pool.match(sequence.block_hashes(self._limits.block_size, full))

    def _grow(self, sequence: Sequence, preempted: list[Sequence]) -> bool:
        """Give a running sequence blocks for all its known tokens, at the cost of later arrivals.

        Returns False, and preempts the sequence itself, if it is the latest.
        """
        missing = self._blocks_for(sequence.num_tokens) - len(sequence.blocks)
        if missing <= 0:
            return True
        while missing > self._pool.available:
            victim = self._running.pop()
            self._free(victim)
            self._waiting.appendleft(victim)
            preempted.append(victim)
            if victim is sequence:
                return False
        sequence.blocks.extend(self._pool.allocate(missing))
        return True

    def _remember(self, sequence: Sequence, first: int) -> None:
        """Publish the blocks from `first` on that are now full, once their content is in the cache and not before."""
        full = sequence.num_computed // self._limits.block_size
        if not self._pool.caching or full == first:
            return
        hashes = sequence.block_hashes(self._limits.block_size, full)
        for i in range(first, full):
            self._pool.remember(sequence.blocks[i], hashes[i])

    def _free(self, sequence: Sequence) -> None:
        self._pool.release(sequence.blocks)
        del sequence.blocks[:]
        sequence.num_computed = 0

    def _blocks_for(self, tokens: int) -> int:
        return -(-tokens // self._limits.block_size)


def _chunk(sequence: Sequence, budget: int) -> Chunk:
    """As much of a sequence's backlog as the budget allows."""
    length = min(sequence.num_tokens - sequence.num_computed, budget)
    reached = sequence.num_computed + length
    return Chunk(sequence, sequence.num_computed, length, samples=reached == sequence.num_tokens)


def _never_fits(what: str, room: str) -> Failure:
    return Failure(
        400,
        f"The request needs room for {what}; this engine has room for {room}. Shorten the prompt or max_tokens.",
        param="max_tokens",
        code="context_length_exceeded",
    )
