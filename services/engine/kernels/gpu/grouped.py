"""Both pools of experts for many rows: products bound by arithmetic, their tiles brought by the copy engine.

Rows are sorted by expert, a tile of rows has one expert, and a launch takes the tiles of one pool: as many programs as
the device has multiprocessors, each with its share of the tiles, which only the device can count. Programs that run
at the same time have all the outputs of some neighbouring tiles of rows: what they read is in the second-level cache.
Weights that are stored quantised are dequantised before: services.engine.kernels.gpu.prefetch.
"""

from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from services.engine.kernels.experts import ExpertPool
from services.engine.kernels.gpu.launch import IN_TURN, overlapped, predecessor
from services.engine.kernels.gpu.prefetch import Prefetch
from services.engine.kernels.gpu.sizes import ceil_div
from services.engine.kernels.gpu.sort import Sorted, sort_pairs
from services.engine.kernels.quantize import Quantized, in_features
from services.engine.kernels.room import roomy

EACH = 32  # rows of an expert, on average over both pools, from which on a tile of rows is full enough
QUANTIZED_ROWS = 4096  # rows of a step from which on dequantising is the smaller part
ROWS = 128  # of a tile


@dataclass(frozen=True, slots=True)
class Cut:
    """How a product is cut."""

    outputs: int  # of a tile: of the gate, and as many of the up projection, in the first product
    inputs: int  # of a stage
    warps: int
    stages: int
    flatten: bool = False  # the next tile is read while this one is stored


GATE_UP = Cut(128, 64, 8, 3)
DOWN = Cut(256, 64, 8, 3, flatten=True)


