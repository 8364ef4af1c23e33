"""Routed experts of both pools as one grouped product."""

from dataclasses import dataclass

import torch
from torch import Tensor

from services.engine.kernels.quantize import Weight
from services.engine.kernels.reference.linear import linear
from services.engine.kernels.reference.silu_mul import silu_mul


@dataclass(frozen=True, slots=True)
class ExpertPool:
    """E experts of inner width I."""

    gate_up: Weight  # [E, 2 I, H]: gate rows, then up rows
    down: Weight  # [E, H, I]

    def __len__(self) -> int:
        return len(self.down)


def experts(x: Tensor, ids: Tensor, weights: Tensor, text: ExpertPool, vision: ExpertPool) -> Tensor:
    """Return the sum over k of weights[n, k] * expert ids[n, k] applied to x[n], summed in float32 in the order of k.

    Args:
        x: [N, H].
        ids: [N, K] int32: 0..E - 1 text experts, E..2 E - 1 vision experts.
        weights: [N, K] float32.
        text, vision: pools of E experts each.

    Returns:
        [N, H], dtype of x.
    """
    flat = ids.flatten()
    order = flat.argsort(stable=True)
    token = order // ids.shape[1]
    results = torch.empty(len(flat), x.shape[1], dtype=x.dtype, device=x.device)
    start = 0
    for expert, count in enumerate(torch.bincount(flat, minlength=len(text) + len(vision)).tolist()):
        if count:
            pool, index = (text, expert) if expert < len(text) else (vision, expert - len(text))
            segment = slice(start, start + count)
            inner = silu_mul(linear(x[token[segment]], pool.gate_up[index]))
            results[order[segment]] = linear(inner, pool.down[index])
            start += count
    combined = (results.view(*ids.shape, -1).float() * weights.unsqueeze(-1)).sum(1)
    return combined.to(x.dtype)
