"""Causal attention of new tokens to their sequences' paged caches."""

import torch
import torch.nn.functional as F
from torch import Tensor

Lengths = tuple[tuple[int, int], ...]  # of each sequence: new tokens, and tokens in all


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
) -> Tensor:
    """Attend each query to the keys at or before its position in its sequence; softmax in float32.

    Sequence s owns query rows [query_start[s], query_start[s + 1]), the last of its context_lens[s] tokens, all of
    which are in the cache already. Key head j serves query heads [j G, (j + 1) G), G = heads / kv_heads.

    Args:
        query: [N, heads, D]. Rows may be strided.
        keys, values: one layer's cache, [blocks, block_size, kv_heads, D].
        block_tables: [S, B] int32; token i of sequence s is in block block_tables[s, i // block_size]. Entries past a
            sequence's last block are valid block numbers of any content.
        query_start: [S + 1] int32.
        context_lens: [S] int32.
        max_query_len, max_context_len: bounds for planning a launch without reading the tensors.
        scale: factor on the scores.
        lengths: the values behind query_start and context_lens, for planning launches, or () where they are unknown.

    Returns:
        [N, heads, D], contiguous, dtype of query.
    """
    out = torch.empty(query.shape, dtype=query.dtype, device=query.device)
    tables = block_tables[:, : -(-max_context_len // keys.shape[1])].long()
    rows_of = query_start.diff()
    single = (rows_of == 1).nonzero().flatten()
    if len(single):
        rows = query_start[single].long()
        out[rows] = _decode(query[rows], keys, values, tables[single], context_lens[single], scale)
    if max_query_len > 1:
        starts, contexts = query_start.tolist(), context_lens.tolist()
        for s in (rows_of > 1).nonzero().flatten().tolist():
            chunk = slice(starts[s], starts[s + 1])
            key, value = (_gather(cache, tables[s], contexts[s]) for cache in (keys, values))
            out[chunk] = _chunk(query[chunk], key, value, scale)
    return out


def _gather(cache: Tensor, table: Tensor, length: int) -> Tensor:
    """Return the first `length` tokens of a sequence: [length, kv_heads, D]."""
    blocks = -(-length // cache.shape[1])
    return cache[table[:blocks]].flatten(0, 1)[:length]


def _chunk(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    """Attend one sequence's chunk: query [Q, heads, D], key and value [C, kv_heads, D]."""
    length, heads, dim = query.shape
    context, kv_heads = key.shape[:2]
    visible = torch.ones(length, context, dtype=torch.bool, device=query.device).tril(context - length)
    grouped = query.view(length, kv_heads, heads // kv_heads, dim).permute(1, 2, 0, 3)
    shape = (kv_heads, heads // kv_heads, context, dim)
    out = F.scaled_dot_product_attention(
        grouped.float(),
        key.float().transpose(0, 1).unsqueeze(1).expand(shape),
        value.float().transpose(0, 1).unsqueeze(1).expand(shape),
        attn_mask=visible,
        scale=scale,
    )
    return out.permute(2, 0, 1, 3).reshape(length, heads, dim).to(query.dtype)


def _decode(query: Tensor, keys: Tensor, values: Tensor, tables: Tensor, contexts: Tensor, scale: float) -> Tensor:
    """Attend one query each of S sequences, padded to the longest context. query [S, heads, D], tables [S, B]."""
    count, heads, dim = query.shape
    block_size, kv_heads = keys.shape[1:3]
    blocks = -(-int(contexts.max()) // block_size)
    key, value = (cache[tables[:, :blocks]].flatten(1, 2).transpose(1, 2).float() for cache in (keys, values))
    visible = torch.arange(blocks * block_size, device=query.device) < contexts.unsqueeze(1)
    # The group's queries share a key head, so they are attended to as if they were consecutive queries.
    grouped = query.reshape(count, kv_heads, heads // kv_heads, dim).float()
    out = F.scaled_dot_product_attention(grouped, key, value, attn_mask=visible[:, None, None], scale=scale)
    return out.reshape(count, heads, dim).to(query.dtype)
