"""Conversations on the console: how answers look, what is kept, branches, limits, and the end of a gateway."""

import json
import urllib.request
from typing import Any

from browser_pages import DROP, SHAPES, THOUGHT, Watched, answered, file, never_ending, photo, say, stream_of
from system import System

MARKDOWN = r"""
# Title

Some *words*, `code`, a [link](https://example.org/x), a [trap](javascript:alert(1)) and ![a picture](https://example.org/p.png).

| Name | $x^2$ |
|:-----|------:|
| a    |     1 |

```python
print("<b>")
```

Euler: \(e^{i\pi} + 1 = 0\), for $5.

$$\int_0^1 x\,dx = \frac{1}{2}$$
"""
# The newest answer as it is kept.
KEPT = """
() => new Promise((resolve) => {
  indexedDB.open("millrace").onsuccess = ({ target }) => {
    target.result.transaction("turns").objectStore("turns").getAll().onsuccess = ({ target: { result } }) =>
      resolve(result.filter((turn) => turn.role === "assistant").sort((a, b) => a.at - b.at).at(-1));
  };
})
"""


def whole(system: System, name: str) -> Any:
    """The answer as the server keeps it."""
    with urllib.request.urlopen(f"{system.base_url}/v1/chat/completions/{name}") as reply:
        assert reply.status == 200
        return json.load(reply)


def check_complete(page: Any, system: System, tokens: int) -> None:
    """Check that the page shows, and keeps, the very answer that the server has."""
    answer = answered(page)
    assert answer.locator(".failure").count() == 0
    assert f"{tokens} tokens" in answer.locator(".stats").inner_text()
    kept = page.evaluate(KEPT)
    message = whole(system, kept["asked"]["id"])["choices"][0]["message"]
    assert (kept["content"], kept["reasoning"]) == (message["content"] or "", message.get("reasoning_content") or "")


# ------------------------------------------------------------------------------------------------------------- looks


def test_markdown_code_tables_and_formulas_are_shown(pages: Watched, demo: System) -> None:
    page = pages.open(demo.base_url, permissions=["clipboard-read", "clipboard-write"])
    body = stream_of({"reasoning_content": "I *think*."}, {"content": MARKDOWN})
    page.route("**/v1/chat/completions", lambda route: route.fulfill(content_type="text/event-stream", body=body))
    say(page, "Show all")
    answer = answered(page).locator(".answer")
    assert answer.get_by_role("heading", name="Title").evaluate("(node) => node.tagName") == "H3"
    assert answer.locator("td").all_inner_texts() == ["a", "1"]
    assert answer.locator("a").evaluate_all("(all) => all.map((one) => [one.textContent, one.href, one.rel])") == [
        ["link", "https://example.org/x", "noopener noreferrer"],
        ["a picture", "https://example.org/p.png", "noopener noreferrer"],
    ]
    assert answer.locator("img").count() == 0
    answer.locator(".katex-display mfrac").wait_for(state="attached")
    assert answer.locator(".katex").count() == 3
    assert "for $5." in answer.inner_text()
    answer.get_by_role("button", name="Copy code, python").click()
    page.locator("#toast.shown").wait_for()
    assert page.evaluate("navigator.clipboard.readText()") == 'print("<b>")\n'
    reasoning = page.locator("li.assistant details.reasoning")
    assert reasoning.get_attribute("open") is None
    reasoning.locator("summary").click()
    reasoning.locator("em", has_text="think").wait_for()


# -------------------------------------------------------------------------------------------------------------- kept


def test_conversations_survive_the_tab(pages: Watched, demo: System) -> None:
    page = pages.open(demo.base_url)
    page.evaluate(DROP, file(photo(), "hills.png"))
    page.locator("#attachments img").wait_for()
    say(page, "What is this?")
    answered(page)
    page.reload()
    page.locator("li.turn").nth(1).wait_for()
    assert (
        page.locator("li.user .media img").evaluate("(image) => image.decode().then(() => image.naturalWidth)") == 320
    )
    other = pages.open_in(page.context, demo.base_url)
    page.close()
    other.locator("#welcome").wait_for()
    other.locator("#conversations").get_by_role("button", name="What is this?", exact=True).click()
    other.locator("li.turn").nth(1).wait_for()
    with other.expect_request("**/v1/chat/completions") as sent:
        say(other, "And then?")
    roles = [message["role"] for message in sent.value.post_data_json["messages"]]
    assert roles[0] == roles[-1] == "user"
    assert sent.value.post_data_json["messages"][0]["content"][0]["type"] == "image_url"
    answered(other)


