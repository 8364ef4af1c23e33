"""A block of experts with one order of sums for each row."""

from torch import Tensor

from services.engine.kernels.quantize import Weight, bits_of
from services.engine.kernels.reference.moe import MoE
from services.engine.kernels.triton.common.sizes import ceil_div, ceil_pow2
from services.engine.kernels.triton.dense.matmul import STEP
from services.engine.kernels.triton.dense.rms_norm import add_norm
from services.engine.kernels.triton.invariant.dense import swiglu
from services.engine.kernels.triton.invariant.linear import linear
from services.engine.kernels.triton.moe.experts import tiled_results
from services.engine.kernels.triton.moe.moe import combine, text_only
from services.engine.kernels.triton.moe.router import route_tiles
from services.engine.kernels.triton.moe.tiles import Plan, Tile

TILES = {4: Tile(64, STEP, 4, 2), 8: Tile(64, 128, 4, 3), 16: Tile(64, 64, 4, 4)}
MOST_ROWS, FEWEST_ROWS = 64, 16


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
    """See the reference. All contiguous but x, whose rows may be strided."""
    x, residual = add_norm(linear(x, out), residual, moe_norm, eps)
    return combine(*all_experts(x, moe, vision, top_k), residual, norm, eps)


def all_experts(x: Tensor, moe: MoE, vision: Tensor | None, top_k: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return what `combine` sums: the routed experts' results, their weights, and the shared expert's."""
    ids, weights = route_tiles(x, moe.gate, moe.bias, text_only(x) if vision is None else vision, top_k)
    experts = len(moe.text) + len(moe.vision)
    rows = min(MOST_ROWS, max(FEWEST_ROWS, ceil_pow2(ceil_div(ids.numel(), experts))))
    tile = TILES[bits_of(moe.text.down)]
    routed = tiled_results(x, ids, moe.text, moe.vision, Plan(rows, tile, tile))
    return routed, weights, swiglu(x, moe.shared)
