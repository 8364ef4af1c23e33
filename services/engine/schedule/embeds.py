"""Embeddings of a prompt's media: which are here, and how far the prompt can be computed without the others."""

from collections.abc import Mapping
from collections.abc import Sequence as Ordered

import msgspec

from shared.messages import MediaSpan


class Embeds(msgspec.Struct, frozen=True):
    """Embeddings of one image or video as the encoder stored them: [rows, hidden] of `dtype`, row-major.

    Kept on the host until the request ends: a preempted sequence is prefilled again, and must not then depend on
    a blob that may have been evicted. A segment that is mapped stays, too.
    """

    data: bytes | memoryview
    dtype: str


class PromptEmbeds:
    """Embeddings of each span of a prompt, in their order; None while they are still being made."""

    def __init__(self, spans: Ordered[MediaSpan], stored: Ordered[Embeds | None]) -> None:
        self._spans = spans
        self._stored = list(stored)
        self.complete = None not in self._stored

    def __getitem__(self, index: int) -> Embeds:
        """Return those of a span, which are here."""
        embeds = self._stored[index]
        assert embeds is not None, "a chunk ends before embeddings that are missing"
        return embeds

    @property
    def stored(self) -> tuple[Embeds | None, ...]:
        """Those of all spans."""
        return tuple(self._stored)

    def add(self, arrived: Mapping[int, Embeds]) -> None:
        """Add embeddings, by index of their span."""
        for index, embeds in arrived.items():
            self._stored[index] = embeds
        self.complete = None not in self._stored

    def reach(self, start: int, stop: int) -> int:
        """Return the end of the tokens of [start, stop) that can be computed: they end where embeddings are missing."""
        if not self.complete:
            for span, embeds in zip(self._spans, self._stored, strict=True):
                if embeds is None and span.offset + span.length > start:
                    return min(stop, max(start, span.offset))
        return stop
