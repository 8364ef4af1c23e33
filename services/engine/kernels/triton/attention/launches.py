"""Attention by launches that are made for a step's first layer and serve all others."""

from collections.abc import Callable

import torch
from torch import Tensor

from services.engine.kernels.reference.paged_attention import AttentionLaunch, PagedSequences

Begin = Callable[[Tensor, Tensor, PagedSequences, float, Tensor], list[AttentionLaunch]]


def attend_by(
    begin: Begin,
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    paged: PagedSequences,
    scale: float,
    out: Tensor | None,
    launches: list[AttentionLaunch] | None,
) -> Tensor:
    """Attend as `paged_attention`, by the launches that are there or that `begin` makes for keys of any layer."""
    if out is None:
        out = torch.empty(query.shape, dtype=query.dtype, device=query.device)
    if launches is None:
        launches = []
    if not launches:
        launches += begin(query, keys, paged, scale, out)
    for launch in launches:
        launch(keys, values)
    return out
