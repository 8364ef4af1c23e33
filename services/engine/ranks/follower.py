"""Follower: what every rank but the first does. It computes the steps that it is told of, with its part of the model,
and draws the same tokens from the same logits as rank 0 does, so that those in flight are on its device, too."""

import zlib
from collections import deque

import numpy as np
from torch import Tensor

from services.engine.ranks.orders import SAMPLE, STEP, Checked, OrderReader
from services.engine.ranks.pulse import Pulse
from services.engine.run.runner import ModelRunner
from services.engine.run.sampler import Drawn, Sampled
from services.engine.run.sampling_plan import SamplingPlan
from services.engine.run.step import HostStep, Model


class DivergedError(Exception):
    """Error of a rank that drew other tokens than rank 0: what they compute from here on would mean nothing."""


class Follower:
    """Loop over orders."""

    def __init__(self, runner: ModelRunner, model: Model, orders: OrderReader, pulse: Pulse) -> None:
        self._runner = runner
        self._model = model
        self._orders = orders
        self._pulse = pulse
        self._unchecked: deque[Drawn] = deque()
        self._checked = Checked()

    def run(self) -> None:
        """Work until rank 0 ends.

        Raises:
            DivergedError: rank 0 has drawn other tokens.
        """
        logits: Tensor | None = None
        while True:
            order = self._orders.read(self._model.dtype, self._model.hidden_size)
            if order.kind == STEP:
                assert isinstance(order.content, HostStep)
                logits = self._runner.logits(order.content)
            elif order.kind == SAMPLE:
                assert isinstance(order.content, SamplingPlan)
                assert logits is not None, "told to sample before a step"
                self._unchecked.append(self._runner.draw(logits, order.content))
            else:
                return
            self._pulse.take_order()
            # After the launch: here the host waits for the device.
            self._check(order.checked)

    def _check(self, theirs: Checked) -> None:
        """Compare the tokens of the steps that rank 0 has read by now."""
        while self._checked.steps < theirs.steps:
            self._checked = check(self._checked, self._unchecked.popleft().read())
        if self._checked.checksum != theirs.checksum:
            raise DivergedError(
                f"other tokens than those of rank 0 were drawn, up to step {theirs.steps} of its tokens"
            )


def check(before: Checked, sampled: list[Sampled]) -> Checked:
    """Return the checksum with the tokens of one more step."""
    tokens = np.array([one.token for one in sampled], np.int64)
    return Checked(before.steps + 1, zlib.crc32(tokens.tobytes(), before.checksum))