@triton.jit
def _gather_kernel(
    x_ptr, place_ptr, bounds_ptr, out_ptr, H, x_stride,
    K: tl.constexpr, BM: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """out[row] = x of the row's token. Rows without a pair are left as they are: nobody reads what comes of them."""
    predecessor(PDL)
    first = tl.program_id(0).to(tl.int64) * ROWS
    if first >= tl.load(bounds_ptr + 2) * BM:
        return
    row = first + tl.arange(0, ROWS)
    pair = tl.load(place_ptr + row)
    for start in range(0, H, BLOCK):
        column = start + tl.arange(0, BLOCK)
        mask = (pair >= 0)[:, None] & (column < H)[None, :]
        values = tl.load(x_ptr + (pair // K).to(tl.int64)[:, None] * x_stride + column[None, :], mask)
        tl.store(out_ptr + row[:, None] * H + column[None, :], values, mask)


@triton.jit(do_not_specialize=["pool"])
def _gate_up_kernel(
    x_desc, w_desc, owner_ptr, bounds_ptr, out_ptr, H, WIDTH, out_stride, pool,
    E: tl.constexpr, FLATTEN: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """out[row] = silu(gate) up, rows in order."""
    predecessor(PDL)
    first, last = tl.load(bounds_ptr + pool), tl.load(bounds_ptr + pool + 1)
    columns = tl.cdiv(WIDTH, BN)
    for job in tl.range(tl.program_id(0), (last - first) * columns, tl.num_programs(0), flatten=FLATTEN):
        tile, n = first + job // columns, job % columns * BN
        index = tl.load(owner_ptr + tile) - pool * E
        row = tile * BM + tl.arange(0, BM)
        acc = tl.zeros((BM, 2 * BN), tl.float32)
        for k in range(0, H, BK):
            w = w_desc.load([2 * index, n, k]).reshape(2 * BN, BK)
            acc = tl.dot(x_desc.load([tile * BM, k]), w.T, acc, input_precision="ieee")
        gate, up = tl.split(acc.reshape(BM, 2, BN).permute(0, 2, 1))
        inner = (gate * tl.sigmoid(gate) * up).to(out_ptr.dtype.element_ty)
        n += tl.arange(0, BN)
        tl.store(out_ptr + row.to(tl.int64)[:, None] * out_stride + n[None, :], inner, (n < WIDTH)[None, :])


@triton.jit(do_not_specialize=["pool"])
def _down_kernel(
    x_desc, w_desc, place_ptr, owner_ptr, bounds_ptr, out_ptr, WIDTH, H, pool,
    E: tl.constexpr, FLATTEN: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """out[pair] = x[row of the pair] times the expert's weight."""
    predecessor(PDL)
    first, last = tl.load(bounds_ptr + pool), tl.load(bounds_ptr + pool + 1)
    columns = tl.cdiv(H, BN)
    for job in tl.range(tl.program_id(0), (last - first) * columns, tl.num_programs(0), flatten=FLATTEN):
        tile, n = first + job // columns, job % columns * BN
        index = tl.load(owner_ptr + tile) - pool * E
        acc = tl.zeros((BM, BN), tl.float32)
        for k in range(0, WIDTH, BK):
            w = w_desc.load([index, n, k]).reshape(BN, BK)
            acc = tl.dot(x_desc.load([tile * BM, k]), w.T, acc, input_precision="ieee")
        pair = tl.load(place_ptr + tile * BM + tl.arange(0, BM))
        n += tl.arange(0, BN)
        mask = (pair >= 0)[:, None] & (n < H)[None, :]
        tl.store(out_ptr + pair.to(tl.int64)[:, None] * H + n[None, :], acc.to(out_ptr.dtype.element_ty), mask)


def takes(x: Tensor, top_k: int, text: ExpertPool, vision: ExpertPool) -> bool:
    """Whether there are rows enough, memory for copies of them, and the copy engine can read where rows begin."""
    experts = len(text) + len(vision)
    enough = len(x) * top_k >= EACH * experts and experts & (experts - 1) == 0
    if isinstance(text.gate_up, Quantized):
        enough = enough and len(x) >= QUANTIZED_ROWS
    widths = (x.shape[1], x.stride(0), in_features(text.down), in_features(vision.down))
    return enough and ample(x.device) and all(width * x.element_size() % 16 == 0 for width in widths)


def ample(device: torch.device) -> bool:
    """Whether a device has memory for rows in order and a pool dequantised. The interpreter has: it is there to try."""
    return device.type != "cuda" or roomy(device)


def grouped_experts(
    x: Tensor, ids: Tensor, text: ExpertPool, vision: ExpertPool, prefetch: Prefetch | None = None
) -> Tensor:
    """Every chosen expert applied to its row.

    Args:
        x: [N, H], the last dimension contiguous.
        ids: [N, K] int32.
        text, vision: quantised alike.
        prefetch: the next weights to be taken are those of both pools; None: nobody began to make them ready.

    Returns:
        [N K, H] in the dtype of x.
    """
    order = sort_pairs(ids.flatten(), len(text) + len(vision), ROWS)
    rows = _in_order(x, order, ids.shape[1])
    inner = torch.empty(len(order.place), in_features(text.down), dtype=x.dtype, device=x.device)
    weights = prefetch or Prefetch([(text, vision)], order.counts.view(2, -1))
    # A product that were set up early would stand in line before what is dequantised beside the one that runs.
    launch = IN_TURN if isinstance(text.gate_up, Quantized) else overlapped(x)
    for nth, weight in enumerate(weights.take()):
        _gate_up(rows, order, nth, weight, inner, launch)
    del rows
    results = torch.empty(ids.numel(), x.shape[1], dtype=x.dtype, device=x.device)
    for nth, weight in enumerate(weights.take()):
        _down(inner, order, nth, weight, results, launch)
    return results


def _in_order(x: Tensor, order: Sorted, top_k: int) -> Tensor:
    """[rows, H]: x of each row's token."""
    out = torch.empty(len(order.place), x.shape[1], dtype=x.dtype, device=x.device)
    _gather_kernel[(len(out) // 8,)](
        x, order.place, order.bounds, out, x.shape[1], x.stride(0),
        K=top_k, BM=ROWS, ROWS=8, BLOCK=512, num_warps=4, **overlapped(x),
    )  # fmt: skip
    return out


def _gate_up(x: Tensor, order: Sorted, nth: int, weight: Tensor, inner: Tensor, launch: dict[str, Any]) -> None:
    """The first product of pool `nth`. weight [E, 2 I, H]; fills the pool's rows of inner [rows, >= I]."""
    cut, (experts, double, hidden) = GATE_UP, weight.shape
    width = double // 2
    # Gate and up of an expert are two planes, so that one tile has the same outputs of both.
    planes = weight.view(experts * 2, width, hidden)
    _gate_up_kernel[(_programs(cut, order, width, x),)](
        TensorDescriptor.from_tensor(x, [ROWS, cut.inputs]),
        TensorDescriptor.from_tensor(planes, [2, cut.outputs, cut.inputs]),
        order.owner, order.bounds, inner, hidden, width, inner.stride(0), nth,
        E=experts, **_options(cut, x), **launch,
    )  # fmt: skip


def _down(inner: Tensor, order: Sorted, nth: int, weight: Tensor, results: Tensor, launch: dict[str, Any]) -> None:
    """The second product of pool `nth`. weight [E, H, I]; fills the rows of the pool's pairs in results [P, H]."""
    cut, (experts, hidden, width) = DOWN, weight.shape
    _down_kernel[(_programs(cut, order, hidden, inner),)](
        TensorDescriptor.from_tensor(inner[:, :width], [ROWS, cut.inputs]),
        TensorDescriptor.from_tensor(weight, [1, cut.outputs, cut.inputs]),
        order.place, order.owner, order.bounds, results, width, hidden, nth,
        E=experts, **_options(cut, inner), **launch,
    )  # fmt: skip


def _programs(cut: Cut, order: Sorted, outputs: int, x: Tensor) -> int:
    most: int = len(order.owner) * ceil_div(outputs, cut.outputs)
    return min(most, _multiprocessors(x.device))


@cache
def _multiprocessors(device: torch.device) -> int:
    """An interpreter has some, too: more than one, so that tiles are shared out."""
    if device.type != "cuda":
        return 3
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


def _options(cut: Cut, x: Tensor) -> dict[str, Any]:
    return {
        "FLATTEN": cut.flatten,
        "BM": ROWS,
        "BN": cut.outputs,
        "BK": cut.inputs,
        "num_warps": cut.warps,
        "num_stages": cut.stages if x.element_size() == 2 else 1,
    }
