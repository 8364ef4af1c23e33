"""The block pool: no block lost, none freed twice, references equal to users, and hashes that tell contents apart."""

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from services.engine.blocks import ROOT, BlockPool, block_hash

BLOCKS = 6


class PoolMachine(RuleBasedStateMachine):
    """Users that allocate, share by content, fill and release, beside a model that remembers who holds what."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = BlockPool(BLOCKS, caching=True)
        self.users: list[list[int]] = []

    @rule(count=st.integers(1, 3))
    def allocate(self, count: int) -> None:
        if count <= self.pool.available:
            held = {block for user in self.users for block in user}
            fresh = self.pool.allocate(count)
            assert not held & set(fresh)
            assert len(set(fresh)) == count
            self.users.append(fresh)

    @precondition(lambda self: self.users)
    @rule(data=st.data())
    def fill(self, data: st.DataObject) -> None:
        user = data.draw(st.sampled_from(self.users))
        content = data.draw(st.sampled_from([b"a", b"b", b"c"]))
        for place, block in enumerate(user):
            self.pool.remember(block, content + bytes([place]))

    @rule(content=st.sampled_from([b"a", b"b", b"c"]))
    def share(self, content: bytes) -> None:
        matched = self.pool.match(content + bytes([place]) for place in range(3))
        available = self.pool.available
        cost = self.pool.cost(matched)
        if matched:
            self.pool.share(matched)
            self.users.append(matched)
        assert self.pool.available == available - cost

    @precondition(lambda self: self.users)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        user = self.users.pop(data.draw(st.integers(0, len(self.users) - 1)))
        self.pool.release(user)

    @invariant()
    def references_are_users(self) -> None:
        self.pool.check()
        for block in range(BLOCKS):
            assert self.pool.references(block) == sum(user.count(block) for user in self.users)
        assert self.pool.used == len({block for user in self.users for block in user})

    def teardown(self) -> None:
        for user in self.users:
            self.pool.release(user)
        self.pool.check()
        assert self.pool.available == BLOCKS


PoolMachine.TestCase.settings = settings(max_examples=60, stateful_step_count=40)
TestPool = PoolMachine.TestCase


def test_the_block_released_longest_ago_is_evicted_first() -> None:
    pool = BlockPool(3, caching=True)
    blocks = pool.allocate(3)
    for name, block in zip(b"abc", blocks, strict=True):
        pool.remember(block, bytes([name]))
    for block in (blocks[1], blocks[0], blocks[2]):
        pool.release([block])
    assert pool.allocate(1) == [blocks[1]]
    assert pool.match([b"b"]) == []
    assert pool.match([b"a"]) == [blocks[0]]


def test_the_end_of_a_prefix_is_evicted_before_its_beginning() -> None:
    pool = BlockPool(2, caching=True)
    blocks = pool.allocate(2)
    for name, block in zip(b"ab", blocks, strict=True):
        pool.remember(block, bytes([name]))
    pool.release(blocks)
    assert pool.allocate(1) == [blocks[1]]


def test_empty_blocks_go_before_cached_ones() -> None:
    pool = BlockPool(2, caching=True)
    known = pool.allocate(1)
    pool.remember(known[0], b"a")
    pool.release(known)
    pool.allocate(1)
    assert pool.match([b"a"]) == known


def test_a_block_taken_up_again_cannot_be_evicted() -> None:
    pool = BlockPool(1, caching=True)
    block = pool.allocate(1)
    pool.remember(block[0], b"a")
    pool.release(block)
    pool.share(pool.match([b"a"]))
    assert pool.available == 0
    with pytest.raises(AssertionError):
        pool.allocate(1)


def test_a_double_release_is_caught() -> None:
    pool = BlockPool(1, caching=True)
    block = pool.allocate(1)
    pool.release(block)
    with pytest.raises(AssertionError):
        pool.release(block)


def test_without_caching_nothing_is_remembered() -> None:
    pool = BlockPool(1, caching=False)
    block = pool.allocate(1)
    pool.remember(block[0], b"a")
    assert pool.match([b"a"]) == []


@pytest.mark.parametrize(
    "other",
    [
        (b"x", b"\1\2", [(0, 0, "cat")]),  # another beginning
        (ROOT, b"\1\3", [(0, 0, "cat")]),  # another token
        (ROOT, b"\1\2", [(0, 0, "dog")]),  # another image behind the same placeholders
        (ROOT, b"\1\2", [(0, 2, "cat")]),  # another part of the image
        (ROOT, b"\1\2", [(1, 0, "cat")]),  # the image begins elsewhere
        (ROOT, b"\1\2", []),  # no image
        (ROOT, b"\1\2", [(0, 0, "c"), (1, 0, "at")]),
    ],
)
def test_different_contents_have_different_hashes(other: tuple[bytes, bytes, list[tuple[int, int, str]]]) -> None:
    assert block_hash(ROOT, b"\1\2", [(0, 0, "cat")]) != block_hash(*other)
    assert block_hash(*other) == block_hash(*other)
