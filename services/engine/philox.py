"""Philox4x32-10: random numbers that are a pure function of (seed, counter), in vectorised integer arithmetic.

Salmon, Moraes, Dror and Shaw, "Parallel random numbers: as easy as 1, 2, 3" (SC11). A resumed request draws what it
would have drawn, whoever its neighbours in the batch are, because there is no state to lose.
"""

import numpy as np
from numpy.typing import NDArray

UInt64 = NDArray[np.uint64]

_LOW = np.uint64(0xFFFFFFFF)
_32 = np.uint64(32)
_MULTIPLIERS = np.uint64(0xD2511F53), np.uint64(0xCD9E8D57)
_WEYL = 0x9E3779B9, 0xBB67AE85
_ROUNDS = 10


def philox4x32(counter: UInt64, key: UInt64) -> UInt64:
    """The bijection of a 128-bit counter under a 64-bit key.

    Args:
        counter: [4, ...] 32-bit words in 64-bit integers.
        key: [2, ...] the same.

    Returns:
        [4, ...] random 32-bit words in 64-bit integers.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for bump in range(_ROUNDS):
        # 32 x 32 bits never exceed 64, so plain products are exact.
        first, second = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        round_k0, round_k1 = ((k + np.uint64(bump * w)) & _LOW for k, w in zip((k0, k1), _WEYL, strict=True))
        c0, c1, c2, c3 = (second >> _32) ^ c1 ^ round_k0, second & _LOW, (first >> _32) ^ c3 ^ round_k1, first & _LOW
    return np.stack([c0, c1, c2, c3])


def uniform(seeds: UInt64, indices: UInt64) -> NDArray[np.float64]:
    """One number in [0, 1) a row, with all 53 bits of a double.

    Args:
        seeds: [R] the requests' seeds.
        indices: [R] which of its generated tokens each row is drawing.
    """
    zero = np.zeros_like(indices)
    counter = np.stack([indices & _LOW, indices >> _32, zero, zero])
    words = philox4x32(counter, np.stack([seeds & _LOW, seeds >> _32]))
    bits: NDArray[np.float64] = ((words[0] << _32 | words[1]) >> np.uint64(11)).astype(np.float64)
    return bits * 2.0**-53
