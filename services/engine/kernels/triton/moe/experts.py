"""Both pools of experts as one grouped product: rows sorted by expert on the device, tiles of one expert each.

Three launches: sort, gate_up with the gate applied, and down; whoever reads the results weighs and sums them. The host
never learns how many rows an expert got: the grid has as many row tiles as the worst case needs, and tiles past the
last one leave at once. With very few pairs each is a tile of its own and nothing is sorted. Many rows are another
matter: services.engine.kernels.triton.moe.grouped.
"""

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from services.engine.kernels.quantize import GROUP, Weight, in_features
from services.engine.kernels.reference.experts import ExpertPool
from services.engine.kernels.reference.router import SUM_MIN
from services.engine.kernels.triton.common.launch import pdl_options, wait_for_previous_kernel
from services.engine.kernels.triton.common.sizes import ceil_div, ceil_pow2
from services.engine.kernels.triton.dense.matmul import dot_tile, gate_or_up, gated, parts, scales
from services.engine.kernels.triton.moe.grouped import grouped_experts, takes
from services.engine.kernels.triton.moe.router import choice
from services.engine.kernels.triton.moe.sort import sort_pairs

FEW = 12  # pairs that are not sorted: each is a tile of its own


@triton.jit
def _sort_kernel(
    ids_ptr, place_ptr, tile_expert_ptr, cursor_ptr, P, tiles,
    EXPERTS: tl.constexpr, BM: tl.constexpr, PPAD: tl.constexpr, TPAD: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """place[row] = pair, rows grouped by expert and each group padded to tiles of BM with -1."""
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
    tl.store(tile_expert_ptr + tile, EXPERTS, tile < tiles)
    rows = tl.arange(0, TPAD * BM)
    tl.store(place_ptr + rows, -1, rows < tiles * BM)
    tl.debug_barrier()
    for nth in range(0, tl.max(needed, 0)):
        tl.store(tile_expert_ptr + ends - needed + nth, expert, nth < needed)
    row = tl.atomic_add(cursor_ptr + ids, 1, inside, sem="relaxed", scope="cta")  # nobody else counts
    tl.store(place_ptr + row, pair, inside)


@triton.jit
def _rows(place_ptr, owner_ptr, SORTED: tl.constexpr, BM: tl.constexpr):
    """The expert of this program's tile, and the pairs in its rows (-1: none)."""
    tile, row = tl.program_id(1), tl.arange(0, BM)
    pair = tl.load(place_ptr + tile * BM + row) if SORTED else tl.where(row == 0, tile, -1)
    return tl.load(owner_ptr + tile), pair


@triton.jit
def _of_pool(expert, TEXT, text_ptr, text_scale_ptr, VISION, vision_ptr, vision_scale_ptr, E: tl.constexpr):
    """Width, weight and scales of the expert's pool, and its index there."""
    width, w_ptr, scale_ptr, index = TEXT, text_ptr, text_scale_ptr, expert
    if expert >= E:
        width, w_ptr, scale_ptr, index = VISION, vision_ptr, vision_scale_ptr, expert - E
    return width, w_ptr, scale_ptr, index.to(tl.int64)


@triton.jit
def gate_up_tile(
    pair, x_ptr, out_ptr, width, w_ptr, scale_ptr, index, IN, OUT, x_stride, w_stride,
    K: tl.constexpr, BITS: tl.constexpr, EVEN: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """out[pair] = silu(gate) up, BN / 2 outputs of one expert for the pairs [BM], -1 for none."""
    first = tl.program_id(0) * (BN // 2)
    output, is_up = gate_or_up(first, BN)
    w_row = index * 2 * width + output + is_up * width
    rows, columns = (pair >= 0)[None, :], (output < width)[:, None]
    x_ptrs = x_ptr + (pair // K).to(tl.int64)[None, :] * x_stride
    w_ptrs = w_ptr + w_row[:, None] * w_stride
    acc = tl.zeros((BN, BM), tl.float32)
    for block in range(0, tl.cdiv(IN, BK)):
        acc = dot_tile(acc, w_ptrs, columns, x_ptrs, rows, block, IN, BK, BITS, EVEN)
    if BITS != 16:
        acc *= scales(scale_ptr + w_row, output < width)[:, None]
    n = first + tl.arange(0, BN // 2)
    out = out_ptr + pair.to(tl.int64)[None, :] * OUT + n[:, None]
    tl.store(out, gated(acc, BN, BM).to(out_ptr.dtype.element_ty), rows & (n < width)[:, None])


@triton.jit
def _gate_up_kernel(
    x_ptr, place_ptr, owner_ptr, out_ptr,
    text_ptr, text_scale_ptr, vision_ptr, vision_scale_ptr, IN, TEXT, VISION, x_stride, w_stride,
    E: tl.constexpr, K: tl.constexpr, BITS: tl.constexpr, SORTED: tl.constexpr, EVEN: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    wait_for_previous_kernel(PDL)
    expert, pair = _rows(place_ptr, owner_ptr, SORTED, BM)
    if expert >= 2 * E:
        return
    width, w_ptr, scale_ptr, index = _of_pool(
        expert, TEXT, text_ptr, text_scale_ptr, VISION, vision_ptr, vision_scale_ptr, E
    )  # fmt: skip
    if tl.program_id(0) * (BN // 2) >= width:
        return
    gate_up_tile(
        pair, x_ptr, out_ptr, width, w_ptr, scale_ptr, index, IN, TEXT, x_stride, w_stride, K, BITS, EVEN, BM, BN, BK
    )  # fmt: skip


@triton.jit
def _choose_gate_up_kernel(
    scores_ptr, bias_ptr, pool_ptr, ids_ptr, weights_ptr, sum_min, x_ptr, out_ptr,
    text_ptr, text_scale_ptr, vision_ptr, vision_scale_ptr, IN, TEXT, VISION, x_stride, w_stride,
    E: tl.constexpr, K: tl.constexpr, BITS: tl.constexpr, EVEN: tl.constexpr, BLOCK: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """The first product of one pair, by a program that finds out by itself which expert the pair has."""
    wait_for_previous_kernel(PDL)
    at = tl.program_id(1)
    row, nth = at // K, at % K
    pool = tl.load(pool_ptr + row).to(tl.int32)
    rank, weight = choice(scores_ptr + row * 2 * E, bias_ptr, pool, E, sum_min, K, 1, BLOCK)
    chosen = rank == nth
    expert = tl.sum(tl.where(chosen, tl.arange(0, BLOCK), 0), 0) + pool * E
    if tl.program_id(0) == 0:
        tl.store(ids_ptr + at, expert)
        tl.store(weights_ptr + at, tl.sum(tl.where(chosen, weight, 0.0), 0))
    width, w_ptr, scale_ptr, index = _of_pool(
        expert, TEXT, text_ptr, text_scale_ptr, VISION, vision_ptr, vision_scale_ptr, E
    )  # fmt: skip
    if tl.program_id(0) * (BN // 2) >= width:
        return
    pair = tl.where(tl.arange(0, BM) == 0, at, -1)
    gate_up_tile(
        pair, x_ptr, out_ptr, width, w_ptr, scale_ptr, index, IN, TEXT, x_stride, w_stride, K, BITS, EVEN, BM, BN, BK
    )  # fmt: skip


@triton.jit
def _down_kernel(
    inner_ptr, place_ptr, owner_ptr, out_ptr,
    text_ptr, text_scale_ptr, vision_ptr, vision_scale_ptr, H, TEXT, VISION, text_stride, vision_stride,
    E: tl.constexpr, BITS: tl.constexpr, SORTED: tl.constexpr, EVEN: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    wait_for_previous_kernel(PDL)
    expert, pair = _rows(place_ptr, owner_ptr, SORTED, BM)
    if expert >= 2 * E:
        return
    width, w_ptr, scale_ptr, index = _of_pool(
        expert, TEXT, text_ptr, text_scale_ptr, VISION, vision_ptr, vision_scale_ptr, E
    )  # fmt: skip
    w_stride = tl.where(expert >= E, vision_stride, text_stride)
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    rows, columns = (pair >= 0)[None, :], (n < H)[:, None]
    x_ptrs = inner_ptr + pair.to(tl.int64)[None, :] * TEXT
    w_row = index * H + n
    w_ptrs = w_ptr + w_row[:, None] * w_stride
    acc = tl.zeros((BN, BM), tl.float32)
    for block in range(0, tl.cdiv(width, BK)):
        acc = dot_tile(acc, w_ptrs, columns, x_ptrs, rows, block, width, BK, BITS, EVEN)
    if BITS != 16:
        acc *= scales(scale_ptr + w_row, n < H)[:, None]
    out = out_ptr + pair.to(tl.int64)[None, :] * H + n[:, None]
    tl.store(out, acc.to(out_ptr.dtype.element_ty), rows & columns)


@dataclass(frozen=True, slots=True)
class Tile:
    """How a product is cut: rows of a weight and inputs of a program, its warps and stages."""

    bn: int  # in the first product, half of them of the gate and half of the up projection
    bk: int
    warps: int
    stages: int

    def options(self, x: Tensor, inputs: tuple[int, ...], outputs: tuple[int, ...], bn: int) -> dict[str, Any]:
        """Of a launch for products of any of these sizes, whose programs have `bn` outputs. EVEN: tiles cover them
        exactly, so nothing need be masked."""
        even = not any(n % self.bk for n in inputs) and not any(n % bn for n in outputs)
        stages = self.stages if x.element_size() == 2 else 1
        return {"EVEN": even, "BN": self.bn, "BK": self.bk, "num_warps": self.warps, "num_stages": stages}


@dataclass(frozen=True, slots=True)
class Tiles:
    """How both products are cut."""

    rows: int  # of a tile
    gate_up: Tile
    down: Tile
    grouped: bool = True


def group_rows(ids: Tensor, experts: int, tile: int) -> tuple[Tensor, Tensor]:
    """Rows of pairs grouped by expert, each group padded to whole tiles.

    Args:
        ids: [P] int32, the expert of each (token, choice) pair.

    Returns:
        place [tiles * tile] int32, the pair of each row or -1; tile_expert [tiles] int32, >= experts past the end.
    """
    pairs = len(ids)
    if pairs > 2048:
        order = sort_pairs(ids, experts, tile)
        return order.place, order.owner
    tiles = min(pairs, ceil_div(pairs, tile) + experts)
    place = torch.empty(tiles * tile, dtype=torch.int32, device=ids.device)
    tile_expert = torch.empty(tiles, dtype=torch.int32, device=ids.device)
    cursor = torch.empty(2 * experts, dtype=torch.int32, device=ids.device)
    _sort_kernel[(1,)](
        ids, place, tile_expert, cursor, pairs, tiles,
        EXPERTS=experts, BM=tile, PPAD=ceil_pow2(pairs), TPAD=ceil_pow2(tiles),
        num_warps=8, **pdl_options(ids),
    )  # fmt: skip
    return place, tile_expert


def expert_results(x: Tensor, ids: Tensor, text: ExpertPool, vision: ExpertPool, media: bool = True) -> Tensor:
    """Every chosen expert applied to its row; still to be weighted and summed.

    Args:
        x: [N, H], contiguous.
        ids: [N, K] int32.
        text, vision: quantised alike.
        media: whether there may be choices of the vision pool.

    Returns:
        [N K, H] in the dtype of x.
    """
    if takes(x, ids.shape[1], text, vision):
        return grouped_experts(x, ids, text, vision, media)
    flat, experts = ids.flatten(), len(text) + len(vision)
    tiles = plan(len(flat), experts, parts(text.down)[2])
    place, owner = group_rows(flat, experts, tiles.rows) if tiles.grouped else (flat, flat)
    rows = Rows(place, owner, len(flat), {"E": len(text), "BM": tiles.rows, "SORTED": tiles.grouped, **pdl_options(x)})
    inner = _gate_up(x, rows, tiles.gate_up, text.gate_up, vision.gate_up, ids.shape[1])
    return _down(inner, rows, tiles.down, text.down, vision.down)


def routed_results(
    x: Tensor, scores: Tensor, bias: Tensor, rows: Tensor, top_k: int, text: ExpertPool, vision: ExpertPool
) -> tuple[Tensor, Tensor]:
    """Router and `expert_results` of at most `FEW` pairs, in two launches.

    Args:
        x: [N, H], contiguous.
        scores: [N, 2 E] float32 of both pools, not yet a softmax.
        bias: [2 E] float32.
        rows: [N] bool: those of the vision pool.

    Returns:
        [N K, H] in the dtype of x, and their weights [N, K] float32.
    """
    pairs, experts = len(x) * top_k, len(text)
    tiles = plan(pairs, experts + len(vision), parts(text.down)[2])
    ids = torch.empty(pairs, dtype=torch.int32, device=x.device)
    weights = torch.empty(len(x), top_k, dtype=torch.float32, device=x.device)
    first = _first(x, tiles.gate_up, text.gate_up, vision.gate_up, pairs, top_k)
    common = {"E": experts, "BM": tiles.rows, **pdl_options(x)}
    _choose_gate_up_kernel[(first.columns, pairs)](
        scores, bias, rows, ids, weights, SUM_MIN, x, first.inner, *first.arguments,
        BLOCK=ceil_pow2(experts), **first.options, **common,
    )  # fmt: skip
    placed = Rows(ids, ids, pairs, {"SORTED": False, **common})
    return _down(first.inner, placed, tiles.down, text.down, vision.down), weights


@dataclass(frozen=True, slots=True)
class Rows:
    """Where the pairs are."""

    place: Tensor
    owner: Tensor
    pairs: int
    options: dict[str, Any]  # of either launch


@dataclass(frozen=True, slots=True)
class First:
    """What launches of the first product have in common."""

    inner: Tensor  # [P, I of the text pool] in the dtype of x, to be filled
    columns: int  # tiles of outputs
    arguments: tuple[Any, ...]  # from the text pool's weight on
    options: dict[str, Any]


def _first(x: Tensor, tile: Tile, text: Weight, vision: Weight, pairs: int, top_k: int) -> First:
    (text_data, text_scale, bits), (vision_data, vision_scale, _) = parts(text), parts(vision)
    hidden, width, vision_width = x.shape[1], text_data.shape[1] // 2, vision_data.shape[1] // 2
    outputs = tile.bn // 2
    return First(
        torch.empty(pairs, width, dtype=x.dtype, device=x.device),
        ceil_div(width, outputs),
        (
            text_data, text_scale, vision_data, vision_scale,
            hidden, width, vision_width, x.stride(0), text_data.stride(1),
        ),
        {"K": top_k, "BITS": bits, **tile.options(x, (hidden,), (width, vision_width), outputs)},
    )  # fmt: skip


def _gate_up(x: Tensor, rows: Rows, tile: Tile, text: Weight, vision: Weight, top_k: int) -> Tensor:
    """silu(gate) up of every pair, [P, I of the text pool] in the dtype of x."""
    first = _first(x, tile, text, vision, rows.pairs, top_k)
    _gate_up_kernel[(first.columns, len(rows.owner))](
        x, rows.place, rows.owner, first.inner, *first.arguments, **first.options, **rows.options
    )
    return first.inner


def _down(inner: Tensor, rows: Rows, tile: Tile, text: Weight, vision: Weight) -> Tensor:
    """[P, H] in the dtype of inner."""
    (text_data, text_scale, bits), (vision_data, vision_scale, _) = parts(text), parts(vision)
    hidden, width, vision_width = text_data.shape[1], inner.shape[1], in_features(vision)
    results = torch.empty(rows.pairs, hidden, dtype=inner.dtype, device=inner.device)
    _down_kernel[(ceil_div(hidden, tile.bn), len(rows.owner))](
        inner, rows.place, rows.owner, results, text_data, text_scale, vision_data, vision_scale,
        hidden, width, vision_width, text_data.stride(1), vision_data.stride(1),
        BITS=bits, **tile.options(inner, (width, vision_width), (hidden,), tile.bn), **rows.options,
    )  # fmt: skip
    return results


def plan(pairs: int, experts: int, bits: int) -> Tiles:
    """By how many rows an expert gets on average. Measured: see docs/engine-performance.md."""
    return {4: _plan4, 8: _plan8, 16: _plan16}[bits](pairs, pairs / experts)


def _plan4(pairs: int, each: float) -> Tiles:
    if pairs <= FEW:
        return Tiles(8, Tile(32, GROUP, 2, 3), Tile(32, GROUP, 2, 3), grouped=False)
    if each <= 4:
        return Tiles(8, Tile(64, GROUP, 2, 3), Tile(64, GROUP, 4, 3))
    if each <= 8:
        return Tiles(16, Tile(64, GROUP, 2, 3), Tile(128, GROUP, 4, 3))
    if each <= 24:
        return Tiles(32, Tile(128, GROUP, 4, 3), Tile(128, GROUP, 4, 3))
    return Tiles(64, Tile(128, GROUP, 4, 2), Tile(128, GROUP, 4, 2))


def _plan8(pairs: int, each: float) -> Tiles:
    if pairs <= FEW:
        return Tiles(8, Tile(32, 256, 1, 3), Tile(16, 256, 1, 3), grouped=False)
    if each <= 2:
        return Tiles(8, Tile(64, 256, 2, 3), Tile(64, 256, 4, 3))
    if each <= 8:
        return Tiles(16, Tile(64, 128, 2, 4), Tile(64, 256, 2, 3))
    if each <= 24:
        return Tiles(32, Tile(64, 128, 2, 4), Tile(64, 128, 2, 3))
    return Tiles(64, Tile(128, 128, 4, 3), Tile(64, 128, 4, 3))


def _plan16(pairs: int, each: float) -> Tiles:
    if pairs <= FEW:
        return Tiles(8, Tile(64, 128, 4, 4), Tile(16, 128, 1, 4), grouped=False)
    if each <= 8:
        return Tiles(16, Tile(64, 128, 4, 3), Tile(64, 128, 4, 3))
    if each <= 24:
        return Tiles(32, Tile(256, 128, 8, 3), Tile(64, 128, 4, 3))
    return Tiles(128, Tile(256, 64, 8, 3), Tile(128, 64, 8, 3))