def test_conversations_are_exported_deleted_and_imported(pages: Watched, demo: System) -> None:
    page = pages.open(demo.base_url)
    page.evaluate(DROP, file(photo(), "hills.png"))
    page.locator("#attachments img").wait_for()
    say(page, "One")
    answered(page)
    page.locator("#new-chat").click()
    page.locator("#welcome").wait_for()
    say(page, "Two")
    answered(page)
    other = pages.open_in(page.context, demo.base_url)
    with page.expect_download() as download:
        page.get_by_role("button", name="Export all").click()
    exported = download.value.path().read_bytes()
    page.get_by_role("button", name="Delete all").click()
    page.get_by_role("button", name="Cancel").click()
    assert page.locator("#conversations li").count() == 2
    page.get_by_role("button", name="Delete all").click()
    page.locator("#confirm-yes").click()
    for tab in (page, other):
        tab.wait_for_function("() => document.querySelectorAll('#conversations li').length === 0")
    page.locator("#welcome").wait_for()
    for name, content, said in (
        ("bad.json", b"{}", "bad.json was not imported: it is not an export of conversations."),
        ("good.json", exported, "2 conversations imported"),
        ("good.json", exported, "0 conversations imported, 2 here already"),
    ):
        upload = {"name": name, "mimeType": "application/json", "buffer": content}
        page.locator("#import-file").set_input_files(upload)
        page.get_by_text(said, exact=True).wait_for()
    assert page.locator("#conversations li > :first-child").all_inner_texts() == ["Two", "One"]
    page.locator("#conversations").get_by_role("button", name="One", exact=True).click()
    page.locator("li.user .media img").wait_for()
    page.locator("#conversations").get_by_role("button", name="Delete One").click()
    page.locator("#welcome").wait_for()
    assert page.locator("#conversations li").count() == 1


# ---------------------------------------------------------------------------------------------------------- branches


def test_a_message_is_edited_into_a_branch_of_its_own(pages: Watched, demo: System) -> None:
    page = pages.open(demo.base_url)
    say(page, "One")
    answered(page)
    page.locator("li.user").get_by_role("button", name="Edit").click()
    page.get_by_label("Edited message").fill("Two")
    with page.expect_request("**/v1/chat/completions") as sent:
        page.keyboard.press("Enter")
    assert sent.value.post_data_json["messages"] == [{"role": "user", "content": "Two"}]
    answered(page)
    assert page.locator("li.user .text").text_content() == "Two"
    assert page.locator("li.user .branches").text_content() == "‹2/2›"
    page.get_by_role("button", name="Version before").click()
    page.locator("li.user .text", has_text="One").wait_for()
    assert page.evaluate("document.activeElement.textContent") == "›"
    page.reload()
    page.locator("li.user .text", has_text="One").wait_for()
    with page.expect_request("**/v1/chat/completions"):
        page.locator("li.assistant").get_by_role("button", name="Again").click()
    assert answered(page).locator(".branches").text_content() == "‹2/2›"
    assert page.locator("li.turn").count() == 2
    page.locator("li.user").get_by_role("button", name="Version after").click()
    page.locator("li.user .text", has_text="Two").wait_for()
    assert page.locator("li.assistant .branches").count() == 0


def test_a_stopped_answer_is_continued(pages: Watched, demo: System) -> None:
    page = pages.open(demo.base_url)
    never_ending(page)
    say(page, "Go on for long", max_tokens=8000)
    page.locator("li.assistant .reasoning .text", has_text="e").wait_for()
    page.locator("#stop").click()
    assert "stopped" in answered(page).locator(".stats").inner_text()
    before = page.evaluate(KEPT)
    with page.expect_request("**/v1/chat/completions") as sent:
        page.get_by_role("button", name="Continue").click()
    body = sent.value.post_data_json
    assert body["continue_final_message"] is True
    last = body["messages"][-1]
    assert (last["role"], last["content"]) == ("assistant", before["content"])
    assert last.get("reasoning_content", "") == before["reasoning"]
    length = len(before["content"] + before["reasoning"])
    shown = "document.querySelector('li.assistant').textContent.length"
    page.wait_for_function(f"() => {shown} > {length + 20}")
    page.keyboard.press("Escape")
    after = page.evaluate(KEPT)
    assert answered(page).locator(".failure").count() == 0
    assert (after["reasoning"] + after["content"]).startswith(before["reasoning"] + before["content"])


def test_an_answer_that_was_cut_off_is_finished(pages: Watched, trained: System) -> None:
    page = pages.open(trained.base_url)
    page.evaluate(DROP, file(SHAPES.read_bytes(), "shapes.png"))
    page.locator("#attachments li").wait_for()
    say(page, "Where is the green square?", max_tokens=45)
    answer = answered(page)
    assert "ended by length" in answer.locator(".stats").inner_text()
    page.get_by_label("Max tokens").fill("100")
    page.get_by_role("button", name="Continue").click()
    page.locator("li.assistant.live").wait_for(state="detached")
    assert answer.locator(".reasoning .text").text_content() == THOUGHT
    assert answer.locator(".answer").text_content() == "The green square is in the middle."
    assert page.locator("li.turn").count() == 2


