"""What axe-core finds on the console, which is nothing, in each of its states; and what an operator searches for."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import redis
from browser_pages import DROP, PHONE, Watched, answered, chat, file, photo, say, stream_of
from system import System

from shared.bus.keys import GENERATE, Keys

MARKDOWN = "# One\n\n### Three\n\n| a | |\n|---|---|\n| b | c |\n\n```python\nx = 1\n```\n\n$$x^2$$\n\n> [a](https://example.org)"
DARK: dict[str, Any] = {"color_scheme": "dark", "reduced_motion": "reduce"}
SCREENS = [pytest.param(DARK, id="dark"), pytest.param({**PHONE, "reduced_motion": "reduce"}, id="phone")]


def check(page: Any, state: str) -> None:
    """Check that axe-core has no finding, of any weight, on the page as it is."""
    axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason="needs the extra browser-test")
    found = axe.Axe().run(page).response["violations"]
    findings = [(each["id"], node["target"], node["failureSummary"]) for each in found for node in each["nodes"]]
    assert findings == [], state


def answer_with(page: Any, **reply: Any) -> None:
    page.unroute("**/v1/chat/completions")
    page.route("**/v1/chat/completions", lambda route: route.fulfill(**reply))


@contextmanager
def quarantined(system: System, request_id: str, reason: str) -> Iterator[str]:
    """An entry in the quarantine, and its name."""
    client = redis.Redis.from_url(system.redis_url)
    key = Keys("millrace").quarantine(GENERATE)
    entry: Any = client.xadd(key, {"reason": reason, "attempts": 4, "v": "1", "m": b"\xc1", "r": request_id})
    yield f"{GENERATE}/{entry.decode()}"
    client.xdel(key, entry)
    client.close()


@pytest.mark.parametrize("screen", SCREENS)
def test_nothing_is_found_on_the_chat_page(pages: Watched, demo: System, screen: dict[str, Any]) -> None:
    page = pages.open(demo.base_url, **screen)
    page.locator('#health[data-state="ready"]').wait_for()
    check(page, "empty")
    answer_with(
        page, content_type="text/event-stream", body=stream_of({"reasoning_content": "Hm"}, {"content": MARKDOWN})
    )
    page.evaluate(DROP, file(photo(), "hills.png"))
    page.locator("#attachments img").wait_for()
    check(page, "a file is attached")
    say(page, "Hello")
    answered(page).locator(".katex").wait_for()
    page.locator(".reasoning summary").click()
    check(page, "an answer")
    page.get_by_role("button", name="Again").click()
    page.locator(".branches").wait_for()
    page.get_by_role("button", name="Edit").click()
    check(page, "a message is edited")
    page.keyboard.press("Escape")
    answer_with(page, status=429, json={"error": {"message": "Too many.", "code": "rate_limit_exceeded"}})
    page.get_by_role("button", name="Again").click()
    page.locator(".failure", has_text="The server is busy.").wait_for()
    check(page, "a failure")
    answer_with(page, status=503, json={"error": {"message": "Later."}})
    page.get_by_role("button", name="Again").click()
    page.locator(".waiting", has_text="does not answer").wait_for()
    check(page, "the server is away")
    page.locator("#stop").click()
    call = {"index": 0, "id": "c", "function": {"name": "get_weather", "arguments": '{"city": "Paris"}'}}
    answer_with(page, content_type="text/event-stream", body=stream_of({"tool_calls": [call]}))
    page.get_by_role("button", name="Again").click()
    page.get_by_label("Result of get_weather").wait_for()
    check(page, "a tool is called")


@pytest.mark.parametrize("screen", SCREENS)
def test_nothing_is_found_on_drawers_dialogs_and_notices(pages: Watched, demo: System, screen: dict[str, Any]) -> None:
    page = pages.open(demo.base_url, **screen)
    limits = {"limit_mm_per_prompt": {"image": 0, "video": 0}, "max_body_bytes": 1 << 30, "max_media_bytes": 1 << 30}
    page.route("**/console/limits", lambda route: route.fulfill(json=limits))
    page.reload()
    page.locator('#health[data-state="ready"]').wait_for()
    page.evaluate(DROP, file(photo(), "hills.png"))
    page.locator("#limits", has_text="This server takes no pictures").wait_for()
    check(page, "a limit is reached")
    page.get_by_role("button", name="Remove hills.png").click()
    say(page, "Hello", max_tokens=2)
    answered(page)
    for name in ("history", "settings"):
        if page.locator(f"#{name}-button").is_visible():
            page.locator(f"#{name}-button").click()
            page.locator(f"#{name} .close").wait_for()
        for more in page.locator(f"#{name} summary").all():
            more.click()
        check(page, name)
        page.keyboard.press("Escape")
    for opened in ("confirm-dialog", "copy-dialog", "key-dialog"):
        page.evaluate("(id) => document.getElementById(id).showModal()", opened)
        page.evaluate("document.getElementById('confirm-text').textContent = 'Delete?'")
        page.evaluate("document.getElementById('confirm-yes').textContent = 'Delete'")
        check(page, opened)
        page.keyboard.press("Escape")


@pytest.mark.parametrize("screen", SCREENS)
def test_a_request_is_searched_and_the_quarantine_is_shown(
    pages: Watched, demo: System, screen: dict[str, Any]
) -> None:
    page = pages.open(f"{demo.base_url}/#pipeline", **screen)
    page.locator(".stage .count", has_text="1 ready").nth(3).wait_for()
    assert page.locator("#quarantine").is_hidden()
    check(page, "the pipeline")
    name = chat(demo, max_tokens=60)
    page.get_by_label("Request id").fill(name)
    page.keyboard.press("Enter")
    page.locator("#timeline .events", has_text="Finished (length)").wait_for()
    assert "queue time" in page.locator("#timeline .facts").inner_text()
    page.locator('.pipe[data-pipe="tokens"]', has_text="hop").wait_for()
    page.locator("#tiles", has_text="Queue time").wait_for()
    lost = "0123456789abcdef"
    with quarantined(demo, lost, "it ended three engines") as entry:
        shown = page.locator("#quarantined li")
        shown.get_by_text("it ended three engines").wait_for()
        assert entry in shown.inner_text()
        page.get_by_label("Request id").fill(f"chatcmpl-{lost}")
        page.get_by_role("button", name="Find").click()
        page.locator("#found", has_text="in quarantine:generate after 4 deliveries: it ended three engines").wait_for()
        check(page, "a timeline and the quarantine")
    for given, said in (("fedcba9876543210", "Redis has nothing of"), ("*", "An id has 16 digits")):
        page.get_by_label("Request id").fill(given)
        page.keyboard.press("Enter")
        page.locator("#found", has_text=said).wait_for()
