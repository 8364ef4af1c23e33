"""Softmax, biased choice and renormalisation of a row's pool, in one program a row."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from services.engine.kernels.router import SUM_MIN


@triton.jit
def _choose_kernel(
    scores_ptr,
    bias_ptr,
    vision_ptr,
    ids_ptr,
    weights_ptr,
    E,
    sum_min,
    K: tl.constexpr,
    BLOCK: tl.constexpr,
    KPAD: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    pool = tl.load(vision_ptr + row).to(tl.int32)
    expert = tl.arange(0, BLOCK)
    inside = expert < E
    scores = tl.load(scores_ptr + row * 2 * E + pool * E + expert, inside, float("-inf"))
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
    """See the reference. The scores are one float32 product over both pools."""
    rows = len(x)
    scores = x.float() @ gate.T
    ids = torch.empty(rows, top_k, dtype=torch.int32, device=x.device)
    weights = torch.empty(rows, top_k, dtype=torch.float32, device=x.device)
    per_pool = gate.shape[0] // 2
    _choose_kernel[(rows,)](
        scores,
        bias,
        vision,
        ids,
        weights,
        per_pool,
        SUM_MIN,
        K=top_k,
        BLOCK=triton.next_power_of_2(per_pool),
        KPAD=triton.next_power_of_2(top_k),
        num_warps=1,
    )
    return ids, weights
