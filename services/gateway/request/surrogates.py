"""Replacement of lone surrogates in a JSON body, which stand for no character: clients cut emoji in half.

They are JSON's escapes alone: a body is UTF-8, which has none. A surrogate becomes U+FFFD in a spelling that no encoder
writes, so that the fields that had one can be found again.
"""

import re

import msgspec

_ESCAPE = re.compile(rb"\\(?:u[dD][89abAB][0-9a-fA-F]{2}\\u[dD][c-fC-F][0-9a-fA-F]{2}|u[dD][89a-fA-F][0-9a-fA-F]{2}|.)")
_REPLACEMENT = rb"\uFfFd"
_LONE_LENGTH = len(_REPLACEMENT)

_fields = msgspec.json.Decoder(dict[str, msgspec.Raw])
_items = msgspec.json.Decoder(list[msgspec.Raw])


def replace_lone_surrogates(body: bytes) -> bytes:
    """Return `body` with every lone surrogate replaced; most bodies have none, and are returned as they are."""
    if b"\\ud" not in body and b"\\uD" not in body:
        return body
    return _ESCAPE.sub(_replace, body)


def replaced_paths(body: bytes) -> list[str]:
    """Return where `replace_lone_surrogates` has replaced some in a body (an object): fields, and items of a list."""
    if _REPLACEMENT not in body:
        return []
    paths = []
    for name, raw in _fields.decode(body).items():
        value = bytes(raw)
        if _REPLACEMENT not in value:
            continue
        items = [bytes(item) for item in _items.decode(value)] if value[:1] == b"[" else []
        paths += [f"{name}[{i}]" for i, item in enumerate(items) if _REPLACEMENT in item] or [name]
    return paths


def _replace(found: re.Match[bytes]) -> bytes:
    escape = found.group()
    return _REPLACEMENT if len(escape) == _LONE_LENGTH else escape
