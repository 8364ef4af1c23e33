"""Causal attention over the paged cache: one kernel for prefill chunks, and one split over the context for decode.

Decode reads each key and value once for the group of query heads that shares them. The context is cut into a number of
splits that depends on the number of sequences only, so that a captured graph stays valid as contexts grow; a second
kernel merges the splits' partial softmaxes.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from services.engine.kernels.gpu.launch import overlapped, predecessor

PROGRAMS = 1024  # decode programs to aim at: enough to fill the device whatever the batch
MAX_SPLITS = 64
GROUP_PAD = 16  # rows of the smallest matrix instruction; a group of query heads fills a part of them


# Queries and keys of a prefill program's tile, its warps and stages: for long chunks and for short ones.
LONG, SHORT = (128, 128, 8, 2), (16, 64, 4, 3)


@triton.jit
def _decode_kernel(
    q_ptr, k_ptr, v_ptr, tables_ptr, starts_ptr, contexts_ptr, acc_ptr, max_ptr, sum_ptr,
    q_stride, q_head_stride, table_stride, kv_heads, splits, scale,
    G: tl.constexpr, GPAD: tl.constexpr, D: tl.constexpr, DPAD: tl.constexpr, BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    predecessor(PDL)
    sequence, head, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    row = tl.load(starts_ptr + sequence).to(tl.int64)
    context = tl.load(contexts_ptr + sequence)
    blocks = tl.cdiv(context, BLOCK)
    share = tl.cdiv(blocks, splits)
    first = split * share
    last = tl.minimum(first + share, blocks)
    group, d, token = tl.arange(0, GPAD), tl.arange(0, DPAD), tl.arange(0, BLOCK)
    q_mask = (group[:, None] < G) & (d[None, :] < D)
    q = tl.load(q_ptr + row * q_stride + (head * G + group[:, None]) * q_head_stride + d[None, :], q_mask, 0.0)
    high = tl.full((GPAD,), float("-inf"), tl.float32)
    total = tl.zeros((GPAD,), tl.float32)
    acc = tl.zeros((GPAD, DPAD), tl.float32)
    d_mask = d[None, :] < D
    for block in range(first, last):
        page = tl.load(tables_ptr + sequence * table_stride + block).to(tl.int64)
        base = ((page * BLOCK + token[:, None]) * kv_heads + head) * D + d[None, :]
        k = tl.load(k_ptr + base, d_mask, 0.0)
        v = tl.load(v_ptr + base, d_mask, 0.0)
        scores = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
        scores = tl.where((block * BLOCK + token[None, :]) < context, scores, float("-inf"))
        peak = tl.maximum(high, tl.max(scores, 1))
        shrink = tl.exp(high - peak)
        p = tl.exp(scores - peak[:, None])
        total = total * shrink + tl.sum(p, 1)
        acc = acc * shrink[:, None] + tl.dot(p.to(v.dtype), v, input_precision="ieee")
        high = peak
    place = (sequence * kv_heads + head) * splits + split
    tl.store(acc_ptr + (place * G + group[:, None]) * D + d[None, :], acc, q_mask)
    tl.store(max_ptr + place * G + group, high, group < G)
    tl.store(sum_ptr + place * G + group, total, group < G)


@triton.jit
def _merge_kernel(
    acc_ptr, max_ptr, sum_ptr, starts_ptr, contexts_ptr, out_ptr, kv_heads, splits,
    G: tl.constexpr, D: tl.constexpr, DPAD: tl.constexpr, BLOCK: tl.constexpr, SPAD: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    predecessor(PDL)
    sequence, head = tl.program_id(0), tl.program_id(1)
    row = tl.load(starts_ptr + sequence).to(tl.int64)
    split, d = tl.arange(0, SPAD), tl.arange(0, DPAD)
    share = tl.cdiv(tl.cdiv(tl.load(contexts_ptr + sequence), BLOCK), splits)
    used = (split < splits) & (split * share * BLOCK < tl.load(contexts_ptr + sequence))
    place = (sequence * kv_heads + head // G) * splits + split
    high = tl.load(max_ptr + place * G + head % G, used, float("-inf"))
    factor = tl.where(used, tl.exp(high - tl.max(high, 0)), 0.0)
    total = tl.sum(factor * tl.load(sum_ptr + place * G + head % G, used, 0.0), 0)
    mask = used[:, None] & (d[None, :] < D)
    acc = tl.load(acc_ptr + (place[:, None] * G + head % G) * D + d[None, :], mask, 0.0)
    merged = tl.sum(acc * factor[:, None], 0) / total
    tl.store(out_ptr + (row * kv_heads * G + head) * D + d, merged.to(out_ptr.dtype.element_ty), d < D)


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
    sequences, (_, block, kv_heads, dim), heads = len(context_lens), keys.shape, query.shape[1]
    splits, group = decode_splits(sequences, kv_heads), heads // kv_heads
    partial = torch.empty(sequences * kv_heads * splits * group, dim, dtype=torch.float32, device=query.device)
    high, total = torch.empty(2, len(partial), dtype=torch.float32, device=query.device)
    sizes = {"G": group, "D": dim, "DPAD": max(16, triton.next_power_of_2(dim)), "BLOCK": block, **overlapped(query)}
    _decode_kernel[(sequences, kv_heads, splits)](
        query, keys, values, block_tables, query_start, context_lens, partial, high, total,
        query.stride(0), query.stride(1), block_tables.stride(0), kv_heads, splits, scale,
        GPAD=max(GROUP_PAD, triton.next_power_of_2(group)), num_warps=4, num_stages=3, **sizes,
    )  # fmt: skip
    _merge_kernel[(sequences, heads)](
        partial, high, total, query_start, context_lens, out, kv_heads, splits,
        SPAD=triton.next_power_of_2(splits), num_warps=4, **sizes,
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
