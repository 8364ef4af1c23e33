"""Position ids against transformers, and against tables where transformers follows another rule."""

from types import SimpleNamespace

import numpy as np
import oracle  # noqa: F401  # before transformers, which it makes importable
import pytest
import torch
from transformers.models.ernie4_5_vl_moe.modeling_ernie4_5_vl_moe import Ernie4_5_VLMoeModel

from services.engine.schedule.positions import positions
from shared.messages import MediaKind, MediaSpan

Piece = int | tuple[MediaKind, tuple[int, int, int]]  # text tokens, or media with its grid in patches


def prompt(*pieces: Piece) -> tuple[int, list[MediaSpan]]:
    length, spans = 0, []
    for piece in pieces:
        if isinstance(piece, int):
            length += piece
            continue
        kind, (frames, rows, columns) = piece
        tokens = (frames if kind == "image" else frames // 2) * (rows // 2) * (columns // 2)
        spans.append(MediaSpan(kind, "key", length, tokens, (frames, rows, columns)))
        length += tokens
    return length, spans


def judge(length: int, spans: list[MediaSpan]) -> tuple[np.ndarray, int]:
    """transformers' positions and the first generated token's."""
    types = torch.zeros(1, length, dtype=torch.long)
    grids: dict[str, list[tuple[int, int, int]]] = {"image": [], "video": []}
    for span in spans:
        types[0, span.offset : span.offset + span.length] = 1 if span.kind == "image" else 2
        grids[span.kind].append(span.grid)
    vision = SimpleNamespace(temporal_merge_size=2, spatial_merge_size=2)
    model = SimpleNamespace(config=SimpleNamespace(vision_config=vision))
    model.get_vision_position_ids = lambda *a, **k: Ernie4_5_VLMoeModel.get_vision_position_ids(model, *a, **k)
    ids, deltas = Ernie4_5_VLMoeModel.get_rope_index(
        model,
        torch.zeros(1, length, dtype=torch.long),
        types,
        image_grid_thw=torch.tensor(grids["image"]) if grids["image"] else None,
        video_grid_thw=torch.tensor(grids["video"]) if grids["video"] else None,
    )
    return ids[:, 0].numpy(), length + int(deltas[0, 0])


@pytest.mark.parametrize(
    "pieces",
    [
        (1,),
        (9,),
        (4, ("image", (1, 4, 6)), 3),
        (2, ("image", (1, 2, 2)), 1),
        (1, ("image", (1, 4, 6)), 2, ("image", (1, 10, 2)), 5, ("image", (1, 2, 8)), 1),
        (3, ("video", (4, 4, 6)), 4),
        (3, ("video", (6, 6, 2)), 1),
        (3, ("video", (4, 8, 2)), 2, ("image", (1, 6, 6)), 2, ("video", (2, 4, 4)), 4),
    ],
)
def test_positions_are_transformers(pieces: tuple[Piece, ...]) -> None:
    length, spans = prompt(*pieces)
    actual, following = positions(length, spans, 2, 2)
    expected, expected_following = judge(length, spans)
    assert actual.dtype == np.int32
    np.testing.assert_array_equal(actual, expected)
    assert following == expected_following


@pytest.mark.parametrize("edge", ["first", "last", "adjacent"])
def test_media_at_the_edges(edge: str) -> None:
    image: Piece = ("image", (1, 2, 4))
    pieces: tuple[Piece, ...] = {"first": (image, 2), "last": (2, image), "adjacent": (image, image)}[edge]
    actual, following = positions(*prompt(*pieces), 2, 2)
    tables = {
        "first": ([[0, 0, 2, 3], [0, 0, 2, 3], [0, 1, 2, 3]], 4),
        "last": ([[0, 1, 2, 2], [0, 1, 2, 2], [0, 1, 2, 3]], 4),
        "adjacent": ([[0, 0, 2, 2], [0, 0, 2, 2], [0, 1, 2, 3]], 4),
    }
    assert (actual.tolist(), following) == tables[edge]


def test_what_follows_a_long_small_video_begins_after_its_last_frame() -> None:
    """Ten frames of one by two tokens: five steps of time, more than rows or columns."""
    actual, following = positions(*prompt(1, ("video", (10, 2, 4)), 2), 2, 2)
    assert actual.tolist() == [
        [0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6, 7],
        [0, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 6, 7],
        [0, 1, 2, 1, 2, 1, 2, 1, 2, 1, 2, 6, 7],
    ]
    assert following == 8


def test_merge_sizes_count() -> None:
    span = MediaSpan("video", "key", 0, 2, (3, 3, 6))
    actual, following = positions(2, [span], 3, 3)
    assert (actual.tolist(), following) == ([[0, 0], [0, 0], [0, 1]], 2)


def test_an_empty_prompt_begins_at_zero() -> None:
    assert positions(0, [], 2, 2)[1] == 0


@pytest.mark.parametrize(
    ("spans", "message"),
    [
        ([MediaSpan("image", "a", 1, 2, (1, 2, 4)), MediaSpan("image", "b", 2, 2, (1, 2, 4))], "overlaps"),
        ([MediaSpan("image", "a", 3, 2, (1, 2, 4)), MediaSpan("image", "b", 0, 2, (1, 2, 4))], "overlaps"),
        ([MediaSpan("image", "a", 7, 2, (1, 2, 4))], "ends after token 8"),
        ([MediaSpan("image", "a", 1, 3, (1, 2, 4))], "has 3 tokens"),
        ([MediaSpan("video", "a", 1, 4, (2, 2, 4))], "has 4 tokens"),
    ],
)
def test_spans_that_cannot_be_are_refused(spans: list[MediaSpan], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        positions(8, spans, 2, 2)
