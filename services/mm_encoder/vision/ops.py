"""Operations of the vision tower, in torch: their definition, and the way on a CPU.

All but matrix products: these are torch's everywhere. Kernels for GPUs, of the same signatures, are in kernels/;
encoder.py chooses.
"""

from collections.abc import Sequence
from itertools import groupby
from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from services.mm_encoder.vision.memory import ROWS
from services.mm_encoder.vision.rows import spans
from services.mm_encoder.vision.tables import Tables
from services.mm_encoder.vision.weights import Linear


class AddNorm(Protocol):
    def __call__(self, x: Tensor, more: Tensor | None, norm: Linear, eps: float) -> Tensor: ...


class Rotate(Protocol):
    def __call__(self, qkv: Tensor, heads: int, tables: Tables) -> None: ...


class Attend(Protocol):
    def __call__(self, qkv: Tensor, heads: int, tables: Tables) -> Tensor: ...


class QuickGelu(Protocol):
    def __call__(self, x: Tensor) -> None: ...


def add_norm(x: Tensor, more: Tensor | None, norm: Linear, eps: float) -> Tensor:
    """Add `more`, if any, to x in place; return LayerNorm of the sum. Both are [n, hidden]."""
    if more is not None:
        x += more
    return F.layer_norm(x, norm.weight.shape, norm.weight, norm.bias, eps)


def rotate(qkv: Tensor, heads: int, tables: Tables) -> None:
    """Rotate queries and keys in place, in fp32: dimension i of a head with dimension i + head_dim / 2.

    qkv: [N, 3 * hidden], queries, keys and values of all heads.
    """
    both = qkv.view(len(qkv), 3 * heads, -1)[:, : 2 * heads]
    for rows in spans(len(qkv), ROWS):
        cos, sin = tables.cos[rows, None], tables.sin[rows, None]
        left, right = both[rows].float().chunk(2, dim=-1)
        both[rows] = torch.cat([left * cos - right * sin, right * cos + left * sin], dim=-1).to(qkv.dtype)


def attend(qkv: Tensor, heads: int, tables: Tables) -> Tensor:
    """Attend each row to all rows of its frame; return [N, hidden], which is written over the queries."""
    width = qkv.shape[1] // 3
    for rows, frame, frames in parts(tables.frames):
        query, key, value = (
            each.view(frames, len(each) // frames, heads, -1).transpose(1, 2)
            for each in (qkv[rows, :width], qkv[frame, width : 2 * width], qkv[frame, 2 * width :])
        )  # [frames, heads, rows of a frame, head_dim]
        attended = F.scaled_dot_product_attention(query, key, value)
        qkv[rows, :width] = attended.transpose(1, 2).flatten(2).flatten(0, 1)
    return qkv[:, :width]


def quick_gelu(x: Tensor) -> None:
    """Compute x * sigmoid(1.702 x) in place."""
    x *= torch.sigmoid(1.702 * x)


class Part(NamedTuple):
    """Rows of one call of attention: those of `frames` whole frames of one size, or some of one frame."""

    rows: slice
    keys: slice  # rows of the whole frames
    frames: int


def parts(frames: Sequence[int]) -> list[Part]:
    """Cut all rows, in order, into parts of at most ROWS rows; `frames` are the rows of each frame."""
    found, start = [], 0
    for length, run in groupby(frames):
        count = sum(1 for _ in run)
        together = max(1, ROWS // length)
        for first in range(0, count, together):
            some = min(together, count - first)
            stop = start + some * length
            cut = (slice(start + rows.start, start + rows.stop) for rows in spans(stop - start, ROWS))
            found += [Part(rows, slice(start, stop), some) for rows in cut]
            start = stop
    return found


class Ops(NamedTuple):
    """Operations of one kind of device. `captured`: they read frames from device memory, as a graph does."""

    add_norm: AddNorm = add_norm
    rotate: Rotate = rotate
    attend: Attend = attend
    quick_gelu: QuickGelu = quick_gelu
    captured: bool = False
