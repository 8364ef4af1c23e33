"""The cases that FastDeploy and vLLM test their parsers of this model family with, retold, and what we make of them.

docs/parsing.md has them as a table, by the same names, with who is right where the three differ.
"""

from pathlib import Path

import pytest
from postproc_stand_in import every_byte, run

BEIJING = '<tool_call>\n{"name": "temperature", "arguments": {"place": "Beijing"}}\n</tool_call>\n'
CANTON = '<tool_call>\n{"name": "unit", "arguments": {"place": "Canton", "unit": "c"}}\n</tool_call>\n'
TWO = [("temperature", '{"place": "Beijing"}'), ("unit", '{"place": "Canton", "unit": "c"}')]
NO_NAME = '<tool_call>"arguments": {"place": "北京"}}'
ONLY_OPENED = '<tool_call>"name": "temperature", "arguments": {</tool_call>'

# what follows <think> in the output -> reasoning, content, calls
THINKING: dict[str, tuple[str, str, str, list[tuple[str, str]]]] = {
    "reasoning and answer": ("abc</think>def", "abc", "def", []),
    "several lines of each": ("abc\nABC</think>def\nDEF", "abc\nABC", "def\nDEF", []),
    "reasoning that ends and no answer": ("abc</think>", "abc", "", []),
    "reasoning that never ends": ("abc", "abc", "", []),
    "newlines before the answer": ("abc</think>\n\ncd", "abc", "cd", []),
    "newlines, then spaces": ("abc</think>\n\n  cd", "abc", "  cd", []),
    "only newlines after reasoning": ("abc</think>\n\n", "abc", "", []),
    "a marker of calls in reasoning": ("abc<tool_call>def", "abc<tool_call>def", "", []),
    "a call right after reasoning": (f"abc\n</think>\n\n{BEIJING}", "abc", "", TWO[:1]),
    "two calls after reasoning": (f"abc\n</think>\n\n{BEIJING}{CANTON}", "abc", "", TWO),
    "a body that is no JSON": (
        "abc</think>\n<tool_call>def</tool_call>",
        "abc",
        "<tool_call>def</tool_call>",
        [],
    ),
    "text, then a body that is no JSON": (
        "abc</think>\nABC\n<tool_call>def</tool_call>",
        "abc",
        "ABC\n<tool_call>def</tool_call>",
        [],
    ),
    "text between reasoning and a call": (f"</think>abc{BEIJING}", "", "abc", TWO[:1]),
    "text and a call without the end of reasoning": (f"abc{BEIJING}", "abc", "", TWO[:1]),
}

# the output with thinking off -> content, calls
ANSWERING: dict[str, tuple[str, str, list[tuple[str, str]]]] = {
    "text without a call": ("This is a test", "This is a test", []),
    "one call": (BEIJING, "", TWO[:1]),
    "two calls": (BEIJING + CANTON, "", TWO),
    "text before a call": (f"abc\n{BEIJING}", "abc", TWO[:1]),
    "a call in one line": (BEIJING.replace("\n", ""), "", TWO[:1]),
    "arguments without their braces' end": (
        '<tool_call>{"name": "temperature", "arguments": {"place": "北"</tool_call>',
        "",
        [("temperature", '{"place": "北"}')],
    ),
    "arguments that only open, without outer braces": (ONLY_OPENED, ONLY_OPENED, []),
    "arguments without a name": (NO_NAME, NO_NAME, []),
    "a name, and then the end": ('<tool_call>{"name": "temperature"', "", [("temperature", "{}")]),
    "spaces and newlines in arguments": (
        '<tool_call>{"name": "f", "arguments": {"a":  "x \\n y",\n "b" : [ 1 ]}}</tool_call>',
        "",
        [("f", '{"a":  "x \\n y",\n "b" : [ 1 ]}')],
    ),
    "braces that close together": (
        '<tool_call>{"name": "f", "arguments": {"a": {"b": {}}, "c": 1}}</tool_call>',
        "",
        [("f", '{"a": {"b": {}}, "c": 1}')],
    ),
}


@pytest.mark.parametrize(("text", "reasoning", "content", "functions"), THINKING.values(), ids=THINKING)
def test_thinking(text: str, reasoning: str, content: str, functions: list[tuple[str, str]]) -> None:
    for places in ([], every_byte(text)):
        shown = run(text, places, tools=True, functions=("temperature", "unit"))
        assert (shown.reasoning, shown.content, shown.functions) == (reasoning, content, functions)
        assert shown.finish_reason == ("tool_calls" if functions else "stop")


@pytest.mark.parametrize(("text", "content", "functions"), ANSWERING.values(), ids=ANSWERING)
def test_answering(text: str, content: str, functions: list[tuple[str, str]]) -> None:
    for places in ([], every_byte(text)):
        shown = run(text, places, tools=True, thinking=False)
        assert (shown.reasoning, shown.content, shown.functions) == ("", content, functions)
        assert shown.finish_reason == ("tool_calls" if functions else "stop")


def test_the_table_has_these_cases() -> None:
    table = (Path(__file__).resolve().parents[2] / "docs" / "parsing.md").read_text().partition("\n## Cases")[2]
    rows = [line.split("|")[1].strip() for line in table.splitlines() if line.startswith("| ")]
    assert rows[1:] == [*THINKING, *ANSWERING]
