"""A headless Chromium, and the product it looks at. Both are skipped where there is none: see docs/console.md."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from browser_pages import API_KEY, Watched
from system import System, running

from benchmarks.demo_model.evaluate import PROCESSOR

CHECKPOINT = Path(__file__).parents[2] / "cli" / "demo_checkpoint"


@pytest.fixture(scope="package")
def chromium() -> Iterator[Any]:
    """Of this folder, since playwright's event loop occupies this thread: tests that bring their own come after."""
    playwright = pytest.importorskip("playwright.sync_api", reason="needs the extra browser-test")
    binary = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if binary is None:
        pytest.skip("needs Chromium on PATH")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=binary, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture(scope="package")
def demo(chromium: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[System]:
    """`millrace serve --demo`. Answers are kept for as long as by default: the console reads in them how they ended."""
    with running(["--demo"], tmp_path_factory.mktemp("demo"), {"MILLRACE_RETAIN_S": "60"}) as system:
        yield system


@pytest.fixture(scope="package")
def trained(chromium: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[System]:
    """The demo that answers, as `make serve` serves it, with at most two pictures in a conversation."""
    arguments = ["--model", str(CHECKPOINT), "--served-model-name", "demo", "--limit-mm-per-prompt", '{"image": 2}']
    arguments += ["--mm-processor-kwargs", json.dumps(PROCESSOR)]
    with running(arguments, tmp_path_factory.mktemp("trained"), {"MILLRACE_RETAIN_S": "60"}) as system:
        yield system


@pytest.fixture(scope="package")
def locked(demo: System, tmp_path_factory: pytest.TempPathFactory) -> Iterator[System]:
    """The same, behind a key."""
    arguments = ["--model", str(demo.directory / "demo"), "--api-key", API_KEY]
    with running(arguments, tmp_path_factory.mktemp("locked")) as system:
        yield system


@pytest.fixture
def screenshots(tmp_path: Path, request: pytest.FixtureRequest) -> Path:
    """Where pictures go: docs/images where --screenshots says so."""
    given = request.config.getoption("--screenshots", None)
    return Path(given) if given else tmp_path


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--screenshots", help="directory for the pictures of the documentation")


@pytest.fixture
def pages(chromium: Any) -> Iterator[Watched]:
    watched = Watched(chromium)
    yield watched
    watched.close()
    assert watched.complaints == []
