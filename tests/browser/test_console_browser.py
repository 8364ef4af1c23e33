"""The console as a person uses it: Chromium against a running `millrace serve --demo`."""

import base64
import json
import os
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
from browser_pages import (
    API_KEY,
    DROP,
    PASTE,
    PHONE,
    SHAPES,
    THOUGHT,
    WIDER,
    Watched,
    answered,
    chat,
    file,
    load,
    never_ending,
    photo,
    say,
)
from system import System, encoded, mp4, picture

EVIL = '<img src=x onerror="window.hurt=1"><script>window.hurt=1</script>'
TOOL_CALL = {"index": 0, "id": "call_1", "type": "function", "function": {"name": EVIL, "arguments": '{"a": 1}'}}
NAMELESS = """
() => [...document.querySelectorAll("button, input, select, textarea, a, summary")]
  .filter((one) => one.checkVisibility())
  .filter((one) => !one.getAttribute("aria-label") && !one.textContent.trim() && !one.labels?.length)
  .filter((one) => !document.getElementById(one.getAttribute("aria-labelledby")))
  .map((one) => one.outerHTML)
"""
IN_SIGHT = "() => document.getElementById('timeline-title').getBoundingClientRect().top < innerHeight"


# ------------------------------------------------------------------------------------------------------------- chat


def test_a_question_is_answered_with_counts_and_timings(pages: Watched, demo: System) -> None:
    page = pages.open(demo.base_url)
    page.locator('#health[data-state="ready"]').wait_for()
    assert page.locator("#model").inner_text() == "demo"
    never_ending(page)
    say(page, "What is a mill race?")
    answer = answered(page)
    assert answer.locator(".failure").count() == 0
    assert answer.locator(".reasoning .text").text_content() + answer.locator(".answer").text_content()
    stats = answer.locator(".stats").inner_text()
    assert "24 tokens" in stats
    assert "first token" in stats
    assert "tokens/s" in stats
    assert "ended by length" in stats
    say(page, "And a second question?")
    assert answered(page).locator(".failure").count() == 0
    assert page.locator("li.turn").count() == 4


def test_a_dropped_and_a_pasted_image_are_sent(pages: Watched, demo: System) -> None:
    page = pages.open(demo.base_url)
    page.evaluate(DROP, file(photo(), "hills.png"))
    page.evaluate(PASTE, file(encoded(picture(56, 56), "PNG"), "noise.png"))
    page.locator("#attachments li").nth(1).wait_for()
    page.get_by_role("button", name="Remove noise.png").click()
    assert page.locator("#attachments img").count() == 1
    with page.expect_request("**/v1/chat/completions") as sent:
        say(page, "What is in this picture?")
    [message] = sent.value.post_data_json["messages"]
    assert [part["type"] for part in message["content"]] == ["image_url", "text"]
    assert base64.b64decode(message["content"][0]["image_url"]["url"].partition(",")[2]) == photo()
    answer = answered(page)
    assert answer.locator(".failure").count() == 0
    assert page.locator("li.user .media img").evaluate("(image) => image.naturalWidth") == 320
    assert page.locator("#attachments li").count() == 0
    answer.get_by_role("button", name="Timeline").click()
    events = page.locator("#timeline .events")
    events.get_by_text(re.compile(r"Finished \((length|stop)\)")).wait_for()
    assert "not seen" not in events.locator("li", has_text="First token").inner_text()


def test_a_video_is_sent(pages: Watched, demo: System) -> None:
    page = pages.open(demo.base_url)
    film = mp4(8)
    page.evaluate(DROP, [*file(film, "waves.mp4", "video/mp4"), "settings"])  # beside the conversation
    page.locator("#attachments video").wait_for()
    with page.expect_request("**/v1/chat/completions") as sent:
        say(page, "What happens here?")
    [message] = sent.value.post_data_json["messages"]
    assert [part["type"] for part in message["content"]] == ["video_url", "text"]
    assert message["content"][0]["video_url"]["url"].startswith("data:video/mp4;base64,")
    answer = answered(page)
    assert answer.locator(".failure").count() == 0
    assert "prompt tokens" in answer.locator(".stats").inner_text()
    assert page.locator("li.user .media video").count() == 1


