"""The judge of the demo's answers: what it takes for right, and the interval it prints."""

import base64
import io
import json
import shutil
from pathlib import Path

import pytest
from PIL import Image

from benchmarks.demo_model import corpus, draw
from benchmarks.demo_model.card import AIMS, BEGIN, END, WAYS, figures, interval, read, write
from benchmarks.demo_model.evaluate import PROCESSOR
from benchmarks.demo_model.questions import SETS, Question, questions
from services.mm_encoder.media.resize import smart_resize

LIMITS = {"factor": draw.BLOCK, "min_pixels": 3136, "max_pixels": PROCESSOR["image_max_pixels"]}


def first(name: str) -> Question:
    return next(questions(1, 3, only=name))


def message(question: Question) -> dict[str, object]:
    """The right answer, as the API gives it."""
    calls = [
        {"function": {"name": call.name, "arguments": json.dumps(call.arguments)}} for call in question.sample.calls
    ]
    return {"content": question.sample.answer or None, "tool_calls": calls or None}


@pytest.mark.parametrize("name", SETS)
def test_the_expected_answer_is_right_and_a_changed_one_is_not(name: str) -> None:
    question = first(name)
    right = message(question)
    assert question.is_right(right)
    assert not question.is_right(right | {"content": "I do not know."})
    stray = {"function": {"name": "get_time", "arguments": '{"city": "Nowhere"}'}}
    assert not question.is_right(right | {"tool_calls": [*(right["tool_calls"] or ()), stray]})  # type: ignore[misc]


def test_arguments_and_json_are_compared_as_values() -> None:
    call, record = first("tool calls"), first("JSON")
    (function, *_) = message(call)["tool_calls"]  # type: ignore[misc]
    wrong = {"function": {"name": function["function"]["name"], "arguments": "{}"}}
    assert not call.is_right({"content": None, "tool_calls": [wrong]})
    assert record.is_right({"content": json.dumps(json.loads(record.sample.answer), indent=2)})
    assert not record.is_right({"content": record.sample.answer[:-1]})


def test_wilsons_interval() -> None:
    """Against values of the literature: 81 of 263 (Newcombe, 1998, table I)."""
    low, high = interval(81, 263)
    assert (round(low, 4), round(high, 4)) == (0.2553, 0.3662)
    assert [round(each, 4) for each in interval(0, 20)] == [0.0, 0.1611]


def pictures(question: Question) -> list[Image.Image]:
    parts = [part for message in question.body["messages"] for part in message["content"] if isinstance(part, dict)]
    urls = [part["image_url"]["url"] for part in parts if part["type"] == "image_url"]
    assert all(url.startswith("data:image/jpeg;base64,") for url in urls)
    return [Image.open(io.BytesIO(base64.b64decode(url.split(",")[1]))) for url in urls]


def test_pictures_of_other_sizes_are_shown_on_a_canvas_of_training() -> None:
    asked = list(questions(6, 3, own_size=True))
    assert {each.set_name for each in asked} == {name for name, (made, _) in SETS.items() if made in corpus.PICTURES}
    sizes = [picture.size for each in asked for picture in pictures(each)]
    assert {smart_resize(tall, wide, **LIMITS)[::-1] for wide, tall in sizes} <= set(draw.CANVASES)
    assert sum(size in draw.CANVASES for size in sizes) < len(sizes) / 4
    assert len({size for size in sizes if size[0] * size[1] > LIMITS["max_pixels"]}) > len(asked) / 3


CHECKPOINT = Path(__file__).parents[2] / "cli" / "demo_checkpoint"


def test_the_card_shows_its_counts() -> None:
    card = (CHECKPOINT / "README.md").read_text()
    assert card.split(BEGIN)[1].split(END)[0] == figures(read(CHECKPOINT))


def test_figures_are_written_into_the_card_and_nothing_else_changes(tmp_path: Path) -> None:
    shutil.copy(CHECKPOINT / "README.md", tmp_path)
    before = (tmp_path / "README.md").read_text()
    counts = {name: {each: [9, 10] for each in SETS} for name in ("bf16", "wint8")}
    counts["wint8"]["JSON"] = [8, 10]
    write(tmp_path, counts)
    after = (tmp_path / "README.md").read_text()
    assert read(tmp_path) == counts
    assert "wint8 -0.53." in after
    assert after.count(", missed |") == sum(aim > 90 for _, aim, _ in AIMS)
    assert "Asked in other ways" not in after
    assert (after.split(BEGIN)[0], after.split(END)[1]) == (before.split(BEGIN)[0], before.split(END)[1])


def test_other_ways_to_ask_have_a_table_of_their_own() -> None:
    counts = {name: {each: [9, 10] for each in SETS} for name in ("bf16", WAYS[0])}
    counts[WAYS[1]] = {"charts": [3, 10]}
    formats, ways = figures(counts).split("Asked in other ways")
    assert "| kind | n | bf16 |" in formats
    assert not any(way in formats for way in WAYS)
    assert f"| kind | n | {WAYS[0]} | {WAYS[1]} |" in ways
    assert "| charts | 10 | 90.0 (59.6 to 98.2) | 30.0 (10.8 to 60.3) |" in ways
    assert "| JSON | 10 | 90.0 (59.6 to 98.2) |  |" in ways
