"""Both products of the grouped GEMM with plain weights: TMA loads all operands."""

from dataclasses import dataclass
from typing import Any

import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from services.engine.kernels.triton.common.launch import (
    fitting_stages,
    multiprocessors,
    pdl_options,
    wait_for_previous_kernel,
)
from services.engine.kernels.triton.common.sizes import ceil_div
from services.engine.kernels.triton.moe.sort import SortedPairs


@dataclass(frozen=True, slots=True)
class ProductShape:
    """Tile shape of one product."""

    outputs: int  # of a tile: of the gate, and as many of the up projection, in the first product
    inputs: int  # of a stage
    warps: int
    stages: int
    flatten: bool = False  # overlap the epilogue: the next tile is loaded while this one is stored


ROWS = 128  # of a tile
REST = 9216  # bytes of shared memory beside the stages, at most: where products are not by warp groups
GATE_UP = ProductShape(128, 64, 8, 3)
DOWN = ProductShape(256, 64, 8, 3, flatten=True)


@triton.jit(do_not_specialize=["pool"])
def _gate_up_kernel(
    x_desc, w_desc, expert_ids_ptr, tile_bounds_ptr, out_ptr, H, WIDTH, out_stride, pool,
    E: tl.constexpr, FLATTEN: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Store out[row] = silu(gate) up, rows in order."""
    wait_for_previous_kernel(PDL)
    first, last = tl.load(tile_bounds_ptr + pool), tl.load(tile_bounds_ptr + pool + 1)
    columns = tl.cdiv(WIDTH, BN)
    for job in tl.range(tl.program_id(0), (last - first) * columns, tl.num_programs(0), flatten=FLATTEN):
        tile, n = first + job // columns, job % columns * BN
        index = tl.load(expert_ids_ptr + tile) - pool * E
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
    x_desc, w_desc, pair_ids_ptr, expert_ids_ptr, tile_bounds_ptr, out_ptr, WIDTH, H, pool,
    E: tl.constexpr, FLATTEN: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Store out[pair] = x[row of the pair] times the expert's weight."""
    wait_for_previous_kernel(PDL)
    first, last = tl.load(tile_bounds_ptr + pool), tl.load(tile_bounds_ptr + pool + 1)
    columns = tl.cdiv(H, BN)
    for job in tl.range(tl.program_id(0), (last - first) * columns, tl.num_programs(0), flatten=FLATTEN):
        tile, n = first + job // columns, job % columns * BN
        index = tl.load(expert_ids_ptr + tile) - pool * E
        acc = tl.zeros((BM, BN), tl.float32)
        for k in range(0, WIDTH, BK):
            w = w_desc.load([index, n, k]).reshape(BN, BK)
            acc = tl.dot(x_desc.load([tile * BM, k]), w.T, acc, input_precision="ieee")
        pair = tl.load(pair_ids_ptr + tile * BM + tl.arange(0, BM))
        n += tl.arange(0, BN)
        mask = (pair >= 0)[:, None] & (n < H)[None, :]
        tl.store(out_ptr + pair.to(tl.int64)[:, None] * H + n[None, :], acc.to(out_ptr.dtype.element_ty), mask)


def gate_up(x: Tensor, order: SortedPairs, nth: int, weight: Tensor, inner: Tensor) -> None:
    """Compute the first product of pool `nth`.

    Args:
        x: [rows, H], in order.
        weight: [E, 2 I, H].
        inner: [rows, I], of strided rows; the pool's are written.
    """
    shape, (experts, double, hidden) = GATE_UP, weight.shape
    width = double // 2
    # Gate and up of an expert are two planes, so that one tile has the same outputs of both.
    planes = weight.view(experts * 2, width, hidden)
    _gate_up_kernel[(_programs(shape, order, width, x),)](
        TensorDescriptor.from_tensor(x, [order.tile, shape.inputs]),
        TensorDescriptor.from_tensor(planes, [2, shape.outputs, shape.inputs]),
        order.expert_ids, order.tile_bounds, inner, hidden, width, inner.stride(0), nth,
        E=experts, **_options(shape, order, x, planes=2),
    )  # fmt: skip


def down(inner: Tensor, order: SortedPairs, nth: int, weight: Tensor, results: Tensor) -> None:
    """Compute the second product of pool `nth`.

    Args:
        weight: [E, H, I].
        results: [P, H]; the rows of the pool's pairs are written.
    """
    shape, (experts, hidden, width) = DOWN, weight.shape
    _down_kernel[(_programs(shape, order, hidden, inner),)](
        TensorDescriptor.from_tensor(inner, [order.tile, shape.inputs]),
        TensorDescriptor.from_tensor(weight, [1, shape.outputs, shape.inputs]),
        order.sorted_pair_ids, order.expert_ids, order.tile_bounds, results, width, hidden, nth,
        E=experts, **_options(shape, order, inner, planes=1),
    )  # fmt: skip


def _programs(shape: ProductShape, order: SortedPairs, outputs: int, x: Tensor) -> int:
    most: int = len(order.expert_ids) * ceil_div(outputs, shape.outputs)
    return min(most, multiprocessors(x.device))


def _options(shape: ProductShape, order: SortedPairs, x: Tensor, planes: int) -> dict[str, Any]:
    stage = (order.tile + planes * shape.outputs) * shape.inputs * x.element_size()
    return {
        "FLATTEN": shape.flatten,
        "BM": order.tile,
        "BN": shape.outputs,
        "BK": shape.inputs,
        "num_warps": shape.warps,
        "num_stages": fitting_stages(shape.stages, stage, REST) if x.element_size() == 2 else 1,
        **pdl_options(x),
    }
