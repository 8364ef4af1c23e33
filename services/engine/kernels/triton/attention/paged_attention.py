"""Causal attention over the paged cache: one kernel for prefill chunks, and a split-context one for decode. Long
prompts without cached tokens, alone in a call, go to the vendor library: whole_prompt.py.

Decode reads each key and value once for the group of query heads that shares them. The device decides into how many
splits a context is cut, up to a limit that depends on the number of sequences only, so that a captured graph stays
valid as contexts grow. The last program of a group to finish merges the splits' partial softmaxes (last-block
reduction); with many splits a second launch does.
"""

from dataclasses import dataclass, replace
from math import ceil

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from services.engine.kernels.reference.paged_attention import AttentionLaunch, PagedSequences
from services.engine.kernels.triton.attention.launches import attend_by
from services.engine.kernels.triton.attention.whole_prompt import is_whole_prompt, library_supports, whole_prompt
from services.engine.kernels.triton.common.last_block import counters, is_last_block
from services.engine.kernels.triton.common.launch import (
    begin_beside_previous_kernel,
    end_after_previous_kernel,
    fitting_stages,
    multiprocessors,
    pdl_options,
    wait_for_previous_kernel,
)
from services.engine.kernels.triton.common.repeated_launch import RepeatedLaunch
from services.engine.kernels.triton.common.sizes import ceil_div, ceil_pow2

MAX_SPLITS = 64
GROUP_PAD = 16  # rows of the smallest matrix instruction; a group of query heads fills a part of them


@dataclass(frozen=True, slots=True)
class DecodePlan:
    """Split of the contexts of a decode step."""

    stages: int
    programs: int  # at most, where a context is split
    share: int  # tokens of a program, at least, for each sequence of the step
    last_merges: bool  # the last program of a context to finish merges its splits; else a second launch does


# With few sequences contexts are split to fill the device. From MANY_SEQUENCES on, a context of 1,024 tokens is not:
# its one program has more loads in flight.
FEW_SEQUENCES_PLAN, MANY_SEQUENCES_PLAN, MANY_SEQUENCES = (
    DecodePlan(3, 256, 0, False),
    DecodePlan(4, 2048, 16, True),
    48,
)
TILE, WARPS = 64, 4  # tokens, at most a page
DECODE_REST = 6144  # bytes of shared memory beside the tiles of keys and values: queries, and probabilities
MERGED = 8  # partial softmaxes read together, at most


@dataclass(frozen=True, slots=True)
class PrefillShape:
    """Tile shape of a prefill."""

    queries: int  # of a tile
    keys: int
    warps: int
    stages: int
    pagewise: bool = False  # TMA loads keys a page at a time, where a page is as long as the tile
    registers: int | None = None  # of a thread, at most


# Of the last two a multiprocessor holds two programs, which hide each other's exponentials. Small tiles are for few
# queries, since large ones are too few programs then.
SHORT_CHUNKS, CHUNKS, LONG_CHUNKS = (
    PrefillShape(16, 64, 4, 3),
    PrefillShape(64, 64, 4, 3, pagewise=True),
    PrefillShape(128, 64, 8, 2, pagewise=True, registers=128),
)
SHORT, LONG = 64, 2048  # queries: the most of a short chunk, and of one that is not long
LARGE_TILE = 1.75  # times as long as a small one takes


