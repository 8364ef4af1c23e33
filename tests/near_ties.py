"""The engine, with a word on stderr whenever a token hangs on less than the order in which sums are rounded.

In whose company a request is computed decides that order, so that only answers without such a token are the same every
time. A token hangs on: which experts see it and those before it, which token is likeliest, which tokens top_p keeps,
and where in their cumulated probabilities the request's random number lies. With several hundred tokens kept, the last
is near a border in one answer of three or so.
"""

import itertools
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from unittest.mock import patch

import msgspec
import numpy as np
import torch
from torch import Tensor

from services.engine import __main__
from services.engine.kernels.reference import moe
from services.engine.kernels.reference.router import router
from services.engine.run import assembly
from services.engine.run.sampler import Drawn, Sampler
from services.engine.run.sampling_plan import SamplingPlan

NEAR_TIE = "near tie:"
# Measured between requests alone and the same in company, in float32: logits differ by up to 4e-5, cumulated
# probabilities by up to 1.2e-6.
LOGITS = 4e-4
MASS = 3e-6
ROUTED = 1e-5  # between the scores of experts, which are probabilities with a bias


class Judge(Sampler):
    """Draws as its base does, and again a little to either side."""

    def draw(self, logits: Tensor, plan: SamplingPlan) -> Drawn:
        raw = logits.clone()
        drawn = super().draw(logits, plan)
        greedy = raw[np.setdiff1d(np.arange(len(raw)), plan.drawing)].topk(2).values
        _tell("two likeliest tokens", greedy[:, 0] - greedy[:, 1] < LOGITS)
        for beside in _beside(plan):
            _tell("a draw", super().draw(raw.clone(), beside).tokens != drawn.tokens)
        return drawn


def _beside(plan: SamplingPlan) -> list[SamplingPlan]:
    """The plan with the random numbers, and the mass that top_p keeps, a little less or more."""
    return [
        msgspec.structs.replace(plan, numbers=np.clip(plan.numbers + point, 0, 1 - MASS), top_p=plan.top_p + kept)
        for point, kept in itertools.product((-MASS, MASS), repeat=2)
    ]


def judged_router(x: Tensor, gate: Tensor, bias: Tensor, vision: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """`router`."""
    # Of all experts of a pool, the weights are their probabilities.
    ids, weights = router(x, gate, bias, vision, len(bias) // 2)
    scores = weights + bias[ids.long()]
    _tell("two experts", scores[:, top_k - 1] - scores[:, top_k] < ROUTED)
    return router(x, gate, bias, vision, top_k)


def _tell(what: str, near: Tensor) -> None:
    if torch.any(near):
        print(NEAR_TIE, what, file=sys.stderr, flush=True)


@contextmanager
def judging() -> Iterator[None]:
    """Engines that are loaded and run meanwhile in this process tell of near ties."""
    with patch.object(assembly, "Sampler", Judge), patch.object(moe, "router", judged_router):
        yield


if __name__ == "__main__":
    with judging():
        status = __main__.main()
    os._exit(status)  # as the engine's own
