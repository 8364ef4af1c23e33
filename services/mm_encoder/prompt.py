"""A prompt's text segments and its media's sizes become the prompt and its spans. Pure."""

from collections.abc import Sequence

import msgspec

from shared.messages import MediaKind, MediaSpan, pack_ids


class Embedded(msgspec.Struct, frozen=True):
    """One image or video of a prompt: where its embeddings are and how many rows they have."""

    kind: MediaKind
    key: str
    grid: tuple[int, int, int]
    rows: int


def expand(
    segments: Sequence[bytes], media: Sequence[Embedded], placeholder: int
) -> tuple[bytes, tuple[MediaSpan, ...]]:
    """(packed prompt ids, spans): `media[i]` is as many placeholders as it has rows, between segments i and i + 1.

    Raises:
        ValueError: the numbers of segments and media do not fit together.
    """
    pieces: list[bytes] = []
    spans: list[MediaSpan] = []
    offset = 0
    for segment, item in zip(segments[:-1], media, strict=True):
        offset += len(segment) // 4
        pieces += [segment, pack_ids([placeholder]) * item.rows]
        spans.append(MediaSpan(item.kind, item.key, offset, item.rows, item.grid))
        offset += item.rows
    return b"".join([*pieces, segments[-1]]), tuple(spans)


def text_tokens(segments: Sequence[bytes]) -> int:
    """Tokens of the segments alone."""
    return sum(len(segment) for segment in segments) // 4
