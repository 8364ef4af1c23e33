"""Causal attention over the paged cache: one kernel for prefill chunks, and one split over the context for decode.
Long prompts of which nothing is cached are the library's business: whole_prompt.py.

Decode reads each key and value once for the group of query heads that shares them. The context is cut into a number of
splits that the device decides, up to a limit that depends on the number of sequences only, so that a captured graph
stays valid as contexts grow. The last program of a group to finish merges the splits' partial softmaxes, or where there
may be many, another launch does.
"""

from dataclasses import dataclass
from itertools import groupby

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from services.engine.kernels.reference.paged_attention import Lengths
from services.engine.kernels.triton.attention.whole_prompt import suits, whole, whole_prompt
from services.engine.kernels.triton.common.last_block import counters, last_of
from services.engine.kernels.triton.common.launch import pdl_options, wait_for_previous_kernel
from services.engine.kernels.triton.common.sizes import ceil_div, ceil_pow2

MAX_SPLITS = 64
GROUP_PAD = 16  # rows of the smallest matrix instruction; a group of query heads fills a part of them


@dataclass(frozen=True, slots=True)
class Decode:
    """How the contexts of a decode step are cut."""

    stages: int
    programs: int  # at most, where a context has more than one
    share: int  # tokens of a program, at least, for each sequence of the step
    last_merges: bool  # the last program of a context to finish merges its splits; else another launch does


# So few sequences that contexts are split to fill the device, and so many that one of 1,024 tokens need not be. Those
# have a program each, which has much on its way.
FEW, MANY, MANY_SEQUENCES = Decode(3, 256, 0, False), Decode(4, 2048, 16, True), 48
TILE, WARPS = 64, 4  # tokens, at most a page
MERGED = 8  # partial softmaxes that are read together, at most


@dataclass(frozen=True, slots=True)
class Cut:
    """How a prefill is cut."""

    queries: int  # of a tile
    keys: int
    warps: int
    stages: int
    pagewise: bool = False  # keys come a page at a time, by the copy engine, where a page is as long as the tile
    registers: int | None = None  # of a thread, at most


# For long chunks, of which two programs of a multiprocessor hide each other's exponentials, and for short ones.
LONG, SHORT = Cut(128, 64, 8, 2, pagewise=True, registers=128), Cut(16, 64, 4, 3)


