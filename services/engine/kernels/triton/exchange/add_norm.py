"""End of a block of experts on one rank of several, in one launch: sums a row's experts, exchanges the sums with the
other cards, adds the residual stream, and norms."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from services.engine.kernels.peer_memory import PeerMemory
from services.engine.kernels.triton.common.sizes import ceil_pow2
from services.engine.kernels.triton.dense.rms_norm import rounded_norm, row_warps
from services.engine.kernels.triton.exchange.blocks import FOREVER, received, send, wait
from services.engine.kernels.triton.moe.moe import experts_sum


@triton.jit
def _exchange_add_norm_kernel(
    routed_ptr, weights_ptr, shared_ptr, residual_ptr, norm_ptr, out_ptr, total_ptr,
    data_ptrs, flag_ptrs, counts_ptr, late_ptr, H, eps, shared_stride, room, limit,
    K: tl.constexpr, SHARED: tl.constexpr, RANK: tl.constexpr, SIZE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    row = program.to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside, at = column < H, row * H + column
    summed = experts_sum(routed_ptr, weights_ptr, shared_ptr, row, column, inside, H, shared_stride, K, SHARED)
    own = summed.to(residual_ptr.dtype.element_ty)
    count = tl.load(counts_ptr + program) + 1
    send(own, at, inside, count, program, data_ptrs, flag_ptrs, room, RANK, SIZE)
    exact = tl.load(residual_ptr + at, inside, 0.0).to(tl.float32)
    wait(count, program, counts_ptr, flag_ptrs, late_ptr, limit, RANK, SIZE)
    parts = tl.zeros(column.shape, tl.float32)
    for rank in tl.static_range(SIZE):
        parts += received(rank, at, inside, count, data_ptrs, room, own, RANK, SIZE).to(tl.float32)
    x = (exact + parts).to(total_ptr.dtype.element_ty)
    tl.store(total_ptr + at, x, inside)
    tl.store(out_ptr + at, rounded_norm(x, norm_ptr, column, inside, H, eps), inside)


def fits(peers: PeerMemory, residual: Tensor) -> bool:
    """Return True if it has room for so many rows."""
    return residual.nbytes <= peers.room and len(residual) <= len(peers.counts)


def exchange_add_norm(
    routed: Tensor,
    weights: Tensor,
    shared: Tensor,
    residual: Tensor,
    norm: Tensor,
    eps: float,
    peers: PeerMemory,
    limit: int = FOREVER,
) -> tuple[Tensor, Tensor]:
    """Return `add_norm` of what `sum_experts` gives on all ranks. All must call it with the same shapes, in the same
    order, and rows of one width in all calls that share memory.

    Args:
        routed, weights, shared: as of `combine`.
        limit: as of `push`.
    """
    (rows, width), out, total = residual.shape, torch.empty_like(residual), torch.empty_like(residual)
    block = ceil_pow2(width)
    # No programmatic dependent launch: see `combine`.
    _exchange_add_norm_kernel[(rows,)](
        routed, weights, shared, residual, norm, out, total,
        peers.data, peers.flags, peers.counts, peers.late, width, eps, shared.stride(0),
        peers.room // residual.element_size(), limit,
        K=weights.shape[1], SHARED=len(shared), RANK=peers.rank, SIZE=peers.size, BLOCK=block,
        num_warps=row_warps(block),
    )  # fmt: skip
    return out, total
