"""Sorting of (token, expert) pairs by expert, each expert's pairs padded to whole tiles of rows.

Two sorters, as neither is the faster one everywhere. `_sort_kernel` is one program that holds all pairs, so one launch;
`sort_pairs` is a counting sort of any number of pairs by many programs, in three launches. Microseconds a layer in a
captured graph (H200, 128 experts, 6 a token, tiles of 16 rows):

    pairs            48    384    768   1536   2046   3072   6144
    one program     1.9    2.2    3.0    4.5    5.4    7.0   12.8
    three launches  3.3    3.7    4.0    4.3    4.2    5.2    7.2

The first saves a decode step of up to 128 rows (768 pairs) 1.0 to 1.6 us in each of 27 layers; they meet at about
1,400 pairs.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from services.engine.kernels.triton.common.launch import pdl_options, wait_for_previous_kernel
from services.engine.kernels.triton.common.sizes import ceil_div, ceil_pow2

ONE_PROGRAM_PAIRS = 2048  # up to here one program sorts
BLOCKS = 64  # programs that count, at most: one program sums their counts
MIN_BLOCK_PAIRS = 512  # of a counting program


@dataclass(frozen=True, slots=True)
class SortedPairs:
    """Pairs grouped by expert, each group padded to whole tiles of rows."""

    sorted_pair_ids: Tensor  # [tiles * tile] int32, the pair of each row or -1
    expert_ids: Tensor  # [tiles] int32, the expert of each tile, `experts` past the end
    tile_bounds: Tensor  # [3] int32, tiles before the text pool's first, before the vision pool's first, and in all
    rows: Tensor  # [pairs] int32, the row of each pair
    ends: Tensor  # [experts] int32, the row behind the last pair of each expert
    tile: int  # rows of a tile


@triton.jit
def _sort_kernel(
    ids_ptr, pair_ids_ptr, expert_ids_ptr, cursor_ptr, P, tiles,
    EXPERTS: tl.constexpr, BM: tl.constexpr, PPAD: tl.constexpr, TPAD: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Store pair_ids[row] = pair, rows grouped by expert and each group padded to tiles of BM with -1."""
    wait_for_previous_kernel(PDL)
    pair = tl.arange(0, PPAD)
    inside = pair < P
    ids = tl.load(ids_ptr + pair, inside, EXPERTS)
    counts = tl.histogram(ids, EXPERTS * 2)
    expert = tl.arange(0, EXPERTS * 2)
    needed = tl.where(expert < EXPERTS, tl.cdiv(counts, BM), 0)
    ends = tl.cumsum(needed, 0)
    tl.store(cursor_ptr + expert, (ends - needed) * BM)
    tile = tl.arange(0, TPAD)
    tl.store(expert_ids_ptr + tile, EXPERTS, tile < tiles)
    rows = tl.arange(0, TPAD * BM)
    tl.store(pair_ids_ptr + rows, -1, rows < tiles * BM)
    tl.debug_barrier()
    for nth in range(0, tl.max(needed, 0)):
        tl.store(expert_ids_ptr + ends - needed + nth, expert, nth < needed)
    row = tl.atomic_add(cursor_ptr + ids, 1, inside, sem="relaxed", scope="cta")  # the only program
    tl.store(pair_ids_ptr + row, pair, inside)


