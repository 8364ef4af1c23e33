"""Expansion of a prompt's text segments and its media's sizes to the full prompt and its spans. Pure."""

from collections.abc import Sequence

import msgspec

from shared.messages import MediaKind, MediaSpan, pack_ids


class Embedded(msgspec.Struct, frozen=True):
    """Embeddings of one image or video of a prompt: their key and their number of rows."""

    kind: MediaKind
    key: str
    grid: tuple[int, int, int]
    rows: int


def expand(
    segments: Sequence[bytes], media: Sequence[Embedded], placeholder: int
) -> tuple[bytes, tuple[MediaSpan, ...]]:
    """Return (packed prompt ids, spans). `media[i]` becomes a placeholder per row, between segments i and i + 1.

    Raises:
        ValueError: there is not exactly one segment more than media.
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
    """Return the number of tokens in the text segments."""
    return sum(len(segment) for segment in segments) // 4
