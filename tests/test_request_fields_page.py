"""docs/request-fields.md: current, and a line for each field that says what it does."""

import importlib.util
from pathlib import Path
from types import ModuleType

import msgspec
import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def page() -> ModuleType:
    """The page's writer, which no package has."""
    spec = importlib.util.spec_from_file_location("request_fields_page", ROOT / "docs" / "request_fields.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Silent(msgspec.Struct):
    nothing: int | None = None


def test_the_page_is_current(page: ModuleType) -> None:
    written = (ROOT / "docs" / "request-fields.md").read_text()
    assert written == page.text(), "a field has changed: run python docs/request_fields.py"


def test_a_field_needs_a_meaning(page: ModuleType) -> None:
    with pytest.raises(page.Undescribed, match="nothing"):
        page.field_rows(Silent)
