"""Routing: the float32 product of rows with both pools' gates, and each row's choice of experts.

One launch on the matrix units. A float32 is the sum of three bfloat16s, so with bfloat16 activations three products are
exact, and their sums are float32's. Inputs are split over programs (split-K), and the last program of a tile of rows to
finish sums the parts, in order, and chooses. For many rows the vendor library makes the three products; for few the
plain units do: add_norm_scores.py. In these two cases the choice is a launch of its own, or part of the next one.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from services.engine.kernels.reference.router import SUM_MIN
from services.engine.kernels.triton.common.last_block import counters, is_last_block
from services.engine.kernels.triton.common.launch import pdl_options, wait_for_previous_kernel
from services.engine.kernels.triton.common.sizes import ceil_div, ceil_pow2

TILED_ROWS = 256  # above, the vendor library is faster
ROWS, EXPERTS, INPUTS = 16, 32, 256  # of a program's tile on the matrix units


@triton.jit
def _comparable(ranked, inside):
    """Rank NaN last, but before padding, so that ids are distinct experts whatever x was."""
    return tl.where(inside, tl.where(ranked > -3e38, ranked, -3e38), float("-inf"))


@triton.jit
def rank_experts(scores_ptr, bias_ptr, pool, E, sum_min, K: tl.constexpr, PARTS: tl.constexpr, BLOCK: tl.constexpr):
    """Rank the experts of a row of pool `pool`: [BLOCK] ranks, and the weights of those ranked below K.

    scores_ptr: [PARTS, 2 E] of the row, still to be summed.
    """
    expert = tl.arange(0, BLOCK)
    inside = expert < E
    at = scores_ptr + pool * E + expert
    scores = tl.load(at, inside, float("-inf"))
    for part in tl.static_range(1, PARTS):
        scores += tl.load(at + part * 2 * E, inside, 0.0)
    p = tl.exp(scores - tl.max(scores, 0))
    p = p / tl.sum(p, 0)
    ranked = _comparable(p + tl.load(bias_ptr + pool * E + expert, inside, 0.0), inside)
    # All pairs are compared at once: finding the greatest K times would be K times as many dependent steps.
    before = (ranked[None, :] > ranked[:, None]) | (
        (ranked[None, :] == ranked[:, None]) & (expert[None, :] < expert[:, None])
    )
    rank = tl.sum(before.to(tl.int32), 1)
    total = tl.sum(tl.where(rank < K, p, 0.0), 0)
    return rank, p / tl.maximum(total, sum_min)


@triton.jit
def _choose_kernel(
    scores_ptr, bias_ptr, vision_ptr, ids_ptr, weights_ptr, E, sum_min,
    K: tl.constexpr, PARTS: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    wait_for_previous_kernel(PDL)
    row = tl.program_id(0).to(tl.int64)
    pool = tl.load(vision_ptr + row).to(tl.int32)
    rank, weight = rank_experts(scores_ptr + row * PARTS * 2 * E, bias_ptr, pool, E, sum_min, K, PARTS, BLOCK)
    tl.store(ids_ptr + row * K + rank, tl.arange(0, BLOCK) + pool * E, rank < K)
    tl.store(weights_ptr + row * K + rank, weight, rank < K)


@triton.jit
def _dot_exact(x, gate):
    """Return x [ROWS, INPUTS] times gate [INPUTS, EXPERTS] float32, exact products summed in float32."""
    if x.dtype == tl.float32:
        return tl.dot(x, gate, input_precision="ieee")
    high = gate.to(x.dtype)
    rest = gate - high.to(tl.float32)
    middle = rest.to(x.dtype)
    low = (rest - middle.to(tl.float32)).to(x.dtype)
    # Separate sums: instructions that do not wait for each other.
    return tl.dot(x, high) + (tl.dot(x, middle) + tl.dot(x, low))


@triton.jit
def _router_kernel(
    x_ptr, gate_ptr, bias_ptr, vision_ptr, parts_ptr, count_ptr, ids_ptr, weights_ptr, M, E, H, x_stride, sum_min,
    K: tl.constexpr, PARTS: tl.constexpr, ROWS: tl.constexpr, EXPERTS: tl.constexpr, INPUTS: tl.constexpr,
    POOL: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    expert = tl.program_id(0) * EXPERTS + tl.arange(0, EXPERTS)
    column = tl.program_id(1) * INPUTS + tl.arange(0, INPUTS)
    row = tl.program_id(2) * ROWS + tl.arange(0, ROWS)
    experts, columns, rows = (expert < 2 * E)[None, :], column < H, (row < M)[:, None]
    # The gates do not depend on the previous kernel.
    gate = tl.load(gate_ptr + expert[None, :] * H + column[:, None], experts & columns[:, None], 0.0)
    wait_for_previous_kernel(PDL)
    x = tl.load(x_ptr + row.to(tl.int64)[:, None] * x_stride + column[None, :], rows & columns[None, :], 0.0)
    part = parts_ptr + (tl.program_id(1) * M + row[:, None]) * 2 * E + expert[None, :]
    tl.store(part, _dot_exact(x, gate), rows & experts)
    if is_last_block(count_ptr + tl.program_id(2), tl.num_programs(0) * PARTS):
        _choose(parts_ptr, bias_ptr, vision_ptr, ids_ptr, weights_ptr, M, E, row, sum_min, K, PARTS, ROWS, POOL)


@triton.jit
def _choose(
    parts_ptr, bias_ptr, vision_ptr, ids_ptr, weights_ptr, M, E, row, sum_min,
    K: tl.constexpr, PARTS: tl.constexpr, ROWS: tl.constexpr, POOL: tl.constexpr,
):  # fmt: skip
    """Choose the experts of these rows: parts_ptr [PARTS, M, 2 E]."""
    pool = tl.load(vision_ptr + row, row < M, 0).to(tl.int32)[:, None]
    expert = tl.arange(0, POOL)[None, :]
    mask = (row < M)[:, None] & (expert < E)
    at = parts_ptr + (row.to(tl.int64)[:, None] * 2 + pool) * E + expert
    scores = tl.zeros((ROWS, POOL), tl.float32)
    for part in tl.static_range(PARTS):
        scores += tl.load(at + part * M * 2 * E, mask, 0.0, cache_modifier=".cg")
    scores = tl.where(expert < E, scores, float("-inf"))
    p = tl.exp(scores - tl.max(scores, 1)[:, None])
    p = p / tl.sum(p, 1)[:, None]
    ranked = _comparable(p + tl.load(bias_ptr + pool * E + expert, expert < E, 0.0), expert < E)
    rank = tl.full((ROWS, POOL), K, tl.int32)
    for k in tl.static_range(K):
        best = expert == tl.argmax(ranked, 1)[:, None]
        rank = tl.where(best, k, rank)
        ranked = tl.where(best, float("-inf"), ranked)
    total = tl.sum(tl.where(rank < K, p, 0.0), 1)[:, None]
    place, mask = row.to(tl.int64)[:, None] * K + rank, mask & (rank < K)
    tl.store(ids_ptr + place, expert + pool * E, mask)
    tl.store(weights_ptr + place, p / tl.maximum(total, sum_min), mask)


@triton.jit
def _split_kernel(gate_ptr, out_ptr, SIZE, BLOCK: tl.constexpr, PDL: tl.constexpr):
    wait_for_previous_kernel(PDL)
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    rest = tl.load(gate_ptr + at, at < SIZE, 0.0)
    for part in tl.static_range(3):
        rounded = rest.to(out_ptr.dtype.element_ty)
        tl.store(out_ptr + part * SIZE + at, rounded, at < SIZE)
        rest -= rounded.to(tl.float32)


def router(
    x: Tensor, gate: Tensor, bias: Tensor, vision: Tensor, top_k: int, scores: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """See the reference. `gate` contiguous; the rows of `x` may be strided.

    Args:
        scores: [N, 2 E] float32, x @ gate^T, if already computed.
    """
    rows = len(x)
    if scores is None and rows <= TILED_ROWS:
        return route_tiles(x, gate, bias, vision, top_k)
    ids, weights = _choices(x, top_k)
    scores = _library_scores(x, gate) if scores is None else scores
    per_pool = len(gate) // 2
    _choose_kernel[(rows,)](
        scores, bias, vision, ids, weights, per_pool, SUM_MIN,
        K=top_k, PARTS=scores.shape[1] // len(gate), BLOCK=ceil_pow2(per_pool), num_warps=1,
        **pdl_options(x),
    )  # fmt: skip
    return ids, weights


def _choices(x: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """Return room for the experts' ids and their weights, [N, K] each."""
    ids = torch.empty(len(x), top_k, dtype=torch.int32, device=x.device)
    return ids, torch.empty(len(x), top_k, dtype=torch.float32, device=x.device)


