"""Causal attention with one order of sums for each query."""

import torch
from torch import Tensor

from services.engine.kernels.reference.paged_attention import AttentionLaunch, Lengths
from services.engine.kernels.triton.attention.paged_attention import PrefillShape, tiles_launch

# Decoding sequences fill one row of a tile in 64. A context is not cut: one program walks over it.
TILES = PrefillShape(queries=64, keys=64, warps=4, stages=3)


def paged_attention(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    block_tables: Tensor,
    query_start: Tensor,
    context_lens: Tensor,
    max_query_len: int,
    max_context_len: int,
    scale: float,
    lengths: Lengths = (),
    out: Tensor | None = None,
    beside: bool = False,
    launches: list[AttentionLaunch] | None = None,
) -> Tensor:
    """See the reference. The last dimension of `query` is contiguous, `keys` and `values` are contiguous."""
    if out is None:
        out = torch.empty(query.shape, dtype=query.dtype, device=query.device)
    if launches is None:
        launches = []
    if not launches:
        arguments = (query, keys, block_tables, query_start, context_lens)
        launches.append(tiles_launch(*arguments, max_query_len, scale, out, TILES))
    for launch in launches:
        launch(keys, values)
    return out
