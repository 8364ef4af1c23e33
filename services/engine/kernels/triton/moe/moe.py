"""A block of experts: the shared expert beside the routed ones, on a stream of its own where that hides it.

With few rows every product waits for memory or for its launch, so two streams hide one behind the other. One kernel
then weighs the routed results and adds the shared expert, the residual stream and the next block's norm.
"""

from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from services.engine.kernels.quantize import Weight
from services.engine.kernels.reference.mlp import SwiGLU
from services.engine.kernels.reference.moe import MoE
from services.engine.kernels.triton.common.sizes import ceil_pow2
from services.engine.kernels.triton.dense.linear import gated_linear, partial_linear
from services.engine.kernels.triton.dense.rms_norm import add_norm, rounded_norm, row_warps
from services.engine.kernels.triton.moe.add_norm_scores import MAX_ROWS, add_norm_scores
from services.engine.kernels.triton.moe.experts import expert_results, routed_results
from services.engine.kernels.triton.moe.router import router
from services.engine.kernels.triton.moe.tiles import UNSORTED_PAIRS

SIDE_STREAM_ROWS = 2048  # with more rows nothing is gained: each product fills the device alone


@triton.jit
def experts_sum(
    routed_ptr, weights_ptr, shared_ptr, row, column, inside, H, shared_stride, K: tl.constexpr, SHARED: tl.constexpr
):  # fmt: skip
    """Return the weighted results of a row's experts and the shared one's, summed: float32, 0 past H."""
    summed = tl.zeros(column.shape, tl.float32)
    for part in tl.static_range(SHARED):
        summed += tl.load(shared_ptr + part * shared_stride + row * H + column, inside, 0.0).to(tl.float32)
    for k in tl.static_range(K):
        weight = tl.load(weights_ptr + row * K + k)
        summed += weight * tl.load(routed_ptr + (row * K + k) * H + column, inside, 0.0).to(tl.float32)
    return summed


@triton.jit
def _combine_kernel(
    routed_ptr, weights_ptr, shared_ptr, residual_ptr, norm_ptr, out_ptr, total_ptr, H, eps,
    shared_stride, K: tl.constexpr, SHARED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < H
    summed = experts_sum(routed_ptr, weights_ptr, shared_ptr, row, column, inside, H, shared_stride, K, SHARED)
    exact = tl.load(residual_ptr + row * H + column, inside, 0.0).to(tl.float32)
    x = (exact + summed).to(total_ptr.dtype.element_ty)
    tl.store(total_ptr + row * H + column, x, inside)
    tl.store(out_ptr + row * H + column, rounded_norm(x, norm_ptr, column, inside, H, eps), inside)


@triton.jit
def _sum_experts_kernel(
    routed_ptr, weights_ptr, shared_ptr, out_ptr, H, shared_stride, K: tl.constexpr, SHARED: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < H
    summed = experts_sum(routed_ptr, weights_ptr, shared_ptr, row, column, inside, H, shared_stride, K, SHARED)
    tl.store(out_ptr + row * H + column, summed.to(out_ptr.dtype.element_ty), inside)


def linear_moe_add_norm(
    x: Tensor,
    out: Weight,
    residual: Tensor,
    moe_norm: Tensor,
    moe: MoE,
    vision: Tensor | None,
    top_k: int,
    norm: Tensor,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """See the reference: services.engine.kernels.reference.moe. All contiguous but x, whose rows may be strided."""
    partial, scores = partial_linear(x, out), None
    if len(x) <= MAX_ROWS:
        x, residual, scores = add_norm_scores(partial, residual, moe_norm, eps, moe.gate)
    else:
        x, residual = add_norm(partial, residual, moe_norm, eps)
    return combine(*all_experts(x, moe, vision, top_k, scores), residual, norm, eps)


def all_experts(
    x: Tensor, moe: MoE, vision: Tensor | None, top_k: int, scores: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Return what `combine` sums: the routed experts' results, their weights, and the shared expert's."""
    if x.is_cuda and len(x) <= SIDE_STREAM_ROWS:
        main, side = torch.cuda.current_stream(x.device), _side_stream(x.device)
        # Memory that either stream frees is reused only after the next of these waits.
        side.wait_stream(main)
        with torch.cuda.stream(side):
            shared = _shared(x, moe.shared)
        routed, weights = _routed(x, moe, vision, top_k, scores)
        main.wait_stream(side)
    else:
        shared = _shared(x, moe.shared)
        routed, weights = _routed(x, moe, vision, top_k, scores)
    return routed, weights, shared


@cache
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)


def _shared(x: Tensor, mlp: SwiGLU) -> Tensor:
    """Apply the shared expert; its second product is still in parts."""
    return partial_linear(gated_linear(x, mlp.gate_up), mlp.down)


def _routed(x: Tensor, moe: MoE, vision: Tensor | None, top_k: int, scores: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return the routed experts' results of every pair, and their weights."""
    rows = text_only(x) if vision is None else vision
    if scores is not None and len(x) * top_k <= UNSORTED_PAIRS:
        return routed_results(x, scores, moe.bias, rows, top_k, moe.text, moe.vision)
    ids, weights = router(x, moe.gate, moe.bias, rows, top_k, scores)
    return expert_results(x, ids, moe.text, moe.vision, media=vision is not None), weights


def text_only(x: Tensor) -> Tensor:
    """Return the flags of rows that are all of the text pool."""
    return _no_vision(x.device, ceil_pow2(len(x)))[: len(x)]


@cache
def _no_vision(device: torch.device, rows: int) -> Tensor:
    return torch.zeros(rows, dtype=torch.bool, device=device)


def combine(
    routed: Tensor, weights: Tensor, shared: Tensor, residual: Tensor, norm: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """Weigh and sum the routed results, add the shared expert and the residual, and norm.

    Args:
        routed: [N K, H].
        weights: [N, K] float32.
        shared: [parts, N, H].
    """
    (rows, width), out, total = residual.shape, torch.empty_like(residual), torch.empty_like(residual)
    block = ceil_pow2(width)
    # No programmatic dependent launch: this kernel joins two streams, and both must have ended.
    _combine_kernel[(rows,)](
        routed, weights, shared, residual, norm, out, total, width, eps, shared.stride(0),
        K=weights.shape[1], SHARED=len(shared), BLOCK=block, num_warps=row_warps(block),
    )  # fmt: skip
    return out, total


def sum_experts(routed: Tensor, weights: Tensor, shared: Tensor, dtype: torch.dtype) -> Tensor:
    """Weigh and sum the routed results and add the shared expert, as `combine` does: [N, H]."""
    _, rows, width = shared.shape
    out, block = torch.empty(rows, width, dtype=dtype, device=shared.device), ceil_pow2(width)
    # No programmatic dependent launch: see `combine`.
    _sum_experts_kernel[(rows,)](
        routed, weights, shared, out, width, shared.stride(0),
        K=weights.shape[1], SHARED=len(shared), BLOCK=block, num_warps=row_warps(block),
    )  # fmt: skip
    return out
