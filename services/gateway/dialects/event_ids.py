"""Ids of the events of a stream, by which its reader can come back."""

from collections.abc import Iterable, Iterator
from itertools import repeat

from services.gateway.inflight.request import StreamPosition
from shared.messages import Delta


class NoEventIds:
    """Events of data alone, which also readers understand that take each line, or each event, for `data: `."""

    # With the blank line, readers that cut the stream at blank lines do not take the next event for a comment.
    keep_alive = b": keep-alive\n\n"

    def line(self) -> bytes:
        """Return nothing."""
        return b""

    def advance_one(self, _index: int, _delta: Delta) -> bytes:
        """Return nothing."""
        return b""

    def advance(self, _index: int, _delta: Delta, events: int) -> Iterator[bytes]:
        """Return nothing for each event."""
        return repeat(b"", events)


class EventIds:
    """Ids of a stream's events: the position, in each choice, of a reader that has read up to the event.

    A position is `seq`, the number of the last delta. One delta may take several events; between them the position is
    `start-seq-events`: the delta's start, its number, and how many of its events were read.
    """

    # Without a blank line: the openai client, once it has seen an id, takes one for the end of an empty event.
    keep_alive = b": keep-alive\n"

    def __init__(self, positions: Iterable[StreamPosition]) -> None:
        """Begin where the stream begins for its reader."""
        self._ids = [b"%d" % position.seq for position in positions]

    def line(self) -> bytes:
        """Return the `id` field of an event at the current position."""
        return b"id: %b\n" % b".".join(self._ids)

    def advance_one(self, index: int, delta: Delta) -> bytes:
        """Return the `id` field of the only event of a delta of choice `index`, or of its last."""
        self._ids[index] = b"%d" % delta.seq
        return self.line()

    def advance(self, index: int, delta: Delta, events: int) -> Iterator[bytes]:
        """Yield the `id` field of each event of a delta of choice `index`."""
        for event in range(1, events):
            self._ids[index] = b"%d-%d-%d" % (delta.start, delta.seq, event)
            yield self.line()
        yield self.advance_one(index, delta)
