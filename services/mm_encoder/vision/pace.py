"""Pace of passes on a GPU that an engine shares: passes are sent in pieces, and some of these wait.

The driver lets two processes take turns of some 2 ms while both have work, and whenever one has none for a moment, as
an engine between its launches, the other has a turn. Beside whole passes a decode step of 4 ms takes 15, and one with
prefill, which is planned to take as long as a gap may be, 60. So few pieces are sent during a step with prefill that
sequences wait for, and the engine plans for these (BESIDE_ENCODER in services/engine/schedule/prefill_budget.py), if
they are of 2 ms and of one encoder: a second one on the GPU sends as many. With none at all the tower would starve.
Where no engine uses the GPU, or none shares memory with us, passes are sent whole.

What counts is the time of what was sent, and not in how many pieces or batches: a batch of small pictures may be less
than a piece, and several of them fit in a step. A small pass is several graphs (graphs.py), on large cards each less
than a piece.

Cuts change no bit: the same operations on the same rows are launched, with waits between them.
"""

import math
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from services.mm_encoder.vision.tables import QUERIES, HostTables
from shared.card_page import PREFILL, CardPage
from shared.model.config import VisionConfig

PREFILL_PIECES = 2  # during a step with prefill, and the one that was sent before it began
POLL_S = 0.0002
PATIENCE_S = 5.0  # for all waits of a pass; the rest of it is sent as if nobody waited for tokens
SLOWEST = 2e13  # operations a second; the first pieces show how many more a GPU does
# Tiles of attention that are never parted. A row of their table has 12 bytes, and a kernel is compiled anew for a table
# that does not begin at a multiple of 16.
ALIGNED_TILES = 4
ATTENTION_COST = 1.7  # times as long as a product takes for an operation: 419 and 705 TFLOP/s of 1080p on an H200


class Mark(Protocol):
    """Point in a GPU's work."""

    def wait(self) -> None:
        """Return when the GPU has come to it."""

    def seconds_since(self, earlier: "Mark") -> float:
        """Return the time from another to this one; the GPU has come to both."""


class GpuMark:
    """Mark in the work of the current GPU."""

    def __init__(self) -> None:
        self.event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        self.event.record()

    def wait(self) -> None:
        self.event.synchronize()

    def seconds_since(self, earlier: Mark) -> float:
        assert isinstance(earlier, GpuMark)
        return float(earlier.event.elapsed_time(self.event)) / 1e3


class Pace:
    """Pace of a GPU that nobody shares: all is sent at once."""

    def begin(self) -> None:
        """Begin a batch."""

    def begin_pass(self) -> None:
        """Begin a pass of it."""

    def cut(self, costs: Sequence[float]) -> list[slice]:
        """Divide what one launch could do, by the operations of each of its parts."""
        return [slice(0, len(costs))]

    def spend(self, operations: float) -> None:
        """Note what has been sent, and wait until more may be."""


