"""Exchange of parts between cards, each of which writes into the memory of the others: one launch, and each byte
crosses the link once."""

import triton
import triton.language as tl
from torch import Tensor

from services.engine.kernels.peer_memory import PeerMemory
from services.engine.kernels.triton.common.launch import pdl_options, wait_for_previous_kernel
from services.engine.kernels.triton.common.sizes import ceil_div
from services.engine.kernels.triton.exchange.blocks import FOREVER, received, send, wait

BLOCK_BYTES = 4096  # of a part, for a program: 16 at a time, two for each thread
_WARPS = 4


@triton.jit
def _push_kernel(
    own_ptr, parts_ptr, data_ptrs, flag_ptrs, counts_ptr, late_ptr, length, part_stride, room, limit,
    RANK: tl.constexpr, SIZE: tl.constexpr, PDL: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    wait_for_previous_kernel(PDL)
    program = tl.program_id(0)
    at = program * BLOCK + tl.arange(0, BLOCK)
    inside = at < length
    count = tl.load(counts_ptr + program) + 1
    own = tl.load(own_ptr + at, inside, 0.0)
    send(own, at, inside, count, program, data_ptrs, flag_ptrs, room, RANK, SIZE)
    tl.store(parts_ptr + RANK * part_stride + at, own, inside)
    wait(count, program, counts_ptr, flag_ptrs, late_ptr, limit, RANK, SIZE)
    for other in tl.static_range(SIZE):
        if other != RANK:
            part = received(other, at, inside, count, data_ptrs, room, own, RANK, SIZE)
            tl.store(parts_ptr + other * part_stride + at, part, inside)


def push(own: Tensor, parts: Tensor, peers: PeerMemory, limit: int = FOREVER) -> None:
    """Write the parts of all ranks to `parts`. All must call it with the same shapes, in the same order.

    Args:
        own: this rank's part, contiguous, of as many bytes as there is room for.
        parts: [ranks, *own.shape], each contiguous.
        limit: looks for the other ranks; what is written may not be theirs behind so many.
    """
    block = BLOCK_BYTES // own.element_size()
    _push_kernel[(ceil_div(own.numel(), block),)](
        own, parts, peers.data, peers.flags, peers.counts, peers.late, own.numel(), parts.stride(0),
        peers.room // own.element_size(), limit,
        RANK=peers.rank, SIZE=peers.size, BLOCK=block, num_warps=_WARPS, **pdl_options(own),
    )  # fmt: skip
