"""Writing to the paged cache and attending to it."""

import numpy as np
import pytest
import torch

from services.engine.kernels.reference.kv_write import kv_write
from services.engine.kernels.reference.paged_attention import PagedSequences, paged_attention

pytestmark = pytest.mark.usefixtures("poisoned_allocations")

BLOCK, DIM, SCALE = 4, 6, 0.3
BLOCKS = 23


def test_kv_write_touches_its_slots_only() -> None:
    keys, values = (torch.full((5, BLOCK, 2, DIM), float("nan")) for _ in range(2))
    qkv = torch.randn(3, 4 + 2 + 2, DIM)
    slots = torch.tensor([7, 0, 18])
    kv_write(qkv[:, 4:6], qkv[:, 6:], keys, values, slots)
    written = {7: 0, 0: 1, 18: 2}
    for slot in range(5 * BLOCK):
        for cache, first in ((keys, 4), (values, 6)):
            stored = cache[slot // BLOCK, slot % BLOCK]
            if slot in written:
                assert torch.equal(stored, qkv[written[slot], first : first + 2])
            else:
                assert stored.isnan().all()


def naive_attention(query: np.ndarray, key: np.ndarray, value: np.ndarray, context: int) -> np.ndarray:
    """One sequence, one query and key head at a time: query [Q, heads, D], key and value [context, kv_heads, D]."""
    out = np.empty(query.shape)
    group = query.shape[1] // key.shape[1]
    for i, head in np.ndindex(*query.shape[:2]):
        last = context - len(query) + i
        scores = np.array([query[i, head] @ key[j, head // group] * SCALE for j in range(last + 1)])
        p = np.exp(scores - scores.max())
        out[i, head] = (p / p.sum()) @ value[: last + 1, head // group]
    return out


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("heads", [(2, 2), (10, 2), (3, 1)])
@pytest.mark.parametrize(
    "lengths",  # (query, context) of each sequence
    [
        [(1, 1)],
        [(1, 9), (1, 4), (1, 1)],  # decode
        [(5, 5)],  # a whole prompt
        [(3, 11), (1, 6), (7, 7), (1, 13), (2, 8)],  # decode, chunks and cached prefixes at once
        [(4, 8), (8, 12)],  # at the edges of blocks
    ],
)
def test_paged_attention(lengths: list[tuple[int, int]], heads: tuple[int, int], dtype: torch.dtype) -> None:
    # What is in the cache but not in a sequence is large, so that reading it shows.
    keys, values = (torch.full((BLOCKS, BLOCK, heads[1], DIM), 1e4).to(dtype) for _ in range(2))
    free = torch.randperm(BLOCKS).tolist()
    width = max(-(-context // BLOCK) for _, context in lengths) + 2
    tables, sequences = torch.zeros(len(lengths), width, dtype=torch.int32), []
    for s, (_, context) in enumerate(lengths):
        key, value = (torch.randn(context, heads[1], DIM).to(dtype) for _ in range(2))
        for j in range(context):
            if j % BLOCK == 0:
                tables[s, j // BLOCK] = free.pop()
            block = int(tables[s, j // BLOCK])
            keys[block, j % BLOCK], values[block, j % BLOCK] = key[j], value[j]
        sequences.append((key.double().numpy(), value.double().numpy()))
    starts = np.cumsum([0, *(query for query, _ in lengths)])
    query = torch.randn(starts[-1], heads[0] + 3, DIM).to(dtype)[:, : heads[0]]
    paged = PagedSequences(
        tables,
        torch.tensor(starts, dtype=torch.int32),
        torch.tensor([context for _, context in lengths], dtype=torch.int32),
        max(query for query, _ in lengths),
        max(context for _, context in lengths),
    )
    out = paged_attention(query, keys, values, paged, SCALE)
    assert out.dtype == dtype
    assert out.is_contiguous()
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    for s, (exact_keys, exact_values) in enumerate(sequences):
        rows = slice(starts[s], starts[s + 1])
        expected = naive_attention(query[rows].double().numpy(), exact_keys, exact_values, lengths[s][1])
        np.testing.assert_allclose(out[rows].double().numpy(), expected, rtol=tolerance, atol=tolerance)
