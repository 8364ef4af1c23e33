"""Block pool: which blocks of the paged cache are free, shared or cached. Knows nothing of tensors.

A block is in exactly one of three states:
    used      referenced by one or more sequences
    cached    referenced by none, but its content is known by hash and can be shared again
    empty     neither
Allocation takes empty blocks first and then evicts the cached block that was released longest ago.
"""

import hashlib
import struct
from collections import OrderedDict
from collections.abc import Iterable, Sequence

ROOT = b""  # the parent of a sequence's first block


def root_hash(salt: str) -> bytes:
    """Return the parent of the first block of sequences with this salt, which share blocks with each other only."""
    return hashlib.sha256(b"salt\0" + salt.encode()).digest() if salt else ROOT


def block_hash(parent: bytes, token_ids: bytes, media: Iterable[tuple[int, int, str]]) -> bytes:
    """Return the identity of a full block's content and of everything before it.

    Args:
        parent: the hash of the block before, or that of the root (`root_hash`).
        token_ids: the block's ids as bytes of a fixed width.
        media: for each image or video with placeholders in the block: (index in the block of its first placeholder
            there, index within the media of that placeholder, content key). All placeholders have the same id, so
            ids alone cannot tell one image from another, nor one part of an image from the next.
    """
    digest = hashlib.sha256(parent)
    digest.update(token_ids)
    for index, offset, key in media:
        name = key.encode()
        digest.update(struct.pack("<QQQ", index, offset, len(name)))
        digest.update(name)
    return digest.digest()


class BlockPool:
    """Reference counts and the prefix cache over blocks 0 .. num_blocks - 1."""

    def __init__(self, num_blocks: int, caching: bool) -> None:
        self.num_blocks = num_blocks
        self.caching = caching
        self._references = [0] * num_blocks
        self._empty = list(range(num_blocks - 1, -1, -1))
        self._cached: OrderedDict[int, bytes] = OrderedDict()  # unreferenced, least recently released first
        self._block_of: dict[bytes, int] = {}
        self._hash_of: dict[int, bytes] = {}

    @property
    def available(self) -> int:
        """Number of blocks that `allocate` can give."""
        return len(self._empty) + len(self._cached)

    @property
    def used(self) -> int:
        return self.num_blocks - self.available

    def references(self, block: int) -> int:
        return self._references[block]

    def match(self, hashes: Iterable[bytes]) -> list[int]:
        """Return the blocks that hold the longest prefix of `hashes`, not referenced yet: see `share`."""
        found = []
        for wanted in hashes:
            block = self._block_of.get(wanted)
            if block is None:
                break
            found.append(block)
        return found

    def cost(self, matched: Iterable[int]) -> int:
        """Return how many of `matched` are unreferenced, and so stop being available once shared."""
        return sum(self._references[block] == 0 for block in matched)

    def share(self, blocks: Iterable[int]) -> None:
        """Add a reference to blocks that `match` returned."""
        for block in blocks:
            assert block in self._hash_of, "only blocks of known content are shared"
            if self._references[block] == 0:
                del self._cached[block]
            self._references[block] += 1

    def allocate(self, count: int) -> list[int]:
        """Return `count` blocks of unknown content with one reference each. The caller has checked `available`."""
        assert count <= self.available, "more blocks asked for than available"
        return [self._allocate_one() for _ in range(count)]

    def release(self, blocks: Sequence[int]) -> None:
        """Drop one reference to each of a sequence's blocks, given in order.

        The last block is released first: a prefix is worth more than what follows it, which is useless without it.
        """
        for block in reversed(blocks):
            assert self._references[block] > 0, "a block was released twice"
            self._references[block] -= 1
            if self._references[block] > 0:
                continue
            if block in self._hash_of:
                self._cached[block] = self._hash_of[block]
            else:
                self._empty.append(block)

    def remember(self, block: int, content: bytes) -> None:
        """Register a used block as full, by its content hash, unless another block already has that hash."""
        assert self._references[block] > 0, "only a used block can have been filled"
        if not self.caching or content in self._block_of or block in self._hash_of:
            return
        self._block_of[content] = block
        self._hash_of[block] = content

    def check(self) -> None:
        """Assert that every block is in exactly one state."""
        used = {block for block, count in enumerate(self._references) if count > 0}
        states = [used, set(self._empty), set(self._cached)]
        assert sum(map(len, states)) == len(set().union(*states)) == self.num_blocks
        assert len(self._empty) == len(set(self._empty))
        assert {content: block for block, content in self._hash_of.items()} == self._block_of
        assert all(self._hash_of[block] == content for block, content in self._cached.items())
        assert not set(self._empty) & set(self._hash_of)

    def _allocate_one(self) -> int:
        if self._empty:
            block = self._empty.pop()
        else:
            block, content = self._cached.popitem(last=False)
            del self._block_of[content]
            del self._hash_of[block]
        assert self._references[block] == 0
        self._references[block] = 1
        return block
