"""The judge of near ties speaks where it should, and only there."""

from collections.abc import Sequence

import near_ties
import numpy as np
import pytest
import torch
from near_ties import Judge, judged_router

from services.engine.kernels.sampling_ops import SamplingOps
from services.engine.run.sampling_plan import SamplingPlan

LOW, HIGH = -20.0, 3.0
SECOND = 0.76  # what two of three tokens have together: up to this top_p they are all that is kept


def judged(logits: Sequence[float], plan: SamplingPlan) -> list[int]:
    return Judge((1,), SamplingOps(), torch.device("cpu")).draw(torch.tensor([logits]), plan).tokens.tolist()


def drawing(number: float, top_p: float = 1.0) -> SamplingPlan:
    return SamplingPlan(
        drawing=np.array([0]),
        temperature=np.ones(1, np.float32),
        top_k=np.zeros(1, np.int64),
        top_p=np.array([top_p]),
        min_p=np.zeros(1, np.float32),
        numbers=np.array([number]),
    )


@pytest.mark.parametrize(("second", "told"), [(HIGH - near_ties.LOGITS / 2, True), (HIGH - 0.1, False)])
def test_the_likeliest_token(capsys: pytest.CaptureFixture[str], second: float, told: bool) -> None:
    assert judged([LOW, HIGH, second], SamplingPlan()) == [1]
    assert (near_ties.NEAR_TIE in capsys.readouterr().err) is told


@pytest.mark.parametrize(
    ("number", "top_p", "told"),
    [
        (0.5 - near_ties.MASS / 2, 1.0, True),
        (0.5 - near_ties.MASS * 4, 1.0, False),
        (0.6, SECOND - near_ties.MASS / 2, True),
        (0.6, SECOND - near_ties.MASS * 4, False),
        (0.2, SECOND - near_ties.MASS / 2, False),  # a token more or less, and the draw is the same
    ],
)
def test_a_draw(capsys: pytest.CaptureFixture[str], number: float, top_p: float, told: bool) -> None:
    assert judged(np.log([0.5, SECOND - 0.5, 1 - SECOND]).tolist(), drawing(number, top_p)) == [0]
    assert (near_ties.NEAR_TIE in capsys.readouterr().err) is told


@pytest.mark.parametrize(("second", "told"), [(0.3 + near_ties.ROUTED / 10, True), (0.31, False)])
def test_experts(capsys: pytest.CaptureFixture[str], second: float, told: bool) -> None:
    gate = torch.tensor([[0.1], [0.3], [second], [LOW]]).repeat(2, 1)
    ids, _ = judged_router(torch.ones(1, 1), gate, torch.zeros(8), torch.zeros(1, dtype=torch.bool), 1)
    assert ids.tolist() == [[2]]
    assert (near_ties.NEAR_TIE in capsys.readouterr().err) is told
