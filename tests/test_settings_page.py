"""docs/settings.md: current, complete, and a line for each setting that says what it is."""

import importlib.util
from pathlib import Path
from types import ModuleType

import msgspec
import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def page() -> ModuleType:
    """The page's writer, which no package has."""
    spec = importlib.util.spec_from_file_location("settings_page", ROOT / "docs" / "settings.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Described(msgspec.Struct):
    beside: int = 1  # said beside it
    # Said above it,
    # in two lines.
    above_s: float = 2.0
    both: str = ""  # beside wins


class Silent(msgspec.Struct):
    nothing_bytes: int = 1 << 20


def test_the_page_is_current(page: ModuleType) -> None:
    written = (ROOT / "docs" / "settings.md").read_text()
    assert written == page.text(), "a setting, flag or value has changed: run python docs/settings.py"


def test_a_setting_means_what_the_comment_beside_it_says(page: ModuleType) -> None:
    rows = {row.name: row for row in page.rows(Described, None)}
    assert {name: row.meaning for name, row in rows.items()} == {
        "beside": "said beside it",
        "above_s": "Said above it, in two lines.",
        "both": "beside wins",
    }
    assert (rows["above_s"].unit, rows["above_s"].default) == ("s", "`2.0`")
    assert (rows["both"].unit, rows["both"].default) == ("", "empty")


def test_a_setting_without_a_comment_is_refused_by_name(page: ModuleType) -> None:
    with pytest.raises(page.Undescribed, match=r"Silent\.nothing_bytes"):
        page.rows(Silent, None)


def test_every_setting_and_every_flag_is_on_the_page(page: ModuleType) -> None:
    text = page.text()
    names = {name for struct in page.SERVICES.values() for name in struct.__struct_fields__}
    assert {name for name in names if f"| `{name}` |" not in text} == set()
    assert {action.option_strings[0] for action in page.flags() if f"`{action.option_strings[0]}`" not in text} == set()


def test_every_value_of_the_chart_is_read_as_helm_reads_it(page: ModuleType) -> None:
    import yaml

    def leaves(values: object, path: str = "") -> dict[str, object]:
        if not isinstance(values, dict) or not values:
            return {path: values}
        return {leaf: value for key, each in values.items() for leaf, value in leaves(each, f"{path}.{key}").items()}

    text = page.VALUES.read_text()
    wanted = {path.removeprefix("."): value for path, value in leaves(yaml.safe_load(text)).items()}
    found = {key: yaml.safe_load(value) for key, value, _ in page.values(text)}
    assert found == wanted
