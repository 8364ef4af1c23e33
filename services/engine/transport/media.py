"""Checks of embeddings, as mm_encoder stored them, against the spans of the prompt that they are for."""

import msgspec

from services.engine.run.step import EMBED_DTYPES
from services.engine.schedule.embeds import Embeds
from shared.errors import RequestError, internal
from shared.messages import MediaSpan


class EmbedsMeta(msgspec.Struct, frozen=True):
    """Shape and type of a blob of embeddings, as mm_encoder wrote them."""

    grid: tuple[int, int, int]
    rows: int
    hidden: int
    dtype: str


class EmbedsGoneError(RequestError):
    """Embeddings that can be made again: evicted before use, or stored and not those of their span."""


def gone(span: MediaSpan) -> EmbedsGoneError:
    """Return the error of a span of which nothing is stored."""
    return EmbedsGoneError(internal(f"{_name(span)} are no longer stored. Send the request again.", status=503).failure)


def check_embeds(span: MediaSpan, stored: tuple[bytes | memoryview, bytes], hidden_size: int) -> Embeds:
    """Return the embeddings of a span.

    Raises:
        EmbedsGoneError: what is stored does not match the span (500).
    """
    what = _name(span)
    data, meta_json = stored
    try:
        meta = msgspec.json.decode(meta_json, type=EmbedsMeta)
    except msgspec.MsgspecError:
        raise _damaged(f"{what} are unreadable.") from None
    expected = EmbedsMeta(span.grid, span.length, hidden_size, meta.dtype)
    if meta != expected or meta.dtype not in EMBED_DTYPES:
        raise _damaged(f"{what} are {meta}; expected {expected}.")
    if len(data) != meta.rows * meta.hidden * EMBED_DTYPES[meta.dtype].itemsize:
        raise _damaged(f"{what} are {len(data)} bytes for {meta}.")
    return Embeds(data, meta.dtype)


def _name(span: MediaSpan) -> str:
    return f"The embeddings of the {span.kind} at token {span.offset}"


def _damaged(message: str) -> EmbedsGoneError:
    return EmbedsGoneError(internal(message).failure)
