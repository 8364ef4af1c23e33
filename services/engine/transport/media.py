"""Checks of embeddings, as mm_encoder stored them, against the spans of the prompt that they are for."""

import msgspec

from services.engine.run.step import EMBED_DTYPES
from services.engine.schedule.sequence import Embeds
from shared.errors import RequestError, internal
from shared.messages import MediaSpan


class EmbedsMeta(msgspec.Struct, frozen=True):
    """Shape and type of a blob of embeddings, as mm_encoder wrote them."""

    grid: tuple[int, int, int]
    rows: int
    hidden: int
    dtype: str


class EmbedsGoneError(RequestError):
    """Embeddings that were evicted before use, and can be made again."""


def check_embeds(span: MediaSpan, stored: tuple[bytes, bytes] | None, hidden_size: int) -> Embeds:
    """Return the embeddings of a span.

    Raises:
        EmbedsGoneError: nothing is stored (503).
        RequestError: they do not match the span (500).
    """
    if stored is None:
        what = f"The embeddings of the {span.kind} at token {span.offset} are no longer stored. Send the request again."
        raise EmbedsGoneError(internal(what, status=503).failure)
    data, meta_json = stored
    try:
        meta = msgspec.json.decode(meta_json, type=EmbedsMeta)
    except msgspec.MsgspecError as unreadable:
        raise internal(f"The embeddings of the {span.kind} at token {span.offset} are unreadable.") from unreadable
    expected = EmbedsMeta(span.grid, span.length, hidden_size, meta.dtype)
    if meta != expected or meta.dtype not in EMBED_DTYPES:
        raise internal(f"The embeddings of the {span.kind} at token {span.offset} are {meta}; expected {expected}.")
    if len(data) != meta.rows * meta.hidden * EMBED_DTYPES[meta.dtype].itemsize:
        raise internal(f"The embeddings of the {span.kind} at token {span.offset} are {len(data)} bytes for {meta}.")
    return Embeds(data, meta.dtype)
