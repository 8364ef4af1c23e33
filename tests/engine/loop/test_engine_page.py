"""What an engine tells encoders on its GPU: of each step that sequences wait for, when it runs."""

import pytest
from engine_cases import continuation, sequence
from engine_loop import Bench, prompt

from services.engine.loop.mailbox import Add
from services.engine.schedule.plan import Plan
from services.engine.schedule.scheduler import Scheduler
from shared.card_page import SIZE, CardPage


class Told(CardPage):
    """A page that remembers: of each step whether it has prefill, or None."""

    def __init__(self) -> None:
        super().__init__(bytearray(SIZE))
        self.steps: list[bool | None] = []

    def begin_step(self, prefill: bool) -> None:
        super().begin_step(prefill)
        self.steps.append(prefill)

    def end_step(self) -> None:
        super().end_step()
        self.steps.append(None)


class Beside(Told):
    """Of a GPU on which an encoder works."""

    def encoder_works(self) -> bool:
        return True


def kind(plan: Plan) -> bool | None:
    """By hand: a sequence that decodes has a token of its answer as its chunk."""
    decodes = [chunk.start >= chunk.sequence.prompt_len for chunk in plan.chunks]
    return not all(decodes) if any(decodes) else None


def test_every_step_that_tokens_wait_for_is_told() -> None:
    """A prompt alone, its answer, another prompt of several steps beside it, the rest of both, and nothing."""
    first = sequence(prompt(0, 5), request_id="0", max_tokens=20)
    second = sequence(prompt(1, 40), request_id="1", max_tokens=4)
    for overlaps in (True, False):
        page = Told()
        bench = Bench({0: [Add(first)], 4: [Add(second)]}, overlaps=overlaps, page=page)
        assert bench.answer("0") == continuation(prompt(0, 5), 20)
        launched = [kind(plan) for plan in bench.runner.plans]
        assert launched[0] is None
        assert launched.count(True) >= 3
        assert launched.count(False) >= 10
        told = [step for step in page.steps if step is not None]
        assert told == [step for step in launched if step is not None]
        assert page.steps[-1] is None
        assert page.step() == 0, "at rest nobody waits"
        first = sequence(prompt(0, 5), request_id="0", max_tokens=20)
        second = sequence(prompt(1, 40), request_id="1", max_tokens=4)


@pytest.mark.parametrize(("page", "learns"), [(None, True), (Told(), True), (Beside(), False)])
def test_nothing_is_learnt_of_steps_beside_an_encoder(
    page: CardPage | None, learns: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are slow for another reason than guesses."""
    learnt: list[Plan] = []
    monkeypatch.setattr(Scheduler, "learn", lambda self, plan, *ms: learnt.append(plan))
    bench = Bench({0: [Add(sequence(prompt(0, 5), request_id="0", max_tokens=9))]}, page=page)
    assert len(bench.answer("0")) == 9
    assert learnt == (bench.runner.plans if learns else [])
