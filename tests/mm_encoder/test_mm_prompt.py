"""Expanding placeholders."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.mm_encoder.prompt import Embedded, expand, text_tokens
from shared.messages import MediaSpan, pack_ids, unpack_ids

PATCH = 9


def test_a_prompt_with_two_media() -> None:
    image, video = Embedded("image", "a", (1, 4, 2), 2), Embedded("video", "b", (4, 2, 4), 4)
    segments = [pack_ids([1, 2]), pack_ids([3]), b""]
    prompt, spans = expand(segments, [image, video], PATCH)
    assert unpack_ids(prompt) == [1, 2, 9, 9, 3, 9, 9, 9, 9]
    assert spans == (MediaSpan("image", "a", 2, 2, (1, 4, 2)), MediaSpan("video", "b", 5, 4, (4, 2, 4)))


@given(
    st.lists(st.tuples(st.lists(st.integers(10, 99), max_size=5), st.integers(1, 20))), st.lists(st.integers(10, 99))
)
def test_spans_are_exactly_the_placeholders(parts: list[tuple[list[int], int]], end: list[int]) -> None:
    segments = [pack_ids(text) for text, _ in parts] + [pack_ids(end)]
    media = [Embedded("image", str(i), (1, 2, 2 * rows), rows) for i, (_, rows) in enumerate(parts)]
    prompt, spans = expand(segments, media, PATCH)
    ids = unpack_ids(prompt)
    assert len(ids) == text_tokens(segments) + sum(item.rows for item in media)
    inside = [at for span in spans for at in range(span.offset, span.offset + span.length)]
    assert inside == [at for at, token in enumerate(ids) if token == PATCH]
    assert [token for token in ids if token != PATCH] == [token for text, _ in parts for token in text] + end


def test_a_segment_too_few_is_an_error() -> None:
    with pytest.raises(ValueError, match="zip"):
        expand([b""], [Embedded("image", "a", (1, 2, 2), 1)], PATCH)
