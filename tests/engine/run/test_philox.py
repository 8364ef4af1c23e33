"""Philox4x32-10 against the known answers published with Random123 (kat_vectors)."""

import numpy as np
import pytest

from services.engine.run.philox import philox4x32, uniform

# counter, key, expected: the three philox4x32 10 lines of Random123's kat_vectors.
KNOWN = [
    (
        "00000000 00000000 00000000 00000000",
        "00000000 00000000",
        "6627e8d5 e169c58d bc57ac4c 9b00dbd8",
    ),
    (
        "ffffffff ffffffff ffffffff ffffffff",
        "ffffffff ffffffff",
        "408f276d 41c83b0e a20bc7c6 6d5451fd",
    ),
    (
        "243f6a88 85a308d3 13198a2e 03707344",
        "a4093822 299f31d0",
        "d16cfe09 94fdcceb 5001e420 24126ea1",
    ),
]


def words(text: str) -> np.ndarray:
    return np.array([int(word, 16) for word in text.split()], np.uint64)


@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN)
def test_known_answers(counter: str, key: str, expected: str) -> None:
    np.testing.assert_array_equal(philox4x32(words(counter), words(key)), words(expected))


def test_rows_are_computed_alike_alone_and_together() -> None:
    counters = np.stack([words(counter) for counter, _, _ in KNOWN], axis=1)
    keys = np.stack([words(key) for _, key, _ in KNOWN], axis=1)
    expected = np.stack([words(answer) for _, _, answer in KNOWN], axis=1)
    np.testing.assert_array_equal(philox4x32(counters, keys), expected)


def test_a_uniform_is_the_first_two_words_as_a_53_bit_fraction() -> None:
    zero = np.zeros(1, np.uint64)
    bits = (0x6627E8D5 << 32 | 0xE169C58D) >> 11
    assert uniform(zero, zero)[0] == bits / 2**53


def test_a_uniform_depends_on_all_of_seed_and_index() -> None:
    seeds = np.array([0, 1, 2**40, 0, 0], np.uint64)
    indices = np.array([0, 0, 0, 1, 2**40], np.uint64)
    assert len({*uniform(seeds, indices).tolist()}) == 5


def test_uniforms_are_uniform() -> None:
    indices = np.arange(20_000, dtype=np.uint64)
    numbers = uniform(np.full_like(indices, 1234), indices)
    assert numbers.min() >= 0
    assert numbers.max() < 1
    counts = np.bincount((numbers * 10).astype(int), minlength=10)
    # Chi-square, 9 degrees of freedom: 27.9 is exceeded once in a thousand seeds.
    assert float(((counts - 2000) ** 2 / 2000).sum()) < 27.9
