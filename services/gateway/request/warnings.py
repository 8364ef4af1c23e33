"""Warnings of what an answer does not follow, sent in the header X-Millrace-Warning."""

from collections.abc import Iterable

from services.gateway.request.schemas import unknown_fields
from services.gateway.request.surrogates import replaced_paths

MAX_WARNINGS = 8


def warnings_of(body: bytes) -> tuple[str, ...]:
    """Return a sentence for each field of a valid body that the answer does not follow as it was written."""
    return warnings_for(unknown_fields(body), body)


def warnings_for(unknown: Iterable[str], body: bytes) -> tuple[str, ...]:
    """Return the same, where an API has fields of its own and knows which of them are `unknown`."""
    ignored = [f"{_quote(name)} is no field that this server knows; it is ignored" for name in unknown]
    replaced = [f"{_quote(path)}: a lone surrogate was replaced by U+FFFD" for path in replaced_paths(body)]
    return tuple([*ignored, *replaced][:MAX_WARNINGS])


def _quote(path: str) -> str:
    """Return a field's path as it may stand in a header."""
    return f"`{path[:64].encode('unicode_escape').decode()}`"
