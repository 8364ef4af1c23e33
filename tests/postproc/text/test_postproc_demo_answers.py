"""Answers that the demo checkpoint wrote, token by token as the engine gave them, against what was asked for.

demo_answers.jsonl has the token ids of right answers; the words beside them are the corpus's, not our parsers'.
A new checkpoint need not write these tokens: only a new tokenizer makes the file stale.
"""

import json
from pathlib import Path
from typing import Any

import pytest
from postproc_stand_in import BEGIN, Shown, collect, request

from services.postproc.text.answer import Answer, Parsers
from services.postproc.text.detokenize import Vocabulary
from shared.messages import Finish
from shared.model.tokenizer import Tokenizer

CHECKPOINT = Path(__file__).parents[3] / "cli" / "demo_checkpoint"
RECORDED = [json.loads(line) for line in Path(__file__).with_name("demo_answers.jsonl").read_text().splitlines()]
NAMES = [f"{each['set']}{'' if each['thinking'] else ' unthought'}" for each in RECORDED]


@pytest.fixture(scope="module")
def vocabulary() -> Vocabulary:
    return Vocabulary(Tokenizer.load(CHECKPOINT))


def shown(vocabulary: Vocabulary, recorded: dict[str, Any], count: int, every: int) -> Shown:
    """The first `count` tokens as a client gets them, with a delta after every so many tokens."""
    functions = tuple(recorded["functions"])
    answer = Answer(
        request(thinking=recorded["thinking"], tools=bool(functions), functions=functions), vocabulary, Parsers()
    )
    answer.begin = BEGIN
    deltas = []
    for place, token in enumerate(recorded["token_ids"][:count]):
        answer.push_token(token)
        if place % every == 0:
            deltas.append(answer.take_delta())
    whole = count == len(recorded["token_ids"]) - 1
    if whole:
        answer.push_stop_token(recorded["token_ids"][-1])
    answer.apply_finish(Finish("stop" if whole else "length"))
    return collect([*deltas, answer.take_delta()])


@pytest.mark.parametrize("every", [1, 3, 1000])
@pytest.mark.parametrize("recorded", RECORDED, ids=NAMES)
def test_an_answer_is_taken_apart_as_it_was_meant(vocabulary: Vocabulary, recorded: dict[str, Any], every: int) -> None:
    whole = shown(vocabulary, recorded, len(recorded["token_ids"]) - 1, every)
    assert (whole.reasoning, whole.content.strip()) == (recorded["reasoning"], recorded["content"])
    assert [[name, json.loads(arguments)] for name, arguments in whole.functions] == recorded["calls"]
    assert whole.finish_reason == ("tool_calls" if recorded["calls"] else "stop")


@pytest.mark.parametrize("recorded", RECORDED, ids=NAMES)
def test_an_answer_cut_off_shows_the_beginning_of_what_was_meant(
    vocabulary: Vocabulary, recorded: dict[str, Any]
) -> None:
    text = b"".join(map(vocabulary.bytes_of, recorded["token_ids"])).decode()
    for count in range(len(recorded["token_ids"]) - 1):
        part = shown(vocabulary, recorded, count, 1)
        assert recorded["reasoning"].startswith(part.reasoning.strip())
        # A call that is not complete is shown as the text that it is.
        wording = text.rpartition("</think>")[2].strip() if recorded["calls"] else recorded["content"]
        assert part.content.strip() in wording
        assert [name for name, _ in part.functions] == [name for name, _ in recorded["calls"]][: len(part.functions)]


def test_the_recording_has_every_form() -> None:
    assert {len(each["calls"]) for each in RECORDED} == {0, 1, 2}
    assert {each["thinking"] for each in RECORDED} == {True, False}