# ----------------------------------------------------------------------------------------------------------- limits


def add_picture(page: Any, name: str) -> None:
    page.evaluate(DROP, file(SHAPES.read_bytes(), name))
    page.get_by_role("button", name=f"Remove {name}").wait_for()


def test_the_limit_of_pictures_is_told_before_anything_is_sent(pages: Watched, trained: System) -> None:
    page = pages.open(trained.base_url)
    page.locator('#health[data-state="ready"]').wait_for()
    page.wait_for_function("() => document.getElementById('model').textContent")
    for name in ("one.png", "two.png"):
        add_picture(page, name)
        say(page, "Where is the green square?", max_tokens=100)
        answered(page)
    add_picture(page, "three.png")
    page.locator("#limits", has_text="at most 2 pictures in one conversation").wait_for()
    say(page, "Where is the green square?", max_tokens=100)
    assert page.locator("li.turn").count() == 4, "nothing is sent"
    page.get_by_role("button", name="Leave out the oldest one").click()
    assert page.locator("#limits").is_hidden()
    with page.expect_request("**/v1/chat/completions") as sent:
        page.keyboard.press("Enter")
    contents = [message["content"] for message in sent.value.post_data_json["messages"] if message["role"] == "user"]
    assert [part[0]["type"] for part in contents] == ["text", "image_url", "image_url"]
    assert contents[0][0]["text"] == "[picture left out]"
    assert answered(page).locator(".failure").count() == 0
    for name in ("four.png", "five.png", "six.png"):
        add_picture(page, name)
    page.locator("#limits", has_text="Remove 1 picture from this message").wait_for()
    assert page.locator("#limits-leave").is_hidden()


def test_a_limit_that_only_the_server_knows_is_mended_from_its_error(pages: Watched, trained: System) -> None:
    page = pages.open(trained.base_url)
    page.route("**/console/limits", lambda route: route.fulfill(status=404, json={}))
    page.reload()
    for name in ("one.png", "two.png", "three.png"):
        add_picture(page, name)
        say(page, "Where is the green square?", max_tokens=100)
        answered(page)
    failure = page.locator("li.assistant").last.locator(".failure")
    assert "limit is 2 (the setting limit_mm_per_prompt" in failure.inner_text()
    assert failure.evaluate("(box) => box.getBoundingClientRect().bottom <= innerHeight"), "it is in sight"
    failure.get_by_role("button", name="Leave older pictures out and send again").click()
    page.locator("li.assistant").last.locator(".branches").wait_for()
    assert answered(page).locator(".failure").count() == 0
    assert answered(page).locator(".branches").text_content() == "‹2/2›"


# ---------------------------------------------------------------------------------------------------------- survival


def test_an_answer_survives_the_gateway(pages: Watched, demo: System) -> None:
    page = pages.open(demo.base_url)
    never_ending(page)
    say(page, "Go on for long", max_tokens=200)
    page.locator("li.assistant .reasoning .text", has_text="e").wait_for()
    demo.kill_child("services.gateway")
    page.locator("li.assistant .waiting", has_text="goes on as soon as").wait_for()
    check_complete(page, demo, 200)
    assert page.locator("li.assistant .waiting").is_hidden()
    demo.wait_until_ready()


def test_an_answer_survives_a_reload_and_goes_on_behind_another_conversation(pages: Watched, demo: System) -> None:
    page = pages.open(demo.base_url)
    never_ending(page)
    say(page, "Go on for long", max_tokens=200)
    page.locator("li.assistant .reasoning .text", has_text="e").wait_for()
    page.reload()
    page.locator("li.assistant.live").wait_for()
    page.locator("#new-chat").click()
    page.locator("#welcome").wait_for()
    assert page.locator("#send").is_visible(), "another question can be asked meanwhile"
    page.locator("#conversations button").first.click()
    check_complete(page, demo, 200)


def test_a_request_that_did_not_arrive_is_sent_again(pages: Watched, demo: System) -> None:
    page = pages.open(demo.base_url)
    tries: list[Any] = []

    def lose(route: Any) -> None:
        tries.append(route.request.headers["idempotency-key"])
        if len(tries) == 1:
            route.abort("connectionreset")
        else:
            route.continue_()

    page.route("**/v1/chat/completions", lose)
    say(page, "Hello")
    assert answered(page).locator(".failure").count() == 0
    assert len(tries) == 2
    assert tries[0] == tries[1]


def test_a_server_that_is_gone_is_said_in_words(pages: Watched, demo: System) -> None:
    page = pages.open(demo.base_url)
    page.clock.install()
    page.route("**/v1/**", lambda route: route.abort("connectionrefused"))
    say(page, "Hello")
    page.locator(".waiting", has_text="does not answer").wait_for()
    page.clock.run_for(60_000)
    assert answered(page).locator(".failure").inner_text() == "The server cannot be reached."
