"""Pairs of a token and an expert, sorted by expert: a counting sort in three launches, for any number of pairs."""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from services.engine.kernels.triton.common.launch import pdl_options, wait_for_previous_kernel
from services.engine.kernels.triton.common.sizes import ceil_div, ceil_pow2

BLOCKS = 64  # programs that count, at most: one program sums what they counted
LEAST = 512  # pairs of such a program, at least


@dataclass(frozen=True, slots=True)
class Sorted:
    """Rows of pairs grouped by expert, each group padded to whole tiles."""

    place: Tensor  # [tiles * tile] int32, the pair of each row or -1
    owner: Tensor  # [tiles] int32, the expert of each tile, `experts` past the end
    bounds: Tensor  # [3] int32, the tiles before the first pool, before the second, and before the end
    tile: int  # its rows


@triton.jit
def _count_kernel(
    ids_ptr, counts_ptr, place_ptr, owner_ptr, P, tiles,
    EXPERTS: tl.constexpr, SIZE: tl.constexpr, BM: tl.constexpr, TILES: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """counts[block, expert] of a block of pairs; besides, its share of the tiles is emptied."""
    wait_for_previous_kernel(PDL)
    block = tl.program_id(0)
    pair = block * SIZE + tl.arange(0, SIZE)
    # Pairs past the end are counted where no expert is.
    counts = tl.histogram(tl.load(ids_ptr + pair, pair < P, EXPERTS), EXPERTS * 2)
    expert = tl.arange(0, EXPERTS * 2)
    tl.store(counts_ptr + block * EXPERTS + expert, counts, expert < EXPERTS)
    row = block * TILES * BM + tl.arange(0, TILES * BM)
    tl.store(place_ptr + row, -1, row < tiles * BM)
    tile = block * TILES + tl.arange(0, TILES)
    tl.store(owner_ptr + tile, EXPERTS, tile < tiles)


@triton.jit
def _offsets_kernel(
    counts_ptr, cursor_ptr, owner_ptr, bounds_ptr, blocks,
    EXPERTS: tl.constexpr, BM: tl.constexpr, BPAD: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """cursor[block, expert]: the row of the block's first pair of this expert."""
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
        tl.store(owner_ptr + ends - needed + nth, expert, nth < needed)
    tl.store(bounds_ptr, 0)
    tl.store(bounds_ptr + 1, tl.sum(tl.where(expert < EXPERTS // 2, needed, 0), 0))
    tl.store(bounds_ptr + 2, tl.sum(needed, 0))


@triton.jit
def _place_kernel(
    ids_ptr, cursor_ptr, place_ptr, P, EXPERTS: tl.constexpr, SIZE: tl.constexpr, PDL: tl.constexpr
):  # fmt: skip
    wait_for_previous_kernel(PDL)
    block = tl.program_id(0)
    pair = block * SIZE + tl.arange(0, SIZE)
    ids = tl.load(ids_ptr + pair, pair < P, 0)
    # Which row of its group a pair gets is left to chance: no row's result depends on its neighbours.
    row = tl.atomic_add(cursor_ptr + block * EXPERTS + ids, 1, pair < P, sem="relaxed", scope="cta")
    tl.store(place_ptr + row, pair, pair < P)


def sort_pairs(ids: Tensor, experts: int, tile: int) -> Sorted:
    """
    Args:
        ids: [P] int32, the expert of each pair.
        experts: of both pools, a power of two; the first half are the first pool's.
        tile: rows of a tile, a power of two.
    """
    pairs, device = len(ids), ids.device
    tiles = min(pairs, ceil_div(pairs, tile) + experts)
    size = max(LEAST, ceil_pow2(ceil_div(pairs, BLOCKS)))
    blocks = ceil_div(pairs, size)
    cursor, counts = torch.empty(2, blocks, experts, dtype=torch.int32, device=device)
    place, owner = (torch.empty(n, dtype=torch.int32, device=device) for n in (tiles * tile, tiles))
    bounds = torch.empty(3, dtype=torch.int32, device=device)
    common = {"EXPERTS": experts, **pdl_options(ids)}
    _count_kernel[(blocks,)](
        ids, counts, place, owner, pairs, tiles,
        SIZE=size, BM=tile, TILES=ceil_pow2(ceil_div(tiles, blocks)), num_warps=4, **common,
    )  # fmt: skip
    _offsets_kernel[(1,)](
        counts, cursor, owner, bounds, blocks,
        BM=tile, BPAD=ceil_pow2(blocks), num_warps=16, **common,
    )  # fmt: skip
    _place_kernel[(blocks,)](ids, cursor, place, pairs, SIZE=size, num_warps=4, **common)
    return Sorted(place, owner, bounds, tile)
