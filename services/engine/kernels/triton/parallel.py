"""Operations of one rank of tensor parallelism on CUDA devices: see services.engine.kernels.reference.parallel.

The kernel that adds the residual stream and norms sums the ranks' parts, too, in float32 and in their order, as it sums
parts of a product: beyond the exchange itself a block has one launch more, which puts its experts together. Few rows of
cards that reach each other's memory take one launch for all of it.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

from torch import Tensor

from services.engine.kernels.ops import Ops
from services.engine.kernels.peer_memory import PeerMemory
from services.engine.kernels.quantize import Weight
from services.engine.kernels.reference.mlp import SwiGLU
from services.engine.kernels.reference.moe import MoE
from services.engine.kernels.reference.parallel import Gather
from services.engine.kernels.triton.dense.linear import gated_linear, linear
from services.engine.kernels.triton.dense.rms_norm import add_norm
from services.engine.kernels.triton.exchange.add_norm import exchange_add_norm, fits
from services.engine.kernels.triton.invariant import dense as invariant_dense
from services.engine.kernels.triton.invariant.linear import linear as invariant_linear
from services.engine.kernels.triton.invariant.moe import all_experts as invariant_experts
from services.engine.kernels.triton.moe.add_norm_scores import MAX_ROWS, add_norm_scores
from services.engine.kernels.triton.moe.moe import all_experts, sum_experts

Experts = Callable[[Tensor, MoE, Tensor | None, int, Tensor | None], tuple[Tensor, Tensor, Tensor]]


@dataclass(frozen=True, slots=True)
class Products:
    """The products of a family of operations, before the ranks' results are summed."""

    linear: Callable[[Tensor, Weight], Tensor]
    swiglu: Callable[[Tensor, SwiGLU], Tensor]
    experts: Experts
    scored_rows: int  # up to so many rows, the router's scores come with the norm before it


FASTEST = Products(linear, lambda x, mlp: linear(gated_linear(x, mlp.gate_up), mlp.down), all_experts, MAX_ROWS)
INVARIANT = Products(
    lambda x, weight: invariant_linear(x, weight)[0],
    lambda x, mlp: invariant_dense.swiglu(x, mlp)[0],
    lambda x, moe, vision, top_k, _: invariant_experts(x, moe, vision, top_k),
    scored_rows=0,
)


def parallel_ops(ops: Ops, gather: Gather, products: Products = FASTEST, peer_memory: PeerMemory | None = None) -> Ops:
    """Return `ops` for one rank's weights.

    Args:
        peer_memory: by which few rows are exchanged on the way, if cards reach each other's memory.
    """

    def linear_add_norm(x: Tensor, weight: Weight, residual: Tensor, norm: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        return add_norm(gather(products.linear(x, weight)), residual, norm, eps)

    def mlp_add_norm(x: Tensor, mlp: SwiGLU, residual: Tensor, norm: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        return add_norm(gather(products.swiglu(x, mlp)), residual, norm, eps)

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
        attended, scores = gather(products.linear(x, out)), None
        if len(x) <= products.scored_rows:
            x, residual, scores = add_norm_scores(attended, residual, moe_norm, eps, moe.gate)
        else:
            x, residual = add_norm(attended, residual, moe_norm, eps)
        results = products.experts(x, moe, vision, top_k, scores)
        if peer_memory is not None and fits(peer_memory, residual):
            return exchange_add_norm(*results, residual, norm, eps, peer_memory)
        return add_norm(gather(sum_experts(*results, x.dtype)), residual, norm, eps)

    return replace(
        ops, linear_add_norm=linear_add_norm, mlp_add_norm=mlp_add_norm, linear_moe_add_norm=linear_moe_add_norm
    )
