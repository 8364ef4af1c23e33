"""Projection to queries, keys and values, rotary embedding, and the write to the paged cache."""

from torch import Tensor

from services.engine.kernels.quantize import Weight
from services.engine.kernels.reference.kv_write import kv_write
from services.engine.kernels.reference.linear import linear
from services.engine.kernels.reference.rotary import rotary


def qkv(
    x: Tensor,
    weight: Weight,
    cos: Tensor,
    sin: Tensor,
    keys: Tensor,
    values: Tensor,
    slots: Tensor,
    query: Tensor | None = None,
) -> Tensor:
    """Apply `linear`, `rotary` to its queries and keys, and `kv_write` to its keys and values.

    Args:
        x: [N, H].
        weight: [(heads + 2 kv_heads) D, H]: queries, keys, values.
        cos, sin: [N, D / 2] float32.
        keys, values: one layer's cache, [blocks, block_size, kv_heads, D], contiguous; written.
        slots: [N] int64, distinct.
        query: [N, heads, D], contiguous; written and returned, if given.

    Returns:
        the rotated queries, [N, heads, D]; rows may be strided.
    """
    kv_heads, dim = keys.shape[2:]
    projected = linear(x, weight).view(len(x), -1, dim)
    rotated = projected[:, :-kv_heads]
    rotary(rotated, cos, sin)
    kv_write(rotated[:, -kv_heads:], projected[:, -kv_heads:], keys, values, slots)
    queries = rotated[:, :-kv_heads]
    return queries if query is None else query.copy_(queries)
