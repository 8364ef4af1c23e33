"""Both pools of experts as one grouped product: rows sorted by expert on the device, tiles of one expert each.

Four launches: sort, gate_up with the gate applied, down, and the weighted sum. The host never learns how many rows an
expert got: the grid has as many row tiles as the worst case needs, and tiles past the last one leave at once.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from services.engine.kernels.experts import ExpertPool
from services.engine.kernels.gpu.matmul import dot_tile, parts
from services.engine.kernels.quantize import GROUP


@triton.jit
def _sort_kernel(
    ids_ptr, place_ptr, tile_expert_ptr, cursor_ptr, P, tiles,
    EXPERTS: tl.constexpr, BM: tl.constexpr, PPAD: tl.constexpr, TPAD: tl.constexpr,
):  # fmt: skip
    """place[row] = pair, rows grouped by expert and each group padded to tiles of BM with -1 (filled by the caller)."""
    pair = tl.arange(0, PPAD)
    inside = pair < P
    ids = tl.load(ids_ptr + pair, inside, EXPERTS)
    counts = tl.histogram(ids, EXPERTS * 2)
    expert = tl.arange(0, EXPERTS * 2)
    needed = tl.where(expert < EXPERTS, tl.cdiv(counts, BM), 0)
    ends = tl.cumsum(needed, 0)
    tl.store(cursor_ptr + expert, (ends - needed) * BM)
    tile = tl.arange(0, TPAD)
    owner = tl.sum((ends[None, :] <= tile[:, None]).to(tl.int32), 1)
    tl.store(tile_expert_ptr + tile, owner, tile < tiles)
    tl.debug_barrier()
    row = tl.atomic_add(cursor_ptr + ids, 1, inside)
    tl.store(place_ptr + row, pair, inside)


@triton.jit
def _gate_up_kernel(
    x_ptr, place_ptr, tile_expert_ptr, inner_ptr,
    text_ptr, text_scale_ptr, vision_ptr, vision_scale_ptr, IN, TEXT, VISION, x_stride, w_stride,
    E: tl.constexpr, K: tl.constexpr, BITS: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    expert = tl.load(tile_expert_ptr + tl.program_id(1))
    if expert >= 2 * E:
        return
    width, w_ptr, scale_ptr, index = TEXT, text_ptr, text_scale_ptr, expert
    if expert >= E:
        width, w_ptr, scale_ptr, index = VISION, vision_ptr, vision_scale_ptr, expert - E
    if tl.program_id(0) * BN >= width:
        return
    pair = tl.load(place_ptr + tl.program_id(1) * BM + tl.arange(0, BM))
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    rows, columns = (pair >= 0)[None, :], (n < width)[:, None]
    x_ptrs = x_ptr + (pair // K).to(tl.int64)[None, :] * x_stride
    gate_row = index.to(tl.int64) * 2 * width + n
    w_ptrs = w_ptr + gate_row[:, None] * w_stride
    up_offset = width.to(tl.int64) * w_stride
    gate = tl.zeros((BN, BM), tl.float32)
    up = tl.zeros((BN, BM), tl.float32)
    for k in range(0, IN, BK):
        gate = dot_tile(gate, w_ptrs, columns, x_ptrs, rows, k, IN, BK, BITS)
        up = dot_tile(up, w_ptrs + up_offset, columns, x_ptrs, rows, k, IN, BK, BITS)
    if BITS != 16:
        gate *= tl.load(scale_ptr + gate_row, n < width, 0.0).to(tl.float32)[:, None]
        up *= tl.load(scale_ptr + gate_row + width, n < width, 0.0).to(tl.float32)[:, None]
    inner = gate * tl.sigmoid(gate) * up
    out = inner_ptr + pair.to(tl.int64)[None, :] * TEXT + n[:, None]
    tl.store(out, inner.to(inner_ptr.dtype.element_ty), rows & columns)


@triton.jit
def _down_kernel(
    inner_ptr, place_ptr, tile_expert_ptr, out_ptr,
    text_ptr, text_scale_ptr, vision_ptr, vision_scale_ptr, H, TEXT, VISION, text_stride, vision_stride,
    E: tl.constexpr, BITS: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    expert = tl.load(tile_expert_ptr + tl.program_id(1))
    if expert >= 2 * E:
        return
    width, w_ptr, scale_ptr, index, w_stride = TEXT, text_ptr, text_scale_ptr, expert, text_stride
    if expert >= E:
        width, w_ptr, scale_ptr, index, w_stride = VISION, vision_ptr, vision_scale_ptr, expert - E, vision_stride
    pair = tl.load(place_ptr + tl.program_id(1) * BM + tl.arange(0, BM))
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    rows, columns = (pair >= 0)[None, :], (n < H)[:, None]
    x_ptrs = inner_ptr + pair.to(tl.int64)[None, :] * TEXT
    w_row = index.to(tl.int64) * H + n
    w_ptrs = w_ptr + w_row[:, None] * w_stride
    acc = tl.zeros((BN, BM), tl.float32)
    for k in range(0, width, BK):
        acc = dot_tile(acc, w_ptrs, columns, x_ptrs, rows, k, width, BK, BITS)
    if BITS != 16:
        acc *= tl.load(scale_ptr + w_row, n < H, 0.0).to(tl.float32)[:, None]
    out = out_ptr + pair.to(tl.int64)[None, :] * H + n[:, None]
    tl.store(out, acc.to(out_ptr.dtype.element_ty), rows & columns)


@triton.jit
def _combine_kernel(results_ptr, weights_ptr, out_ptr, H, K: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < H
    total = tl.zeros((BLOCK,), tl.float32)
    for k in tl.static_range(K):
        result = tl.load(results_ptr + (row * K + k) * H + column, inside, 0.0).to(tl.float32)
        total += tl.load(weights_ptr + row * K + k) * result
    tl.store(out_ptr + row * H + column, total.to(out_ptr.dtype.element_ty), inside)


def group_rows(ids: Tensor, experts: int, tile: int) -> tuple[Tensor, Tensor]:
    """Rows of pairs grouped by expert, each group padded to whole tiles.

    Args:
        ids: [P] int32, the expert of each (token, choice) pair.

    Returns:
        place [tiles * tile] int32, the pair of each row or -1; tile_expert [tiles] int32, >= experts past the end.
    """
    pairs = len(ids)
    tiles = min(pairs, triton.cdiv(pairs, tile) + experts)
    place = torch.full((tiles * tile,), -1, dtype=torch.int32, device=ids.device)
    if pairs > 2048:
        return place, _group_many(ids, experts, tile, tiles, place)
    tile_expert = torch.empty(tiles, dtype=torch.int32, device=ids.device)
    cursor = torch.empty(2 * experts, dtype=torch.int32, device=ids.device)
    _sort_kernel[(1,)](
        ids, place, tile_expert, cursor, pairs, tiles,
        EXPERTS=experts, BM=tile, PPAD=triton.next_power_of_2(pairs), TPAD=triton.next_power_of_2(tiles), num_warps=8,
    )  # fmt: skip
    return place, tile_expert


def _group_many(ids: Tensor, experts: int, tile: int, tiles: int, place: Tensor) -> Tensor:
    """The same by the device's radix sort: for prefill, where its launches do not count. Fills `place`."""
    ranked, order = ids.sort(stable=True)
    starts = torch.searchsorted(ranked, torch.arange(experts + 1, dtype=ids.dtype, device=ids.device))
    needed = (starts.diff() + tile - 1) // tile
    ends = needed.cumsum(0)
    expert = ranked.long()
    row = (ends - needed)[expert] * tile + torch.arange(len(ids), device=ids.device) - starts[expert]
    place[row] = order.to(torch.int32)
    return torch.searchsorted(ends, torch.arange(tiles, device=ids.device), right=True).to(torch.int32)


