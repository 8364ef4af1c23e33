"""Type check of everything, strictly but for the tests that any machine runs: there only stale calls and names count.

What pyproject.toml lists for mypy has to be right in all that mypy finds. Other tests pass values that are odd on
purpose, or that are there because the test says so; but a call of a function that has changed is wrong even where the
test is skipped. All is one run of mypy, with the cache of a plain one. Of files of one name, as conftest.py, it reads
one: so it reads copies, each with a name of its own.
"""

import json
import os
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
COPIES = ".mypy_cache/conftest"  # where mypy finds again what it has read
COUNTED = frozenset(
    ("attr-defined", "call-arg", "call-overload", "func-returns-value", "import-not-found", "name-defined", "syntax")
)


def main() -> int:
    """Print what counts, and return the exit status."""
    strict = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["mypy"]["files"]
    places = [place for place in strict if not place.startswith("tests/")]
    copies = copy_conftests(ROOT)
    command = [sys.executable, "-m", "mypy", "--output=json", *places, "tests", *copies]
    found_by = {**os.environ, "MYPYPATH": COPIES}
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, env=found_by)
    if done.returncode not in (0, 1):  # it could not do its work
        print(done.stdout)
        return done.returncode
    findings = [json.loads(line) for line in done.stdout.splitlines()]
    for finding in findings:
        finding["file"] = copies.get(finding["file"], finding["file"])
    counted = [finding for finding in findings if counts(finding, strict)]
    for finding in counted:
        print("{file}:{line}: {severity}: {message} [{code}]".format_map(finding))
    print(f"types: {len(counted)} findings")
    return int(bool(counted))


def copy_conftests(root: Path) -> dict[str, str]:
    """Copy each conftest.py below `root`'s tests under a name of its own; return the paths of the copies and theirs."""
    (root / COPIES).mkdir(parents=True, exist_ok=True)
    copies = {}
    for path in sorted((root / "tests").rglob("conftest.py")):
        original = path.relative_to(root)
        copy = f"{COPIES}/{'_'.join(original.with_suffix('').parts)}.py"
        (root / copy).write_bytes(path.read_bytes())
        copies[copy] = str(original)
    return copies


def counts(finding: dict[str, Any], strict: list[str]) -> bool:
    """Return True unless it may stand in a test: one that is not in the `strict` places."""
    return finding["code"] in COUNTED or any(Path(finding["file"]).is_relative_to(place) for place in strict)


if __name__ == "__main__":
    sys.exit(main())
