"""Exchange of blocks between the same programs of a launch on several cards (`services.engine.kernels.peer_memory`).

A program writes its block into the memory of all other cards, says so by a flag there, and waits for theirs in its own
memory. It numbers its exchanges, in memory, so a captured launch can be replayed. Successive exchanges use two halves
by turns: who writes the one after the next has been told of the next one, which the program on the other card begins
when it has read this one. For this, a program's block is at the same place in all launches that share memory.
"""

import triton
import triton.language as tl

FOREVER = 0  # looks for the others


@triton.jit
def send(own, at, inside, count, program, data_ptrs, flag_ptrs, room, RANK: tl.constexpr, SIZE: tl.constexpr):
    """Write a block to the other cards, and say so."""
    half = (count % 2) * SIZE * room
    for other in tl.static_range(SIZE):
        if other != RANK:
            theirs = tl.multiple_of(tl.load(data_ptrs + other).to(tl.pointer_type(own.dtype)), 16)
            tl.store(theirs + half + RANK * room + at, own, inside)
    tl.debug_barrier()  # the block of all threads is written before one of them says so
    for other in tl.static_range(SIZE):
        if other != RANK:
            flags = tl.load(flag_ptrs + other).to(tl.pointer_type(tl.int64))
            tl.atomic_xchg(flags + program * SIZE + RANK, count, sem="release", scope="sys")


@triton.jit
def wait(count, program, counts_ptr, flag_ptrs, late_ptr, limit, RANK: tl.constexpr, SIZE: tl.constexpr):
    """Wait for the blocks of the other cards, which nobody overwrites before this program's next exchange. Where looks
    are limited, the first program that has waited in vain ends the waiting of all, also of those that begin later."""
    seen = tl.load(flag_ptrs + RANK).to(tl.pointer_type(tl.int64))
    looked = 0
    for other in tl.static_range(SIZE):
        if other != RANK:
            flag = seen + program * SIZE + other
            while (tl.atomic_add(flag, 0, sem="acquire", scope="sys") < count) & (
                (limit == 0) | ((looked < limit) & (tl.load(late_ptr, limit != 0, 0, volatile=True) == 0))
            ):
                looked += 1
    tl.debug_barrier()
    tl.store(counts_ptr + program, count)
    if (limit != 0) & (looked >= limit):
        tl.store(late_ptr, 1)


@triton.jit
def received(other: tl.constexpr, at, inside, count, data_ptrs, room, own, RANK: tl.constexpr, SIZE: tl.constexpr):
    """Return the block of a rank, whose own is `own`."""
    if other == RANK:
        return own
    else:  # Triton compiles one of two branches
        half = (count % 2) * SIZE * room
        mine = tl.multiple_of(tl.load(data_ptrs + RANK).to(tl.pointer_type(own.dtype)), 16)
        return tl.load(mine + half + other * room + at, inside, 0.0, cache_modifier=".cg")