def test_a_file_dropped_on_the_other_page_does_not_replace_it(pages: Watched, demo: System) -> None:
    page = pages.open(f"{demo.base_url}/#pipeline")
    page.evaluate(DROP, [*file(photo(), "hills.png"), "flow"])
    page.locator("#to-chat").click()
    page.evaluate(PASTE, file(photo(), "hills.png"))
    page.locator("#attachments img").wait_for()
    assert page.locator("#attachments li").count() == 1


def test_a_file_picked_that_is_no_medium_is_refused_at_once(pages: Watched, demo: System) -> None:
    page = pages.open(demo.base_url)
    page.locator("#picker").set_input_files({"name": "a.txt", "mimeType": "text/plain", "buffer": b"text"})
    page.get_by_text("a.txt is neither an image nor a video").wait_for()
    page.locator("#picker").set_input_files({"name": "a.png", "mimeType": "image/png", "buffer": photo()})
    page.locator("#attachments img").wait_for()


def test_an_error_is_shown_with_what_it_names(pages: Watched, demo: System) -> None:
    page = pages.open(demo.base_url)
    page.evaluate(DROP, file(photo()[:200], "torn.png"))
    page.locator("#attachments li").wait_for()
    say(page, "What is this?")
    failure = answered(page).locator(".failure").inner_text()
    assert "400" in failure
    assert "messages[0].content[0]" in failure
    page.locator("#settings details", has_text="Tools").locator("summary").click()
    page.locator("#tools").fill("{")
    assert "not JSON" in page.locator("#tools-problem").inner_text()
    turns = page.locator("li.turn").count()
    say(page, "With broken tools")
    assert page.locator("li.turn").count() == turns, "nothing is sent"


def test_stop_ends_the_answer_here_and_in_the_engine(pages: Watched, demo: System) -> None:
    page = pages.open(demo.base_url)
    never_ending(page)
    say(page, "Go on for long", max_tokens=8000)
    page.locator("li.assistant .reasoning .text", has_text="e").wait_for()
    page.locator("#stop").click()
    assert "stopped" in answered(page).locator(".stats").inner_text()
    assert page.locator("#send").is_visible()
    page.get_by_role("button", name="Timeline").click()
    page.locator("#timeline .events", has_text="cancelled").wait_for()


def test_escape_stops_too(pages: Watched, demo: System) -> None:
    page = pages.open(demo.base_url)
    never_ending(page)
    say(page, "Go on for long", max_tokens=8000)
    page.locator("#stop").wait_for()
    page.keyboard.press("Escape")
    assert "stopped" in answered(page).locator(".stats").inner_text()


def test_markup_from_people_and_models_is_text(pages: Watched, demo: System) -> None:
    page = pages.open(demo.base_url)
    pieces: list[dict[str, Any]] = [{"reasoning_content": EVIL}, {"content": EVIL}, {"tool_calls": [TOOL_CALL]}]
    chunks = [
        {"id": "chatcmpl-1", "choices": [{"index": 0, "delta": piece, "finish_reason": None}]} for piece in pieces
    ]
    chunks.append({"error": {"message": EVIL, "type": EVIL, "param": EVIL, "code": 500}})  # type: ignore[dict-item]
    stream = "".join(f"data: {json.dumps(chunk)}\n\n" for chunk in chunks) + "data: [DONE]\n\n"
    page.route("**/v1/chat/completions", lambda route: route.fulfill(content_type="text/event-stream", body=stream))
    page.evaluate(DROP, file(photo(), f"{EVIL}.png"))
    page.locator("#attachments li").wait_for()
    say(page, EVIL)
    answer = answered(page)
    assert page.locator("li.user .text").text_content() == EVIL
    assert answer.locator(".reasoning .text").text_content() == EVIL
    assert answer.locator(".answer").text_content() == EVIL
    assert answer.locator(".call h3").text_content() == EVIL
    assert answer.locator(".failure strong").text_content() == "The server failed to answer."
    assert answer.locator(".failure p").text_content() == EVIL
    assert page.locator("#conversations button").first.text_content() == EVIL[:60]
    page.reload()
    assert page.locator("li.user .text").text_content() == EVIL
    assert page.evaluate("window.hurt") is None
    assert page.locator("main script, main img[src=x]").count() == 0


