"""Pages of a browser that note what it complains of, and what tests do with them."""

import base64
import json
import threading
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from machine import PATIENCE_MS, PATIENCE_S
from system import System, encoded, picture

API_KEY = "a-secret"
# What the browser says of an answer that is an error, which tests provoke.
EXPECTED = "Failed to load resource"

PHONE: dict[str, Any] = {"viewport": {"width": 390, "height": 844}, "device_scale_factor": 2, "has_touch": True}
SHAPES = Path(__file__).parents[2] / "docs" / "images" / "demo-shapes.png"
# What the trained demo thinks when it is asked where the green square is.
THOUGHT = (
    "I see a red circle at the top left: no, a blue star at the top right: no, a green square in the middle: yes, "
    "a red triangle at the bottom right: no."
)
# Drops a file where a person would, or anywhere else.
DROP = """
([bytes, name, type, where]) => {
  const transfer = new DataTransfer();
  transfer.items.add(new File([Uint8Array.from(atob(bytes), (c) => c.charCodeAt(0))], name, {type}));
  for (const kind of ["dragenter", "dragover", "drop"]) {
    document.getElementById(where ?? "talk").dispatchEvent(
      new DragEvent(kind, {dataTransfer: transfer, bubbles: true, cancelable: true}));
  }
}
"""
PASTE = """
([bytes, name, type]) => {
  const transfer = new DataTransfer();
  transfer.items.add(new File([Uint8Array.from(atob(bytes), (c) => c.charCodeAt(0))], name, {type}));
  document.body.dispatchEvent(
    new ClipboardEvent("paste", {clipboardData: transfer, bubbles: true, cancelable: true}));
}
"""
WIDER = "() => document.documentElement.scrollWidth - document.documentElement.clientWidth"


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
        context.set_default_timeout(PATIENCE_MS)
        self._contexts.append(context)
        return self.open_in(context, url)

    def open_in(self, context: Any, url: str) -> Any:
        """A page in the session of another one: a tab beside it."""
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


def file(data: bytes, name: str, kind: str = "image/png") -> list[str]:
    return [base64.b64encode(data).decode(), name, kind]


def photo() -> bytes:
    """A picture that looks like one: a sky, a sun, hills."""
    image = picture(8, 6, seed=3).resize((320, 240))
    for y in range(240):
        for x in range(320):
            hill = 150 + 30 * abs(((x / 80) % 2) - 1)
            sun = (x - 230) ** 2 + (y - 70) ** 2 < 900
            image.putpixel(
                (x, y), (250, 205, 90) if sun else (60, 120 + y // 4, 90) if y > hill else (120, 170 + y // 4, 225)
            )
    return encoded(image, "PNG")


def say(page: Any, text: str, max_tokens: int = 24) -> None:
    page.locator('input[name="max_tokens"]').evaluate(
        "(input, value) => { input.value = value; input.dispatchEvent(new Event('input', {bubbles: true})); }",
        str(max_tokens),
    )
    page.locator("#prompt").fill(text)
    page.keyboard.press("Enter")


def never_ending(page: Any) -> None:
    """The model's own end of an answer does not count from here on."""
    page.route(
        "**/v1/chat/completions",
        lambda route: route.continue_(post_data=json.dumps({**route.request.post_data_json, "ignore_eos": True})),
    )


def answered(page: Any) -> Any:
    """The newest answer, once it has ended."""
    answer = page.locator("li.assistant").last
    answer.and_(page.locator('[aria-busy="false"]')).wait_for()
    return answer


def chat(system: System, max_tokens: int, text: str = "Hello") -> str:
    """Have a question answered, and return the answer's name."""
    body = {"model": "demo", "max_tokens": max_tokens, "ignore_eos": True}
    request = urllib.request.Request(
        f"{system.base_url}/v1/chat/completions",
        json.dumps({**body, "messages": [{"role": "user", "content": text}]}).encode(),
        {"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=PATIENCE_S) as reply:
        return str(json.load(reply)["id"])


@contextmanager
def load(system: System, requests: int, max_tokens: int) -> Iterator[None]:
    """That many requests under way."""
    threads = [threading.Thread(target=chat, args=(system, max_tokens, f"Question {i}")) for i in range(requests)]
    for thread in threads:
        thread.start()
    yield
    for thread in threads:
        thread.join()


def stream_of(*deltas: dict[str, Any]) -> str:
    """A stream of events with these deltas, as the server writes one."""
    name = "chatcmpl-0123456789abcdef"
    choices: list[dict[str, Any]] = [{"index": 0, "delta": delta, "finish_reason": None} for delta in deltas]
    choices.append({"index": 0, "delta": {}, "finish_reason": "stop"})
    events = [f"id: {i}\ndata: {json.dumps({'id': name, 'choices': [one]})}\n\n" for i, one in enumerate(choices)]
    return "".join(events) + "data: [DONE]\n\n"
