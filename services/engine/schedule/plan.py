"""Plan of a step: which tokens of which sequences it computes, and which of them it samples behind."""

from dataclasses import dataclass

import msgspec

from services.engine.schedule.sequence import Sequence


class Chunk(msgspec.Struct, frozen=True):
    """One sequence's share of a step: tokens [start, start + length)."""

    sequence: Sequence
    start: int
    length: int
    samples: bool  # its last token is the sequence's last
    source: int | None = None  # index among the tokens in flight of the one it computes; None: its tokens are known
    drafts: int = 0  # its last tokens that are guessed: each is verified by the token drawn in its place

    @property
    def stop(self) -> int:
        return self.start + self.length

    @property
    def generated(self) -> int:
        """Number of tokens of the answer before the one it samples."""
        return self.start + self.length - self.sequence.prompt_len

    def apart(self) -> list["Chunk"]:
        """Return itself without guesses, else a chunk for its known token and for each guess."""
        if not self.drafts:
            return [self]
        first = self.stop - self.drafts - 1
        return [Chunk(self.sequence, start, 1, samples=True) for start in range(first, self.stop)]

    def draws(self) -> list["Chunk"]:
        """Return a chunk for each token that it samples, its sequence as it is if the guesses before are right."""
        rows, supposed = self.apart(), self.sequence
        if supposed.depends_on_tokens:
            for place in range(1, len(rows)):
                supposed = supposed.with_draft()
                rows[place] = msgspec.structs.replace(rows[place], sequence=supposed)
        return rows


@dataclass(frozen=True, slots=True)
class Plan:
    """One step. Chunks are in the order of their rows."""

    chunks: tuple[Chunk, ...]
    begun: tuple[Sequence, ...] = ()  # scheduled for the first time
    preempted: tuple[Sequence, ...] = ()  # lost their blocks and wait again
    asked_tokens: int = 0  # looked up in the prefix cache for the admitted sequences
    hit_tokens: int = 0  # of these, found
    samples_later: bool = False  # sampling depends on tokens in flight: it waits for the commit of the step before
    drafts: int = 0  # guessed tokens that it verifies

    @property
    def num_tokens(self) -> int:
        return sum(chunk.length for chunk in self.chunks)

    @property
    def kinds(self) -> tuple[bool, bool]:
        """Return whether sequences decode in it, and whether it computes prefill."""
        decodes = [chunk.length == 1 + chunk.drafts for chunk in self.chunks]
        return any(decodes), not all(decodes)

    @property
    def sampling(self) -> list[Chunk]:
        """Chunks that sample tokens, in the order of the tokens."""
        return [chunk for chunk in self.chunks if chunk.samples]

    @property
    def parts(self) -> tuple[Chunk, ...]:
        """Chunks as they are computed: a guess is a row like another sequence's, over the same blocks. All keys and
        values of a layer are written before any row attends, so it finds those before it. So a step that verifies
        guesses is a decode step."""
        if not self.drafts:
            return self.chunks
        return tuple(part for chunk in self.chunks for part in chunk.apart())

    def draws(self) -> list[Chunk]:
        """Return a chunk for each token that is sampled."""
        if not self.drafts:
            return self.sampling
        return [draw for chunk in self.sampling for draw in chunk.draws()]
