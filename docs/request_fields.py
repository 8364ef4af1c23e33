"""Writer of request-fields.md: every field of a chat request that the server knows, and what it does with it.

The one source is the code: the fields of `ChatRequest` with the comments beside them, and the tables of those that are
refused or have no effect. Run it from the repository's root after one has changed: python docs/request_fields.py
"""

import json
import sys
from pathlib import Path

import msgspec

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "docs")]

from settings import Undescribed, comments, table  # noqa: E402

from services.gateway.request.completion import CompletionRequest  # noqa: E402
from services.gateway.request.schemas import ChatRequest, GenerationRequest  # noqa: E402
from services.gateway.request.unsupported import NEUTRAL_VALUES, NO_EFFECT  # noqa: E402

TARGET = ROOT / "docs" / "request-fields.md"
HEADER = """# Fields of a chat request

Written by `python docs/request_fields.py` out of the code; a test fails when it is not current. `GET /openapi.json` has
the types and limits.

No field is ignored in silence that changes the answer elsewhere: it works, or it is a 400 that names it. A field that
no API known to us defines is ignored, and the answer's header `X-Millrace-Warning` says so, once for each. Every
optional field may be null. A number may be written as `5.0` or `"5"`.
"""
COMPLETIONS = """## Fields of POST /v1/completions

Those of a conversation, and of the thinking that its template asks for, are refused there.
"""
REFUSED = """## Fields that are refused

Known from OpenAI, FastDeploy, vLLM, SGLang and others. The values listed ask for nothing and are accepted, and so is
null; every other value is a 400 with the code `unsupported_parameter`.
"""


def field_rows(struct: type[msgspec.Struct]) -> list[tuple[str, str]]:
    """Return (field, meaning) of each field that works.

    Raises:
        Undescribed: a field has no comment.
    """
    told = {**comments(GenerationRequest), **comments(struct)}
    for name in struct.__struct_fields__:
        if not told.get(name):
            raise Undescribed(f"{struct.__module__}.{struct.__name__}.{name} needs a comment beside it")
    return [(f"`{name}`", told[name]) for name in struct.__struct_fields__]


def text() -> str:
    """Return the page."""
    refused = [
        (f"`{name}`", ", ".join(f"`{json.dumps(value)}`" for value in neutral) or "none")
        for name, neutral in sorted(NEUTRAL_VALUES.items())
    ]
    parts = [
        HEADER,
        "## Fields that work\n\n" + table(("field", "meaning"), field_rows(ChatRequest)),
        COMPLETIONS,
        table(("field", "meaning"), field_rows(CompletionRequest)),
        REFUSED,
        table(("field", "accepted"), refused),
        "## Fields without effect\n",
        "Accepted whatever they say: " + ", ".join(f"`{name}`" for name in sorted(NO_EFFECT)) + ".\n",
    ]
    return "\n".join(parts)


if __name__ == "__main__":
    TARGET.write_text(text(), encoding="utf-8")
