"""Tables of a pass: all that its grids alone determine, built on the host and uploaded without waiting.

Frames are independent, so a pass may hold any mix of frames; the tables say to which one each row belongs.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import torch
from torch import Tensor

from shared.model.config import VisionConfig

Grids = Sequence[tuple[int, int, int]]  # (frames, patch rows, patch columns) of each item, in row order
QUERIES = 128  # rows of a tile of queries, which is of one frame


@dataclass(frozen=True, slots=True)
class HostTables:
    """Tables of a pass on the host."""

    frames: tuple[int, ...]  # rows of each frame, in order
    places: Tensor  # [N, 2] float: row and column of each patch in its frame
    tiles: Tensor  # [tiles, 3] int32: a tile's first row, its frame's first row, and the row after its frame's last
    pairs: Tensor  # [rows of the result, frames of one] int64: the vectors that the resampler joins


@dataclass(frozen=True, slots=True)
class Tables:
    """Tables of a pass on the device: all that its layers read beside rows and weights."""

    frames: tuple[int, ...]  # as in HostTables; kernels read tiles instead
    tiles: Tensor
    cos: Tensor  # [N, head_dim / 2] fp32, of the angle that each pair of dimensions is rotated by
    sin: Tensor
    pairs: Tensor

    def some(self, tiles: slice) -> "Tables":
        """Return the tables with some of the tiles."""
        return replace(self, tiles=self.tiles[tiles])


def host_tables(grids: Grids, config: VisionConfig) -> HostTables:
    """Build the tables of a pass over `grids`."""
    frames = tuple(h * w for t, h, w in grids for _ in range(t))
    places = torch.cat([_places(h, w, config.spatial_merge_size).repeat(t, 1) for t, h, w in grids])
    pairs = _pairs(grids, config.spatial_merge_size**2, config.temporal_merge_size)
    return HostTables(frames, places, _tiles(frames), pairs)


def to_device(host: HostTables, config: VisionConfig, device: torch.device) -> Tables:
    """Return the tables on the device."""
    cos, sin = angles(upload(host.places, device), config)
    return Tables(host.frames, upload(host.tiles, device), cos, sin, upload(host.pairs, device))


def upload(tensor: Tensor, device: torch.device) -> Tensor:
    """Copy to the device: to a GPU through pinned memory, in the order of its work and without waiting for it."""
    if device.type == "cuda":
        tensor = tensor.pin_memory()  # itself, if it is pinned already
    return tensor.to(device, non_blocking=True)


def angles(places: Tensor, config: VisionConfig) -> tuple[Tensor, Tensor]:
    """Return cos and sin: a half of the pairs of dimensions turns by the patch's row, the other by its column."""
    quarter = config.hidden_size // config.num_heads // 4
    frequencies = config.rope_theta ** (-torch.arange(quarter, dtype=torch.float32, device=places.device) / quarter)
    turns = (places[:, :, None] * frequencies).flatten(1)
    return turns.cos(), turns.sin()


@lru_cache(maxsize=64)
def _places(h: int, w: int, merge: int) -> Tensor:
    """Return [h * w, 2] float: (row, column) of each patch of a frame, in merge-block order."""
    rows, columns = torch.meshgrid(torch.arange(h), torch.arange(w), indexing="ij")
    blocks = torch.stack([rows, columns], dim=-1).reshape(h // merge, merge, w // merge, merge, 2)
    return blocks.permute(0, 2, 1, 3, 4).reshape(h * w, 2).float()


def _tiles(frames: Sequence[int]) -> Tensor:
    """Cut each frame into tiles of QUERIES rows, of which the last has what is left."""
    rows = torch.tensor(frames)
    stops = rows.cumsum(0)
    counts = (rows + QUERIES - 1) // QUERIES
    frame = torch.repeat_interleave(counts)
    within = torch.arange(len(frame)) - (counts.cumsum(0) - counts)[frame]
    starts = (stops - rows)[frame]
    return torch.stack([starts + within * QUERIES, starts, stops[frame]], dim=1).int()


def _pairs(grids: Grids, block: int, temporal: int) -> Tensor:
    """Return the indices of the vectors, one for each `block` rows, that a row of the result joins: those at one place
    of consecutive frames. A single frame is joined with itself."""
    found, start = [], 0
    for t, h, w in grids:
        each = h * w // block
        frames = torch.arange(start, start + t * each).view(t, each)
        if t == 1:
            frames = frames.expand(temporal, each)
        found.append(frames.reshape(-1, temporal, each).transpose(1, 2).flatten(0, 1))
        start += t * each
    return torch.cat(found)
