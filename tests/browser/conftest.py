"""A headless Chromium, and the product it looks at. Both are skipped where there is none: see docs/console.md."""

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from system import System, running

API_KEY = "a-secret"
# What the browser says of an answer that is an error, which tests provoke.
EXPECTED = "Failed to load resource"


@pytest.fixture(scope="package")
def chromium() -> Iterator[Any]:
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
    """`millrace serve --demo`."""
    with running(["--demo"], tmp_path_factory.mktemp("demo")) as system:
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
    given = request.config.getoption("--screenshots")
    return Path(given) if given else tmp_path


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--screenshots", help="directory for the pictures of the documentation")


class Watched:
    """Pages whose complaints fail the test: errors of the script, and what the policy blocked."""

    def __init__(self, browser: Any) -> None:
        self._browser = browser
        self._contexts: list[Any] = []
        self.complaints: list[str] = []

    def open(self, url: str, **options: Any) -> Any:
        """A page in a session of its own."""
        context = self._browser.new_context(**{"viewport": {"width": 1440, "height": 900}, **options})
        self._contexts.append(context)
        page = context.new_page()
        page.on("pageerror", lambda error: self.complaints.append(str(error)))
        page.on("console", self._hear)
        page.goto(url)
        return page

    def close(self) -> None:
        for context in self._contexts:
            context.close()

    def _hear(self, message: Any) -> None:
        if message.type == "error" and EXPECTED not in message.text:
            self.complaints.append(message.text)


@pytest.fixture
def pages(chromium: Any) -> Iterator[Watched]:
    watched = Watched(chromium)
    yield watched
    watched.close()
    assert watched.complaints == []
