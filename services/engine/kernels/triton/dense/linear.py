"""Matrix products with a weight that may be quantised.

With plain weights the vendor library multiplies, but for very few rows. Quantised weights are dequantised in registers
while the product waits for memory; from so many rows on that it is bound by arithmetic, they are dequantised once, at
loading if memory allows, and the library multiplies.

With very few rows a program has all inputs of some outputs, a part of them a warp, and loads them before the previous
kernel has ended. With few rows the product is split-K: programs share a weight's inputs, and the reader of the product
sums the parts, in order, so that the float32 sum does not depend on which program finished first.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from services.engine.kernels.quantize import Quantized, Weight, bits_of, stored_inputs
from services.engine.kernels.triton.common.launch import pdl_options, wait_for_previous_kernel
from services.engine.kernels.triton.common.sizes import ceil_div, ceil_pow2
from services.engine.kernels.triton.dense.dequantize import plain
from services.engine.kernels.triton.dense.matmul import (
    STEP,
    dot_tile,
    gate_or_up,
    gated,
    scales,
    steps,
    storage,
    subgroups_of,
    widen,
)
from services.engine.kernels.triton.dense.silu_mul import silu_mul

LIBRARY_ROWS = 512  # from here on a product is bound by arithmetic
PLAIN_ROWS = 96  # from here on the library is faster, if the weight is kept dequantised
EARLY_ROWS = 32  # up to here a weight is loaded before the previous kernel has ended
UNSPLIT_ROWS, UNSPLIT_PLAIN_ROWS = 16, 32  # up to here a program has all inputs: quantised, plain
UNSPLIT_BITS = (8, 16)
MOST_SPLITS = 4  # programs that share the inputs of an output, and so parts of a product
PARTS, PART = 2, 128  # warps of such a program, and inputs of a warp at a time


@triton.jit
def unsplit_product(
    x_ptr, w_ptr, scale_ptr, m, n, columns, M, IN, x_stride, w_stride,
    BITS: tl.constexpr, PARTS: tl.constexpr, PART: tl.constexpr, EVEN: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Return weight[n] times x[m]^T: [BN, BM] float32, of the weight's rows n [BN] where `columns`, and x's rows m < M.

    PARTS warps, each with a part of every block of PARTS PART inputs. Waits for the previous kernel.
    """
    k = tl.arange(0, PARTS)[:, None] * PART + tl.arange(0, PART)[None, :]
    rows, columns = (m < M)[None, None, :], columns[None, :, None]
    w_ptrs = w_ptr + n.to(tl.int64)[None, :, None] * w_stride + k[:, None, :]
    x_ptrs = x_ptr + m.to(tl.int64)[None, None, :] * x_stride + k[:, :, None]
    # The weight does not depend on the previous kernel.
    w = tl.load(w_ptrs) if EVEN else tl.load(w_ptrs, columns & (k < IN)[:, None, :], 0)
    wait_for_previous_kernel(PDL)
    x = tl.load(x_ptrs, rows if EVEN else rows & (k < IN)[:, :, None], 0.0)
    acc = tl.zeros((PARTS, n.shape[0], m.shape[0]), tl.float32)
    acc = tl.dot(widen(w, x.dtype), x, acc, input_precision="ieee")
    for first in range(PARTS * PART, IN, PARTS * PART):
        inside = first + k < IN
        w = tl.load(w_ptrs + first) if EVEN else tl.load(w_ptrs + first, columns & inside[:, None, :], 0)
        x = tl.load(x_ptrs + first, rows if EVEN else rows & inside[:, :, None], 0.0)
        acc = tl.dot(widen(w, x.dtype), x, acc, input_precision="ieee")
    total = tl.sum(acc, 0)
    if BITS != 16:
        total *= scales(scale_ptr + n, tl.reshape(columns, (n.shape[0],)))[:, None]
    return total