def test_a_tool_call_can_be_given_its_result(pages: Watched, demo: System) -> None:
    page = pages.open(demo.base_url)
    call = {**TOOL_CALL, "function": {"name": "get_weather", "arguments": '{"city": "Paris"}'}}
    chunk = {
        "id": "chatcmpl-1",
        "choices": [{"index": 0, "delta": {"tool_calls": [call]}, "finish_reason": "tool_calls"}],
    }
    body = f"data: {json.dumps(chunk)}\n\ndata: [DONE]\n\n"
    page.route(
        "**/v1/chat/completions", lambda route: route.fulfill(content_type="text/event-stream", body=body), times=1
    )
    page.locator("#settings details", has_text="Tools").locator("summary").click()
    page.locator("#tools-example").click()
    with page.expect_request("**/v1/chat/completions") as first:
        say(page, "What is the weather in Paris?")
    assert first.value.post_data_json["tools"][0]["function"]["name"] == "get_weather"
    page.get_by_label("Result of get_weather").fill("sunny")
    with page.expect_request("**/v1/chat/completions") as second:
        page.get_by_role("button", name="Give this result").click()
    messages = second.value.post_data_json["messages"]
    assert [message["role"] for message in messages] == ["user", "assistant", "tool"]
    assert (messages[2]["tool_call_id"], messages[2]["content"]) == ("call_1", "sunny")
    assert answered(page).locator(".failure").count() == 0, "the server takes the conversation"


def test_the_curl_command_does_what_the_page_did(pages: Watched, demo: System) -> None:
    page = pages.open(demo.base_url, permissions=["clipboard-read", "clipboard-write"])
    page.locator("#system").fill("It's a 'quoted' prompt\nof two lines")
    say(page, "Hello 'you'", max_tokens=2)
    answered(page).get_by_role("button", name="Copy as curl").click()
    page.locator("#toast.shown").wait_for()
    command = page.evaluate("navigator.clipboard.readText()")
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=60)
    assert "data: [DONE]" in done.stdout, done.stderr


def test_the_curl_command_takes_the_key_from_the_environment(pages: Watched, locked: System) -> None:
    page = pages.open(locked.base_url, permissions=["clipboard-read", "clipboard-write"])
    page.locator("#key").fill(API_KEY)
    page.get_by_role("button", name="Use it").click()
    page.evaluate(DROP, file(photo(), "hills.png"))
    page.locator("#attachments img").wait_for()
    say(page, "Hello", max_tokens=2)
    answered(page)
    page.reload()  # the server has refused nothing since
    answered(page).get_by_role("button", name="Copy as curl").click()
    page.locator("#toast.shown", has_text="$MILLRACE_API_KEY").wait_for()
    command = page.evaluate("navigator.clipboard.readText()")
    assert API_KEY not in command
    environ = {**os.environ, "MILLRACE_API_KEY": API_KEY}
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=60, env=environ)
    assert "data: [DONE]" in done.stdout, done.stdout + done.stderr
    page.get_by_role("button", name="API key").click()
    page.locator("#key-dialog[open]").wait_for()


def test_who_gives_no_key_is_asked_again_only_when_sending(pages: Watched, locked: System) -> None:
    page = pages.open(f"{locked.base_url}/#pipeline")
    page.locator("#key-dialog[open]").wait_for()
    page.keyboard.press("Escape")
    page.locator("#trouble", has_text="A valid API key is needed").wait_for()
    with page.expect_response("**/console/state") as refused:
        pass
    assert refused.value.status == 401
    assert page.locator("#key-dialog[open]").count() == 0
    page.locator("#to-chat").click()
    say(page, "Hello")
    page.locator("#key-dialog[open]").wait_for()
    page.get_by_role("button", name="Cancel").click()
    assert "401" in answered(page).locator(".failure").inner_text()


