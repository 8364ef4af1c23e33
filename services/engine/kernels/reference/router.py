"""Routing: the experts of each token, and their weights."""

import torch
from torch import Tensor

from services.engine.kernels.reference.linear import linear

SUM_MIN = 1e-12  # the model's moe_norm_min


def router(x: Tensor, gate: Tensor, bias: Tensor, vision: Tensor | None, top_k: int) -> tuple[Tensor, Tensor]:
    """Choose top_k experts of each row's own pool.

    p is the softmax over the pool's E experts. The bias affects the choice only; weights are p of the chosen ones,
    divided by their sum (at least 1e-12). All in float32.

    Args:
        x: [N, H], activations.
        gate: [2 E, H] float32: the text pool's rows, then the vision pool's.
        bias: [2 E] float32.
        vision: [N] bool: rows of the vision pool; None: no row is.

    Returns:
        expert ids [N, top_k] int32 in 0..2 E - 1 (the vision pool's begin at E), best first, and weights
        [N, top_k] float32.
    """
    experts = gate.shape[0] // 2
    # Both pools for every row: twice a small product costs less than separating the rows by pool.
    scores = linear(x.float(), gate).view(-1, 2, experts)
    pool = torch.zeros(len(x), dtype=torch.long, device=x.device) if vision is None else vision.long()
    p = _of_pool(scores, pool).softmax(-1)
    chosen = (p + bias.view(2, experts)[pool]).topk(top_k, -1).indices
    weights = p.gather(-1, chosen)
    weights = weights / weights.sum(-1, keepdim=True).clamp(min=SUM_MIN)
    return (chosen + pool.unsqueeze(-1) * experts).to(torch.int32), weights


def _of_pool(scores: Tensor, pool: Tensor) -> Tensor:
    """Select the scores of each row's pool."""
    index = pool.view(-1, 1, 1).expand(-1, 1, scores.shape[-1])
    return scores.gather(1, index).squeeze(1)
