"""The acceptance rule: whatever a log holds of a request, all who read it by this rule keep the same tokens."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shared.messages import TokenRun
from shared.token_runs import Verdict, judge_run, known_tokens


def run(epoch: int, index: int, tokens: tuple[int, ...] = (7,)) -> TokenRun:
    return TokenRun("r", epoch, index, tokens, None, None)


@pytest.mark.parametrize(
    ("given_run", "verdict"),
    [
        (run(1, 5), Verdict.STALE),
        (run(1, 9), Verdict.STALE),
        (run(2, 6), Verdict.GAP),
        (run(2, 5), Verdict.NEXT),
        (run(2, 0), Verdict.NEXT),
        (run(3, 5), Verdict.NEXT),
        (run(3, 6), Verdict.GAP),
    ],
)
def test_the_verdict_of_a_reader_with_five_tokens_and_epoch_two(given_run: TokenRun, verdict: Verdict) -> None:
    assert judge_run(given_run, 2, 5) is verdict


def accepted(log: list[TokenRun], have: list[int], epoch: int) -> list[int]:
    tokens = list(have)
    for part in log:
        verdict = judge_run(part, epoch, len(tokens))
        if verdict is Verdict.STALE:
            continue
        epoch = part.epoch
        if verdict is Verdict.NEXT:
            tokens += part.tokens[known_tokens(part, len(tokens)) :]
    return tokens


@given(st.data())
def test_owners_that_follow_each_other_and_repeat_themselves_make_one_answer(data: st.DataObject) -> None:
    """Each owner goes on from a place that was accepted, draws the same tokens at the same places, and may say every
    part twice; once it has said something, its predecessor may wake up and say what counts for nobody. The token at
    place n is n, so 0, 1, 2, ... is kept."""
    log: list[TokenRun] = []
    for epoch in range(1, data.draw(st.integers(1, 4)) + 1):
        place = data.draw(st.integers(0, len(accepted(log, [], 0))))
        for size in data.draw(st.lists(st.integers(1, 4), max_size=5)):
            log += [run(epoch, place, tuple(range(place, place + size)))] * data.draw(st.integers(1, 2))
            place += size
            if data.draw(st.booleans()):
                log.append(run(epoch - 1, data.draw(st.integers(0, 30)), (99, 98)))
    tokens = accepted(log, [], 0)
    assert tokens == list(range(len(tokens)))
    cut = data.draw(st.integers(0, len(log)))
    seen = max((part.epoch for part in log[:cut]), default=0)
    assert accepted(log[cut:], accepted(log[:cut], [], 0), seen) == tokens, "a reader that joins in the middle agrees"