def test_parameters_are_sent_as_set(pages: Watched, demo: System) -> None:
    page = pages.open(demo.base_url)
    page.locator("#thinking").select_option("off")
    page.get_by_label("Temperature").fill("0.3")
    page.get_by_label("Seed").fill("7")
    with page.expect_request("**/v1/chat/completions") as sent:
        say(page, "Hello", max_tokens=5)
    body = sent.value.post_data_json
    assert {name: body[name] for name in ("enable_thinking", "temperature", "seed", "max_tokens")} == {
        "enable_thinking": False,
        "temperature": 0.3,
        "seed": 7,
        "max_tokens": 5,
    }
    assert answered(page).locator(".failure").count() == 0


def test_a_key_is_asked_for_and_kept_in_the_tab(pages: Watched, locked: System) -> None:
    assert locked.get("/console/state")[0] == 401
    page = pages.open(locked.base_url)
    for key in ("wrong", API_KEY):
        page.locator("#key-dialog[open]").wait_for()
        page.locator("#key").fill(key)
        page.get_by_role("button", name="Use it").click()
    page.locator("#model", has_text="demo").wait_for()
    say(page, "Hello")
    assert answered(page).locator(".failure").count() == 0
    page.goto(f"{locked.base_url}/#pipeline")
    page.locator(".stage .count", has_text="1 ready").nth(3).wait_for()
    assert page.evaluate("[sessionStorage.getItem('millrace.key'), localStorage.length]") == [API_KEY, 0]


# --------------------------------------------------------------------------------------------------------- pipeline


def test_the_pipeline_shows_four_stages_and_their_requests(pages: Watched, demo: System) -> None:
    page = pages.open(f"{demo.base_url}/#pipeline")
    page.locator(".stage .count", has_text="1 ready").nth(3).wait_for()
    assert page.locator(".stage h2").all_inner_texts() == ["Gateway", "Encoder", "Engine", "Post-processing"]
    with load(demo, requests=6, max_tokens=150):
        page.locator(".stage[data-stage=engine] .dot").first.wait_for()
        page.locator("#requests tbody tr", has_text="writing").first.wait_for()
        page.locator("#requests tbody button").first.focus()
        page.keyboard.press("Enter")
        page.locator("#timeline .events", has_text="Taken up by an engine").wait_for()
    page.locator("#timeline .events", has_text="Finished (length)").wait_for()
    strip, parts = page.locator("#timeline .strip"), page.locator("#timeline .seg")
    filled = sum(part.bounding_box()["width"] for part in parts.all())
    assert filled == pytest.approx(strip.bounding_box()["width"], abs=2)
    facts = page.locator("#timeline .facts").inner_text()
    assert "tokens 150" in facts


def test_a_pipeline_that_cannot_be_seen_says_so(pages: Watched, demo: System) -> None:
    page = pages.open(demo.base_url)
    page.route("**/console/state", lambda route: route.fulfill(status=503, json={"error": {"message": "No queue."}}))
    page.locator("#to-pipeline").click()
    page.locator("#trouble", has_text="The pipeline cannot be seen now").get_by_text("No queue.").wait_for()


# ------------------------------------------------------------------------------------------------- for everybody


def test_all_can_be_reached_and_told_by_name(pages: Watched, demo: System) -> None:
    page = pages.open(demo.base_url)
    say(page, "Hello")
    answered(page)
    assert page.evaluate(NAMELESS) == []
    page.locator(".skip").focus()
    reached = []
    for _ in range(60):
        reached.append(page.evaluate("document.activeElement.id || document.activeElement.name || ''"))
        page.keyboard.press("Tab")
    order = [
        name
        for name in reached
        if name in ("to-chat", "to-pipeline", "new-chat", "scroll", "prompt", "send", "system", "temperature")
    ]
    assert order[:8] == ["to-chat", "to-pipeline", "new-chat", "scroll", "prompt", "send", "system", "temperature"]
    page.locator("#to-pipeline").click()
    page.locator(".replica").nth(3).wait_for()
    assert page.evaluate(NAMELESS) == []


