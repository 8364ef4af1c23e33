"""The split of an answer into reasoning and content."""

import pytest
from hypothesis import given
from postproc_stand_in import cuts, every_byte, run, run_pieces

from services.postproc.text.answer import Parsers

CASES = {
    "as the model writes it": ("I see.\n</think>\n\nA cat.", "I see.", "A cat."),
    "no newlines": ("I see.</think>A cat.", "I see.", "A cat."),
    "many newlines": ("a\n\n\n</think>\n\n\n\nb\n\n", "a", "b\n\n"),
    "newlines within stay": ("a\n\nb\n</think>\nc\n\nd", "a\n\nb", "c\n\nd"),
    "only spaces are text": ("a \n</think>\n b", "a ", " b"),
    "newlines and carriage returns": ("a\r\n</think>\r\nb", "a\r", "\r\nb"),
    "nothing thought": ("</think>\n\nA cat.", "", "A cat."),
    "nothing thought but a newline": ("\n</think>\n\nA cat.", "", "A cat."),
    "nothing said": ("I see.\n</think>\n\n", "I see.", ""),
    "nothing at all": ("", "", ""),
    "truncated thinking": ("I see a", "I see a", ""),
    "truncated before the marker": ("I see.\n\n", "I see.\n\n", ""),
    "the first marker counts": ("a</think>b</think>c", "a", "b</think>c"),
    "an opening marker is text": ("<think>a</think><think>b", "<think>a", "<think>b"),
    "a call in thinking is thinking": (
        'a<tool_call>{"name": "f"}</tool_call></think>b',
        'a<tool_call>{"name": "f"}</tool_call>',
        "b",
    ),
    "a character broken by the marker": ("é\n</think>é", "é", "é"),
}  # fmt: skip


@pytest.mark.parametrize("tools", [False, True])
@pytest.mark.parametrize(("text", "reasoning", "content"), CASES.values(), ids=CASES)
def test_cases(text: str, reasoning: str, content: str, tools: bool) -> None:
    for places in ([], every_byte(text)):
        for finish in ("stop", "length"):
            shown = run(text, places, finish=finish, tools=tools)
            assert (shown.reasoning, shown.content, shown.finish_reason) == (reasoning, content, finish)


@pytest.mark.parametrize(("text", "reasoning", "content"), CASES.values(), ids=CASES)
@given(places=cuts)
def test_any_cut(text: str, reasoning: str, content: str, places: list[int]) -> None:
    shown = run(text, places)
    assert (shown.reasoning, shown.content) == (reasoning, content)


def test_text_that_spells_the_marker_is_text() -> None:
    shown = run_pieces([b"a", b"</think>", b"b</thi", b"nk>", "</think>", b"c"])
    assert (shown.reasoning, shown.content) == ("a</think>b</think>", "c")


def test_half_a_character_before_the_marker() -> None:
    shown = run_pieces([b"a\xe2\x82", "</think>", b"\xac", b"\xe2"], finish="length")
    assert (shown.reasoning, shown.content) == ("a\ufffd", "\ufffd\ufffd")


def test_thinking_off_begins_in_content() -> None:
    shown = run("\nA cat.</think>\n", thinking=False)
    assert (shown.reasoning, shown.content) == ("", "\nA cat.</think>\n")
    assert shown.usage is not None
    assert shown.usage.reasoning_tokens == 0


def test_without_the_parser_everything_is_content() -> None:
    shown = run("a\n</think>\n\nb", parsers=Parsers(reasoning=False))
    assert (shown.reasoning, shown.content) == ("", "a\n</think>\n\nb")
    assert shown.usage is not None
    assert shown.usage.reasoning_tokens == 0


@pytest.mark.parametrize(("text", "tokens"), [("abc</think>de", 4), ("abc", 4), ("</think>", 1)])
def test_reasoning_tokens_are_counted_up_to_the_marker(text: str, tokens: int) -> None:
    usage = run(text, every_byte(text)).usage
    assert usage is not None
    assert usage.reasoning_tokens == tokens  # "abc" without a marker: the stop token was thought, too
