"""Routing: the float32 product with both pools' gates, and each row's choice."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from services.engine.kernels.gpu.launch import overlapped, predecessor
from services.engine.kernels.router import SUM_MIN

LIBRARY_ROWS = 256  # above, the library's product is faster
EXPERTS = 4  # scores of a program


@triton.jit
def _scores_kernel(
    x_ptr, gate_ptr, out_ptr, M, N, H, x_stride,
    ROWS: tl.constexpr, EXPERTS: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    expert = tl.program_id(1) * EXPERTS + tl.arange(0, EXPERTS)
    column = tl.arange(0, BLOCK)
    inside = column < H
    gate_ptrs = gate_ptr + expert[:, None] * H + column[None, :]
    # The gates wait for nobody.
    gate = tl.load(gate_ptrs, (expert < N)[:, None] & inside[None, :], 0.0)
    predecessor(PDL)
    for nth in range(0, ROWS):
        row = tl.program_id(0).to(tl.int64) * ROWS + nth
        x = tl.load(x_ptr + row * x_stride + column, inside & (row < M), 0.0).to(tl.float32)
        tl.store(out_ptr + row * N + expert, tl.sum(gate * x[None, :], 1), (expert < N) & (row < M))


@triton.jit
def _split_kernel(gate_ptr, out_ptr, SIZE, BLOCK: tl.constexpr, PDL: tl.constexpr):
    predecessor(PDL)
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    rest = tl.load(gate_ptr + at, at < SIZE, 0.0)
    for part in tl.static_range(3):
        rounded = rest.to(out_ptr.dtype.element_ty)
        tl.store(out_ptr + part * SIZE + at, rounded, at < SIZE)
        rest -= rounded.to(tl.float32)


@triton.jit
def _choose_kernel(
    scores_ptr, bias_ptr, vision_ptr, ids_ptr, weights_ptr, E, sum_min,
    K: tl.constexpr, PARTS: tl.constexpr, BLOCK: tl.constexpr, KPAD: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    predecessor(PDL)
    row = tl.program_id(0).to(tl.int64)
    pool = tl.load(vision_ptr + row).to(tl.int32)
    expert = tl.arange(0, BLOCK)
    inside = expert < E
    scores = tl.load(scores_ptr + (row * PARTS * 2 + pool) * E + expert, inside, float("-inf"))
    for part in tl.static_range(1, PARTS):
        scores += tl.load(scores_ptr + ((row * PARTS + part) * 2 + pool) * E + expert, inside, 0.0)
    p = tl.exp(scores - tl.max(scores, 0))
    p = p / tl.sum(p, 0)
    ranked = tl.where(inside, p + tl.load(bias_ptr + pool * E + expert, inside, 0.0), float("-inf"))
    slot = tl.arange(0, KPAD)
    ids = tl.zeros((KPAD,), tl.int32)
    weights = tl.zeros((KPAD,), tl.float32)
    for k in tl.static_range(K):
        best = tl.argmax(ranked, 0)
        ids = tl.where(slot == k, best + pool * E, ids)
        weights = tl.where(slot == k, tl.sum(tl.where(expert == best, p, 0.0), 0), weights)
        ranked = tl.where(expert == best, float("-inf"), ranked)
    weights = weights / tl.maximum(tl.sum(weights, 0), sum_min)
    tl.store(ids_ptr + row * K + slot, ids, slot < K)
    tl.store(weights_ptr + row * K + slot, weights, slot < K)


def router(x: Tensor, gate: Tensor, bias: Tensor, vision: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """See the reference. `gate` contiguous; the rows of `x` may be strided."""
    rows = len(x)
    scores = _scores(x, gate) if rows <= LIBRARY_ROWS else _library_scores(x, gate)
    ids = torch.empty(rows, top_k, dtype=torch.int32, device=x.device)
    weights = torch.empty(rows, top_k, dtype=torch.float32, device=x.device)
    per_pool = len(gate) // 2
    _choose_kernel[(rows,)](
        scores, bias, vision, ids, weights, per_pool, SUM_MIN,
        K=top_k, PARTS=scores.shape[1] // len(gate), BLOCK=triton.next_power_of_2(per_pool),
        KPAD=triton.next_power_of_2(top_k), num_warps=1, **overlapped(x),
    )  # fmt: skip
    return ids, weights


def _scores(x: Tensor, gate: Tensor) -> Tensor:
    """x @ gate^T in float32 on the plain units, for which the library has no good product of so odd a shape."""
    (rows, hidden), outputs = x.shape, len(gate)
    scores = torch.empty(rows, outputs, dtype=torch.float32, device=x.device)
    each = 1 if rows <= 8 else 4 if rows <= 64 else 8
    _scores_kernel[(triton.cdiv(rows, each), triton.cdiv(outputs, EXPERTS))](
        x, gate, scores, rows, outputs, hidden, x.stride(0),
        ROWS=each, EXPERTS=EXPERTS, BLOCK=triton.next_power_of_2(hidden), num_warps=8, **overlapped(x),
    )  # fmt: skip
    return scores


def _library_scores(x: Tensor, gate: Tensor) -> Tensor:
    """x @ gate^T, in parts that are still to be summed: [N, parts 2 E] float32.

    The library's product of float32 is slow. But three bfloat16 hold what a float32 does, a bfloat16 is the first of
    its three parts, and their products are exact in the float32 that sums them.
    """
    if x.dtype != torch.bfloat16:
        return x.float() @ gate.T
    parts = split(gate)
    return torch.mm(x, parts.T, out_dtype=torch.float32) if x.is_cuda else x.float() @ parts.float().T


def split(gate: Tensor) -> Tensor:
    """[3 R, H] bfloat16 from [R, H] float32: three summands of each value, the largest first."""
    parts = torch.empty(3 * len(gate), gate.shape[1], dtype=torch.bfloat16, device=gate.device)
    _split_kernel[(triton.cdiv(gate.numel(), 2048),)](
        gate, parts, gate.numel(), BLOCK=2048, num_warps=4, **overlapped(gate)
    )  # fmt: skip
    return parts
