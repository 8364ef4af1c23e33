"""Block of experts: routed ones of two pools and a shared one, added to the residual, normed for the next block."""

from dataclasses import dataclass

from torch import Tensor

from services.engine.kernels.quantize import Weight
from services.engine.kernels.reference.experts import ExpertPool, experts
from services.engine.kernels.reference.linear_add_norm import linear_add_norm
from services.engine.kernels.reference.mlp import SwiGLU, swiglu
from services.engine.kernels.reference.rms_norm import add_rms_norm
from services.engine.kernels.reference.router import router


@dataclass(frozen=True, slots=True)
class MoE:
    """Two pools of routed experts, their router, and a shared expert that every token visits."""

    gate: Tensor  # [2 E, H] float32: text, then vision
    bias: Tensor  # [2 E] float32
    text: ExpertPool
    vision: ExpertPool
    shared: SwiGLU


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
    """Apply `linear_add_norm`, then a block of experts: `add_rms_norm` of the `experts` that `router` chooses plus
    `swiglu` of the shared one. An implementation may leave out the roundings to x's dtype in between.

    Args:
        x: [N, in].
        out: [H, in].
        residual: [N, H].
        moe_norm, norm: [H]: before the experts and after them.
        vision: [N] bool: rows of the vision pool; None if the host knows that there is none.
        top_k: routed experts of a row.

    Returns:
        the norm and the new residual, each [N, H].
    """
    x, residual = linear_add_norm(x, out, residual, moe_norm, eps)
    return add_rms_norm(all_experts(x, moe, vision, top_k), residual, norm, eps)


def all_experts(x: Tensor, moe: MoE, vision: Tensor | None, top_k: int) -> Tensor:
    """Return the sum of the routed experts and the shared one, [N, H]."""
    ids, weights = router(x, moe.gate, moe.bias, vision, top_k)
    return experts(x, ids, weights, moe.text, moe.vision) + swiglu(x, moe.shared)
