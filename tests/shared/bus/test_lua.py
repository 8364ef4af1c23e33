"""The Lua scripts: each says what it is given, requires only what exists, and is used."""

import re
from pathlib import Path

import pytest

from shared.bus.lua import SCRIPTS, read_script

ROOT = Path(__file__).resolve().parents[3]
FILES = sorted(path for top in ("shared", "services", "cli") for path in (ROOT / top).rglob("*.lua"))


def test_there_are_scripts_in_every_place_that_calls_redis_so() -> None:
    assert {path.parent.relative_to(ROOT).parts[0] for path in FILES} == {"shared", "services", "cli"}


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_script_has_a_contract(path: Path) -> None:
    """A sentence, then its KEYS and ARGV; a prelude may leave them to the script that requires it."""
    header = re.match(r"(?:--.*\n)+", path.read_text())
    assert header is not None
    assert header[0].startswith("-- ")
    assert header[0].startswith("-- Prelude") or ("-- KEYS:" in header[0] and "-- ARGV:" in header[0])


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_script_is_used(path: Path) -> None:
    sources = [file.read_text() for top in ("shared", "services", "cli") for file in (ROOT / top).rglob("*.py")]
    required = [file.read_text() for file in FILES]
    assert any(f'read_script("{path.stem}"' in source for source in sources) or any(
        f"-- requires: {path.stem}\n" in source for source in required
    )


def test_what_a_script_requires_stands_before_it(tmp_path: Path) -> None:
    (tmp_path / "near.lua").write_text("-- Prelude.\n-- requires: entries\nlocal near = 1\n")
    (tmp_path / "script.lua").write_text("-- requires: near\nreturn near\n")
    source = read_script("script", tmp_path)
    entries = (SCRIPTS / "entries.lua").read_text()
    assert source == entries + (tmp_path / "near.lua").read_text() + (tmp_path / "script.lua").read_text()
