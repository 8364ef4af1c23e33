"""The next build: a copy of the sources whose messages have another version: a field renamed, and a type changed."""

import re
import shutil
from pathlib import Path

from chaos_system import ROOT

RENAMED = ("services/gateway/inflight/work_messages.py", "services/gateway/inflight/pipeline.py", "shared/messages.py")
TRANSLATION = '''
_RUN = ("request_id", "epoch", "index", "tokens", "logprobs", "finish")


def _up(kind: str, value: Any) -> Any:
    """From 1 to 2: Request.form is called answer_form; a TokenRun is a map."""
    if kind == "Request":
        return {("answer_form" if name == "form" else name): each for name, each in value.items()}
    if kind in ("Encode", "Generate"):
        return {**value, "request": _up("Request", value["request"])}
    if kind == "Tokens":
        return {**value, "runs": [dict(zip(_RUN, run, strict=True)) for run in value["runs"]]}
    return value


def _down(kind: str, value: Any) -> Any:
    if kind == "Request":
        return {("form" if name == "answer_form" else name): each for name, each in value.items()}
    if kind in ("Encode", "Generate"):
        return {**value, "request": _down("Request", value["request"])}
    if kind == "Tokens":
        return {**value, "runs": [[run[name] for name in _RUN] for run in value["runs"]]}
    return value


TRANSLATIONS: Mapping[int, Translation] = {2: Translation(_up, _down)}
'''


def write_next_build(directory: Path) -> Path:
    """Write the sources of the next build into a directory, and return it."""
    for top in ("shared", "services"):
        shutil.copytree(ROOT / top, directory / top, ignore=shutil.ignore_patterns("__pycache__"))
    _edit(directory / "shared/message_versions.py", r"^VERSION = 1\b", "VERSION = 2")
    _edit(directory / "shared/message_versions.py", r"^TRANSLATIONS: .*\n", TRANSLATION)
    for name in RENAMED:
        _edit(directory / name, r"(?<=request\.)form\b|\bform(?==|: bytes)", "answer_form")
    _edit(
        directory / "shared/messages.py",
        r"class TokenRun\(msgspec.Struct, frozen=True, array_like=True\)",
        "class TokenRun(msgspec.Struct, frozen=True)",
    )
    return directory


def _edit(path: Path, pattern: str, replacement: str) -> None:
    """
    Raises:
        AssertionError: there is nothing to edit.
    """
    text, edits = re.subn(pattern, lambda _: replacement, path.read_text(), flags=re.MULTILINE)
    assert edits, f"{path}: no {pattern}"
    path.write_text(text)
