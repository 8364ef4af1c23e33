"""Routed experts of both pools as one grouped GEMM, for few rows: pairs sorted by expert, each tile with one expert.

Three launches: sort, gate_up with the gate applied, and down; the reader of the results weighs and sums them. The host
never learns how many rows an expert got, so the grid has as many row tiles as the worst case needs, and programs of
tiles past the last one return at once. With very few pairs each is a tile of its own and nothing is sorted. Many rows
take another path: services.engine.kernels.triton.moe.grouped.
"""

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from services.engine.kernels.quantize import Weight, bits_of, in_features, stored_inputs
from services.engine.kernels.reference.experts import ExpertPool
from services.engine.kernels.reference.router import SUM_MIN
from services.engine.kernels.triton.common.launch import pdl_options, wait_for_previous_kernel
from services.engine.kernels.triton.common.sizes import ceil_div, ceil_pow2
from services.engine.kernels.triton.dense.matmul import (
    dot_tile,
    gate_or_up,
    gated,
    group_words,
    scales,
    steps,
    storage,
    subgroups_of,
)
from services.engine.kernels.triton.moe.grouped import grouped_experts, uses_grouped_gemm
from services.engine.kernels.triton.moe.router import rank_experts
from services.engine.kernels.triton.moe.sort import group_pairs
from services.engine.kernels.triton.moe.tiles import Plan, Tile, plan


@triton.jit
def _tile_of(pair_ids_ptr, expert_ids_ptr, SORTED: tl.constexpr, BM: tl.constexpr):
    """Return the expert of this program's tile, and the pairs in its rows (-1: none)."""
    tile, row = tl.program_id(1), tl.arange(0, BM)
    pair = tl.load(pair_ids_ptr + tile * BM + row) if SORTED else tl.where(row == 0, tile, -1)
    return tl.load(expert_ids_ptr + tile), pair


@triton.jit
def _weights_of(
    expert, TEXT, text_ptr, text_scale_ptr, text_group_ptr, VISION, vision_ptr, vision_scale_ptr, vision_group_ptr,
    E: tl.constexpr,
):  # fmt: skip
    """Return width, weight and scales of the expert's pool, and the expert's index there."""
    width, w_ptr, scale_ptr, group_ptr, index = TEXT, text_ptr, text_scale_ptr, text_group_ptr, expert
    if expert >= E:
        width, w_ptr, scale_ptr, group_ptr, index = VISION, vision_ptr, vision_scale_ptr, vision_group_ptr, expert - E
    return width, w_ptr, scale_ptr, group_ptr, index.to(tl.int64)


