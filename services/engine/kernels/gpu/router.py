"""Routing in two launches: the float32 product with both pools' gates, and each row's choice."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from services.engine.kernels.gpu.launch import overlapped, predecessor
from services.engine.kernels.router import SUM_MIN

FEW_ROWS = 64


@triton.jit
def _scores_kernel(
    x_ptr, gate_ptr, out_ptr, M, N, H, share, x_stride,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    predecessor(PDL)
    m = tl.program_id(0) * BM + tl.arange(0, BM)
    n = tl.program_id(1) * BN + tl.arange(0, BN)
    first = tl.program_id(2) * share
    rows, columns = (m < M)[:, None], (n < N)[None, :]
    acc = tl.zeros((BM, BN), tl.float32)
    for k in range(first, tl.minimum(first + share, H), BK):
        column = k + tl.arange(0, BK)
        inside = column < H
        x = tl.load(x_ptr + m.to(tl.int64)[:, None] * x_stride + column[None, :], rows & inside[None, :], 0.0)
        gate = tl.load(gate_ptr + n[None, :] * H + column[:, None], columns & inside[:, None], 0.0)
        # Three products of tf32 have the precision of one of float32.
        acc = tl.dot(x.to(tl.float32), gate, acc, input_precision="tf32x3")
    out_ptrs = out_ptr + (tl.program_id(2).to(tl.int64) * M + m[:, None]) * N + n[None, :]
    tl.store(out_ptrs, acc, rows & columns)


@triton.jit
def _choose_kernel(
    scores_ptr, bias_ptr, vision_ptr, ids_ptr, weights_ptr, E, sum_min, part_stride,
    PARTS: tl.constexpr, K: tl.constexpr, BLOCK: tl.constexpr, KPAD: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    predecessor(PDL)
    row = tl.program_id(0).to(tl.int64)
    pool = tl.load(vision_ptr + row).to(tl.int32)
    expert = tl.arange(0, BLOCK)
    inside = expert < E
    scores = tl.zeros((BLOCK,), tl.float32)
    for part in tl.static_range(PARTS):
        scores += tl.load(scores_ptr + part * part_stride + (row * 2 + pool) * E + expert, inside, 0.0)
    scores = tl.where(inside, scores, float("-inf"))
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
    (rows, hidden), outputs = x.shape, len(gate)
    scores = _scores(x, gate, rows, hidden, outputs)
    ids = torch.empty(rows, top_k, dtype=torch.int32, device=x.device)
    weights = torch.empty(rows, top_k, dtype=torch.float32, device=x.device)
    per_pool = outputs // 2
    _choose_kernel[(rows,)](
        scores, bias, vision, ids, weights, per_pool, SUM_MIN, scores.stride(0),
        PARTS=len(scores), K=top_k, BLOCK=triton.next_power_of_2(per_pool), KPAD=triton.next_power_of_2(top_k),
        num_warps=1, **overlapped(x),
    )  # fmt: skip
    return ids, weights


def _scores(x: Tensor, gate: Tensor, rows: int, hidden: int, outputs: int) -> Tensor:
    """[parts, N, 2 E] float32, to be summed: with few rows only a split of the inputs fills the device."""
    bm, bn, bk, splits = (16, 16, 128, 10) if rows <= FEW_ROWS else (64, 64, 64, 5 if rows <= 1024 else 1)
    share = triton.cdiv(triton.cdiv(hidden, bk), splits) * bk
    splits = triton.cdiv(hidden, share)
    scores = torch.empty(splits, rows, outputs, dtype=torch.float32, device=x.device)
    _scores_kernel[(triton.cdiv(rows, bm), triton.cdiv(outputs, bn), splits)](
        x, gate, scores, rows, outputs, hidden, share, x.stride(0), BM=bm, BN=bn, BK=bk, num_warps=4, num_stages=3,
        **overlapped(x),
    )  # fmt: skip
    return scores
