"""Encoder: patches of any number of images and videos to embeddings, in passes of bounded size.

A video is cut between pairs of frames, which neither the tower nor the resampler combines, so the size of a pass does
not grow with the length of a video.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from services.mm_encoder.media.patches import Grid, Patches
from services.mm_encoder.vision.normalise import normalise
from services.mm_encoder.vision.resampler import run_resampler
from services.mm_encoder.vision.rows import by_rows
from services.mm_encoder.vision.tower import run_tower
from services.mm_encoder.vision.weights import VisionWeights
from shared.model.config import ModelConfig


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
    ) -> None:
        self._weights = weights
        self._config = config
        self._device = device
        self._max_patches = max_patches
        self._dtype = weights.tower.patch_embed.dtype
        self._mean = torch.tensor(mean, dtype=torch.float32, device=device)
        self._std = torch.tensor(std, dtype=torch.float32, device=device)

    @torch.inference_mode()
    def encode(self, items: Sequence[Patches]) -> list[Tensor]:
        """Return [rows, text hidden] in the model's dtype on the CPU, for each item."""
        done: list[list[Tensor]] = [[] for _ in items]
        temporal = self._config.vision.temporal_merge_size
        for pieces in plan_passes([item.grid for item in items], self._max_patches, temporal):
            rows = torch.cat([torch.from_numpy(items[p.item].rows[p.start : p.stop]) for p in pieces])
            out = self._run(rows, [p.grid for p in pieces]).cpu()
            merged = self._config.vision.spatial_merge_size**2
            sizes = [-(-p.grid[0] // temporal) * p.grid[1] * p.grid[2] // merged for p in pieces]
            for piece, part in zip(pieces, torch.split(out, sizes), strict=True):
                done[piece.item].append(part)
        return [torch.cat(parts) for parts in done]

    def _run(self, rows: Tensor, grids: Sequence[Grid]) -> Tensor:
        vision = self._config.vision
        x = by_rows(lambda some: normalise(some.to(self._device), self._mean, self._std, self._dtype), rows)
        x = run_tower(x, grids, self._weights.tower, vision)
        return run_resampler(x, grids, self._weights.resampler, vision, self._config.norm_eps)