# Numbers of pairs, tiles and blocks vary from step to step: no variant of a kernel may depend on them.
@triton.jit(do_not_specialize=["P", "tiles"])
def _count_kernel(
    ids_ptr, counts_ptr, pair_ids_ptr, expert_ids_ptr, P, tiles,
    EXPERTS: tl.constexpr, SIZE: tl.constexpr, BM: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Store counts[block, expert] of a block of pairs, and empty the block's share of the tiles."""
    wait_for_previous_kernel(PDL)
    block = tl.program_id(0)
    pair = block * SIZE + tl.arange(0, SIZE)
    # Pairs past the end are counted as an expert that does not exist.
    counts = tl.histogram(tl.load(ids_ptr + pair, pair < P, EXPERTS), EXPERTS * 2)
    expert = tl.arange(0, EXPERTS * 2)
    tl.store(counts_ptr + block * EXPERTS + expert, counts, expert < EXPERTS)
    for tile in range(block, tiles, tl.num_programs(0)):
        tl.store(pair_ids_ptr + tile * BM + tl.arange(0, BM), -1)
        tl.store(expert_ids_ptr + tile, EXPERTS)


@triton.jit(do_not_specialize=["blocks"])
def _offsets_kernel(
    counts_ptr, cursor_ptr, expert_ids_ptr, tile_bounds_ptr, blocks,
    EXPERTS: tl.constexpr, BM: tl.constexpr, BPAD: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Store cursor[block, expert]: the row of the block's first pair of this expert."""
    wait_for_previous_kernel(PDL)
    expert = tl.arange(0, EXPERTS)
    block = tl.arange(0, BPAD)[:, None]
    at = block * EXPERTS + expert[None, :]
    counts = tl.load(counts_ptr + at, block < blocks, 0)
    before = tl.cumsum(counts, 0) - counts
    needed = tl.cdiv(tl.sum(counts, 0), BM)
    ends = tl.cumsum(needed, 0)
    tl.store(cursor_ptr + at, ((ends - needed) * BM)[None, :] + before, block < blocks)
    for nth in range(0, tl.max(needed, 0)):
        tl.store(expert_ids_ptr + ends - needed + nth, expert, nth < needed)
    tl.store(tile_bounds_ptr, 0)
    tl.store(tile_bounds_ptr + 1, tl.sum(tl.where(expert < EXPERTS // 2, needed, 0), 0))
    tl.store(tile_bounds_ptr + 2, tl.sum(needed, 0))


@triton.jit(do_not_specialize=["P"])
def _place_kernel(
    ids_ptr, cursor_ptr, pair_ids_ptr, rows_ptr, P, EXPERTS: tl.constexpr, SIZE: tl.constexpr, PDL: tl.constexpr
):  # fmt: skip
    wait_for_previous_kernel(PDL)
    block = tl.program_id(0)
    pair = block * SIZE + tl.arange(0, SIZE)
    ids = tl.load(ids_ptr + pair, pair < P, 0)
    # The order within a group varies from run to run: no row's result depends on its neighbours.
    row = tl.atomic_add(cursor_ptr + block * EXPERTS + ids, 1, pair < P, sem="relaxed", scope="cta")
    tl.store(pair_ids_ptr + row, pair, pair < P)
    tl.store(rows_ptr + pair, row, pair < P)


def sort_pairs(ids: Tensor, experts: int, tile: int) -> SortedPairs:
    """Sort any number of pairs, in three launches.

    Args:
        ids: [P] int32, the expert of each pair.
        experts: of both pools, a power of two; the first half are the first pool's.
        tile: rows of a tile, a power of two.
    """
    pairs, device = len(ids), ids.device
    tiles = min(pairs, ceil_div(pairs, tile) + experts)
    size = max(MIN_BLOCK_PAIRS, ceil_pow2(ceil_div(pairs, BLOCKS)))
    blocks = ceil_div(pairs, size)
    cursor, counts = torch.empty(2, blocks, experts, dtype=torch.int32, device=device)
    sorted_pair_ids, expert_ids = (torch.empty(n, dtype=torch.int32, device=device) for n in (tiles * tile, tiles))
    tile_bounds, rows = (torch.empty(n, dtype=torch.int32, device=device) for n in (3, pairs))
    common = {"EXPERTS": experts, **pdl_options(ids)}
    _count_kernel[(blocks,)](
        ids, counts, sorted_pair_ids, expert_ids, pairs, tiles,
        SIZE=size, BM=tile, num_warps=4, **common,
    )  # fmt: skip
    _offsets_kernel[(1,)](
        counts, cursor, expert_ids, tile_bounds, blocks,
        BM=tile, BPAD=ceil_pow2(blocks), num_warps=16, **common,
    )  # fmt: skip
    _place_kernel[(blocks,)](ids, cursor, sorted_pair_ids, rows, pairs, SIZE=size, num_warps=4, **common)
    return SortedPairs(sorted_pair_ids, expert_ids, tile_bounds, rows, cursor[-1], tile)


def group_pairs(ids: Tensor, experts: int, tile: int) -> tuple[Tensor, Tensor]:
    """Sort pairs, with one program up to ONE_PROGRAM_PAIRS.

    Args:
        ids: [P] int32, the expert of each (token, choice) pair.

    Returns:
        sorted_pair_ids [tiles * tile] int32, the pair of each row or -1, and expert_ids [tiles] int32, at least
        `experts` past the end.
    """
    pairs = len(ids)
    if pairs > ONE_PROGRAM_PAIRS:
        order = sort_pairs(ids, experts, tile)
        return order.sorted_pair_ids, order.expert_ids
    tiles = min(pairs, ceil_div(pairs, tile) + experts)
    sorted_pair_ids = torch.empty(tiles * tile, dtype=torch.int32, device=ids.device)
    expert_ids = torch.empty(tiles, dtype=torch.int32, device=ids.device)
    cursor = torch.empty(2 * experts, dtype=torch.int32, device=ids.device)
    _sort_kernel[(1,)](
        ids, sorted_pair_ids, expert_ids, cursor, pairs, tiles,
        EXPERTS=experts, BM=tile, PPAD=ceil_pow2(pairs), TPAD=ceil_pow2(tiles),
        num_warps=8, **pdl_options(ids),
    )  # fmt: skip
    return sorted_pair_ids, expert_ids
