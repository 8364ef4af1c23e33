"""Memory shared with decoders: used again, and never by two."""

import asyncio
import gc
import os

import numpy as np
import pytest
import torch

from services.mm_encoder.decoding import shared_memory
from services.mm_encoder.decoding.shared_memory import KEPT_BLOCKS, KEPT_BYTES, LEAST_BYTES, Block, SharedMemory


async def given_back() -> None:
    """Let what the ends of arrays have asked of the loop come to pass."""
    gc.collect()
    await asyncio.sleep(0)


def test_both_ends_see_the_same_bytes() -> None:
    block = Block(LEAST_BYTES)
    block.write(b"to read")
    assert shared_memory.read(block.fd, 7) == b"to read"
    shared_memory.as_rows(block.fd, (2, 3))[:] = [[1, 2, 3], [4, 5, 6]]
    assert block.start(7).tolist() == [1, 2, 3, 4, 5, 6, ord("d")]


async def test_a_block_is_lent_again_at_the_end_of_the_last_view_of_its_rows() -> None:
    memory = SharedMemory()
    block = memory.take(LEAST_BYTES)
    fd = block.fd
    rows = memory.as_rows(block, (4, 5))
    del block
    view = torch.from_numpy(rows[1:])
    del rows
    await given_back()
    assert memory.take(LEAST_BYTES).fd != fd
    del view
    await given_back()
    assert memory.take(LEAST_BYTES).fd == fd


async def test_the_end_of_rows_in_another_thread_gives_their_block_back() -> None:
    memory = SharedMemory()
    block = memory.take(LEAST_BYTES)
    fd, held = block.fd, [memory.as_rows(block, (4, 5))]
    del block
    await asyncio.to_thread(held.clear)
    await given_back()
    assert memory.take(LEAST_BYTES).fd == fd


def test_rows_that_outlive_the_loop_end_quietly() -> None:
    async def rows() -> np.ndarray:
        memory = SharedMemory()
        return memory.as_rows(memory.take(LEAST_BYTES), (4, 5))

    kept = asyncio.run(rows())
    kept[:] = 1
    del kept  # an exception here would be a warning, and so an error


async def test_a_block_is_for_sizes_near_its_own() -> None:
    memory = SharedMemory()
    block = memory.take(3 * LEAST_BYTES)
    memory.give_back(block)
    assert memory.take(2 * LEAST_BYTES) is not block
    assert memory.take(5 * LEAST_BYTES) is not block
    assert memory.take(4 * LEAST_BYTES) is block
    assert memory.take(4 * LEAST_BYTES) is not block


async def test_few_small_blocks_are_kept() -> None:
    """Each holds descriptors, of which a process has a limited number."""
    memory = SharedMemory()
    blocks = [memory.take(1) for _ in range(KEPT_BLOCKS + 1)]
    numbers = [block.fd for block in blocks]
    for block in blocks:
        memory.give_back(block)
    del blocks, block
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(numbers[0])
    assert [memory.take(1).fd for _ in range(KEPT_BLOCKS)] == numbers[:0:-1]


async def test_what_is_kept_is_bounded_and_the_oldest_goes_first() -> None:
    memory = SharedMemory()
    first, second, third = (memory.take(KEPT_BYTES // 2) for _ in range(3))
    gone = first.fd
    for block in (first, second, third):
        memory.give_back(block)
    del first, block
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(gone)
    assert memory.take(KEPT_BYTES // 2) is third
    assert memory.take(KEPT_BYTES // 2) is second
