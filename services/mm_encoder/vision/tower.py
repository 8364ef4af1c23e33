"""Vision tower: patches to one vector each. Attention is within a frame.

Frames are independent, so a pass may hold any mix of frames; consecutive small ones of one size are one batch of
attention. For a whole pass, only the rows themselves and one layer's keys and values are in memory; all else is
computed for some rows at a time (rows.py), so that the largest image leaves room on a shared card.
"""

from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from services.mm_encoder.vision.memory import ROWS
from services.mm_encoder.vision.rows import by_rows, spans
from services.mm_encoder.vision.weights import Block, Linear, Tower
from shared.model.config import VisionConfig

Frames = Sequence[tuple[int, int, int]]  # grids: (frames, patch rows, patch columns), in row order


class Part(NamedTuple):
    """Rows of one call of attention: those of `frames` whole frames of one size, or some of one frame."""

    rows: slice
    keys: slice  # rows of the whole frames
    frames: int


def parts(grids: Frames) -> Iterator[Part]:
    """Yield all rows in order, in parts of at most ROWS rows."""
    start = 0
    for length, run in groupby(h * w for t, h, w in grids for _ in range(t)):
        count = sum(1 for _ in run)
        together = max(1, ROWS // length)
        for first in range(0, count, together):
            frames = min(together, count - first)
            stop = start + frames * length
            for rows in spans(stop - start):
                yield Part(slice(start + rows.start, start + rows.stop), slice(start, stop), frames)
            start = stop


def run_tower(x: Tensor, grids: Frames, weights: Tower, config: VisionConfig) -> Tensor:
    """Map [N, channels * patch * patch] patches to [N, hidden]; N is the sum of t * h * w, in merge-block order."""
    x = by_rows(lambda rows: F.linear(rows, weights.patch_embed), x)
    cos, sin = rotary(grids, config, x.device)
    cut = list(parts(grids))
    for block in weights.blocks:
        _add_layer(x, cut, cos, sin, block, config)
    return by_rows(lambda rows: _norm(rows, weights.norm, config.norm_eps), x)


def _add_layer(x: Tensor, cut: Sequence[Part], cos: Tensor, sin: Tensor, block: Block, config: VisionConfig) -> None:
    """Apply a layer in place: rows depend on each other through keys and values alone."""
    keys, values = _keys_values(x, cos, sin, block, config)
    for rows, frame, frames in cut:
        own = x[rows]
        query = _queries(own, cos[rows], sin[rows], block, config)
        own += _attention(query, keys[frame], values[frame], frames, block)
        own += _mlp(_norm(own, block.norm2, config.norm_eps), block)


def rotary(grids: Frames, config: VisionConfig, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return cos and sin, each [N, 1, head_dim] fp32: a quarter of the dimensions by row, one by column, repeated."""
    quarter = config.hidden_size // config.num_heads // 4
    frequencies = config.rope_theta ** (-torch.arange(quarter, dtype=torch.float32, device=device) / quarter)
    places = torch.cat([_places(h, w, config.spatial_merge_size, device).repeat(t, 1) for t, h, w in grids])
    angles = (places[:, :, None] * frequencies).flatten(1).repeat(1, 2)[:, None]
    return angles.cos(), angles.sin()


def _places(h: int, w: int, merge: int, device: torch.device) -> Tensor:
    """Return [h * w, 2] float: (row, column) of each patch of a frame, in merge-block order."""
    rows, columns = torch.meshgrid(torch.arange(h, device=device), torch.arange(w, device=device), indexing="ij")
    blocks = torch.stack([rows, columns], dim=-1).reshape(h // merge, merge, w // merge, merge, 2)
    return blocks.permute(0, 2, 1, 3, 4).reshape(h * w, 2).float()


def _keys_values(x: Tensor, cos: Tensor, sin: Tensor, block: Block, config: VisionConfig) -> tuple[Tensor, Tensor]:
    """Return keys and values, each [N, heads, head_dim]."""
    width, shape = x.shape[1], (len(x), config.num_heads, x.shape[1] // config.num_heads)
    keys, values = x.new_empty(shape), x.new_empty(shape)
    for rows in spans(len(x)):
        normed = _norm(x[rows], block.norm1, config.norm_eps)
        both = F.linear(normed, block.qkv.weight[width:], block.qkv.bias[width:]).view(-1, 2, *shape[1:])
        keys[rows] = _rotate(both[:, 0], cos[rows], sin[rows])
        values[rows] = both[:, 1]
    return keys, values


def _queries(x: Tensor, cos: Tensor, sin: Tensor, block: Block, config: VisionConfig) -> Tensor:
    """Return queries, [n, heads, head_dim]."""
    width = x.shape[1]
    normed = _norm(x, block.norm1, config.norm_eps)
    query = F.linear(normed, block.qkv.weight[:width], block.qkv.bias[:width])
    return _rotate(query.view(len(x), config.num_heads, -1), cos, sin)


def _attention(query: Tensor, keys: Tensor, values: Tensor, frames: int, block: Block) -> Tensor:
    """Return [n, hidden]: attention of the queries of `frames` frames over all keys of these frames."""
    # [frames, heads, rows of a frame, head_dim]
    q, k, v = (each.view(frames, -1, *each.shape[1:]).transpose(1, 2) for each in (query, keys, values))
    attended = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(len(query), -1)
    return F.linear(attended, block.proj.weight, block.proj.bias)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the halves of [N, heads, head_dim], in fp32."""
    left, right = x.float().chunk(2, dim=-1)
    return (x.float() * cos + torch.cat([-right, left], dim=-1) * sin).to(x.dtype)


def _mlp(x: Tensor, block: Block) -> Tensor:
    inner = F.linear(x, block.fc1.weight, block.fc1.bias)
    return F.linear(inner * torch.sigmoid(1.702 * inner), block.fc2.weight, block.fc2.bias)


def _norm(x: Tensor, norm: Linear, eps: float) -> Tensor:
    return F.layer_norm(x, norm.weight.shape, norm.weight, norm.bias, eps)