@triton.jit
def gate_up_tile(
    pair, x_ptr, out_ptr, width, w_ptr, scale_ptr, group_ptr, index, IN, OUT, x_stride, w_stride,
    K: tl.constexpr, BITS: tl.constexpr, SUBGROUPS: tl.constexpr, EVEN: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """Store out[pair] = silu(gate) up: BN / 2 outputs of one expert for the pairs [BM], -1 for none."""
    first = tl.program_id(0) * (BN // 2)
    output, is_up = gate_or_up(first, BN)
    w_row = index * 2 * width + output + is_up * width
    rows, columns = (pair >= 0)[None, :], (output < width)[:, None]
    x_ptrs = x_ptr + (pair // K).to(tl.int64)[None, :] * x_stride
    w_ptrs = w_ptr + w_row[:, None] * w_stride
    g_ptrs = group_ptr + (index * group_words(IN, BITS, SUBGROUPS) * 2 * width + output + is_up * width)[:, None]
    acc = tl.zeros((BN, BM), tl.float32)
    for nth in range(0, steps(IN, BK, BITS)):
        acc = dot_tile(acc, w_ptrs, g_ptrs, columns, x_ptrs, rows, nth, IN, 2 * width, BK, BITS, SUBGROUPS, EVEN)
    if BITS != 16:
        acc *= scales(scale_ptr + w_row, output < width)[:, None]
    n = first + tl.arange(0, BN // 2)
    out = out_ptr + pair.to(tl.int64)[None, :] * OUT + n[:, None]
    tl.store(out, gated(acc, BN, BM).to(out_ptr.dtype.element_ty), rows & (n < width)[:, None])


@triton.jit
def _gate_up_kernel(
    x_ptr, pair_ids_ptr, expert_ids_ptr, out_ptr,
    text_ptr, text_scale_ptr, text_group_ptr, vision_ptr, vision_scale_ptr, vision_group_ptr,
    IN, TEXT, VISION, x_stride, w_stride,
    E: tl.constexpr, K: tl.constexpr, BITS: tl.constexpr, SUBGROUPS: tl.constexpr, SORTED: tl.constexpr,
    EVEN: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    wait_for_previous_kernel(PDL)
    expert, pair = _tile_of(pair_ids_ptr, expert_ids_ptr, SORTED, BM)
    if expert >= 2 * E:
        return
    width, w_ptr, scale_ptr, group_ptr, index = _weights_of(
        expert,
        TEXT,
        text_ptr,
        text_scale_ptr,
        text_group_ptr,
        VISION,
        vision_ptr,
        vision_scale_ptr,
        vision_group_ptr,
        E,
    )
    if tl.program_id(0) * (BN // 2) >= width:
        return
    gate_up_tile(
        pair, x_ptr, out_ptr, width, w_ptr, scale_ptr, group_ptr, index, IN, TEXT, x_stride, w_stride,
        K, BITS, SUBGROUPS, EVEN, BM, BN, BK,
    )  # fmt: skip


@triton.jit
def _choose_gate_up_kernel(
    scores_ptr, bias_ptr, pool_ptr, ids_ptr, weights_ptr, sum_min, x_ptr, out_ptr,
    text_ptr, text_scale_ptr, text_group_ptr, vision_ptr, vision_scale_ptr, vision_group_ptr,
    IN, TEXT, VISION, x_stride, w_stride,
    E: tl.constexpr, K: tl.constexpr, BITS: tl.constexpr, SUBGROUPS: tl.constexpr, EVEN: tl.constexpr,
    BLOCK: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """First product of one pair, by a program that routes the pair's row itself."""
    wait_for_previous_kernel(PDL)
    at = tl.program_id(1)
    row, nth = at // K, at % K
    pool = tl.load(pool_ptr + row).to(tl.int32)
    rank, weight = rank_experts(scores_ptr + row * 2 * E, bias_ptr, pool, E, sum_min, K, 1, BLOCK)
    chosen = rank == nth
    expert = tl.sum(tl.where(chosen, tl.arange(0, BLOCK), 0), 0) + pool * E
    if tl.program_id(0) == 0:
        tl.store(ids_ptr + at, expert)
        tl.store(weights_ptr + at, tl.sum(tl.where(chosen, weight, 0.0), 0))
    width, w_ptr, scale_ptr, group_ptr, index = _weights_of(
        expert,
        TEXT,
        text_ptr,
        text_scale_ptr,
        text_group_ptr,
        VISION,
        vision_ptr,
        vision_scale_ptr,
        vision_group_ptr,
        E,
    )
    if tl.program_id(0) * (BN // 2) >= width:
        return
    pair = tl.where(tl.arange(0, BM) == 0, at, -1)
    gate_up_tile(
        pair, x_ptr, out_ptr, width, w_ptr, scale_ptr, group_ptr, index, IN, TEXT, x_stride, w_stride,
        K, BITS, SUBGROUPS, EVEN, BM, BN, BK,
    )  # fmt: skip


@triton.jit
def _down_kernel(
    inner_ptr, pair_ids_ptr, expert_ids_ptr, out_ptr,
    text_ptr, text_scale_ptr, text_group_ptr, vision_ptr, vision_scale_ptr, vision_group_ptr,
    H, TEXT, VISION, text_stride, vision_stride,
    E: tl.constexpr, BITS: tl.constexpr, SUBGROUPS: tl.constexpr, SORTED: tl.constexpr, EVEN: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    wait_for_previous_kernel(PDL)
    expert, pair = _tile_of(pair_ids_ptr, expert_ids_ptr, SORTED, BM)
    if expert >= 2 * E:
        return
    width, w_ptr, scale_ptr, group_ptr, index = _weights_of(
        expert,
        TEXT,
        text_ptr,
        text_scale_ptr,
        text_group_ptr,
        VISION,
        vision_ptr,
        vision_scale_ptr,
        vision_group_ptr,
        E,
    )
    w_stride = tl.where(expert >= E, vision_stride, text_stride)
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    rows, columns = (pair >= 0)[None, :], (n < H)[:, None]
    x_ptrs = inner_ptr + pair.to(tl.int64)[None, :] * TEXT
    w_row = index * H + n
    w_ptrs = w_ptr + w_row[:, None] * w_stride
    g_ptrs = group_ptr + (index * group_words(width, BITS, SUBGROUPS) * H + n)[:, None]
    acc = tl.zeros((BN, BM), tl.float32)
    for nth in range(0, steps(width, BK, BITS)):
        acc = dot_tile(acc, w_ptrs, g_ptrs, columns, x_ptrs, rows, nth, width, H, BK, BITS, SUBGROUPS, EVEN)
    if BITS != 16:
        acc *= scales(scale_ptr + w_row, n < H)[:, None]
    out = out_ptr + pair.to(tl.int64)[None, :] * H + n[:, None]
    tl.store(out, acc.to(out_ptr.dtype.element_ty), rows & columns)


def expert_results(x: Tensor, ids: Tensor, text: ExpertPool, vision: ExpertPool, media: bool = True) -> Tensor:
    """Apply every chosen expert to its row; the results are still to be weighted and summed.

    Args:
        x: [N, H], contiguous.
        ids: [N, K] int32.
        text, vision: quantised alike.
        media: whether there may be choices of the vision pool.

    Returns:
        [N K, H] in the dtype of x.
    """
    if uses_grouped_gemm(x, ids.shape[1], text, vision):
        return grouped_experts(x, ids, text, vision, media)
    return tiled_results(x, ids, text, vision, plan(ids.numel(), len(text) + len(vision), bits_of(text.down)))


def tiled_results(x: Tensor, ids: Tensor, text: ExpertPool, vision: ExpertPool, tiles: Plan) -> Tensor:
    """Apply experts as `expert_results`, in tiles of given shapes."""
    flat, experts = ids.flatten(), len(text) + len(vision)
    sorted_pair_ids, expert_ids = group_pairs(flat, experts, tiles.rows) if tiles.sorted else (flat, flat)
    options = {"E": len(text), "BM": tiles.rows, "SORTED": tiles.sorted, **pdl_options(x)}
    rows = PairTiles(sorted_pair_ids, expert_ids, len(flat), options)
    inner = _gate_up(x, rows, tiles.gate_up, text.gate_up, vision.gate_up, ids.shape[1])
    return _down(inner, rows, tiles.down, text.down, vision.down)


def routed_results(
    x: Tensor, scores: Tensor, bias: Tensor, rows: Tensor, top_k: int, text: ExpertPool, vision: ExpertPool
) -> tuple[Tensor, Tensor]:
    """Route and apply the experts of at most `UNSORTED_PAIRS` pairs, in two launches.

    Args:
        x: [N, H], contiguous.
        scores: [N, 2 E] float32 of both pools, not yet a softmax.
        bias: [2 E] float32.
        rows: [N] bool: those of the vision pool.

    Returns:
        [N K, H] in the dtype of x, and their weights [N, K] float32.
    """
    pairs, experts = len(x) * top_k, len(text)
    tiles = plan(pairs, experts + len(vision), bits_of(text.down))
    ids = torch.empty(pairs, dtype=torch.int32, device=x.device)
    weights = torch.empty(len(x), top_k, dtype=torch.float32, device=x.device)
    first = _gate_up_launch(x, tiles.gate_up, text.gate_up, vision.gate_up, pairs, top_k)
    common = {"E": experts, "BM": tiles.rows, **pdl_options(x)}
    _choose_gate_up_kernel[(first.columns, pairs)](
        scores, bias, rows, ids, weights, SUM_MIN, x, first.inner, *first.arguments,
        BLOCK=ceil_pow2(experts), **first.options, **common,
    )  # fmt: skip
    tiles_of_pairs = PairTiles(ids, ids, pairs, {"SORTED": False, **common})
    return _down(first.inner, tiles_of_pairs, tiles.down, text.down, vision.down), weights


@dataclass(frozen=True, slots=True)
class PairTiles:
    """Tiles of pairs with one expert each, as both products read them."""

    sorted_pair_ids: Tensor  # [tiles BM] int32, -1 where a row has no pair
    expert_ids: Tensor  # [tiles] int32
    pairs: int
    options: dict[str, Any]  # of both launches


@dataclass(frozen=True, slots=True)
class GateUpLaunch:
    """Grid, output, arguments and options that the two launches of the first product share."""

    inner: Tensor  # [P, I of the text pool] in the dtype of x, to be filled
    columns: int  # tiles of outputs
    arguments: tuple[Any, ...]  # from the text pool's weight on
    options: dict[str, Any]


def _gate_up_launch(x: Tensor, tile: Tile, text: Weight, vision: Weight, pairs: int, top_k: int) -> GateUpLaunch:
    text_data, vision_data = storage(text)[0], storage(vision)[0]
    hidden, width, vision_width = x.shape[1], text_data.shape[1] // 2, vision_data.shape[1] // 2
    outputs = tile.bn // 2
    return GateUpLaunch(
        torch.empty(pairs, width, dtype=x.dtype, device=x.device),
        ceil_div(width, outputs),
        (*storage(text), *storage(vision), hidden, width, vision_width, x.stride(0), text_data.stride(1)),
        {
            "K": top_k, "BITS": bits_of(text), "SUBGROUPS": subgroups_of(text),
            **tile.options(x, ((hidden, stored_inputs(text)),), (width, vision_width), outputs),
        },
    )  # fmt: skip


def _gate_up(x: Tensor, rows: PairTiles, tile: Tile, text: Weight, vision: Weight, top_k: int) -> Tensor:
    """Return silu(gate) up of every pair, [P, I of the text pool] in the dtype of x."""
    first = _gate_up_launch(x, tile, text, vision, rows.pairs, top_k)
    _gate_up_kernel[(first.columns, len(rows.expert_ids))](
        x, rows.sorted_pair_ids, rows.expert_ids, first.inner, *first.arguments, **first.options, **rows.options
    )
    return first.inner


def _down(inner: Tensor, rows: PairTiles, tile: Tile, text: Weight, vision: Weight) -> Tensor:
    """Return the second product of every pair, [P, H] in the dtype of inner."""
    text_data, vision_data = storage(text)[0], storage(vision)[0]
    hidden, width, vision_width = text_data.shape[1], inner.shape[1], in_features(vision)
    sizes = tuple((in_features(weight), stored_inputs(weight)) for weight in (text, vision))
    results = torch.empty(rows.pairs, hidden, dtype=inner.dtype, device=inner.device)
    _down_kernel[(ceil_div(hidden, tile.bn), len(rows.expert_ids))](
        inner, rows.sorted_pair_ids, rows.expert_ids, results, *storage(text), *storage(vision),
        hidden, width, vision_width, text_data.stride(1), vision_data.stride(1),
        BITS=bits_of(text), SUBGROUPS=subgroups_of(text),
        **tile.options(inner, sizes, (hidden,), tile.bn), **rows.options,
    )  # fmt: skip
    return results