class SharedPace(Pace):
    """Pace of a GPU that engines use, too."""

    def __init__(
        self,
        pages: Callable[[], Iterable[CardPage]],
        piece_s: float,
        decode_pieces: int,
        count_piece: Callable[[float], None],
        mark: Callable[[], Mark] = GpuMark,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        """Begin at the slowest rate.

        Args:
            pages: returns those of the engines that live.
            piece_s: seconds of a piece, if the GPU does nothing else.
            decode_pieces: the most during a step without prefill; 0: any number.
            count_piece: is told for each piece how many seconds the next has waited.
        """
        self._all_pages = pages
        self._piece_s = piece_s
        self._decode_pieces = decode_pieces
        self._count_piece = count_piece
        self._mark = mark
        self._clock = clock
        self._sleep = sleep
        self._rate = SLOWEST
        self._pages: list[CardPage] = []
        self._steps: dict[CardPage, tuple[int, float]] = {}  # the last step seen, and the pieces sent during it
        self._spent = 0.0  # since the last piece, which may have been another batch's
        self._sent: list[tuple[Mark, Mark, float]] = []  # pieces under way: begin, end, operations

    def begin(self) -> None:
        self._pages = list(self._all_pages())
        self._steps = {page: self._steps.get(page, (0, 0.0)) for page in self._pages}
        if self._pages and not self._spent:
            self._began = self._mark()

    def begin_pass(self) -> None:
        self._patience_s = PATIENCE_S

    def cut(self, costs: Sequence[float]) -> list[slice]:
        if not self._pages:
            return super().cut(costs)
        cuts, start, total = [], 0, 0.0
        for place, cost in enumerate(costs):
            if total and total + cost > self._piece:
                cuts.append(slice(start, place))
                start, total = place, 0.0
            total += cost
        return [*cuts, slice(start, len(costs))]

    def spend(self, operations: float) -> None:
        if not self._pages:
            return
        self._spent += operations
        if self._spent < self._piece:
            return
        pieces = self._spent / self._piece
        self._sent.append((self._began, self._mark(), self._spent))
        self._spent = 0.0
        for page in self._pages:
            page.note_work()
        # The GPU goes on with this piece while we wait for the one before; unless every step is to have few.
        ahead = 0 if self._decode_pieces and self._is_waited_for() else 1
        while len(self._sent) > ahead:
            began, ended, done = self._sent.pop(0)
            ended.wait()
            self._rate = max(self._rate, done / max(ended.seconds_since(began), 1e-6))
        self._wait(pieces)
        self._began = self._mark()

    @property
    def _piece(self) -> float:
        return self._rate * self._piece_s

    def _is_waited_for(self) -> bool:
        return any(page.step() for page in self._pages)

    def _wait(self, pieces: float) -> None:
        """Wait while an engine computes a step during which enough was sent, with these pieces."""
        began = self._clock()
        for page, (last, sent) in self._steps.items():
            step = page.step()
            self._steps[page] = step, pieces + (sent if step == last else 0.0)
        while (waited := self._clock() - began) < self._patience_s and self._is_held():
            self._sleep(POLL_S)
        waited = min(waited, self._patience_s)  # what is more was a halt of the process
        self._patience_s -= waited
        self._count_piece(waited)

    def _is_held(self) -> bool:
        steps = self._steps.items()
        return any(step and sent >= self._allowed(step) and page.step() == step for page, (step, sent) in steps)

    def _allowed(self, step: int) -> float:
        return PREFILL_PIECES if step & PREFILL else self._decode_pieces or math.inf


@dataclass(frozen=True, slots=True)
class PassPace:
    """Pace of one pass of the tower."""

    pace: Pace
    attention: tuple[tuple[slice, float], ...]  # tiles that are attended in one launch, and its operations
    row: float  # operations of all products of a layer, for a row

    def spend(self, rows: slice) -> None:
        """Note that the products of these rows were sent."""
        self.pace.spend((rows.stop - rows.start) * self.row)


WHOLE = PassPace(Pace(), ((slice(None), 0.0),), 0.0)


def pass_pace(pace: Pace, host: HostTables, config: VisionConfig) -> PassPace:
    """Return the pace of a pass."""
    costs = _attention_costs(host, config)
    parts = [slice(start, start + ALIGNED_TILES) for start in range(0, len(costs), ALIGNED_TILES)]
    cuts = pace.cut([sum(costs[tiles]) for tiles in parts])
    attention = [slice(parts[cut.start].start, min(parts[cut.stop - 1].stop, len(costs))) for cut in cuts]
    return PassPace(pace, tuple((tiles, sum(costs[tiles])) for tiles in attention), _row_operations(config))


def pass_operations(host: HostTables, config: VisionConfig) -> float:
    """Return the operations of a pass of the tower, those of attention by the products that take as long."""
    layer = len(host.places) * _row_operations(config) + sum(_attention_costs(host, config))
    return config.depth * layer


def _attention_costs(host: HostTables, config: VisionConfig) -> list[float]:
    keys = host.tiles[:, 2] - host.tiles[:, 1]
    costs: list[float] = (keys.double() * (ATTENTION_COST * 4 * QUERIES * config.hidden_size)).tolist()
    return costs


def _row_operations(config: VisionConfig) -> float:
    width = config.hidden_size
    return 2.0 * width * (4 * width + 2 * config.intermediate_size)
