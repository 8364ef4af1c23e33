"""Pages of a browser that note what it complains of."""

from typing import Any
from urllib.parse import urlsplit

API_KEY = "a-secret"
# What the browser says of an answer that is an error, which tests provoke.
EXPECTED = "Failed to load resource"


class Watched:
    """Pages whose complaints fail the test: errors of the script, what the policy blocked, and whatever they ask of
    another host than their own."""

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
        page.on("request", lambda request: self._watch(url, request.url))
        page.goto(url)
        return page

    def close(self) -> None:
        for context in self._contexts:
            context.close()

    def _watch(self, page: str, asked: str) -> None:
        if urlsplit(asked).scheme not in ("blob", "data") and urlsplit(asked).netloc != urlsplit(page).netloc:
            self.complaints.append(f"{page} asks for {asked}")

    def _hear(self, message: Any) -> None:
        if message.type == "error" and EXPECTED not in message.text:
            self.complaints.append(message.text)
