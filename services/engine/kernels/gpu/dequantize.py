"""A quantised weight back in the dtype of the activations, for products that are bound by arithmetic.

Programs have few registers, so that they find room beside those of a product, and their stores (.cs) leave the
second-level cache to it.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from services.engine.kernels.gpu.matmul import scales, unpack, widen
from services.engine.kernels.gpu.sizes import ceil_div
from services.engine.kernels.quantize import GROUP, PLANES, Quantized, Weight

# Groups of 256 inputs that a program widens together, its warps, and how many times it does: programs of an expert that
# is not used, which have nothing to do, are then few.
GROUPS, WARPS, TIMES = 32, 4, 16
RUN = 8  # values that a thread stores together: 16 bytes


@triton.jit
def _dequantize_kernel(
    data_ptr, scale_ptr, used_ptr, out_ptr, OUT, IN, per_row, data_stride,
    BITS: tl.constexpr, USED: tl.constexpr, GROUPS: tl.constexpr, GROUP: tl.constexpr, PLANES: tl.constexpr,
    RUN: tl.constexpr, TIMES: tl.constexpr,
):  # fmt: skip
    index = tl.program_id(1)
    uses = tl.load(used_ptr + index) if USED else 1
    if uses == 0:
        return
    first_row = index.to(tl.int64) * OUT
    data_ptr += first_row * data_stride
    out_ptr += first_row * IN
    for nth in range(TIMES):
        # A weight is a list of groups, in memory as in this order: what is read and written together is of one piece.
        group = (tl.program_id(0) * TIMES + nth) * GROUPS + tl.arange(0, GROUPS)
        row, first = group // per_row, (group % per_row * GROUP)[:, None]
        inside = row < OUT
        scale = scales(scale_ptr + first_row + row, inside)[:, None]
        dtype = out_ptr.dtype.element_ty
        out_ptrs = out_ptr + row[:, None] * IN + first
        if BITS == 4:
            lane = tl.arange(0, GROUP // PLANES)[None, :]
            words = tl.load(data_ptr + row[:, None] * data_stride + first // PLANES + lane, inside[:, None], 0)
            planes = unpack(words, dtype)
            for j in tl.static_range(PLANES):
                column = j * (GROUP // PLANES) + lane
                value = (planes[j].to(tl.float32) * scale).to(dtype)
                tl.store(out_ptrs + column, value, inside[:, None] & (first + column < IN), cache_modifier=".cs")
        else:
            # Read in the runs that are stored, or each value would change its thread in between.
            column = tl.max_contiguous(tl.multiple_of(tl.arange(0, GROUP), RUN), RUN)[None, :]
            mask = inside[:, None] & (first + column < IN)
            values = widen(tl.load(data_ptr + row[:, None] * data_stride + first + column, mask, 0), dtype)
            tl.store(out_ptrs + column, (values.to(tl.float32) * scale).to(dtype), mask, cache_modifier=".cs")


def dequantize(weight: Quantized, used: Tensor | None = None, out: Tensor | None = None) -> Tensor:
    """See the reference: services.engine.kernels.quantize.dequantize.

    Args:
        used: [E] int32 for a weight [E, out, in]: where 0, nothing is read, and the result is left as it was found.
        out: [.., out, in] contiguous, in the dtype of the scales: written and returned.
    """
    shape, inputs = weight.scale.shape, weight.in_features
    outputs = shape[-1]
    count = weight.scale.numel() // outputs
    if out is None:
        out = torch.empty(*shape, inputs, dtype=weight.scale.dtype, device=weight.data.device)
    per_row = ceil_div(inputs, GROUP)
    # Bytes need fewer groups for as many values a thread.
    groups = GROUPS if weight.bits == 4 else GROUPS // 2
    _dequantize_kernel[(ceil_div(outputs * per_row, groups * TIMES), count)](
        weight.data, weight.scale, out if used is None else used, out, outputs, inputs, per_row, weight.data.stride(-2),
        BITS=weight.bits, USED=used is not None, GROUPS=groups, GROUP=GROUP, PLANES=PLANES, RUN=RUN, TIMES=TIMES,
        num_warps=WARPS,
    )  # fmt: skip
    return out


def plain(weight: Weight) -> Tensor:
    """The weight itself or what its quantised form stands for, dequantised unless that was done before."""
    if not isinstance(weight, Quantized):
        return weight
    return dequantize(weight) if weight.plain is None else weight.plain
