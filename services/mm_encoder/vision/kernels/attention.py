"""Attention within frames, of all frames of a pass in one launch.

Heads are 80 wide, between two powers of two, and libraries compute as if they were 128. Here a head is computed in two
products, the first 64 of its dimensions and the other 16, so that nothing is padded. A frame's last keys, fewer than a
tile, come first: they set the maximum that the others start with, and only they need a mask.
"""

from functools import cache
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from services.mm_encoder.vision.tables import QUERIES, Tables

LOG2_E = 1.4426950408889634  # exp2 is the hardware's exponential
KEYS = 64  # rows of a tile of keys
LEAST = 16  # dimensions that a matrix instruction takes
HOPPER = (9, 0)


class Launch(NamedTuple):
    """Way in which a device runs the kernel. `copies`: tiles are loaded by the copy engine (TMA)."""

    copies: bool
    options: dict[str, Any]


@triton.jit
def _attention_kernel(
    qkv_ptr, main, rest, tiles_ptr, stride, factor,
    WIDTH: tl.constexpr, D: tl.constexpr, A: tl.constexpr, B: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, COPIES: tl.constexpr,
):  # fmt: skip
    """Attend a tile of queries of a head to the keys of their frame, and write over the queries.

    main, rest: with COPIES, descriptors of qkv by [BN, A] and [BN, B]. A and B are the parts of D; B may be 0. A tile
    of a frame without rows is nothing: a graph has some to spare.
    """
    tile, head = tl.program_id(0), tl.program_id(1)
    first = tl.load(tiles_ptr + 3 * tile)
    start = tl.load(tiles_ptr + 3 * tile + 1)
    stop = tl.load(tiles_ptr + 3 * tile + 2)
    if start == stop:
        return
    m, n, a, b = first + tl.arange(0, BM), tl.arange(0, BN), tl.arange(0, A), A + tl.arange(0, B if B else 16)
    column = head * D
    own = m[:, None] < stop
    out_ptr = qkv_ptr + m[:, None].to(tl.int64) * stride + column
    end = start + (stop - start - 1) // BN * BN  # of the whole tiles
    seen = (end + n < stop)[:, None]
    last_ptr = qkv_ptr + (end + n)[:, None].to(tl.int64) * stride + column
    qa = tl.load(out_ptr + a[None, :], own, 0.0)
    ka = tl.load(last_ptr + WIDTH + a[None, :], seen, 0.0)
    va = tl.load(last_ptr + 2 * WIDTH + a[None, :], seen, 0.0)
    if B:
        qb = tl.load(out_ptr + b[None, :], own, 0.0)
        kb = tl.load(last_ptr + WIDTH + b[None, :], seen, 0.0)
        vb = tl.load(last_ptr + 2 * WIDTH + b[None, :], seen, 0.0)
        scores = tl.dot(qa, tl.trans(ka), tl.dot(qb, tl.trans(kb)))
    else:
        scores = tl.dot(qa, tl.trans(ka))
    scores = tl.where((end + n < stop)[None, :], scores, float("-inf"))
    high = tl.max(scores, 1) * factor
    shares = tl.exp2(scores * factor - high[:, None])
    total = tl.sum(shares, 1)
    acca = tl.dot(shares.to(qa.dtype), va)
    if B:
        accb = tl.dot(shares.to(qa.dtype), vb)
    for row in range(start, end, BN):
        if COPIES:
            ka = main.load([row, WIDTH + column])
            va = main.load([row, 2 * WIDTH + column])
        else:
            keys_ptr = qkv_ptr + (row + n)[:, None].to(tl.int64) * stride + WIDTH + column
            ka = tl.load(keys_ptr + a[None, :])
            va = tl.load(keys_ptr + WIDTH + a[None, :])
        if B:
            if COPIES:
                kb = rest.load([row, WIDTH + column + A])
                vb = rest.load([row, 2 * WIDTH + column + A])
            else:
                kb = tl.load(keys_ptr + b[None, :])
                vb = tl.load(keys_ptr + WIDTH + b[None, :])
            scores = tl.dot(qa, tl.trans(ka), tl.dot(qb, tl.trans(kb)))
        else:
            scores = tl.dot(qa, tl.trans(ka))
        peak = tl.maximum(high, tl.max(scores, 1) * factor)
        shrink = tl.exp2(high - peak)
        shares = tl.exp2(scores * factor - peak[:, None])
        total = total * shrink + tl.sum(shares, 1)
        acca = tl.dot(shares.to(qa.dtype), va, acca * shrink[:, None])
        if B:
            accb = tl.dot(shares.to(qa.dtype), vb, accb * shrink[:, None])
        high = peak
    tl.store(out_ptr + a[None, :], (acca / total[:, None]).to(qa.dtype), own)
    if B:
        tl.store(out_ptr + b[None, :], (accb / total[:, None]).to(qa.dtype), own)


def split(head_dim: int) -> tuple[int, int]:
    """Return the largest power of two in a head's width, and the rest."""
    main = 1 << (head_dim.bit_length() - 1)
    return main, head_dim - main


def supports(head_dim: int) -> bool:
    """Return True if both parts of a head are widths of a product."""
    main, rest = split(head_dim)
    return main >= LEAST and (rest == 0 or (rest >= LEAST and rest & (rest - 1) == 0))


def attend(qkv: Tensor, heads: int, tables: Tables) -> Tensor:
    """Attend each row to all rows of its frame; return [N, hidden], which is written over the queries.

    A program reads its queries before it writes, and no other reads them.
    """
    width = qkv.shape[1] // 3
    head_dim = width // heads
    main, rest = split(head_dim)
    how = launch_for(qkv.device)
    copied = [TensorDescriptor.from_tensor(qkv, [KEYS, part]) if how.copies and part else None for part in (main, rest)]
    _attention_kernel[(len(tables.tiles), heads)](
        qkv, *copied, tables.tiles, qkv.stride(0), head_dim**-0.5 * LOG2_E,
        width, head_dim, main, rest, QUERIES, KEYS, how.copies, **how.options,
    )  # fmt: skip
    return qkv[:, :width]


@cache
def launch_for(device: torch.device) -> Launch:
    """Return how a device runs the kernel."""
    return launch(torch.cuda.get_device_capability(device) if device.type == "cuda" else None)


def launch(capability: tuple[int, int] | None) -> Launch:
    """Return how devices of a capability run the kernel. On Hopper two programs share a multiprocessor, and one's
    exponentials are computed beside the other's products."""
    if capability == HOPPER:
        return Launch(True, {"num_warps": 8, "num_stages": 3, "maxnreg": 128})
    return Launch(False, {"num_warps": 8, "num_stages": 2})
