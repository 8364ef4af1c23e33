"""The state of an open request and of its choices, and who writes it."""

import ast
from pathlib import Path

import services.gateway
from services.gateway.inflight.request import Choice, ChoiceState, OpenRequest
from services.gateway.request.answer_format import AnswerFormat
from shared.errors import Failure
from shared.messages import Delta, Usage

PACKAGE = Path(services.gateway.__file__).parent
USAGE = Usage(1, 1, 0, 0, 0, 0)
BROKEN = Failure(500, "It broke.")


def opened() -> tuple[OpenRequest, Choice]:
    request = OpenRequest("r", AnswerFormat(), True, 0.0, 60.0, 1000, 0.0)
    return request, request.choices[0]


def test_a_choice_is_new_then_submitted_then_ended() -> None:
    request, choice = opened()
    assert choice.state is ChoiceState.NEW
    request.mark_submitted()
    assert choice.state is ChoiceState.SUBMITTED
    request.add(choice, [Delta("r", 1, finish_reason="stop", usage=USAGE)], 1.0)
    assert (choice.state, choice.finish_reason, choice.usage) == (ChoiceState.ENDED, "stop", USAGE)


def test_an_end_that_is_faster_than_the_submission_stays() -> None:
    request, choice = opened()
    request.fail(choice, BROKEN)
    request.mark_submitted()
    assert choice.state is ChoiceState.ENDED


def test_a_failure_after_the_finish_takes_nothing_back() -> None:
    request, choice = opened()
    request.mark_submitted()
    request.add(choice, [Delta("r", 1, finish_reason="stop", usage=USAGE)], 1.0)
    request.fail(choice, BROKEN)
    assert (choice.finish_reason, choice.usage, request.failure) == ("stop", USAGE, BROKEN)


def written_attributes(source: str) -> list[str]:
    """Assignments to an attribute of a variable that is named like a choice or an open request."""
    return [
        ast.unparse(node)
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Attribute)
        and isinstance(node.ctx, ast.Store)
        and ast.unparse(node.value).split(".")[-1] in ("choice", "open_request")
    ]


def test_no_other_module_writes_their_attributes() -> None:
    assert written_attributes("choice.open_request.failure = None") == ["choice.open_request.failure"]
    assert written_attributes("choice.seq, x = 1, 2") == ["choice.seq"]
    modules = [path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "inflight" / "request.py"]
    assert {str(path): found for path in modules if (found := written_attributes(path.read_text()))} == {}