@triton.jit
def _share(tiles, splits, least):
    """Tiles of each split but the last, if a context is cut into as many as have `least` tiles, and into at most
    `splits`."""
    return tl.cdiv(tiles, tl.minimum(tl.maximum(tiles // least, 1), splits))


@triton.jit
def _decode_kernel(
    q_ptr, k_ptr, v_ptr, tables_ptr, starts_ptr, contexts_ptr, out_ptr, acc_ptr, high_ptr, sum_ptr, count_ptr,
    q_stride, q_head_stride, table_stride, splits, least, scale,
    KV_HEADS: tl.constexpr, G: tl.constexpr, GPAD: tl.constexpr, D: tl.constexpr, DPAD: tl.constexpr,
    PAGE: tl.constexpr, TILE: tl.constexpr, MERGED: tl.constexpr, MERGES: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    head, sequence, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    # Where to read waits for nobody: a step's tables are uploaded before its first launch.
    row = tl.load(starts_ptr + sequence).to(tl.int64)
    context = tl.load(contexts_ptr + sequence)
    tiles = tl.cdiv(context, TILE)
    share = _share(tiles, splits, least)
    first = split * share
    last = tl.minimum(first + share, tiles)
    tables_ptr += sequence.to(tl.int64) * table_stride
    page = tl.load(tables_ptr + first * TILE // PAGE, first < last, 0)
    wait_for_previous_kernel(PDL)
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
    acc_ptr, high_ptr, sum_ptr, starts_ptr, contexts_ptr, out_ptr, splits, least,
    KV_HEADS: tl.constexpr, G: tl.constexpr, D: tl.constexpr, DPAD: tl.constexpr, TILE: tl.constexpr,
    SPAD: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """The softmax over all of a context from partial ones, for a head of a sequence."""
    sequence, head = tl.program_id(0), tl.program_id(1)
    row = tl.load(starts_ptr + sequence).to(tl.int64)
    tiles = tl.cdiv(tl.load(contexts_ptr + sequence), TILE)
    used = tl.cdiv(tiles, _share(tiles, splits, least))
    wait_for_previous_kernel(PDL)
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
    q_ptr, k, v, tables_ptr, starts_ptr, contexts_ptr, out_ptr,
    q_stride, q_head_stride, table_stride, heads, kv_heads, scale,
    G: tl.constexpr, D: tl.constexpr, DPAD: tl.constexpr, PAGE: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    PAGEWISE: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """k and v: the caches' pointers, or with PAGEWISE descriptors of [blocks PAGE, kv_heads D] by pages of a head."""
    wait_for_previous_kernel(PDL)
    sequence, head = tl.program_id(2), tl.program_id(1)
    start = tl.load(starts_ptr + sequence)
    length = tl.load(starts_ptr + sequence + 1) - start
    # The last tiles see the longest context: they go first.
    tile = tl.num_programs(0) - 1 - tl.program_id(0)
    if tile * BM >= length:
        return
    context = tl.load(contexts_ptr + sequence)
    query, d = tile * BM + tl.arange(0, BM), tl.arange(0, DPAD)
    rows = (start + query).to(tl.int64)
    q_mask = (query[:, None] < length) & (d[None, :] < D)
    q = tl.load(q_ptr + rows[:, None] * q_stride + head * q_head_stride + d[None, :], q_mask, 0.0)
    position = context - length + query
    visible = tl.minimum(context - length + (tile + 1) * BM, context)
    whole = ((context - length + tile * BM + 1) // BN) * BN  # keys before this are seen by every row of the tile
    high = tl.full((BM,), float("-inf"), tl.float32)
    total = tl.zeros((BM,), tl.float32)
    acc = tl.zeros((BM, DPAD), tl.float32)
    factor = scale * 1.4426950408889634  # exp2 is the hardware's exponential
    table_ptr = tables_ptr + sequence * table_stride
    # Two loops, so that the long one neither masks nor branches.
    acc, high, total = _attend(
        acc, high, total, q, k, v, table_ptr, 0, whole, context, position, head // G, kv_heads, factor,
        D, DPAD, PAGE, BN, PAGEWISE, False,
    )  # fmt: skip
    acc, high, total = _attend(
        acc, high, total, q, k, v, table_ptr, whole, visible, context, position, head // G, kv_heads, factor,
        D, DPAD, PAGE, BN, PAGEWISE, True,
    )  # fmt: skip
    out = (acc / total[:, None]).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + (rows[:, None] * heads + head) * D + d[None, :], out, q_mask)


@triton.jit
def _attend(
    acc, high, total, q, k_source, v_source, table_ptr, first, last, context, position, kv_head, kv_heads, factor,
    D: tl.constexpr, DPAD: tl.constexpr, PAGE: tl.constexpr, BN: tl.constexpr, PAGEWISE: tl.constexpr,
    MASKED: tl.constexpr,
):  # fmt: skip
    """The online softmax over keys first..last - 1: acc [BM, DPAD], highest score and total of each row."""
    token, d = tl.arange(0, BN), tl.arange(0, DPAD)[None, :]
    for begin in range(first, last, BN):
        at = begin + token
        if PAGEWISE:
            row = tl.load(table_ptr + begin // PAGE) * PAGE
            k = k_source.load([row, kv_head * D])
            v = v_source.load([row, kv_head * D])
        else:
            page = tl.load(table_ptr + at // PAGE, at < context, 0).to(tl.int64)
            base = (page * (PAGE * kv_heads * D) + ((at % PAGE) * kv_heads + kv_head) * D)[:, None] + d
            k = tl.load(k_source + base, d < D, 0.0)
            v = tl.load(v_source + base, d < D, 0.0)
        scores = tl.dot(q, k.T, input_precision="ieee")
        if MASKED:
            scores = tl.where(at[None, :] <= position[:, None], scores, float("-inf"))
        peak = tl.maximum(high, tl.max(scores, 1) * factor)
        shrink = tl.exp2(high - peak)
        p = tl.exp2(scores * factor - peak[:, None])
        total = total * shrink + tl.sum(p, 1)
        acc = tl.dot(p.to(v.dtype), v, acc * shrink[:, None], input_precision="ieee")
        high = peak
    return acc, high, total


def decode_splits(way: Decode, sequences: int, kv_heads: int) -> int:
    """How many parts a context is cut into, at most: a function of the batch alone, never of the contexts."""
    return max(1, min(MAX_SPLITS, way.programs // (sequences * kv_heads)))


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
    """See the reference. The last dimension of `query` is contiguous, `keys` and `values` are contiguous."""
    if max_query_len > 1 and suits(query) and any(map(whole, lengths)):
        return _mixed(query, keys, values, block_tables, query_start, context_lens, scale, lengths)
    out = torch.empty(query.shape, dtype=query.dtype, device=query.device)
    launch = _decode if max_query_len == 1 else _prefill
    launch(query, keys, values, block_tables, query_start, context_lens, max_query_len, scale, out)
    return out


def _mixed(query, keys, values, block_tables, query_start, context_lens, scale, lengths: Lengths) -> Tensor:
    """Whole prompts one by one, and what is between them a launch each."""
    if len(lengths) == 1:
        return whole_prompt(query, keys, values, block_tables[0], scale)
    out = torch.empty(query.shape, dtype=query.dtype, device=query.device)
    sequence = row = 0
    for alone, group in groupby(lengths, whole):
        for run in ([length] for length in group) if alone else [list(group)]:
            end, rows = sequence + len(run), sum(new for new, _ in run)
            if alone:
                chunk = slice(row, row + rows)
                out[chunk] = whole_prompt(query[chunk], keys, values, block_tables[sequence], scale)
            else:
                starts, contexts = query_start[sequence : end + 1], context_lens[sequence:end]
                longest = max(new for new, _ in run)
                _prefill(query, keys, values, block_tables[sequence:end], starts, contexts, longest, scale, out)
            sequence, row = end, row + rows
    return out


def _decode(query, keys, values, block_tables, query_start, context_lens, _, scale, out) -> None:
    sequences, (_, page, kv_heads, dim), heads = len(context_lens), keys.shape, query.shape[1]
    way, group = FEW if sequences < MANY_SEQUENCES else MANY, heads // kv_heads
    splits, tile = decode_splits(way, sequences, kv_heads), min(TILE, page)
    least = max(1, way.share * sequences // tile)
    partials = sequences * heads * splits if splits > 1 else 0
    acc, high, total = (torch.empty(partials * each, dtype=torch.float32, device=out.device) for each in (dim, 1, 1))
    sizes = {
        "KV_HEADS": kv_heads, "G": group, "D": dim, "DPAD": max(16, ceil_pow2(dim)), "TILE": tile,
        **pdl_options(query),
    }  # fmt: skip
    # Splits last: those that a context is too short for end at once, but not before all others have begun.
    _decode_kernel[(kv_heads, sequences, splits)](
        query, keys, values, block_tables, query_start, context_lens, out, acc, high, total,
        counters(out.device, "decode", sequences * kv_heads),
        query.stride(0), query.stride(1), block_tables.stride(0), splits, least, scale,
        GPAD=max(GROUP_PAD, ceil_pow2(group)), PAGE=page,
        MERGED=min(MERGED, ceil_pow2(splits)), MERGES=way.last_merges,
        num_warps=WARPS, num_stages=way.stages, **sizes,
    )  # fmt: skip
    if splits > 1 and not way.last_merges:
        _merge_kernel[(sequences, heads)](
            acc, high, total, query_start, context_lens, out, splits, least,
            SPAD=ceil_pow2(splits), num_warps=4, **sizes,
        )  # fmt: skip


def _prefill(query, keys, values, block_tables, query_start, context_lens, max_query_len, scale, out) -> None:
    sequences, (_, page, kv_heads, dim), heads = len(context_lens), keys.shape, query.shape[1]
    cut, padded = LONG if max_query_len > 64 else SHORT, max(16, ceil_pow2(dim))
    pagewise = cut.pagewise and page == cut.keys and dim == padded
    if pagewise:
        keys, values = (TensorDescriptor.from_tensor(c.view(-1, kv_heads * dim), [page, dim]) for c in (keys, values))
    grid = (ceil_div(max_query_len, cut.queries), heads, sequences)
    _prefill_kernel[grid](
        query, keys, values, block_tables, query_start, context_lens, out,
        query.stride(0), query.stride(1), block_tables.stride(0), heads, kv_heads, scale,
        G=heads // kv_heads, D=dim, DPAD=padded, PAGE=page, BM=cut.queries, BN=cut.keys, PAGEWISE=pagewise,
        num_warps=cut.warps, num_stages=cut.stages, maxnreg=cut.registers, **pdl_options(query),
    )  # fmt: skip
