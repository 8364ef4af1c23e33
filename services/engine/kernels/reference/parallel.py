"""Operations of one rank of tensor parallelism: where a block's result joins the residual stream, the ranks sum theirs.

A rank has some heads, and a part of the inner width of every block, so what its last product gives is one part of a
sum. Two such sums a layer are all that the ranks exchange. Every rank adds the same parts in the same order, so all
have the same bits, and a row's do not depend on the rows beside it.
"""

from collections.abc import Callable
from dataclasses import replace

from torch import Tensor

from services.engine.kernels.ops import Ops
from services.engine.kernels.quantize import Weight
from services.engine.kernels.reference.linear import linear
from services.engine.kernels.reference.mlp import SwiGLU, swiglu
from services.engine.kernels.reference.moe import MoE, all_experts
from services.engine.kernels.reference.rms_norm import add_rms_norm

# Gives a rank's [N, H] to the others. Returns [parts, N, H], the same on all ranks, whose sum is the result.
Gather = Callable[[Tensor], Tensor]


def parallel_ops(gather: Gather) -> Ops:
    """Return operations with the arguments and results of those in `Ops`, given one rank's weights."""

    def linear_add_norm(x: Tensor, weight: Weight, residual: Tensor, norm: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        return add_rms_norm(sum_parts(gather(linear(x, weight))), residual, norm, eps)

    def mlp_add_norm(x: Tensor, mlp: SwiGLU, residual: Tensor, norm: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        return add_rms_norm(sum_parts(gather(swiglu(x, mlp))), residual, norm, eps)

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
        x, residual = linear_add_norm(x, out, residual, moe_norm, eps)
        return add_rms_norm(sum_parts(gather(all_experts(x, moe, vision, top_k))), residual, norm, eps)

    return replace(
        Ops(), linear_add_norm=linear_add_norm, mlp_add_norm=mlp_add_norm, linear_moe_add_norm=linear_moe_add_norm
    )


def sum_parts(parts: Tensor) -> Tensor:
    """Return the sum over the first dimension, in its order and in float32, in the dtype of the parts."""
    first, *others = parts.unbind()
    total = first.float()
    for part in others:
        total = total + part.float()
    return total.to(parts.dtype)
