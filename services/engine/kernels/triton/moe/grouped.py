"""Grouped GEMM of both pools of experts for many rows, bound by arithmetic.

Rows are sorted by expert and copied in that order, so that TMA reads them as tiles, each with one expert. A launch
computes the tiles of one pool with persistent kernels: as many programs as the device runs at once, each with its share
of the tiles, which only the device can count. Programs that run at the same time have all the outputs of some
neighbouring tiles of rows, so that their operands stay in the second-level cache.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from services.engine.kernels.memory_budget import has_spare_memory
from services.engine.kernels.quantize import BLOCK, Quantized, Weight, in_features, stored_inputs
from services.engine.kernels.reference.experts import ExpertPool
from services.engine.kernels.triton.common.launch import pdl_options, wait_for_previous_kernel
from services.engine.kernels.triton.common.sizes import ceil_div
from services.engine.kernels.triton.dense.interleave import columns_and_inputs
from services.engine.kernels.triton.moe import grouped_plain, grouped_quantized
from services.engine.kernels.triton.moe.sort import SortedPairs, sort_pairs

# Rows of an expert, on average over both pools, from which on the path pays: tiles of rows are full enough, and the
# products gain more than the launches before them take.
ROWS_PER_EXPERT, INT8_ROWS_PER_EXPERT = 32, 64


# Numbers of rows vary from step to step: no variant of a kernel may depend on them.
@triton.jit(do_not_specialize=["N"])
def _scatter_kernel(
    x_ptr, rows_ptr, ends_ptr, out_ptr, N, H, width, x_stride,
    INTERLEAVED: tl.constexpr, K: tl.constexpr, EVEN: tl.constexpr, BM: tl.constexpr, BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """Store a block of a token's inputs to its rows, and 0 behind x up to `width`. The programs behind the last token
    fill the tile of an expert.

    Rows without a pair are 0: nobody reads their results, but multiplying by 0 takes less power, which is what bounds
    long prompts.
    """
    wait_for_previous_kernel(PDL)
    token = tl.program_id(0)
    column, source = columns_and_inputs(tl.program_id(1) * BLOCK, INTERLEAVED)
    if token < N:
        x_ptrs = x_ptr + token.to(tl.int64) * x_stride + source
        values = tl.load(x_ptrs) if EVEN else tl.load(x_ptrs, source < H, 0.0)
        # All rows' numbers are loaded before the first store: a load does not overtake stores.
        rows = ()
        for k in tl.static_range(K):
            rows += (tl.load(rows_ptr + token * K + k).to(tl.int64),)  # type: ignore[assignment]
        for k in tl.static_range(K):
            tl.store(out_ptr + rows[k] * width + column, values, column < width)
    else:
        end = tl.load(ends_ptr + token - N)
        nothing = tl.zeros(column.shape, out_ptr.dtype.element_ty)
        end_ptr = out_ptr + end.to(tl.int64) * width
        for nth in range(0, tl.cdiv(end, BM) * BM - end):
            tl.store(end_ptr + nth * width + column, nothing, column < width)


def uses_grouped_gemm(x: Tensor, top_k: int, text: ExpertPool, vision: ExpertPool) -> bool:
    """Return True if the grouped GEMM applies: rows enough, spare memory, and rows aligned to 16 bytes for TMA."""
    experts = len(text) + len(vision)
    in_bytes = isinstance(text.gate_up, Quantized) and text.gate_up.bits == 8
    least = INT8_ROWS_PER_EXPERT if in_bytes else ROWS_PER_EXPERT
    enough_rows = len(x) * top_k >= least * experts and experts & (experts - 1) == 0
    widths = (x.shape[1], x.stride(0), in_features(text.down), in_features(vision.down))
    aligned = all(width * x.element_size() % 16 == 0 for width in widths)
    return enough_rows and aligned and has_memory_for_copies(x.device)


def has_memory_for_copies(device: torch.device) -> bool:
    """Return True if the device has memory for copies of rows. The interpreter counts, so that tests get here."""
    return device.type != "cuda" or has_spare_memory(device)


def grouped_experts(x: Tensor, ids: Tensor, text: ExpertPool, vision: ExpertPool, media: bool = True) -> Tensor:
    """Apply every chosen expert to its row.

    Args:
        x: [N, H], the last dimension contiguous.
        ids: [N, K] int32.
        text, vision: quantised alike.
        media: whether there may be choices of the vision pool.

    Returns:
        [N K, H] in the dtype of x.
    """
    pools = (text, vision) if media else (text,)
    products: Any = grouped_plain
    experts, tile = len(text) + len(vision), grouped_plain.ROWS
    if isinstance(text.gate_up, Quantized):
        products, tile = grouped_quantized, grouped_quantized.tile_rows(text.gate_up.bits, ids.numel() / experts)
    order = sort_pairs(ids.flatten(), experts, tile)
    rows = _in_order(x, order, ids.shape[1], text.gate_up)
    width = max(stored_inputs(text.down), stored_inputs(vision.down))
    inner = torch.empty(len(order.sorted_pair_ids), width, dtype=x.dtype, device=x.device)
    inners = [inner[:, : stored_inputs(pool.down)] for pool in pools]
    for nth, pool in enumerate(pools):
        products.gate_up(rows, order, nth, pool.gate_up, inners[nth])
    del rows
    results = torch.empty(ids.numel(), x.shape[1], dtype=x.dtype, device=x.device)
    for nth, pool in enumerate(pools):
        products.down(inners[nth], order, nth, pool.down, results)
    return results


def _in_order(x: Tensor, order: SortedPairs, top_k: int, weight: Weight) -> Tensor:
    """Return [rows, inputs of the weight]: x of each row's token, columns in the order in which the weight stores
    inputs."""
    out = torch.empty(len(order.sorted_pair_ids), stored_inputs(weight), dtype=x.dtype, device=x.device)
    hidden, width = x.shape[1], out.shape[1]
    # A token's block is read once for all its rows, and no program is launched for rows that there are not.
    _scatter_kernel[(len(x) + len(order.ends), ceil_div(width, BLOCK))](
        x, order.rows, order.ends, out, len(x), hidden, width, x.stride(0),
        INTERLEAVED=isinstance(weight, Quantized) and weight.bits == 4, EVEN=width == hidden and width % BLOCK == 0,
        K=top_k, BM=order.tile, BLOCK=BLOCK, num_warps=2, **pdl_options(x),
    )  # fmt: skip
    return out