def route_tiles(x: Tensor, gate: Tensor, bias: Tensor, vision: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """Route as `router`, in tiles that are alike for any number of rows."""
    (rows, hidden), outputs = x.shape, len(gate)
    ids, weights = _choices(x, top_k)
    tiles, parts = ceil_div(rows, ROWS), ceil_div(hidden, INPUTS)
    partial = torch.empty(parts, rows, outputs, dtype=torch.float32, device=x.device)
    _router_kernel[(ceil_div(outputs, EXPERTS), parts, tiles)](
        x, gate, bias, vision, partial, counters(x.device, "router", tiles), ids, weights,
        rows, outputs // 2, hidden, x.stride(0), SUM_MIN,
        K=top_k, PARTS=parts, ROWS=ROWS, EXPERTS=EXPERTS, INPUTS=INPUTS,
        POOL=ceil_pow2(outputs // 2), num_warps=4, **pdl_options(x),
    )  # fmt: skip
    return ids, weights


def _library_scores(x: Tensor, gate: Tensor) -> Tensor:
    """Return x @ gate^T, in parts still to be summed: [N, parts 2 E] float32.

    The library's float32 product is slow, but three bfloat16 hold what a float32 does, a bfloat16 is the first of
    its three parts, and their products are exact in the float32 that sums them.
    """
    if x.dtype != torch.bfloat16:
        return x.float() @ gate.T
    parts = split(gate)
    return torch.mm(x, parts.T, out_dtype=torch.float32) if x.is_cuda else x.float() @ parts.float().T


def split(gate: Tensor) -> Tensor:
    """Split [R, H] float32 into [3 R, H] bfloat16: three summands of each value, the largest first."""
    parts = torch.empty(3 * len(gate), gate.shape[1], dtype=torch.bfloat16, device=gate.device)
    _split_kernel[(ceil_div(gate.numel(), 2048),)](
        gate, parts, gate.numel(), BLOCK=2048, num_warps=4, **pdl_options(gate)
    )  # fmt: skip
    return parts
