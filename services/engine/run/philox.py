"""Philox4x32-10: random numbers that are a pure function of (seed, counter), in vectorised integer arithmetic.

Salmon, Moraes, Dror and Shaw, "Parallel random numbers: as easy as 1, 2, 3" (SC11). There is no state to lose: a
resumed request draws the same numbers again, whatever else is in the batch.
"""

import numpy as np
from numpy.typing import NDArray

UInt64 = NDArray[np.uint64]

_LOW = np.uint64(0xFFFFFFFF)
_32 = np.uint64(32)
_MULTIPLIERS = np.array([0xD2511F53, 0xCD9E8D57], np.uint64)
_BUMPS = np.arange(10, dtype=np.uint64)[:, None] * np.array([0x9E3779B9, 0xBB67AE85], np.uint64)  # of each round's key


def philox4x32(counter: UInt64, key: UInt64) -> UInt64:
    """Apply the bijection of a 128-bit counter under a 64-bit key.

    Args:
        counter: [4, ...] 32-bit words in 64-bit integers.
        key: [2, ...] the same.

    Returns:
        [4, ...] random 32-bit words in 64-bit integers.
    """
    ones = (1,) * (counter.ndim - 1)
    multipliers, bumps = _MULTIPLIERS.reshape(2, *ones), _BUMPS.reshape(-1, 2, *ones)
    even, odd = counter[::2], counter[1::2]
    for round_key in (key + bumps) & _LOW:
        # 32 x 32 bits never exceed 64, so plain products are exact.
        products = (even * multipliers)[::-1]
        even, odd = (products >> _32) ^ odd ^ round_key, products & _LOW
    return np.stack([even, odd], axis=1).reshape(counter.shape)


def uniform(seeds: UInt64, indices: UInt64) -> NDArray[np.float64]:
    """Return one number in [0, 1) a row, with all 53 bits of a double.

    Args:
        seeds: [R] the requests' seeds.
        indices: [R] index of the generated token that each row draws.
    """
    zero = np.zeros_like(indices)
    counter = np.stack([indices & _LOW, indices >> _32, zero, zero])
    words = philox4x32(counter, np.stack([seeds & _LOW, seeds >> _32]))
    bits: NDArray[np.float64] = ((words[0] << _32 | words[1]) >> np.uint64(11)).astype(np.float64)
    return bits * 2.0**-53
