"""Router and shared expert side by side, for so few rows that a launch is dearer than what it computes.

Both read the same x and neither needs the other, so they share two launches: the scores beside the shared expert's
first product, and the choice beside its second. On streams of their own nothing is gained: a graph's edge from one
stream to another costs as much as either of these launches.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from services.engine.kernels.gpu.last import counters, last_of
from services.engine.kernels.gpu.launch import overlapped, predecessor
from services.engine.kernels.gpu.linear import product
from services.engine.kernels.gpu.matmul import parts
from services.engine.kernels.gpu.router import choose, plain_scores
from services.engine.kernels.moe import MoE
from services.engine.kernels.quantize import Quantized, Weight
from services.engine.kernels.router import SUM_MIN

ROWS = 4  # up to here
SCORED = 2  # experts that a program of the router scores
BM, BN, BK, WARPS, STAGES = 8, 64, 256, 4, 3  # of a product's programs
SPLITS = 5  # parts of a product's inputs


@triton.jit
def _scores_kernel(
    x_ptr, gate_ptr, scores_ptr, w_ptr, scale_ptr, parts_ptr, count_ptr, inner_ptr,
    M, N, IN, share, x_stride, w_stride, EXPERTS,
    ROUTERS: tl.constexpr, SCORED: tl.constexpr, BLOCK: tl.constexpr, SPLITS: tl.constexpr, BITS: tl.constexpr,
    EVEN: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Programs of the router, the first ROUTERS, and of the shared expert: inner_ptr [M, N / 2] is silu(gate) up.

    A program has as many outputs of the gate as of up, and the last of its tile to finish sums the parts of both.
    """
    if tl.program_id(0) < ROUTERS:
        if tl.program_id(2) == 0:
            expert, first = tl.program_id(0) * SCORED + tl.arange(0, SCORED), tl.program_id(2)
            plain_scores(x_ptr, gate_ptr, scores_ptr, expert, first, M, M, EXPERTS, IN, x_stride, BLOCK, PDL)
    else:
        tile, lane, m = tl.program_id(0) - ROUTERS, tl.arange(0, BN), tl.arange(0, BM)
        column = tile * (BN // 2) + lane % (BN // 2)
        n = tl.where(column < N // 2, column + lane // (BN // 2) * (N // 2), N)
        acc = product(x_ptr, w_ptr, scale_ptr, m, n, M, N, IN, share, x_stride, w_stride, BITS, BK, True, EVEN, PDL)
        at = parts_ptr + (tl.program_id(2) * M + m[None, :]) * N + n[:, None]
        tl.store(at, acc, (m < M)[None, :] & (n < N)[:, None])
        if last_of(count_ptr + tile, SPLITS):
            output = tile * (BN // 2) + tl.arange(0, BN // 2)
            mask = (m < M)[None, :] & (output < N // 2)[:, None]
            gate = tl.zeros((BN // 2, BM), tl.float32)
            up = tl.zeros((BN // 2, BM), tl.float32)
            for part in tl.static_range(SPLITS):
                part_ptrs = parts_ptr + (part * M + m[None, :]) * N + output[:, None]
                gate += tl.load(part_ptrs, mask, 0.0, cache_modifier=".cg")
                up += tl.load(part_ptrs + N // 2, mask, 0.0, cache_modifier=".cg")
            inner = (gate * tl.sigmoid(gate) * up).to(inner_ptr.dtype.element_ty)
            tl.store(inner_ptr + m[None, :] * (N // 2) + output[:, None], inner, mask)


@triton.jit
def _choose_kernel(
    scores_ptr, bias_ptr, vision_ptr, ids_ptr, weights_ptr, E, sum_min,
    inner_ptr, w_ptr, scale_ptr, parts_ptr, M, N, IN, share, w_stride,
    K: tl.constexpr, POOL: tl.constexpr, KPAD: tl.constexpr, BITS: tl.constexpr, EVEN: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Programs that choose, the first M, and of the shared expert's way down, parts_ptr [parts, M, N]."""
    if tl.program_id(0) < M:
        predecessor(PDL)
        if tl.program_id(2) == 0:
            row = tl.program_id(0).to(tl.int64)
            choose(row, scores_ptr, bias_ptr, vision_ptr, ids_ptr, weights_ptr, E, sum_min, K, 1, POOL, KPAD)
    else:
        n, m = (tl.program_id(0) - M) * BN + tl.arange(0, BN), tl.arange(0, BM)
        acc = product(inner_ptr, w_ptr, scale_ptr, m, n, M, N, IN, share, IN, w_stride, BITS, BK, True, EVEN, PDL)
        at = parts_ptr + (tl.program_id(2) * M + m[None, :]) * N + n[:, None]
        tl.store(at, acc, (m < M)[None, :] & (n < N)[:, None])


def route_and_share(x: Tensor, moe: MoE, vision: Tensor, top_k: int) -> tuple[Tensor, Tensor, Tensor]:
    """
    Args:
        x: [N, H], the last dimension contiguous; N at most ROWS.
        vision: [N] bool.

    Returns:
        ids and weights: see services.engine.kernels.router; and the shared expert's result, [parts, N, H] float32,
        still to be summed.
    """
    rows, experts = len(x), len(moe.gate)
    scores = torch.empty(rows, experts, dtype=torch.float32, device=x.device)
    inner = _score(x, moe, scores)
    ids = torch.empty(rows, top_k, dtype=torch.int32, device=x.device)
    weights = torch.empty(rows, top_k, dtype=torch.float32, device=x.device)
    data, scale, bits = parts(moe.shared.down)
    outputs, inputs = data.shape
    share, splits = _shares(inputs)
    shared = torch.empty(splits, rows, outputs, dtype=torch.float32, device=x.device)
    _choose_kernel[(rows + triton.cdiv(outputs, BN), 1, splits)](
        scores, moe.bias, vision, ids, weights, experts // 2, SUM_MIN,
        inner, data, scale, shared, rows, outputs, inputs, share, data.stride(0),
        K=top_k, POOL=triton.next_power_of_2(experts // 2), KPAD=triton.next_power_of_2(top_k),
        **_options(x, bits, inputs, outputs),
    )  # fmt: skip
    return ids, weights, shared


def takes(x: Tensor, shared: Weight) -> bool:
    """Whether there are so few rows, and the shared expert has bytes or plain values."""
    return len(x) <= ROWS and not (isinstance(shared, Quantized) and shared.bits == 4)


def _score(x: Tensor, moe: MoE, scores: Tensor) -> Tensor:
    """Fills `scores` [N, 2 E]; returns the shared expert's silu(gate) up, [N, I]."""
    data, scale, bits = parts(moe.shared.gate_up)
    (rows, hidden), (outputs, _), experts = x.shape, data.shape, len(moe.gate)
    share, splits = _shares(hidden)
    split = torch.empty(splits, rows, outputs, dtype=torch.float32, device=x.device)
    inner = torch.empty(rows, outputs // 2, dtype=x.dtype, device=x.device)
    routers, tiles = triton.cdiv(experts, SCORED), triton.cdiv(outputs, BN)
    _scores_kernel[(routers + tiles, 1, splits)](
        x, moe.gate, scores, data, scale, split, counters(x.device, "shared", tiles), inner,
        rows, outputs, hidden, share, x.stride(0), data.stride(0), experts,
        ROUTERS=routers, SCORED=SCORED, BLOCK=triton.next_power_of_2(hidden), SPLITS=splits,
        **_options(x, bits, hidden, outputs),
    )  # fmt: skip
    return inner


def _options(x: Tensor, bits: int, inputs: int, outputs: int) -> dict[str, Any]:
    """Of either launch, for a product of this size."""
    even = inputs % BK == 0 and outputs % BN == 0
    stages = STAGES if x.element_size() == 2 else 1
    tile = {"BITS": bits, "EVEN": even, "BM": BM, "BN": BN, "BK": BK, "num_warps": WARPS, "num_stages": stages}
    return {**tile, **overlapped(x)}


def _shares(inputs: int) -> tuple[int, int]:
    """Blocks of a part, and parts."""
    share = -(-inputs // (BK * SPLITS))
    return share, triton.cdiv(inputs, share * BK)