@triton.jit
def _share(tiles, splits, least):
    """Return the tiles of each split but the last: as many splits as have `least` tiles, and at most `splits`."""
    return tl.cdiv(tiles, tl.minimum(tl.maximum(tiles // least, 1), splits))


@triton.jit(do_not_specialize=["table_stride", "splits", "least"])
def _decode_kernel(
    q_ptr, k_ptr, v_ptr, tables_ptr, starts_ptr, contexts_ptr, out_ptr, acc_ptr, high_ptr, sum_ptr, count_ptr,
    q_stride, q_head_stride, table_stride, splits, least, scale,
    KV_HEADS: tl.constexpr, G: tl.constexpr, GPAD: tl.constexpr, D: tl.constexpr, DPAD: tl.constexpr,
    PAGE: tl.constexpr, TILE: tl.constexpr, MERGED: tl.constexpr, MERGES: tl.constexpr, BESIDE: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    head, sequence, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    # Tables need no wait: they are uploaded before the step's first launch.
    row = tl.load(starts_ptr + sequence).to(tl.int64)
    context = tl.load(contexts_ptr + sequence)
    tiles = tl.cdiv(context, TILE)
    share = _share(tiles, splits, least)
    first = split * share
    last = tl.minimum(first + share, tiles)
    tables_ptr += sequence.to(tl.int64) * table_stride
    page = tl.load(tables_ptr + first * TILE // PAGE, first < last, 0)
    if BESIDE:
        begin_beside_previous_kernel(PDL)
    else:
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
        # Prefetch the next page's number while this page is read.
        page = tl.load(tables_ptr + (tile + 1) * TILE // PAGE, tile + 1 < last, 0)
        seen = tile * TILE + token < context
        k = tl.load(k_ptr + base + inside, d[None, :] < D, 0.0)
        # Slots past the context hold an earlier owner's values, maybe NaN, and 0 times NaN is not 0.
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
        if MERGES and is_last_block(count_ptr + pair, used):
            _merge(acc_ptr + place * D, high_ptr + place, sum_ptr + place, out_ptr, used, G, D, DPAD, MERGED)
    if BESIDE and head == 0 and sequence == 0 and split == 0:
        end_after_previous_kernel(PDL)


@triton.jit
def _merge(
    acc_ptr, high_ptr, sum_ptr, out_ptr, used,
    G: tl.constexpr, D: tl.constexpr, DPAD: tl.constexpr, MERGED: tl.constexpr,
):  # fmt: skip
    """Merge a context's partial softmaxes, MERGED of them at a time.

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


@triton.jit(do_not_specialize=["splits", "least"])
def _merge_kernel(
    acc_ptr, high_ptr, sum_ptr, starts_ptr, contexts_ptr, out_ptr, splits, least,
    KV_HEADS: tl.constexpr, G: tl.constexpr, D: tl.constexpr, DPAD: tl.constexpr, TILE: tl.constexpr,
    SPAD: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Merge a context's partial softmaxes, for a head of a sequence."""
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


@triton.jit(do_not_specialize=["table_stride"])
def _prefill_kernel(
    q_ptr, k, v, tables_ptr, starts_ptr, contexts_ptr, out_ptr,
    q_stride, q_head_stride, table_stride, heads, kv_heads, scale,
    G: tl.constexpr, D: tl.constexpr, DPAD: tl.constexpr, PAGE: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    PAGEWISE: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Attend a tile of queries. k and v: the caches' pointers, or with PAGEWISE descriptors of [blocks PAGE, kv_heads
    D] by pages of a head."""
    wait_for_previous_kernel(PDL)
    sequence, head = tl.program_id(2), tl.program_id(1)
    start = tl.load(starts_ptr + sequence)
    length = tl.load(starts_ptr + sequence + 1) - start
    # The last tiles see the longest context, so they start first.
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
    all_visible = ((context - length + tile * BM + 1) // BN) * BN  # every row of the tile sees the keys before this
    high = tl.full((BM,), float("-inf"), tl.float32)
    total = tl.zeros((BM,), tl.float32)
    acc = tl.zeros((BM, DPAD), tl.float32)
    factor = scale * 1.4426950408889634  # exp2 is the hardware's exponential
    table_ptr = tables_ptr + sequence * table_stride
    # Two loops, so that the long one has neither mask nor branch.
    acc, high, total = _attend(
        acc, high, total, q, k, v, table_ptr, 0, all_visible, context, position, head // G, kv_heads, factor,
        D, DPAD, PAGE, BN, PAGEWISE, False,
    )  # fmt: skip
    acc, high, total = _attend(
        acc, high, total, q, k, v, table_ptr, all_visible, visible, context, position, head // G, kv_heads, factor,
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
    """Run the online softmax over keys first..last - 1: acc [BM, DPAD], highest score and sum of each row."""
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


def decode_splits(plan: DecodePlan, sequences: int, kv_heads: int) -> int:
    """Return the most splits of a context: a function of the batch alone, never of the contexts."""
    return max(1, min(MAX_SPLITS, plan.programs // (sequences * kv_heads)))


def paged_attention(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    paged: PagedSequences,
    scale: float,
    out: Tensor | None = None,
    launches: list[AttentionLaunch] | None = None,
) -> Tensor:
    """See the reference. The last dimension of `query` is contiguous, `keys` and `values` are contiguous. Only
    sequences that decode are computed beside others, in steps that are not captured."""
    if len(paged.lengths) == 1 and is_whole_prompt(paged.lengths[0]) and library_supports(query):
        begin = _whole
    else:
        begin = _decode if paged.max_query_len == 1 else _prefill
    return attend_by(begin, query, keys, values, paged, scale, out, launches)


def _whole(query: Tensor, keys: Tensor, paged: PagedSequences, scale: float, out: Tensor) -> list[AttentionLaunch]:
    def launch(keys: Tensor, values: Tensor) -> None:
        out.copy_(whole_prompt(query, keys, values, paged.block_tables[0], scale))

    return [launch]


def _decode(query: Tensor, keys: Tensor, paged: PagedSequences, scale: float, out: Tensor) -> list[AttentionLaunch]:
    sequences, (_, page, kv_heads, dim), heads = len(paged.context_lens), keys.shape, query.shape[1]
    plan, group = FEW_SEQUENCES_PLAN if sequences < MANY_SEQUENCES else MANY_SEQUENCES_PLAN, heads // kv_heads
    if paged.lengths:
        # Not captured: a launch is a matter of the host's time, and it has one less.
        plan = replace(plan, last_merges=True)
    splits, tile = decode_splits(plan, sequences, kv_heads), min(TILE, page)
    least = max(1, plan.share * sequences // tile)
    partials = sequences * heads * splits if splits > 1 else 0
    acc, high, total = (torch.empty(partials * each, dtype=torch.float32, device=out.device) for each in (dim, 1, 1))
    sizes = {
        "KV_HEADS": kv_heads, "G": group, "D": dim, "DPAD": max(16, ceil_pow2(dim)), "TILE": tile,
        **pdl_options(query),
    }  # fmt: skip
    # Splits are the slowest dimension: those beyond a short context end at once, after all others have begun.
    splitting = RepeatedLaunch(
        _decode_kernel, (kv_heads, sequences, splits),
        q_ptr=query, tables_ptr=paged.block_tables, starts_ptr=paged.query_start, contexts_ptr=paged.context_lens,
        out_ptr=out, acc_ptr=acc, high_ptr=high, sum_ptr=total,
        count_ptr=counters(out.device, "decode", sequences * kv_heads),
        q_stride=query.stride(0), q_head_stride=query.stride(1), table_stride=paged.block_tables.stride(0),
        splits=splits, least=least, scale=scale,
        GPAD=max(GROUP_PAD, ceil_pow2(group)), PAGE=page,
        MERGED=min(MERGED, ceil_pow2(splits)), MERGES=plan.last_merges, BESIDE=paged.beside,
        num_warps=WARPS, num_stages=_stages(plan, tile, sizes["DPAD"], keys.element_size()), **sizes,
    )  # fmt: skip
    launches: list[AttentionLaunch] = [lambda keys, values: splitting(k_ptr=keys, v_ptr=values)]
    if splits > 1 and not plan.last_merges:
        merging = RepeatedLaunch(
            _merge_kernel, (sequences, heads),
            acc_ptr=acc, high_ptr=high, sum_ptr=total, starts_ptr=paged.query_start, contexts_ptr=paged.context_lens,
            out_ptr=out, splits=splits, least=least, SPAD=ceil_pow2(splits), num_warps=4, **sizes,
        )  # fmt: skip
        launches.append(lambda keys, values: merging())
    return launches


def _stages(plan: DecodePlan, tile: int, dim: int, size: int) -> int:
    """Return the stages that fit: a tile of keys and one of values in each."""
    return fitting_stages(plan.stages, 2 * tile * dim * size, DECODE_REST)


def chunk_shape(queries: int, context: int, lanes: float) -> PrefillShape:
    """Return the fastest tiles for chunks.

    Args:
        queries, context: of the longest chunk.
        lanes: heads of all sequences, relative to the programs that the device runs at once.
    """
    if queries <= SHORT:
        return SHORT_CHUNKS
    if queries > LONG:
        return LONG_CHUNKS
    # Behind a long context all programs take as long, so that it counts how many times they fill the device.
    small, large = (ceil(ceil_div(queries, shape.queries) * lanes) for shape in (CHUNKS, LONG_CHUNKS))
    return LONG_CHUNKS if LARGE_TILE * large < small and context >= 4 * queries else CHUNKS


def _prefill(query: Tensor, keys: Tensor, paged: PagedSequences, scale: float, out: Tensor) -> list[AttentionLaunch]:
    lanes = query.shape[1] * len(paged.context_lens) / (2 * multiprocessors(query.device))
    shape = chunk_shape(paged.max_query_len, paged.max_context_len, lanes)
    return [tiles_launch(query, keys, paged, scale, out, shape)]


def tiles_launch(
    query: Tensor, keys: Tensor, paged: PagedSequences, scale: float, out: Tensor, shape: PrefillShape
) -> AttentionLaunch:
    """Return what attends into `out` in tiles of `shape`: any number of new tokens a sequence.

    `keys`: of any layer.
    """
    sequences, (_, page, kv_heads, dim), heads = len(paged.context_lens), keys.shape, query.shape[1]
    padded = max(16, ceil_pow2(dim))
    pagewise = shape.pagewise and page == shape.keys and dim == padded
    tiles = RepeatedLaunch(
        _prefill_kernel, (ceil_div(paged.max_query_len, shape.queries), heads, sequences),
        q_ptr=query, tables_ptr=paged.block_tables, starts_ptr=paged.query_start, contexts_ptr=paged.context_lens,
        out_ptr=out, q_stride=query.stride(0), q_head_stride=query.stride(1), table_stride=paged.block_tables.stride(0),
        heads=heads, kv_heads=kv_heads, scale=scale, G=heads // kv_heads, D=dim, DPAD=padded, PAGE=page,
        BM=shape.queries, BN=shape.keys, PAGEWISE=pagewise,
        num_warps=shape.warps, num_stages=shape.stages, maxnreg=shape.registers, **pdl_options(query),
    )  # fmt: skip

    def launch(keys: Tensor, values: Tensor) -> None:
        if pagewise:
            keys, values = (
                TensorDescriptor.from_tensor(c.view(-1, kv_heads * dim), [page, dim]) for c in (keys, values)
            )
        tiles(k=keys, v=values)

    return launch
