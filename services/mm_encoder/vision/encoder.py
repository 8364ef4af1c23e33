"""Encoder: patches of any number of images and videos to embeddings, in passes of bounded size.

A video is cut between pairs of frames, which neither the tower nor the resampler combines, so the size of a pass does
not grow with the length of a video.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from services.mm_encoder.media.patches import Grid, Patches
from services.mm_encoder.vision.graphs import PassGraphs, capture_sizes
from services.mm_encoder.vision.memory import graph_patches, rows_at_once
from services.mm_encoder.vision.normalise import normalise
from services.mm_encoder.vision.ops import Ops
from services.mm_encoder.vision.pace import WHOLE, Pace, PassPace, pass_operations, pass_pace
from services.mm_encoder.vision.resampler import run_resampler
from services.mm_encoder.vision.rows import spans
from services.mm_encoder.vision.tables import Tables, host_tables, to_device, upload
from services.mm_encoder.vision.tower import run_tower
from services.mm_encoder.vision.transfer import Download, Results, stage
from services.mm_encoder.vision.weights import VisionWeights
from shared.model.config import ModelConfig, VisionConfig


@dataclass(frozen=True, slots=True)
class Piece:
    """Patch rows [start, stop) of item `item`, which are whole frames of `grid`."""

    item: int
    start: int
    stop: int
    grid: Grid


def plan_passes(grids: Sequence[Grid], max_patches: int, temporal: int) -> list[list[Piece]]:
    """Cut items into pieces and pieces into passes of at most `max_patches`, if one pair of frames is not larger.

    Pieces of an item stay in order, over all passes; inside a pass, pieces with frames of one size are neighbours.
    """
    passes: list[list[Piece]] = []
    room = 0
    for piece in _pieces(grids, max_patches, temporal):
        size = piece.stop - piece.start
        if size > room:
            passes.append([])
            room = max_patches
        passes[-1].append(piece)
        room -= size
    return [sorted(each, key=lambda piece: (piece.grid[1:], piece.item, piece.start)) for each in passes]


def _pieces(grids: Sequence[Grid], max_patches: int, temporal: int) -> list[Piece]:
    found = []
    for item, (t, h, w) in enumerate(grids):
        frames = max(max_patches // (h * w) // temporal * temporal, temporal)
        for first in range(0, t, frames):
            last = min(first + frames, t)
            found.append(Piece(item, first * h * w, last * h * w, (last - first, h, w)))
    return found


class Encoder:
    """Vision model on its device. Not thread-safe: one thread runs it."""

    def __init__(
        self,
        weights: VisionWeights,
        config: ModelConfig,
        device: str,
        max_patches: int,
        mean: Sequence[float],
        std: Sequence[float],
        *,
        ops: Ops | None = None,
        at_once: int | None = None,
        card_bytes: int | None = None,
        pace: Pace | None = None,
    ) -> None:
        """`ops`, `at_once`, which is the rows computed at a time, and the card's memory are by default the device's.

        `pace`: if others use the device, too.
        """
        self._weights = weights
        self._config = config
        self._vision = config.vision
        self._device = torch.device(device)
        self._max_patches = max_patches
        self._dtype = weights.tower.patch_embed.dtype
        self._mean = torch.tensor(mean, dtype=torch.float32, device=device)
        self._std = torch.tensor(std, dtype=torch.float32, device=device)
        self._ops = ops or _operations(self._device, self._dtype, self._vision)
        self._pace = pace or Pace()
        self._largest = 0  # rows of a pass so far
        card = card_bytes or _card_bytes(self._device)
        self._at_once = at_once or rows_at_once(card)
        self._graphs = self._capture(graph_patches(card)) if self._ops.captured else None

    @torch.inference_mode()
    def _capture(self, most: int) -> PassGraphs:
        with _current(self._device):
            return PassGraphs(self._embed, self._run, self._vision, self._device, capture_sizes(most))

    @torch.inference_mode()
    def encode(self, items: Sequence[Patches]) -> list[Tensor]:
        """Return [rows, text hidden] in the model's dtype on the CPU, for each item."""
        with _current(self._device):
            return self._encode(items)

    def _encode(self, items: Sequence[Patches]) -> list[Tensor]:
        """Launch pass after pass; while the device computes one, put away the results of the one before."""
        self._pace.begin()
        results = Results(self._embeddings(item.grid) for item in items)
        before: tuple[Download, list[Piece]] | None = None
        for pieces in plan_passes([item.grid for item in items], self._max_patches, self._vision.temporal_merge_size):
            self._pace.begin_pass()
            rows = stage([items[piece.item].rows[piece.start : piece.stop] for piece in pieces], self._device)
            launched = Download(self._launch(rows, [piece.grid for piece in pieces])), pieces
            if before is not None:
                self._put_away(*before, results)
            before = launched
        if before is not None:
            self._put_away(*before, results)
        return results.whole()

    def _launch(self, rows: Tensor, grids: Sequence[Grid]) -> Tensor:
        """Return the embeddings of a pass, while the device computes them."""
        tables = host_tables(grids, self._vision)
        if self._graphs is not None and self._graphs.takes(tables):
            return self._graphs.run(rows, tables, self._pace, pass_operations(tables, self._vision))
        if self._device.type == "cuda" and len(rows) > self._largest:
            torch.cuda.empty_cache()  # a larger pass has no use for what smaller ones left there
            self._largest = len(rows)
        patches = self._embed(upload(rows, self._device))  # after which the pixels' memory is free
        # Torch's own attention takes frames whole, whatever tiles there are.
        pace = pass_pace(self._pace, tables, self._vision) if self._ops.captured else WHOLE
        return self._run(patches, to_device(tables, self._vision, self._device), pace)

    def _embed(self, rows: Tensor) -> Tensor:
        """Return [N, hidden] in the model's dtype for pixels."""
        weight = self._weights.tower.patch_embed
        patches = weight.new_empty(len(rows), len(weight))
        for some in spans(len(rows), self._at_once):
            torch.mm(normalise(rows[some], self._mean, self._std, self._dtype), weight.T, out=patches[some])
        return patches

    def _run(self, patches: Tensor, tables: Tables, pace: PassPace = WHOLE) -> Tensor:
        """Return the embeddings of embedded patches, whose memory is overwritten."""
        config, at_once = self._config, self._at_once
        x = run_tower(patches, tables, self._weights.tower, self._vision, self._ops, at_once, pace)
        return run_resampler(x, tables, self._weights.resampler, self._vision, config.norm_eps, at_once)

    def _put_away(self, download: Download, pieces: Sequence[Piece], results: Results) -> None:
        sizes = [self._embeddings(piece.grid) for piece in pieces]
        for piece, rows in zip(pieces, torch.split(download.wait(), sizes), strict=True):
            results.add(piece.item, rows)

    def _embeddings(self, grid: Grid) -> int:
        """Return the rows of the result for a grid."""
        t, h, w = grid
        return -(-t // self._vision.temporal_merge_size) * h * w // self._vision.spatial_merge_size**2


def _operations(device: torch.device, dtype: torch.dtype, vision: VisionConfig) -> Ops:
    """Return the operations for a device: kernels on a GPU, for the numbers and sizes that they are made for."""
    if device.type != "cuda" or dtype not in (torch.bfloat16, torch.float16):
        return Ops()
    # Triton exists for Linux only, and the CPU needs none.
    from services.mm_encoder.vision.kernels.attention import supports
    from services.mm_encoder.vision.kernels.gpu import gpu_ops

    return gpu_ops() if supports(vision.hidden_size // vision.num_heads) else Ops()


def _current(device: torch.device) -> AbstractContextManager[object]:
    """Make a GPU this thread's current one, which Triton launches on."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def _card_bytes(device: torch.device) -> int:
    """Return the memory of a GPU; 0 for other devices."""
    return torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else 0
