"""Type check of everything, strictly but for the tests that any machine runs: there only stale calls and names count.

What pyproject.toml lists for mypy has to be right in all that mypy finds. Other tests pass values that are odd on
purpose, or that are there because the test says so; but a call of a function that has changed is wrong even where the
test is skipped. All is one run of mypy, with the cache of a plain one; of conftest.py, of which there are several, mypy
could read but one, so it reads none.
"""

import json
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
COUNTED = frozenset(
    ("attr-defined", "call-arg", "call-overload", "func-returns-value", "import-not-found", "name-defined", "syntax")
)


def main() -> int:
    """Print what counts, and return the exit status."""
    strict = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["mypy"]["files"]
    places = [place for place in strict if not place.startswith("tests/")]
    command = [sys.executable, "-m", "mypy", "--output=json", *places, "tests"]
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    if done.returncode not in (0, 1):  # it could not do its work
        print(done.stdout)
        return done.returncode
    counted = [finding for finding in map(json.loads, done.stdout.splitlines()) if counts(finding, strict)]
    for finding in counted:
        print("{file}:{line}: {severity}: {message} [{code}]".format_map(finding))
    print(f"types: {len(counted)} findings")
    return int(bool(counted))


def counts(finding: dict[str, Any], strict: list[str]) -> bool:
    """Return True unless it may stand in a test: one that is not in the `strict` places."""
    return finding["code"] in COUNTED or any(Path(finding["file"]).is_relative_to(place) for place in strict)


if __name__ == "__main__":
    sys.exit(main())
