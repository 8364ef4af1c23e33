"""Causal attention with one order of sums for each query."""

from torch import Tensor

from services.engine.kernels.reference.paged_attention import AttentionLaunch, PagedSequences
from services.engine.kernels.triton.attention.launches import attend_by
from services.engine.kernels.triton.attention.paged_attention import PrefillShape, tiles_launch

# Decoding sequences fill one row of a tile in 64. A context is not cut: one program walks over it.
TILES = PrefillShape(queries=64, keys=64, warps=4, stages=3)


def paged_attention(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    paged: PagedSequences,
    scale: float,
    out: Tensor | None = None,
    launches: list[AttentionLaunch] | None = None,
) -> Tensor:
    """See the reference. The last dimension of `query` is contiguous, `keys` and `values` are contiguous."""
    return attend_by(_begin, query, keys, values, paged, scale, out, launches)


def _begin(query: Tensor, keys: Tensor, paged: PagedSequences, scale: float, out: Tensor) -> list[AttentionLaunch]:
    return [tiles_launch(query, keys, paged, scale, out, TILES)]
