"""Examples of docs/responses.md, and the check that an answer has the fields that the page shows."""

import json
import re
from pathlib import Path
from typing import Any

PAGE = Path(__file__).parents[3] / "docs" / "responses.md"
ID = "resp_0123456789abcdef"
# What an example says of these is what the server says; of all else, it says which type it has.
EXACT = {"object", "type", "role", "param", "code", "reason", "instructions", "metadata", "deleted", "has_more", "text"}


def examples() -> list[tuple[str, str, Any, int, Any]]:
    """Method, path, body, status and answer of each example, in the page's order."""
    blocks = re.findall(r"(?:^    .*\n)+", PAGE.read_text(), re.MULTILINE)
    lines = [[line[4:] for line in block.splitlines()] for block in blocks]
    found = []
    for asked, told in zip(lines[::2], lines[1::2], strict=True):
        method, path = asked[0].split()
        found.append((method, path, _json(asked[1:]), int(told[0]), _json(told[1:])))
    return found


def _json(lines: list[str]) -> Any:
    return json.loads("\n".join(lines)) if lines else None


def check(shown: Any, got: Any, path: str = "", name: str = "") -> None:
    """Check that an answer has what an example shows."""
    if isinstance(shown, dict) and name != "metadata":
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