def test_a_conversation_with_the_keyboard_alone(pages: Watched, demo: System) -> None:
    page = pages.open(demo.base_url)
    never_ending(page)
    assert page.evaluate("document.activeElement.id") == "prompt"
    page.keyboard.type("One line")
    page.keyboard.press("Shift+Enter")
    page.keyboard.type("and another")
    page.keyboard.press("Enter")
    page.locator("li.assistant .reasoning .text", has_text="e").wait_for()
    page.keyboard.press("Escape")
    assert "stopped" in answered(page).locator(".stats").inner_text()
    assert page.locator("li.user .text").text_content() == "One line\nand another"
    for _ in range(20):
        page.keyboard.press("Shift+Tab")
        if page.evaluate("document.activeElement.textContent") == "Timeline":
            break
    page.keyboard.press("Enter")
    page.locator("#timeline .events").wait_for()
    assert page.evaluate("document.activeElement.id") == "timeline"


@pytest.mark.parametrize("place", ["chat", "pipeline"])
def test_a_phone_has_room_for_all(pages: Watched, demo: System, place: str) -> None:
    page = pages.open(f"{demo.base_url}/#{place}", **PHONE)
    if place == "chat":
        say(page, "Hello")
        answered(page)
        page.locator("#settings-button").click()
        page.get_by_label("Temperature").wait_for()
        page.keyboard.press("Escape")
        assert page.evaluate("document.activeElement.id") == "settings-button"
        page.locator("#history-button").tap()
        page.locator("#history .close").tap()
        page.locator("#history .close").wait_for(state="hidden")
        page.get_by_role("button", name="Timeline").tap()
        page.locator("#timeline .events", has_text="Finished").wait_for()
    else:
        page.locator(".stage .count", has_text="1 ready").nth(3).wait_for()
        chat(demo, 600)  # long enough to be seen: what comes and goes between two looks is not
        page.locator("#requests tbody tr", has_text="ended (length)").first.tap()
        page.wait_for_function(IN_SIGHT)
    assert page.evaluate(WIDER) == 0


def test_a_picture_is_seen_and_what_was_thought_is_shown(pages: Watched, trained: System) -> None:
    page = pages.open(trained.base_url)
    page.evaluate(DROP, file(SHAPES.read_bytes(), "shapes.png"))
    page.locator("#attachments li").wait_for()
    say(page, "Where is the green square?", max_tokens=100)
    answer = answered(page)
    assert answer.locator(".answer").text_content() == "The green square is in the middle."
    assert answer.locator(".reasoning .text").text_content() == THOUGHT


def test_a_tool_is_called_and_its_result_is_told(pages: Watched, trained: System) -> None:
    page = pages.open(trained.base_url)
    page.locator("#settings details", has_text="Tools").locator("summary").click()
    page.locator("#tools-example").click()
    say(page, "What is the weather in Paris?", max_tokens=100)
    answer = answered(page)
    assert answer.locator(".call h3").text_content() == "get_weather"
    assert "Paris" in answer.locator(".call").inner_text()
    page.get_by_label("Result of get_weather").fill('{"temperature": 21, "sky": "sunny"}')
    page.get_by_role("button", name="Give this result").click()
    page.locator("li.assistant").nth(1).wait_for()
    assert answered(page).locator(".answer").text_content() == "It is sunny in Paris, with 21 degrees."


def test_pictures_for_the_documentation(pages: Watched, trained: System, screenshots: Path) -> None:
    for scheme, name, options in (("light", "", {}), ("dark", "", {}), ("light", "-phone", PHONE)):
        page = pages.open(trained.base_url, color_scheme=scheme, reduced_motion="reduce", **options)
        page.evaluate(DROP, file(SHAPES.read_bytes(), "shapes.png"))
        page.locator("#attachments li").wait_for()
        say(page, "Where is the green square?", max_tokens=100)
        answered(page).locator(".reasoning summary").click()
        page.screenshot(path=screenshots / f"console-chat-{scheme}{name}.png")
        with load(trained, requests=7, max_tokens=200):
            page.get_by_role("button", name="Timeline").click()
            page.locator("#timeline .events", has_text="Finished (stop)").wait_for()
            page.locator("#requests tbody tr", has_text="writing").nth(6).wait_for()
            page.locator("#pipeline").evaluate("(page) => page.scrollTo(0, 0)")
            page.screenshot(path=screenshots / f"console-pipeline-{scheme}{name}.png")
    assert len({path.read_bytes() for path in screenshots.glob("console-*.png")}) == 6
