"""Sizes that a request asks for: within the server's bounds, and part of what the embeddings are stored under."""

from pathlib import Path

import numpy as np
import pytest
from media_files import picture, video_bytes, video_frames

from services.mm_encoder.media import timestamps
from services.mm_encoder.media.patches import Grid
from services.mm_encoder.media.processor import Processor
from services.mm_encoder.media.processor_settings import ProcessorSettings
from services.mm_encoder.media.video import VideoLimits
from shared.errors import RequestError
from shared.messages import Media, MediaKind
from shared.model.config import VisionConfig

SETTINGS = ProcessorSettings(image_max_pixels=784 * 100, video_min_pixels=784 * 4, video_max_pixels=784 * 60)
FILES: dict[MediaKind, bytes] = {
    "image": picture(300, 200),
    "video": video_bytes(video_frames(4, 200, 300)),
}


@pytest.fixture(scope="module")
def processor() -> Processor:
    vision = VisionConfig(2, 32, 2, 128, 14, 3, 2, 2, 1e-6, 1e4)
    font = timestamps.font_file(Path("absent"))[0]
    return Processor(SETTINGS, VideoLimits(64_000_000, 3600, 216_000), vision, font)


@pytest.mark.parametrize("kind", ["image", "video"])
def test_the_model_sees_fewer_pixels_where_a_request_says_so(processor: Processor, kind: MediaKind) -> None:
    usual, small = Media(kind, "p"), Media(kind, "p", max_pixels=784 * 6)
    many, few = (processor.plan(media, FILES[kind]) for media in (usual, small))
    assert few.tokens < many.tokens
    assert few.rows[0] * 14 * 14 <= 784 * 6 * max(1, len(getattr(few, "indices", ())))
    assert processor.signature(small) != processor.signature(usual)


@pytest.mark.parametrize("kind", ["image", "video"])
def test_what_the_server_says_itself_changes_nothing(processor: Processor, kind: MediaKind) -> None:
    low, high = {
        "image": (SETTINGS.image_min_pixels, SETTINGS.image_max_pixels),
        "video": (SETTINGS.video_min_pixels, SETTINGS.video_max_pixels),
    }[kind]
    told, usual = Media(kind, "p", min_pixels=low, max_pixels=high), Media(kind, "p")
    assert processor.signature(told) == processor.signature(usual)
    assert processor.plan(told, FILES[kind]) == processor.plan(usual, FILES[kind])


def test_an_image_is_decoded_to_the_size_of_its_plan(processor: Processor) -> None:
    plan = processor.plan(Media("image", "p", max_pixels=784 * 6), FILES["image"])
    grid: Grid = processor.fill(plan, FILES["image"], np.empty(plan.rows, np.uint8))
    assert grid[1] * grid[2] == plan.rows[0]


@pytest.mark.parametrize(("low", "high"), [(None, 784 * 101), (3000, None), (3000, 3100), (784 * 20, 784 * 10)])
def test_sizes_beyond_the_servers_are_refused(processor: Processor, low: int | None, high: int | None) -> None:
    media = Media("image", "p", min_pixels=low, max_pixels=high)
    for ask in (lambda: processor.signature(media), lambda: processor.plan(media, FILES["image"])):
        with pytest.raises(RequestError, match=r"_pixels = .* of images; .* from 3136 to 78400") as refused:
            ask()
        assert refused.value.failure.status == 400


@pytest.mark.parametrize("kind", ["image", "video"])
def test_a_most_below_the_servers_fewest_enlarges_nothing(processor: Processor, kind: MediaKind) -> None:
    plan = processor.plan(Media(kind, "p", max_pixels=784 * 3), FILES[kind])
    assert plan.rows[0] == 2 * 4 * max(1, len(getattr(plan, "indices", ()))), "300 x 200 as 28 x 56"
    with pytest.raises(RequestError, match=f"asks for max_pixels = 783 of {kind}s; this server has them from 784 to"):
        processor.plan(Media(kind, "p", max_pixels=783), FILES[kind])


@pytest.mark.parametrize(
    ("bounds", "most"),
    [
        ({}, 784 * 30),
        ({"max_pixels": 784 * 20}, 784 * 20),
        ({"min_pixels": 784 * 40}, 784 * 40),
        ({"wished_max_pixels": 784 * 1000}, SETTINGS.image_max_pixels),
        ({"wished_max_pixels": 784 * 3}, 784 * 3),  # below the server's fewest
    ],
)
def test_a_wish_for_fewer_pixels_gives_way_to_all_bounds(
    processor: Processor, bounds: dict[str, int], most: int
) -> None:
    wished = Media("image", "p", **{"wished_max_pixels": 784 * 30, **bounds})
    asked = Media("image", "p", min_pixels=wished.min_pixels, max_pixels=most)
    assert processor.signature(wished) == processor.signature(asked)
