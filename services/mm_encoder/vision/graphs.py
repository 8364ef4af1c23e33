"""Small passes as CUDA graphs: the device computes them faster than the host can launch them one operation at a time.

A graph is a fixed list of launches on fixed addresses, here for a number of rows, whatever frames these belong to: all
that depends on frames is in tables, which are inputs. A pass is padded to the next size: no tile of attention covers
the rows that are too many, they are nobody's keys, and their results are dropped.

A pass is several graphs, of a few layers each: between two of them an engine on the same device may be waited for.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from services.mm_encoder.vision.pace import WHOLE, Pace, PassPace
from services.mm_encoder.vision.tables import QUERIES, HostTables, Tables, angles
from shared.model.config import VisionConfig

Embed = Callable[[Tensor], Tensor]
Run = Callable[[Tensor, Tables, PassPace], Tensor]

STEPS = 4  # sizes from one power of two to the next
SMALLEST = 256
# Rows of all layers of a graph, at least: 0.4 to 0.8 ms of an H200, and four times that of a card of 24 GB.
GRAPH_ROWS = 4096


def capture_sizes(most: int) -> list[int]:
    """Return the rows of passes to capture, up to `most`, which is a power of two."""
    sizes, size = [], SMALLEST
    while size <= most:
        sizes.append(size)
        size += max(SMALLEST, (1 << size.bit_length()) // 2 // STEPS)
    return sizes


def tile_room(rows: int) -> int:
    """Return the tiles that a graph has for a number of rows: twice those of one frame, and some."""
    return rows // QUERIES * 2 + 16


class Inputs(NamedTuple):
    """Device memory that a graph reads."""

    rows: Tensor  # [N, channels * patch * patch] uint8
    places: Tensor
    tiles: Tensor
    pairs: Tensor

    def cut(self, rows: int, result: int) -> "Inputs":
        """Return the inputs of a pass of `rows` rows, of which the result has `result`."""
        return Inputs(self.rows[:rows], self.places[:rows], self.tiles[: tile_room(rows)], self.pairs[:result])


class Graph(Protocol):
    """A CUDA graph."""

    def capture_end(self) -> None:
        """End the capture."""

    def replay(self) -> None:
        """Launch it."""


class Cuts(Pace):
    """Pace of a pass that is captured: begins another graph when the one there is has enough rows."""

    def __init__(self, begin: Callable[[], Graph]) -> None:
        """`begin`: begins to capture a graph."""
        self._begin = begin
        self._rows = 0.0  # of the graph that is captured
        self.graphs = [begin()]
        self.rows = list[float]()  # of each graph that is whole

    def spend(self, operations: float) -> None:
        """`operations`: rows of a layer."""
        self._rows += operations
        if self._rows >= GRAPH_ROWS:
            self.end()
            self.graphs.append(self._begin())

    def end(self) -> None:
        """End the capture of a graph."""
        self.graphs[-1].capture_end()
        self.rows.append(self._rows)
        self._rows = 0.0


class Captured(NamedTuple):
    """Pass of some size."""

    graphs: list[Graph]
    shares: list[float]  # of the layers that each graph has
    out: Tensor

    def run(self, pace: Pace, operations: float) -> Tensor:
        """Launch it, which takes so many operations."""
        for graph, share in zip(self.graphs, self.shares, strict=True):
            graph.replay()
            pace.spend(operations * share)
        return self.out


class PassGraphs:
    """Captured passes of one model."""

    def __init__(
        self, embed: Embed, run: Run, config: VisionConfig, device: torch.device, sizes: Sequence[int]
    ) -> None:
        """Capture. Launches of every size are compiled on the way."""
        self._embed, self._run, self._config, self._device, self._sizes = embed, run, config, device, sizes
        self._block = config.spatial_merge_size**2
        most, pixels = sizes[-1], config.in_channels * config.patch_size**2
        self._inputs = Inputs(
            torch.zeros(most, pixels, dtype=torch.uint8, device=device),
            torch.zeros(most, 2, device=device),
            torch.zeros(tile_room(most), 3, dtype=torch.int32, device=device),
            torch.zeros(most // self._block, config.temporal_merge_size, dtype=torch.int64, device=device),
        )
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._pool = torch.cuda.graph_pool_handle()
        self._passes = {size: self._capture(size) for size in reversed(sizes)}  # they share the memory of the largest

    def takes(self, host: HostTables) -> bool:
        """Return True if a graph has room for a pass."""
        rows = len(host.places)
        return rows <= self._sizes[-1] and len(host.tiles) <= tile_room(self._size(rows))

    def run(self, rows: Tensor, host: HostTables, pace: Pace, operations: float) -> Tensor:
        """Return the result, which is valid until the next run. Returns while the device computes.

        `rows` are in pinned memory. `operations`: of the pass.
        """
        size = self._size(len(rows))
        inputs = self._inputs.cut(size, size // self._block)
        filled = Inputs(rows, host.places, padded(host.tiles, len(inputs.tiles)), padded(host.pairs, len(inputs.pairs)))
        for room, table in zip(inputs, filled, strict=True):
            room[: len(table)].copy_(table.pin_memory(), non_blocking=True)
        return self._passes[size].run(pace, operations)[: len(host.pairs)]

    def _size(self, rows: int) -> int:
        return next(size for size in self._sizes if size >= rows)

    def _capture(self, size: int) -> Captured:
        inputs = self._inputs.cut(size, size // self._block)
        # Run once before: a capture must not compile kernels or create the libraries' handles.
        self._forward(inputs, WHOLE)
        torch.cuda.synchronize(self._device)
        torch.cuda.empty_cache()  # the graphs' pool cannot use what that has left
        with torch.cuda.stream(self._stream):
            cuts = Cuts(self._begin)
            try:
                out = self._forward(inputs, PassPace(cuts, WHOLE.attention, 1.0))
            finally:
                cuts.end()
        return Captured(cuts.graphs, [rows / sum(cuts.rows) for rows in cuts.rows], out)

    def _begin(self) -> Graph:
        graph = torch.cuda.CUDAGraph()
        graph.capture_begin(self._pool, capture_error_mode="thread_local")  # other threads may call the driver
        return graph

    def _forward(self, inputs: Inputs, pace: PassPace) -> Tensor:
        cos, sin = angles(inputs.places, self._config)
        return self._run(self._embed(inputs.rows), Tables((), inputs.tiles, cos, sin, inputs.pairs), pace)


def padded(table: Tensor, rows: int) -> Tensor:
    """Return a table with zeros behind it: tiles of no rows, and results that nobody reads."""
    return F.pad(table, (0, 0, 0, rows - len(table)))