def experts(x: Tensor, ids: Tensor, weights: Tensor, text: ExpertPool, vision: ExpertPool) -> Tensor:
    """See the reference. `x` contiguous; both pools quantised alike."""
    rows, hidden = x.shape
    top_k, per_pool = ids.shape[1], len(text)
    gate_text, gate_text_scale, bits = parts(text.gate_up)
    gate_vision, gate_vision_scale, _ = parts(vision.gate_up)
    down_text, down_text_scale, _ = parts(text.down)
    down_vision, down_vision_scale, _ = parts(vision.down)
    text_width, vision_width = gate_text.shape[1] // 2, gate_vision.shape[1] // 2
    bm, bn, bk, warps, stages = _tiles(rows * top_k, 2 * per_pool, bits)
    place, tile_expert = group_rows(ids.flatten(), 2 * per_pool, bm)
    tiles = len(tile_expert)
    inner = torch.empty(rows * top_k, text_width, dtype=x.dtype, device=x.device)
    common = {"E": per_pool, "BITS": bits, "BM": bm, "BK": bk, "num_warps": warps, "num_stages": stages}
    _gate_up_kernel[(triton.cdiv(text_width, bn), tiles)](
        x, place, tile_expert, inner, gate_text, gate_text_scale, gate_vision, gate_vision_scale,
        hidden, text_width, vision_width, x.stride(0), gate_text.stride(1), K=top_k, BN=bn, **common,
    )  # fmt: skip
    results = torch.empty(rows * top_k, hidden, dtype=x.dtype, device=x.device)
    _down_kernel[(triton.cdiv(hidden, bn), tiles)](
        inner, place, tile_expert, results, down_text, down_text_scale, down_vision, down_vision_scale,
        hidden, text_width, vision_width, down_text.stride(1), down_vision.stride(1), BN=bn, **common,
    )  # fmt: skip
    out = torch.empty_like(x)
    block = min(1024, triton.next_power_of_2(hidden))
    _combine_kernel[(rows, triton.cdiv(hidden, block))](
        results, weights, out, hidden, K=top_k, BLOCK=block, num_warps=4
    )
    return out


def _tiles(pairs: int, experts: int, bits: int) -> tuple[int, int, int, int, int]:
    """BM, BN, BK, warps, stages, by how many rows an expert gets on average."""
    each = pairs / experts
    bk = GROUP if bits == 4 else 128
    if each <= 8:
        return 16, 64, bk, 4, 3
    if each <= 64:
        return 32, 64, bk, 4, 2 if bits == 4 else 3
    return 128, 128, bk if bits == 4 else 64, 8, 2 if bits == 4 else 3
