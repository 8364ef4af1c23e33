"""The API's reference in a browser: routes and fields are there, and the policy lets the page do all that it does."""

from typing import Any

import pytest
from browser_pages import API_KEY
from system import System

pytestmark = pytest.mark.system


def test_routes_and_fields_are_shown(chromium: Any, demo: System) -> None:
    page = chromium.new_page()
    said: list[str] = []
    page.on("console", lambda message: said.append(message.text))
    page.goto(f"{demo.base_url}/docs")
    page.get_by_role("heading", name="post /v1/chat/completions", exact=True).wait_for()
    fields = page.locator("#ChatRequest tbody tr")
    assert "messages" in fields.all_inner_texts()[0] + " ".join(fields.all_inner_texts())
    assert said == []
    page.close()


def test_a_server_with_keys_asks_for_one(chromium: Any, locked: System) -> None:
    page = chromium.new_page()
    page.goto(f"{locked.base_url}/docs")
    page.get_by_label("API key").fill(API_KEY)
    page.get_by_role("button", name="Show").click()
    page.get_by_role("heading", name="post /v1/chat/completions", exact=True).wait_for()
    page.close()
