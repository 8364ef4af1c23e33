"""Causal attention over the paged cache: one kernel for prefill chunks, and one split over the context for decode.

Decode reads each key and value once for the group of query heads that shares them. The context is cut into a number of
splits that depends on the number of sequences only, so that a captured graph stays valid as contexts grow; the last
program of a group to finish merges the splits' partial softmaxes.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from services.engine.kernels.gpu.last import counters, last_of
from services.engine.kernels.gpu.launch import overlapped, predecessor

PROGRAMS = 1024  # decode programs to aim at: enough to fill the device whatever the batch
MAX_SPLITS = 64
LAST_MERGES = 4  # splits that the last program to finish merges; more of them another launch does
GROUP_PAD = 16  # rows of the smallest matrix instruction; a group of query heads fills a part of them
DECODE = 64, 4, 3  # tokens of a decode program's tile, at most a page; its warps and stages
MERGED = 8  # partial softmaxes that are read together, at most

# Queries and keys of a prefill program's tile, its warps and stages: for long chunks and for short ones.
LONG, SHORT = (128, 128, 8, 2), (16, 64, 4, 3)


@triton.jit
def _decode_kernel(
    q_ptr, k_ptr, v_ptr, tables_ptr, starts_ptr, contexts_ptr, out_ptr, acc_ptr, high_ptr, sum_ptr, count_ptr,
    q_stride, q_head_stride, table_stride, splits, scale,
    KV_HEADS: tl.constexpr, G: tl.constexpr, GPAD: tl.constexpr, D: tl.constexpr, DPAD: tl.constexpr,
    PAGE: tl.constexpr, TILE: tl.constexpr, MERGED: tl.constexpr, MERGES: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    head, split, sequence = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    # Where to read waits for nobody: a step's tables are uploaded before its first launch.
    row = tl.load(starts_ptr + sequence).to(tl.int64)
    context = tl.load(contexts_ptr + sequence)
    tiles = tl.cdiv(context, TILE)
    share = tl.cdiv(tiles, splits)
    first = split * share
    last = tl.minimum(first + share, tiles)
    tables_ptr += sequence.to(tl.int64) * table_stride
    page = tl.load(tables_ptr + first * TILE // PAGE, first < last, 0)
    predecessor(PDL)
    if first >= last:
        return
    group, d, token = tl.arange(0, GPAD), tl.arange(0, DPAD), tl.arange(0, TILE)
    q_mask = (group[:, None] < G) & (d[None, :] < D)
    q = tl.load(q_ptr + row * q_stride + (head * G + group[:, None]) * q_head_stride + d[None, :], q_mask, 0.0)
    high = tl.full((GPAD,), float("-inf"), tl.float32)
    total = tl.zeros((GPAD,), tl.float32)
    acc = tl.zeros((GPAD, DPAD), tl.float32)
    inside = token[:, None] * (KV_HEADS * D) + d[None, :]
    factor = scale * 1.4426950408889634  # exp2 is the hardware's exponential
    for tile in range(first, last):
        base = ((page.to(tl.int64) * PAGE + tile * TILE % PAGE) * KV_HEADS + head) * D
        # The next page's number is on its way while this one is read.
        page = tl.load(tables_ptr + (tile + 1) * TILE // PAGE, tile + 1 < last, 0)
        seen = tile * TILE + token < context
        k = tl.load(k_ptr + base + inside, d[None, :] < D, 0.0)
        # What an earlier owner of the page left behind the context may be anything, and 0 times anything is not 0.
        v = tl.load(v_ptr + base + inside, seen[:, None] & (d[None, :] < D), 0.0)
        scores = tl.dot(q, tl.trans(k), input_precision="ieee") * factor
        scores = tl.where(seen[None, :], scores, float("-inf"))
        peak = tl.maximum(high, tl.max(scores, 1))
        shrink = tl.exp2(high - peak)
        p = tl.exp2(scores - peak[:, None])
        total = total * shrink + tl.sum(p, 1)
        acc = acc * shrink[:, None] + tl.dot(p.to(v.dtype), v, input_precision="ieee")
        high = peak
    used = tl.cdiv(tiles, share)
    out_ptr += (row * KV_HEADS + head) * G * D
    if used == 1:
        result = acc / total[:, None]
        tl.store(out_ptr + group[:, None] * D + d[None, :], result.to(out_ptr.dtype.element_ty), q_mask)
    else:
        pair = sequence * KV_HEADS + head
        place = pair.to(tl.int64) * splits * G
        at = place + split * G + group
        tl.store(acc_ptr + at[:, None] * D + d[None, :], acc, q_mask)
        tl.store(high_ptr + at, high, group < G)
        tl.store(sum_ptr + at, total, group < G)
        if MERGES and last_of(count_ptr + pair, used):
            _merge(acc_ptr + place * D, high_ptr + place, sum_ptr + place, out_ptr, used, G, D, DPAD, MERGED)


@triton.jit
def _merge(
    acc_ptr, high_ptr, sum_ptr, out_ptr, used,
    G: tl.constexpr, D: tl.constexpr, DPAD: tl.constexpr, MERGED: tl.constexpr,
):  # fmt: skip
    """The softmax over all of a context from the partial ones, MERGED of them at a time.

    acc_ptr: [used, G, D]; high_ptr, sum_ptr: [used, G]; out_ptr: [G, D].
    """
    GROUPS: tl.constexpr = triton.next_power_of_2(G)
    split, group, d = tl.arange(0, MERGED), tl.arange(0, GROUPS), tl.arange(0, DPAD)
    high = tl.full((MERGED, GROUPS), float("-inf"), tl.float32)
    for first in range(0, used, MERGED):
        at = (first + split)[:, None] * G + group[None, :]
        mask = (first + split < used)[:, None] & (group < G)[None, :]
        high = tl.maximum(high, tl.load(high_ptr + at, mask, float("-inf"), cache_modifier=".cg"))
    # Heads beyond G have neither maximum nor sum; any numbers do for them.
    peak = tl.where(group < G, tl.max(high, 0), 0.0)
    total = tl.zeros((MERGED, GROUPS), tl.float32)
    acc = tl.zeros((MERGED, GROUPS, DPAD), tl.float32)
    for first in range(0, used, MERGED):
        at = (first + split)[:, None] * G + group[None, :]
        mask = (first + split < used)[:, None] & (group < G)[None, :]
        own = tl.load(high_ptr + at, mask, float("-inf"), cache_modifier=".cg")
        factor = tl.exp2(own - peak[None, :])
        total += factor * tl.load(sum_ptr + at, mask, 0.0, cache_modifier=".cg")
        d_mask = mask[:, :, None] & (d < D)[None, None, :]
        part = tl.load(acc_ptr + at[:, :, None] * D + d[None, None, :], d_mask, 0.0, cache_modifier=".cg")
        acc += factor[:, :, None] * part
    merged = tl.sum(acc, 0) / tl.where(group < G, tl.sum(total, 0), 1.0)[:, None]
    out_mask = (group < G)[:, None] & (d < D)[None, :]
    tl.store(out_ptr + group[:, None] * D + d[None, :], merged.to(out_ptr.dtype.element_ty), out_mask)


@triton.jit
def _merge_kernel(
    acc_ptr, high_ptr, sum_ptr, starts_ptr, contexts_ptr, out_ptr, splits,
    KV_HEADS: tl.constexpr, G: tl.constexpr, D: tl.constexpr, DPAD: tl.constexpr, TILE: tl.constexpr,
    SPAD: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """The softmax over all of a context from partial ones, for a head of a sequence."""
    sequence, head = tl.program_id(0), tl.program_id(1)
    row = tl.load(starts_ptr + sequence).to(tl.int64)
    tiles = tl.cdiv(tl.load(contexts_ptr + sequence), TILE)
    used = tl.cdiv(tiles, tl.cdiv(tiles, splits))
    predecessor(PDL)
    if used > 1:
        split, d = tl.arange(0, SPAD), tl.arange(0, DPAD)
        inside = split < used
        at = ((sequence * KV_HEADS + head // G).to(tl.int64) * splits + split) * G + head % G
        high = tl.load(high_ptr + at, inside, float("-inf"))
        factor = tl.where(inside, tl.exp2(high - tl.max(high, 0)), 0.0)
        total = tl.sum(factor * tl.load(sum_ptr + at, inside, 0.0), 0)
        acc = tl.load(acc_ptr + at[:, None] * D + d[None, :], inside[:, None] & (d[None, :] < D), 0.0)
        merged = tl.sum(acc * factor[:, None], 0) / total
        tl.store(out_ptr + (row * KV_HEADS * G + head) * D + d, merged.to(out_ptr.dtype.element_ty), d < D)


@triton.jit
def _prefill_kernel(
    q_ptr, k_ptr, v_ptr, tables_ptr, starts_ptr, contexts_ptr, out_ptr,
    q_stride, q_head_stride, table_stride, heads, kv_heads, scale,
    G: tl.constexpr, D: tl.constexpr, DPAD: tl.constexpr, PAGE: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    predecessor(PDL)
    sequence, head = tl.program_id(2), tl.program_id(1)
    start = tl.load(starts_ptr + sequence)
    length = tl.load(starts_ptr + sequence + 1) - start
    # The last tiles see the longest context: they go first.
    tile = tl.num_programs(0) - 1 - tl.program_id(0)
    if tile * BM >= length:
        return
    context = tl.load(contexts_ptr + sequence)
    query, d, token = tile * BM + tl.arange(0, BM), tl.arange(0, DPAD), tl.arange(0, BN)
    rows = (start + query).to(tl.int64)
    q_mask = (query[:, None] < length) & (d[None, :] < D)
    q = tl.load(q_ptr + rows[:, None] * q_stride + head * q_head_stride + d[None, :], q_mask, 0.0)
    kv_head = head // G
    position = context - length + query
    visible = tl.minimum(context - length + (tile + 1) * BM, context)
    whole = ((context - length + tile * BM + 1) // BN) * BN  # keys before this are seen by every row of the tile
    high = tl.full((BM,), float("-inf"), tl.float32)
    total = tl.zeros((BM,), tl.float32)
    acc = tl.zeros((BM, DPAD), tl.float32)
    factor = scale * 1.4426950408889634  # exp2 is the hardware's exponential
    for first in range(0, visible, BN):
        at = first + token
        page = tl.load(tables_ptr + sequence * table_stride + at // PAGE, at < context, 0).to(tl.int64)
        base = ((page * PAGE + at % PAGE)[:, None] * kv_heads + kv_head) * D + d[None, :]
        d_mask = d[None, :] < D
        k = tl.load(k_ptr + base, d_mask, 0.0)
        scores = tl.dot(q, tl.trans(k), input_precision="ieee") * factor
        if first >= whole:
            scores = tl.where(at[None, :] <= position[:, None], scores, float("-inf"))
        peak = tl.maximum(high, tl.max(scores, 1))
        shrink = tl.exp2(high - peak)
        p = tl.exp2(scores - peak[:, None])
        total = total * shrink + tl.sum(p, 1)
        v = tl.load(v_ptr + base, d_mask, 0.0)
        acc = acc * shrink[:, None] + tl.dot(p.to(v.dtype), v, input_precision="ieee")
        high = peak
    out = (acc / total[:, None]).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + (rows[:, None] * heads + head) * D + d[None, :], out, q_mask)


def decode_splits(sequences: int, kv_heads: int) -> int:
    """How many parts each context is cut into: a function of the batch alone, never of the contexts."""
    return max(1, min(MAX_SPLITS, PROGRAMS // (sequences * kv_heads)))


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
) -> Tensor:
    """See the reference. The last dimension of `query` is contiguous, `keys` and `values` are contiguous."""
    out = torch.empty(query.shape, dtype=query.dtype, device=query.device)
    launch = _decode if max_query_len == 1 else _prefill
    launch(query, keys, values, block_tables, query_start, context_lens, max_query_len, scale, out)
    return out


def _decode(query, keys, values, block_tables, query_start, context_lens, _, scale, out) -> None:
    sequences, (_, page, kv_heads, dim), heads = len(context_lens), keys.shape, query.shape[1]
    splits, group = decode_splits(sequences, kv_heads), heads // kv_heads
    tile, warps, stages = DECODE
    partials = sequences * heads * splits if splits > 1 else 0
    acc, high, total = (torch.empty(partials * each, dtype=torch.float32, device=out.device) for each in (dim, 1, 1))
    _decode_kernel[(kv_heads, splits, sequences)](
        query, keys, values, block_tables, query_start, context_lens, out, acc, high, total,
        counters(out.device, "decode", sequences * kv_heads),
        query.stride(0), query.stride(1), block_tables.stride(0), splits, scale,
        KV_HEADS=kv_heads, G=group, GPAD=max(GROUP_PAD, triton.next_power_of_2(group)), D=dim,
        DPAD=max(16, triton.next_power_of_2(dim)), PAGE=page, TILE=min(tile, page),
        MERGED=min(MERGED, triton.next_power_of_2(splits)), MERGES=splits <= LAST_MERGES,
        num_warps=warps, num_stages=stages, **overlapped(query),
    )  # fmt: skip
    if splits > LAST_MERGES:
        _merge_kernel[(sequences, heads)](
            acc, high, total, query_start, context_lens, out, splits,
            KV_HEADS=kv_heads, G=group, D=dim, DPAD=max(16, triton.next_power_of_2(dim)), TILE=min(tile, page),
            SPAD=triton.next_power_of_2(splits), num_warps=4, **overlapped(query),
        )  # fmt: skip


def _prefill(query, keys, values, block_tables, query_start, context_lens, max_query_len, scale, out) -> None:
    sequences, (_, block, kv_heads, dim), heads = len(context_lens), keys.shape, query.shape[1]
    tile, keys_tile, warps, stages = LONG if max_query_len > 64 else SHORT
    grid = (triton.cdiv(max_query_len, tile), heads, sequences)
    _prefill_kernel[grid](
        query, keys, values, block_tables, query_start, context_lens, out,
        query.stride(0), query.stride(1), block_tables.stride(0), heads, kv_heads, scale,
        G=heads // kv_heads, D=dim, DPAD=max(16, triton.next_power_of_2(dim)), PAGE=block, BM=tile, BN=keys_tile,
        num_warps=warps, num_stages=stages, **overlapped(query),
    )  # fmt: skip
