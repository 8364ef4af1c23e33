"""Images resized in bands by several threads: the pixels of Pillow's one call, whichever direction it takes first."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from media_files import image_bytes, noise
from PIL import Image

from services.mm_encoder.media import bands
from services.mm_encoder.media.bands import fill_in_bands, order_of_passes, rule_holds
from services.mm_encoder.media.image import resized
from services.mm_encoder.media.patches import fill_rows
from services.mm_encoder.media.processor import Processor
from services.mm_encoder.media.processor_settings import ProcessorSettings
from services.mm_encoder.media.turns import Turns
from services.mm_encoder.media.video import VideoLimits
from shared.messages import Media
from shared.model.config import VisionConfig

PATCH, MERGE = 14, 2
SIDE = PATCH * MERGE
VISION = VisionConfig(2, 32, 2, 128, PATCH, 3, MERGE, 2, 1e-6, 1e4)
# Width and height before, and in sides after. By the rule of Pillow 13, columns first: the third, and the last two.
SIZES = [
    ((140, 100), (6, 5)),
    ((200, 90), (3, 3)),
    ((100, 300), (5, 10)),
    ((112, 90), (4, 2)),  # of the same width
    ((90, 112), (5, 4)),  # of the same height
    ((90, 113), (4, 4)),
    ((60, 400), (1, 1)),
    ((57, 200), (2, 5)),
]


def drawn(width: int, height: int) -> Image.Image:
    return Image.fromarray(noise(height, width))


def patches(image: Image.Image, width: int, height: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the rows of an image resized whole, and other ones to be filled."""
    rows = np.empty((width * height // PATCH**2, 3 * PATCH**2), np.uint8)
    fill_rows(rows, resized(image, height, width), PATCH, MERGE)
    return rows, ~rows


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bands, "LEAST_PIXELS", 1)


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize(("before", "after"), SIZES)
@pytest.mark.parametrize(("threads", "band_pixels"), [(2, bands.BAND_PIXELS), (3, 2000)])
def test_bands_have_the_pixels_of_the_whole(
    before: tuple[int, int], after: tuple[int, int], threads: int, band_pixels: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bands, "BAND_PIXELS", band_pixels)
    width, height = after[0] * SIDE, after[1] * SIDE
    image = drawn(*before)
    whole, rows = patches(image, width, height)
    assert fill_in_bands(rows, image, height, width, PATCH, MERGE, Turns(threads))
    assert np.array_equal(rows, whole)


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize(("before", "after"), [((1200, 900), (8, 6)), ((200, 3000), (7, 2)), ((300, 260), (20, 20))])
def test_no_thread_holds_much_more_than_a_band(
    before: tuple[int, int], after: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the image, and of what lies between both passes: a band is cut out of either."""
    limit, found, made = 20_000, list[tuple[int, int]](), {name: getattr(bands, name) for name in ("_part", "_joined")}

    def noted(name: str) -> Callable[..., Image.Image]:
        def call(*args: Any) -> Image.Image:
            image: Image.Image = made[name](*args)
            found.append(image.size)
            return image

        return call

    monkeypatch.setattr(bands, "BAND_PIXELS", limit)
    for name in made:
        monkeypatch.setattr(bands, name, noted(name))
    width, height = after[0] * SIDE, after[1] * SIDE
    whole, rows = patches(drawn(*before), width, height)
    assert fill_in_bands(rows, drawn(*before), height, width, PATCH, MERGE, Turns(2))
    assert np.array_equal(rows, whole)
    assert len(found) > 8
    assert all(w * h <= limit + SIDE * max(w, h) for w, h in found), "beyond that, one row of patches at most"


def test_the_order_of_the_passes_is_known_of_the_installed_pillow() -> None:
    rule = order_of_passes()
    assert rule is not None, "bands are never used with this Pillow: what does it do now?"
    assert not all(rule_holds(lambda b, a: not rule(b, a))((*before, *after)) for before, after in SIZES)


@pytest.mark.usefixtures("small")
def test_with_a_pillow_that_nobody_knows_images_are_left_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bands, "order_of_passes", lambda: None)
    whole, rows = patches(drawn(100, 90), SIDE, SIDE)
    assert not fill_in_bands(rows, drawn(100, 90), SIDE, SIDE, PATCH, MERGE, Turns(2))
    assert np.array_equal(rows, ~whole), "nothing was written"


def test_small_images_and_those_of_the_right_size_are_left_whole() -> None:
    assert order_of_passes() is not None
    image, turns = Image.new("RGB", (1000, 900)), Turns(2)
    large, small = 32 * SIDE, 16 * SIDE
    rows = np.empty((large**2 // PATCH**2, 3 * PATCH**2), np.uint8)
    assert fill_in_bands(rows, image, large, large, PATCH, MERGE, turns)
    assert not fill_in_bands(rows, image, large, large, PATCH, MERGE, Turns(1))
    assert not fill_in_bands(rows, image.resize((large, large)), large, large, PATCH, MERGE, turns)
    few = rows[: small**2 // PATCH**2]
    assert fill_in_bands(few, image, small, small, PATCH, MERGE, turns), "a large one made small"
    assert not fill_in_bands(few, image.resize((600, 500)), small, small, PATCH, MERGE, turns)


@pytest.mark.parametrize("size", [(1000, 700), (700, 1000)])
def test_threads_change_nothing(size: tuple[int, int]) -> None:
    data, media = image_bytes(drawn(*size), "JPEG"), Media("image", "p")
    found = []
    for threads in (1, 3):
        limits = VideoLimits(64_000_000, 3600, 216_000)
        processor = Processor(ProcessorSettings(), limits, VISION, b"", threads=threads)
        plan = processor.plan(media, data)
        found.append(np.zeros(plan.rows, np.uint8))
        processor.fill(plan, data, found[-1])
    one, several = found
    assert np.array_equal(one, several)
