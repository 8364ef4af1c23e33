"""Both products of the grouped GEMM with weights that are dequantised on their way to the matrix units.

Unlike in grouped_plain.py, the weight is the left operand, as only that one may come from registers. Four warps
dequantise while four others multiply: warps of the same program, or of a second one on the same multiprocessor.
"""

from typing import Any

import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from services.engine.kernels.quantize import BLOCK, GROUP, PLANES, Quantized
from services.engine.kernels.triton.common.launch import (
    fitting_stages,
    multiprocessors,
    pdl_options,
    wait_for_previous_kernel,
)
from services.engine.kernels.triton.common.sizes import ceil_div
from services.engine.kernels.triton.dense.interleave import INSTRUCTION_INPUTS, columns_of, side_by_side
from services.engine.kernels.triton.dense.matmul import (
    after_wgmma,
    at_least_one,
    gate_or_up,
    gated,
    group_words,
    load_stored,
    scales,
    storage,
    subgroups_of,
    unpack,
    unpack_foreign,
    widen,
    widen_foreign,
)
from services.engine.kernels.triton.moe.sort import SortedPairs

WEIGHT_ROWS, INPUTS = 128, INSTRUCTION_INPUTS * PLANES  # of a program's tile of a weight
# Rows of a tile of activations: the larger one reads a weight half as often, and has more rows of padding.
SMALL_TILE, LARGE_TILE = 128, 256
LARGE_TILE_ROWS_PER_EXPERT = 256  # on average over both pools: from here on tiles are large
REST = 1024  # bytes of shared memory beside the stages, at most


