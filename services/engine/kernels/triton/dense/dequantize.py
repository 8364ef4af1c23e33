"""Dequantisation of a whole weight, for products that are bound by arithmetic."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from services.engine.kernels.quantize import BLOCK, GROUP, Quantized, Weight
from services.engine.kernels.triton.common.sizes import ceil_div
from services.engine.kernels.triton.dense.matmul import (
    group_words,
    scales,
    storage,
    subgroups_of,
    unpack,
    unpack_foreign,
    widen,
    widen_foreign,
)

ROWS, WARPS = 16, 4  # of a program's tile, which is as wide as a block of the packing


@triton.jit
def _dequantize_kernel(
    data_ptr, scale_ptr, group_ptr, out_ptr, OUT, EACH, IN, data_stride,
    BITS: tl.constexpr, SUBGROUPS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """Store rows of a stack of weights with EACH rows each, OUT in all."""
    row, first = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.program_id(1) * BLOCK
    inside = (row < OUT)[:, None]
    dtype = out_ptr.dtype.element_ty
    scale = scales(scale_ptr + row, row < OUT)[:, None]
    data_ptrs = data_ptr + row.to(tl.int64)[:, None] * data_stride
    out_ptrs = out_ptr + row.to(tl.int64)[:, None] * IN
    if BITS == 4:
        PLANES: tl.constexpr = BLOCK // GROUP
        block = (row // EACH * tl.num_programs(1) + tl.program_id(1)).to(tl.int64)
        words_of_block: tl.constexpr = PLANES * SUBGROUPS if SUBGROUPS else 1
        group_ptrs = (group_ptr + block * words_of_block * EACH + row % EACH)[:, None]
        TILES: tl.constexpr = SUBGROUPS if SUBGROUPS else 1
        for tile in tl.static_range(TILES):
            lane = tile * (GROUP // TILES) + tl.arange(0, GROUP // TILES)[None, :]
            words = tl.load(data_ptrs + first // PLANES + lane, inside, 0)
            if SUBGROUPS == 0:
                groups = tl.load(group_ptrs, inside, 0)
            for j in tl.static_range(PLANES):
                column = first + j * GROUP + lane
                if SUBGROUPS == 0:
                    values = unpack(words, groups, j, dtype)
                else:
                    groups = tl.load(group_ptrs + (tile * PLANES + j) * EACH, inside, 0)
                    values = unpack_foreign(words, groups, j, dtype)
                tl.store(out_ptrs + column, (values.to(tl.float32) * scale).to(dtype), inside & (column < IN))
    elif SUBGROUPS:
        words_before = (row // EACH).to(tl.int64) * group_words(IN, BITS, SUBGROUPS) * EACH
        group_ptrs = (group_ptr + words_before + row % EACH)[:, None]
        for tile in tl.static_range(BLOCK * SUBGROUPS // GROUP):
            column = first + tile * (GROUP // SUBGROUPS) + tl.arange(0, GROUP // SUBGROUPS)[None, :]
            at = (first * SUBGROUPS // GROUP + tile).to(tl.int64)
            groups = tl.load(group_ptrs + at * EACH, inside & (first + tile * (GROUP // SUBGROUPS) < IN), 0)
            values = widen_foreign(tl.load(data_ptrs + column, inside & (column < IN), 0), groups, dtype)
            tl.store(out_ptrs + column, (values.to(tl.float32) * scale).to(dtype), inside & (column < IN))
    else:
        column = first + tl.arange(0, BLOCK)[None, :]
        values = widen(tl.load(data_ptrs + column, inside & (column < IN), 0), dtype)
        tl.store(out_ptrs + column, (values.to(tl.float32) * scale).to(dtype), inside & (column < IN))


def dequantize(weight: Quantized) -> Tensor:
    """See the reference: services.engine.kernels.quantize.dequantize."""
    inputs, outputs = weight.in_features, weight.scale.numel()
    out = torch.empty(*weight.scale.shape, inputs, dtype=weight.scale.dtype, device=weight.data.device)
    _dequantize_kernel[(ceil_div(outputs, ROWS), ceil_div(inputs, BLOCK))](
        *storage(weight), out, outputs, weight.scale.shape[-1], inputs, weight.data.stride(-2),
        BITS=weight.bits, SUBGROUPS=subgroups_of(weight), ROWS=ROWS, BLOCK=BLOCK, GROUP=GROUP, num_warps=WARPS,
    )  # fmt: skip
    return out


def plain(weight: Weight) -> Tensor:
    """Return the weight in the dtype of the activations, dequantised unless that was done before."""
    if not isinstance(weight, Quantized):
        return weight
    return dequantize(weight) if weight.plain is None else weight.plain
