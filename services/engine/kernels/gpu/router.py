"""Routing in one launch: the float32 product with both pools' gates, and each row's choice.

The product is made of three on the matrix units. A float32 is the sum of three bfloat16s, so that with the activations
in bfloat16 every single product is exact, and sums are float32's. The inputs are cut into parts however many rows there
are; the last program of a tile of rows to finish sums them, in order, and chooses. So a row's choice depends on the row
alone.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from services.engine.kernels.gpu.last import counters, last_of
from services.engine.kernels.gpu.launch import overlapped, predecessor
from services.engine.kernels.router import SUM_MIN

ROWS, EXPERTS, INPUTS = 16, 32, 256  # of a program's tile


@triton.jit
def _dot_exact(x, gate):
    """x [ROWS, INPUTS] times gate [INPUTS, EXPERTS] float32."""
    if x.dtype == tl.float32:
        return tl.dot(x, gate, input_precision="ieee")
    high = gate.to(x.dtype)
    rest = gate - high.to(tl.float32)
    middle = rest.to(x.dtype)
    low = (rest - middle.to(tl.float32)).to(x.dtype)
    # Sums of their own: instructions that do not wait for each other.
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
    # The gates wait for nobody.
    gate = tl.load(gate_ptr + expert[None, :] * H + column[:, None], experts & columns[:, None], 0.0)
    predecessor(PDL)
    x = tl.load(x_ptr + row.to(tl.int64)[:, None] * x_stride + column[None, :], rows & columns[None, :], 0.0)
    part = parts_ptr + (tl.program_id(1) * M + row[:, None]) * 2 * E + expert[None, :]
    tl.store(part, _dot_exact(x, gate), rows & experts)
    if last_of(count_ptr + tl.program_id(2), tl.num_programs(0) * PARTS):
        _choose(parts_ptr, bias_ptr, vision_ptr, ids_ptr, weights_ptr, M, E, row, sum_min, K, PARTS, ROWS, POOL)


@triton.jit
def _choose(
    parts_ptr, bias_ptr, vision_ptr, ids_ptr, weights_ptr, M, E, row, sum_min,
    K: tl.constexpr, PARTS: tl.constexpr, ROWS: tl.constexpr, POOL: tl.constexpr,
):  # fmt: skip
    """The choice of these rows: parts_ptr [PARTS, M, 2 E]."""
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
    ranked = p + tl.load(bias_ptr + pool * E + expert, expert < E, 0.0)
    # What is no number ranks last, but before what is no expert: ids are experts, each once, whatever the activations.
    ranked = tl.where(expert < E, tl.where(ranked > -3e38, ranked, -3e38), float("-inf"))
    rank = tl.full((ROWS, POOL), K, tl.int32)
    for k in tl.static_range(K):
        best = expert == tl.argmax(ranked, 1)[:, None]
        rank = tl.where(best, k, rank)
        ranked = tl.where(best, float("-inf"), ranked)
    total = tl.sum(tl.where(rank < K, p, 0.0), 1)[:, None]
    place, mask = row.to(tl.int64)[:, None] * K + rank, mask & (rank < K)
    tl.store(ids_ptr + place, expert + pool * E, mask)
    tl.store(weights_ptr + place, p / tl.maximum(total, sum_min), mask)


def router(x: Tensor, gate: Tensor, bias: Tensor, vision: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """See the reference. `gate` contiguous; the rows of `x` may be strided."""
    (rows, hidden), outputs = x.shape, len(gate)
    tiles, parts = triton.cdiv(rows, ROWS), triton.cdiv(hidden, INPUTS)
    partial = torch.empty(parts, rows, outputs, dtype=torch.float32, device=x.device)
    ids = torch.empty(rows, top_k, dtype=torch.int32, device=x.device)
    weights = torch.empty(rows, top_k, dtype=torch.float32, device=x.device)
    _router_kernel[(triton.cdiv(outputs, EXPERTS), parts, tiles)](
        x, gate, bias, vision, partial, counters(x.device, "router", tiles), ids, weights,
        rows, outputs // 2, hidden, x.stride(0), SUM_MIN,
        K=top_k, PARTS=parts, ROWS=ROWS, EXPERTS=EXPERTS, INPUTS=INPUTS,
        POOL=triton.next_power_of_2(outputs // 2), num_warps=4, **overlapped(x),
    )  # fmt: skip
    return ids, weights
