"""Sizes: transformers where it and FastDeploy agree, FastDeploy's rules where they do not."""

import random

import pytest
from oracle import Model  # noqa: F401 - makes transformers importable
from transformers.models.ernie4_5_vl_moe.image_processing_pil_ernie4_5_vl_moe import smart_resize as judge

from services.mm_encoder.media.resize import smart_resize

LIMITS = {"factor": 28, "min_pixels": 56 * 56, "max_pixels": 6177 * 28 * 28}


def test_agrees_with_transformers_on_ordinary_sizes() -> None:
    draw = random.Random(0)
    for _ in range(20_000):
        height, width = draw.randint(15, 4000), draw.randint(15, 4000)
        if max(height, width) / min(height, width) > 200:
            continue
        low = draw.choice([56 * 56, 299 * 784])
        high = draw.choice([1196 * 784, 6177 * 784, 12845056])
        expected = judge(height, width, 28, low, high)
        assert smart_resize(height, width, factor=28, min_pixels=low, max_pixels=high) == expected, (height, width)


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        ((480, 640), (476, 644)),
        ((1080, 1920), (1092, 1932)),
        ((3024, 4032), (1904, 2520)),
        ((14, 14), (56, 56)),
        ((42, 70), (56, 56)),
        ((28, 5000), (28, 5012)),
        ((1, 1), (56, 56)),
        ((1, 5000), (28, 5600)),
        ((5000, 1), (5600, 28)),
        ((10, 3000), (28, 5600)),
    ],
)
def test_known_sizes(size: tuple[int, int], expected: tuple[int, int]) -> None:
    assert smart_resize(*size, **LIMITS) == expected


def test_turning_an_image_keeps_its_number_of_tokens() -> None:
    draw = random.Random(1)
    for _ in range(5_000):
        height, width = draw.randint(1, 6000), draw.randint(1, 6000)
        assert smart_resize(width, height, **LIMITS) == smart_resize(height, width, **LIMITS)[::-1]


def test_limits_without_a_size_between_them_are_an_error() -> None:
    with pytest.raises(ValueError, match="cannot be resized"):
        smart_resize(100, 100, factor=28, min_pixels=785, max_pixels=800)
