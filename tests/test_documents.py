"""What the documents name is there: every `path/file.py:name` by the syntax tree, every link to a file by its path."""

import ast
import re
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
DOCUMENTS = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
GUIDES = sorted(ROOT.glob("services/*/__init__.py"))  # what to read first of a service
NAMED = re.compile(r"`([\w/-]+\.py)(?::([\w.]+))?`")
LINK = re.compile(r"\]\(([^)#:]+)(?:#[^)]*)?\)")
MUST_NAME_CODE = ("README.md", "CONTRIBUTING.md", "glossary.md", "life-of-a-crash.md")


@cache
def names(path: Path) -> frozenset[str]:
    """What a module defines: classes, functions, constants, and members of its classes as `Class.member`."""
    return frozenset(_defined(ast.parse(path.read_text()).body))


def _defined(body: list[ast.stmt], owner: str = "") -> list[str]:
    found = []
    for node in body:
        if isinstance(node, ast.ClassDef):
            found += [owner + node.name, *_defined(node.body, f"{owner}{node.name}.")]
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            found.append(owner + node.name)
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            found += [owner + target.id for target in targets if isinstance(target, ast.Name)]
    return found


def missing(text: str, root: Path = ROOT) -> list[str]:
    """Names of code in `text`, with a folder before the file, that are not there."""
    return [
        f"{file}:{name}" if name else file
        for file, name in NAMED.findall(text)
        if "/" in file and not ((root / file).is_file() and (not name or name in names(root / file)))
    ]


@pytest.mark.parametrize(
    "document", [*DOCUMENTS, *GUIDES], ids=lambda path: path.name.replace("__init__", path.parent.name)
)
def test_the_code_that_a_document_names_is_there(document: Path) -> None:
    text = document.read_text()
    assert missing(text) == []
    if document.name in MUST_NAME_CODE:
        assert [name for _, name in NAMED.findall(text) if name]


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_the_files_that_a_document_links_to_are_there(document: Path) -> None:
    broken = [link for link in LINK.findall(document.read_text()) if not (document.parent / link).exists()]
    assert broken == []


def test_a_name_that_is_not_there_is_found(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "b.py").write_text("LIMIT = 1\nclass Box:\n    size: int = 2\n    async def open(self): ...\n")
    good = "`a/b.py`, `a/b.py:LIMIT`, `a/b.py:Box`, `a/b.py:Box.size`, `a/b.py:Box.open`"
    assert missing(good, tmp_path) == []
    assert missing("`a/c.py`, `a/b.py:open`, `a/b.py:Box.close`", tmp_path) == [
        "a/c.py",
        "a/b.py:open",
        "a/b.py:Box.close",
    ]


def test_readme_follows_a_request_in_ten_stops() -> None:
    text = (ROOT / "README.md").read_text()
    path = text[text.index("## Follow one request") : text.index("## Map")]
    stops = re.split(r"^\d+\. ", path, flags=re.MULTILINE)[1:]
    assert len(stops) == 10
    assert all(any(name for _, name in NAMED.findall(stop)) for stop in stops)