@triton.jit
def _product(
    x_desc, first_row, w_ptr, scale_ptr, group_ptr, index, n, inside, IN, OUT, w_stride,
    BITS: tl.constexpr, SUBGROUPS: tl.constexpr, PLANES: tl.constexpr, BLOCK: tl.constexpr, EVEN: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """Return weight[index, n] times x[first_row ..]^T: [BN, BM] float32, of the rows of the weight that are `inside`.

    IN: stored inputs; with 4 bits, x has them interleaved. OUT: rows of each weight.
    """
    PER: tl.constexpr = PLANES if BITS == 4 else 1  # inputs of a stored element
    column = tl.arange(0, BK // PER)
    w_row = index * OUT + n
    w_ptrs = w_ptr + w_row.to(tl.int64)[:, None] * w_stride + column[None, :]
    words = group_words(IN, BITS, SUBGROUPS) if SUBGROUPS else IN // BLOCK
    g_ptrs = group_ptr + (index.to(tl.int64) * words * OUT + n)[:, None]
    acc = tl.zeros((BN, BM), tl.float32)
    for k in range(0, at_least_one(IN), BK):
        at = k // PER
        if BITS == 4:
            if SUBGROUPS == 0:
                groups = load_stored(g_ptrs + k // BLOCK * OUT, inside[:, None], EVEN)
            else:
                s_ptrs = g_ptrs + at * SUBGROUPS // (BLOCK // PLANES) * PLANES * OUT
                s0 = load_stored(s_ptrs, inside[:, None], EVEN)
                s1 = load_stored(s_ptrs + OUT, inside[:, None], EVEN)
                s2 = load_stored(s_ptrs + 2 * OUT, inside[:, None], EVEN)
                s3 = load_stored(s_ptrs + 3 * OUT, inside[:, None], EVEN)
        w = after_wgmma(load_stored(w_ptrs + at, inside[:, None] & (at + column < IN // PER)[None, :], EVEN))
        x = x_desc.load([first_row, k])
        if BITS == 4:
            if SUBGROUPS == 0:
                planes = (
                    unpack(w, groups, 0, x.dtype),
                    unpack(w, groups, 1, x.dtype),
                    unpack(w, groups, 2, x.dtype),
                    unpack(w, groups, 3, x.dtype),
                )
            else:
                planes = (
                    unpack_foreign(w, s0, 0, x.dtype),
                    unpack_foreign(w, s1, 1, x.dtype),
                    unpack_foreign(w, s2, 2, x.dtype),
                    unpack_foreign(w, s3, 3, x.dtype),
                )
            w = side_by_side(planes)
        elif SUBGROUPS:
            s_ptrs = g_ptrs + k * SUBGROUPS // (BLOCK // PLANES) * OUT
            w = widen_foreign(w, load_stored(s_ptrs, inside[:, None], EVEN), x.dtype)
        else:
            w = widen(w, x.dtype)
        acc = tl.dot(w, x.T, acc, input_precision="ieee")
    return acc * scales(scale_ptr + w_row, inside)[:, None]


@triton.jit(do_not_specialize=["pool"])
def _quantized_gate_up_kernel(
    x_desc, w_ptr, scale_ptr, group_ptr, expert_ids_ptr, tile_bounds_ptr, out_ptr,
    IN, WIDTH, width, w_stride, out_stride, pool,
    E: tl.constexpr, BITS: tl.constexpr, SUBGROUPS: tl.constexpr, PLANES: tl.constexpr, BLOCK: tl.constexpr,
    EVEN: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Store out[row] = silu(gate) up, rows in order, and 0 from output WIDTH up to `width`; with 4 bits interleaved."""
    wait_for_previous_kernel(PDL)
    OUTPUTS: tl.constexpr = BN // 2
    first, last = tl.load(tile_bounds_ptr + pool), tl.load(tile_bounds_ptr + pool + 1)
    columns = tl.cdiv(width, OUTPUTS)
    for job in range(tl.program_id(0), (last - first) * columns, tl.num_programs(0)):
        tile, n = first + job // columns, job % columns * OUTPUTS
        index = tl.load(expert_ids_ptr + tile) - pool * E
        output, is_up = gate_or_up(n, BN)
        acc = _product(
            x_desc, tile * BM, w_ptr, scale_ptr, group_ptr,
            index, output + is_up * WIDTH, output < WIDTH, IN, 2 * WIDTH, w_stride,
            BITS, SUBGROUPS, PLANES, BLOCK, EVEN, BM, BN, BK,
        )  # fmt: skip
        row = tile * BM + tl.arange(0, BM)
        place = columns_of(n, OUTPUTS) if BITS == 4 else n + tl.arange(0, OUTPUTS)
        out_ptrs = out_ptr + row.to(tl.int64)[None, :] * out_stride + place[:, None]
        tl.store(out_ptrs, gated(acc, BN, BM).to(out_ptr.dtype.element_ty), (place < width)[:, None])


@triton.jit(do_not_specialize=["pool"])
def _quantized_down_kernel(
    x_desc, w_ptr, scale_ptr, group_ptr, pair_ids_ptr, expert_ids_ptr, tile_bounds_ptr, out_ptr, IN, H, w_stride, pool,
    E: tl.constexpr, BITS: tl.constexpr, SUBGROUPS: tl.constexpr, PLANES: tl.constexpr, BLOCK: tl.constexpr,
    EVEN: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Store out[pair] = x[row of the pair] times the expert's weight."""
    wait_for_previous_kernel(PDL)
    first, last = tl.load(tile_bounds_ptr + pool), tl.load(tile_bounds_ptr + pool + 1)
    columns = tl.cdiv(H, BN)
    for job in range(tl.program_id(0), (last - first) * columns, tl.num_programs(0)):
        tile, n = first + job // columns, job % columns * BN + tl.arange(0, BN)
        index = tl.load(expert_ids_ptr + tile) - pool * E
        acc = _product(
            x_desc, tile * BM, w_ptr, scale_ptr, group_ptr, index, n, n < H, IN, H, w_stride,
            BITS, SUBGROUPS, PLANES, BLOCK, EVEN, BM, BN, BK,
        )  # fmt: skip
        pair = tl.load(pair_ids_ptr + tile * BM + tl.arange(0, BM))
        out_ptrs = out_ptr + pair.to(tl.int64)[None, :] * H + n[:, None]
        tl.store(out_ptrs, acc.to(out_ptr.dtype.element_ty), (pair >= 0)[None, :] & (n < H)[:, None])


def tile_rows(bits: int, rows_per_expert: float) -> int:
    """Return the rows of a tile of activations.

    Args:
        rows_per_expert: on average over both pools.
    """
    return SMALL_TILE if bits == 4 and rows_per_expert < LARGE_TILE_ROWS_PER_EXPERT else LARGE_TILE


def gate_up(x: Tensor, order: SortedPairs, nth: int, weight: Quantized, inner: Tensor) -> None:
    """Compute the first product of pool `nth`; see grouped_plain.py. The second product may store more inputs than this
    one has outputs: they are 0."""
    (experts, double), inputs, outputs = weight.scale.shape, weight.stored_inputs, WEIGHT_ROWS // 2
    width, written = double // 2, inner.shape[1]
    _quantized_gate_up_kernel[(_programs(order, written, outputs, x),)](
        TensorDescriptor.from_tensor(x, [order.tile, _step(weight)]), *storage(weight),
        order.expert_ids, order.tile_bounds, inner, inputs, width, written, weight.data.stride(1), inner.stride(0), nth,
        E=experts, EVEN=inputs % _step(weight) == 0 and written == width and width % outputs == 0,
        **_options(weight, order, x),
    )  # fmt: skip


def down(inner: Tensor, order: SortedPairs, nth: int, weight: Quantized, results: Tensor) -> None:
    """Compute the second product of pool `nth`; see grouped_plain.py."""
    (experts, hidden), inputs = weight.scale.shape, weight.stored_inputs
    _quantized_down_kernel[(_programs(order, hidden, WEIGHT_ROWS, inner),)](
        TensorDescriptor.from_tensor(inner, [order.tile, _step(weight)]), *storage(weight),
        order.sorted_pair_ids, order.expert_ids, order.tile_bounds, results, inputs, hidden, weight.data.stride(1), nth,
        E=experts, EVEN=inputs % _step(weight) == 0 and hidden % WEIGHT_ROWS == 0, **_options(weight, order, inner),
    )  # fmt: skip


def _step(weight: Quantized) -> int:
    """Return the inputs of a stage. Of 8 bits they share a scale."""
    return min(INPUTS, GROUP // weight.subgroups) if weight.bits == 8 and weight.subgroups else INPUTS


def _programs(order: SortedPairs, outputs: int, each: int, x: Tensor) -> int:
    most: int = len(order.expert_ids) * ceil_div(outputs, each)
    return min(most, max(1, LARGE_TILE // order.tile) * multiprocessors(x.device))


def _options(weight: Quantized, order: SortedPairs, x: Tensor) -> dict[str, Any]:
    stages = 3 if weight.bits == 4 and order.tile == LARGE_TILE else 4
    stage = _step(weight) * (order.tile * x.element_size() + WEIGHT_ROWS * weight.bits // 8)
    return {
        "BITS": weight.bits,
        "SUBGROUPS": subgroups_of(weight),
        "PLANES": PLANES,
        "BLOCK": BLOCK,
        "BM": order.tile,
        "BN": WEIGHT_ROWS,
        "BK": _step(weight),
        "num_warps": max(4, order.tile // 32),
        "num_stages": fitting_stages(stages, stage, REST) if x.element_size() == 2 else 1,
        **pdl_options(x),
    }
