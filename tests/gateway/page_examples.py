"""Examples of a page of docs/, and the check that an answer has the fields that the page shows."""

import json
import re
from pathlib import Path
from typing import Any

DOCS = Path(__file__).parents[2] / "docs"
# What an example says of these is what the server says; of all else, it says which type it has.
EXACT = {"object", "type", "role", "param", "code", "reason", "instructions", "metadata", "deleted", "has_more", "text"}
EXACT |= {"status", "purpose", "endpoint", "completion_window", "request_counts", "custom_id"}


def examples(page: str) -> list[tuple[str, str, Any, int, Any]]:
    """Method, path, body, status and answer of each example, in the page's order. A body of several lines that are
    objects each is a list of them."""
    blocks = re.findall(r"(?:^    .*\n)+", (DOCS / page).read_text(), re.MULTILINE)
    lines = [[line[4:] for line in block.splitlines()] for block in blocks]
    found = []
    for asked, told in zip(lines[::2], lines[1::2], strict=True):
        method, path = asked[0].split()
        found.append((method, path, _json(asked[1:]), int(told[0]), _json(told[1:])))
    return found


def _json(lines: list[str]) -> Any:
    if not lines:
        return None
    if all(line.startswith("{") and line.endswith("}") for line in lines):
        values = [json.loads(line) for line in lines]
        return values if len(values) > 1 else values[0]
    return json.loads("\n".join(lines))


def check(shown: Any, got: Any, path: str = "", name: str = "") -> None:
    """Check that an answer has what an example shows."""
    if isinstance(shown, dict) and name not in ("metadata", "request_counts"):
        for key, value in shown.items():
            assert key in got, f"{path}.{key} is missing"
            check(value, got[key], f"{path}.{key}", key)
    elif isinstance(shown, list):
        assert isinstance(got, list), path
        for index, value in enumerate(shown):
            check(value, got[index], f"{path}[{index}]")
    elif name in EXACT:
        assert got == shown, path
    else:
        assert type(got) is type(shown), path
