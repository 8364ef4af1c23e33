"""Warnings of what an answer does not follow, sent in the header X-Millrace-Warning."""

from collections.abc import Set

from services.gateway.request.schemas import CHAT_FIELDS, unknown_fields
from services.gateway.request.surrogates import replaced_paths

MAX_WARNINGS = 8


def warnings_of(body: bytes, known: Set[str] = CHAT_FIELDS) -> tuple[str, ...]:
    """Return a sentence for each field of a valid body that the answer does not follow as it was written.

    Args:
        known: the fields of the request's API, and of those like it.
    """
    ignored = [
        f"{_quote(name)} is no field that this server knows; it is ignored" for name in unknown_fields(body, known)
    ]
    replaced = [f"{_quote(path)}: a lone surrogate was replaced by U+FFFD" for path in replaced_paths(body)]
    return tuple([*ignored, *replaced][:MAX_WARNINGS])


def _quote(path: str) -> str:
    """Return a field's path as it may stand in a header."""
    return f"`{path[:64].encode('unicode_escape').decode()}`"