@triton.jit
def _unsplit_kernel(
    x_ptr, w_ptr, scale_ptr, out_ptr, M, N, IN, x_stride, w_stride,
    GATED: tl.constexpr, BITS: tl.constexpr, PARTS: tl.constexpr, PART: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, EVEN: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Store the product, or silu(gate) up of it. N: outputs; of a gated product, a half of the weight's rows."""
    m = tl.program_id(1) * BM + tl.arange(0, BM)
    OUTPUTS: tl.constexpr = BN // 2 if GATED else BN
    first = tl.program_id(0) * OUTPUTS
    if GATED:
        output, is_up = gate_or_up(first, BN)
        w_row = output + is_up * N
    else:
        output = first + tl.arange(0, BN)
        w_row = output
    acc = unsplit_product(
        x_ptr, w_ptr, scale_ptr, m, w_row, output < N, M, IN, x_stride, w_stride, BITS, PARTS, PART, EVEN, PDL
    )  # fmt: skip
    if GATED:
        acc = gated(acc, BN, BM)
    n = first + tl.arange(0, OUTPUTS)
    out_ptrs = out_ptr + m.to(tl.int64)[None, :] * N + n[:, None]
    tl.store(out_ptrs, acc.to(out_ptr.dtype.element_ty), (m < M)[None, :] & (n < N)[:, None])


@triton.jit
def _linear_kernel(
    x_ptr, w_ptr, scale_ptr, group_ptr, out_ptr, M, N, IN, share, x_stride, w_stride,
    BITS: tl.constexpr, SUBGROUPS: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    EARLY: tl.constexpr, EVEN: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Store weight times x^T over part program_id(2) of the inputs, which are `share` times BK."""
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    m = tl.program_id(1) * BM + tl.arange(0, BM)
    block = tl.program_id(2) * share
    last = tl.minimum(block + share, steps(IN, BK, BITS))
    rows, columns = (m < M)[None, :], (n < N)[:, None]
    x_ptrs = x_ptr + m.to(tl.int64)[None, :] * x_stride
    w_ptrs = w_ptr + n.to(tl.int64)[:, None] * w_stride
    g_ptrs = group_ptr + n[:, None]
    acc = tl.zeros((BN, BM), tl.float32)
    # The weight does not depend on the previous kernel: with few rows its load starts before x is there.
    if BITS != 16:
        scale = scales(scale_ptr + n, n < N)[:, None]
    if EARLY:
        column = block * BK + tl.arange(0, BK)
        inside = column < IN
        w = tl.load(w_ptrs + column[None, :], columns & inside[None, :], 0)
        wait_for_previous_kernel(PDL)
        x = tl.load(x_ptrs + column[:, None], rows & inside[:, None], 0.0)
        acc = tl.dot(widen(w, x.dtype), x, acc, input_precision="ieee")
        block += 1
    else:
        wait_for_previous_kernel(PDL)
    for nth in range(block, last):
        acc = dot_tile(acc, w_ptrs, g_ptrs, columns, x_ptrs, rows, nth, IN, N, BK, BITS, SUBGROUPS, EVEN)
    if BITS != 16:
        acc *= scale
    out_ptrs = out_ptr + (tl.program_id(2).to(tl.int64) * M + m[None, :]) * N + n[:, None]
    tl.store(out_ptrs, acc.to(out_ptr.dtype.element_ty), rows & columns)


@dataclass(frozen=True, slots=True)
class UnsplitLaunch:
    """Launch of a product of very few rows: every program has all inputs."""

    grid: tuple[int, int]  # tiles of outputs, tiles of rows
    arguments: tuple[Tensor, Tensor, Tensor]  # x, weight, scales
    sizes: tuple[int, ...]  # M to w_stride
    options: dict[str, Any]


def unsplit_launch(x: Tensor, weight: Weight, gated: bool = False) -> UnsplitLaunch | None:
    """Return the launch, or None where there are too many rows for it, or scales of groups."""
    (data, scale, _), bits = storage(weight), bits_of(weight)
    few = len(x) <= (UNSPLIT_PLAIN_ROWS if bits == 16 else UNSPLIT_ROWS)
    if not few or bits not in UNSPLIT_BITS or subgroups_of(weight):
        return None
    (rows, inputs), weight_rows = x.shape, len(data)
    bm, bn = min(32, max(8, ceil_pow2(rows))), 16
    outputs, tile = (weight_rows // 2, bn // 2) if gated else (weight_rows, bn)
    options = {
        "BITS": bits, "PARTS": PARTS, "PART": PART, "BM": bm, "BN": bn,
        "EVEN": inputs % (PARTS * PART) == 0 and outputs % tile == 0,
        "num_warps": PARTS, "num_stages": 4 if x.element_size() == 2 else 1, **pdl_options(x),
    }  # fmt: skip
    sizes = (rows, outputs, inputs, x.stride(0), data.stride(0))
    return UnsplitLaunch((ceil_div(outputs, tile), ceil_div(rows, bm)), (x, data, scale), sizes, options)


def linear(x: Tensor, weight: Weight) -> Tensor:
    """See the reference. The rows of `x` may be strided."""
    partial = partial_linear(x, weight)
    return partial[0] if len(partial) == 1 else partial.sum(0).to(x.dtype)


def partial_linear(x: Tensor, weight: Weight) -> Tensor:
    """Multiply as `linear`, but leave split-K parts to be summed by the reader.

    Returns:
        [parts, N, out]: one part in the dtype of x, or several in float32.
    """
    launch = unsplit_launch(x, weight)
    if launch is not None:
        return _unsplit_linear(x, launch, gated=False).unsqueeze(0)
    if not isinstance(weight, Quantized) or len(x) >= (LIBRARY_ROWS if weight.plain is None else PLAIN_ROWS):
        return F.linear(x, plain(weight)).unsqueeze(0)
    return _split_linear(x, weight)


def gated_linear(x: Tensor, weight: Weight) -> Tensor:
    """Return silu(gate) up of the product.

    Args:
        weight: [2 I, in]: gate rows, then up rows.

    Returns:
        [N, I] in the dtype of x.
    """
    launch = unsplit_launch(x, weight, gated=True)
    return silu_mul(partial_linear(x, weight), x.dtype) if launch is None else _unsplit_linear(x, launch, gated=True)


def _unsplit_linear(x: Tensor, launch: UnsplitLaunch, gated: bool) -> Tensor:
    out = torch.empty(len(x), launch.sizes[1], dtype=x.dtype, device=x.device)
    _unsplit_kernel[launch.grid](*launch.arguments, out, *launch.sizes, GATED=gated, **launch.options)
    return out


def _split_linear(x: Tensor, weight: Quantized) -> Tensor:
    tiles = _tiles(len(x), len(weight), weight.bits)
    return tiled_linear(x, weight, tiles, early=weight.bits == 8 and not weight.subgroups and len(x) <= EARLY_ROWS)


@dataclass(frozen=True, slots=True)
class LinearTiles:
    """Shape of a product's programs."""

    rows: int  # of activations
    outputs: int
    inputs: int  # at a time
    warps: int
    stages: int
    splits: int = 1  # programs that share the inputs of an output, at most


def tiled_linear(
    x: Tensor, weight: Weight, tiles: LinearTiles, early: bool = False, dtype: torch.dtype | None = None
) -> Tensor:
    """Multiply in tiles of a given shape.

    Args:
        early: load the weight before the previous kernel has ended.
        dtype: of a product in one part; None: that of x.

    Returns:
        [parts, N, out]: one part, or several in float32.
    """
    data, scale, groups = storage(weight)
    (rows, inputs), outputs, stored = x.shape, len(data), stored_inputs(weight)
    share = ceil_div(stored, tiles.inputs * tiles.splits)
    parts = ceil_div(stored, share * tiles.inputs)
    out = torch.empty(parts, rows, outputs, dtype=(dtype or x.dtype) if parts == 1 else torch.float32, device=x.device)
    _linear_kernel[(ceil_div(outputs, tiles.outputs), ceil_div(rows, tiles.rows), parts)](
        x, data, scale, groups, out, rows, outputs, inputs, share, x.stride(0), data.stride(0),
        BITS=bits_of(weight), SUBGROUPS=subgroups_of(weight), BM=tiles.rows, BN=tiles.outputs, BK=tiles.inputs,
        EARLY=early, EVEN=inputs == stored and inputs % tiles.inputs == 0 and outputs % tiles.outputs == 0,
        num_warps=tiles.warps, num_stages=tiles.stages if x.element_size() == 2 else 1, **pdl_options(x),
    )  # fmt: skip
    return out


def _tiles(rows: int, outputs: int, bits: int) -> LinearTiles:
    """Return the fastest tiles. Few rows: traffic is the weight's, so many programs load it."""
    splits = max(1, min(MOST_SPLITS, 32768 // outputs))
    if bits == 4:
        return LinearTiles(min(64, max(16, ceil_pow2(rows))), 32, STEP, 4, 2, splits)
    if rows <= 32:
        return LinearTiles(32, 32, 128, 2, 4, min(2, splits))
    if rows <= 64:
        return LinearTiles(64, 64, 128, 4, 3, splits)
    return LinearTiles(128, 64, 128, 4, 3, min(2, splits))
