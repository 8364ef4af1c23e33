"""Causal attention of new tokens to their sequences' paged caches."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

Lengths = tuple[tuple[int, int], ...]  # of each sequence: new tokens, and tokens in all
AttentionLaunch = Callable[[Tensor, Tensor], None]  # launches a layer's attention, to its keys and values
KEYS = 128  # of a tile
MIN_PROMPT = 4096  # tokens from which on a prompt without cached tokens may be faster in a call of its own


@dataclass(frozen=True, slots=True)
class PagedSequences:
    """Sequences whose queries are rows that follow each other, and whose keys and values are in blocks of the cache.

    Sequence s owns query rows [query_start[s], query_start[s + 1]), the last of its context_lens[s] tokens, all of
    which are in the cache already.
    """

    # [S, B] int32: token i of sequence s is in block block_tables[s, i // block_size]. Entries past a sequence's last
    # block are valid block numbers of any content.
    block_tables: Tensor
    query_start: Tensor  # [S + 1] int32
    context_lens: Tensor  # [S] int32
    max_query_len: int  # bounds for planning a launch without reading the tensors
    max_context_len: int
    lengths: Lengths = ()  # the values behind query_start and context_lens, or () where the host does not know them
    # The device may compute this call at the same time as the one before it, which was for other sequences of the same
    # step, and whose results it does not need.
    beside: bool = False


def paged_attention(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    paged: PagedSequences,
    scale: float,
    out: Tensor | None = None,
    launches: list[AttentionLaunch] | None = None,
) -> Tensor:
    """Attend each query to the keys at or before its position in its sequence; softmax in float32.

    Keys are summed in tiles of KEYS, from the first key of the sequence on, one tile after the other. So a query's sums
    do not depend on the other sequences, on what else of its own is computed with it, or on the size of blocks.

    Key head j serves query heads [j G, (j + 1) G), G = heads / kv_heads.

    Args:
        query: [N, heads, D]. Rows may be strided.
        keys, values: one layer's cache, [blocks, block_size, kv_heads, D].
        scale: factor on the scores.
        out: [N, heads, D], contiguous; written and returned, if given.
        launches: of this call for another layer, all of whose arguments were the same but keys and values; or empty,
            and filled for the next one.

    Returns:
        [N, heads, D], contiguous, dtype of query.
    """
    if out is None:
        out = torch.empty(query.shape, dtype=query.dtype, device=query.device)
    query_start, context_lens, tables = paged.query_start, paged.context_lens, paged.block_tables
    rows_of = query_start.diff()
    single = (rows_of == 1).nonzero().flatten()
    if len(single):
        rows = query_start[single].long()
        ends = context_lens[single].unsqueeze(1)
        out[rows] = _attend(query[rows].unsqueeze(1), keys, values, tables[single], ends, scale).squeeze(1)
    if paged.max_query_len > 1:
        starts, contexts = query_start.tolist(), context_lens.tolist()
        for s in (rows_of > 1).nonzero().flatten().tolist():
            chunk = slice(starts[s], starts[s + 1])
            ends = torch.arange(contexts[s] - starts[s + 1] + starts[s], contexts[s], device=query.device) + 1
            table, rows = tables[s : s + 1], query[chunk].unsqueeze(0)
            out[chunk] = _attend(rows, keys, values, table, ends.unsqueeze(0), scale).squeeze(0)
    return out


def _attend(query: Tensor, keys: Tensor, values: Tensor, tables: Tensor, ends: Tensor, scale: float) -> Tensor:
    """Attend Q queries of each of S sequences, by online softmax over tiles of keys.

    Args:
        query: [S, Q, heads, D].
        tables: [S, B].
        ends: [S, Q]: keys at or before each query.
    """
    count, length, heads, dim = query.shape
    kv_heads = keys.shape[2]
    # The group's queries share a key head: they are rows of the same products.
    shape = (count, length, kv_heads, heads // kv_heads)
    rows = query.float().view(*shape, dim).permute(0, 2, 3, 1, 4).reshape(count * kv_heads, -1, dim) * scale
    visible = ends.view(count, 1, 1, length).expand(count, kv_heads, shape[3], length).reshape(len(rows), -1, 1)
    if rows.shape[1] == 1:
        rows = rows.expand(-1, 2, -1)  # see `linear`
    best = rows.new_full((*rows.shape[:2], 1), -torch.inf)
    total, summed = torch.zeros_like(best), torch.zeros_like(rows)
    lengths = ends.amax(1)
    for start in range(0, int(lengths.max()), KEYS):
        at = torch.arange(start, start + KEYS, device=query.device)
        slots = _slots(at, tables, keys.shape[1])
        key, value = _gather(keys, slots), _gather(values, slots, at < lengths.unsqueeze(1))
        scores = torch.bmm(rows, key.transpose(1, 2)).masked_fill_(at >= visible, -torch.inf)
        largest = torch.maximum(best, scores.amax(-1, keepdim=True))
        weights, shrink = (scores - largest).exp_(), (best - largest).exp_()
        total = total * shrink + weights.sum(-1, keepdim=True)
        summed = summed * shrink + torch.bmm(weights, value)
        best = largest
    attended = (summed / total)[:, : length * shape[3]].view(count, kv_heads, shape[3], length, dim)
    return attended.permute(0, 3, 1, 2, 4).reshape(query.shape).to(query.dtype)


def _slots(at: Tensor, tables: Tensor, block_size: int) -> Tensor:
    """Return [S, KEYS] slots of the tokens `at` of each sequence; of any token past the end of a table."""
    blocks = tables[:, (at // block_size).clamp(max=tables.shape[1] - 1)]
    return blocks.long() * block_size + at % block_size


def _gather(cache: Tensor, slots: Tensor, known: Tensor | None = None) -> Tensor:
    """Return [S kv_heads, KEYS, D] float32 of one layer's keys or values.

    Args:
        known: [S, KEYS] the others become 0, whatever is there: a weight of 0 does not silence NaN.
    """
    found = cache.flatten(0, 1)[slots].float()
    if known is not None:
        found = found.masked_fill_(~known[:, :, None, None], 0)
    return found.transpose(1, 2).flatten(0, 1)
