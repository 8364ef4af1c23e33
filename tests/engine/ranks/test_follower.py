"""Follower beside the lead in one process: both have the whole model, so both must end with the same cache."""

import mmap
import random
import socket
import threading
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from typing import Any

import pytest
import torch
from engine_cases import sequence
from engine_loop import Bench, Script, prompt
from guesses import careless
from small_model import ON_GPU, PAGE, SEQS, SMALL, SMALL_FACTS, runner, small_model

from services.engine.kernels.ops import Ops
from services.engine.kernels.triton.ops import gpu_ops
from services.engine.loop.mailbox import Add
from services.engine.model.ernie import ErnieModel
from services.engine.ranks.follower import DivergedError, Follower
from services.engine.ranks.lead import LeadRunner
from services.engine.ranks.orders import OrderReader, OrderWriter
from services.engine.ranks.pulse import PAGE as PULSE_BYTES
from services.engine.ranks.pulse import Pulse
from services.engine.ranks.ring import Reader, Writer
from services.engine.run.runner import Followers, ModelRunner
from services.engine.schedule.speculation import Speculation

RING = 1 << 16
ENDED_S = 60.0


def runner_of(model: ErnieModel, followers: Followers | None = None) -> ModelRunner:
    made = runner(model, ModelRunner)
    made._followers = followers
    return made


class Pair:
    """A lead, and a follower in a thread of its own."""

    def __init__(self, theirs: ErnieModel) -> None:
        ours, link = self._sockets = socket.socketpair()
        ring = mmap.mmap(-1, RING)
        self.orders = OrderWriter(Writer(ring, [ours]))
        self.lead, self.followed = runner_of(small_model(), self.orders), runner_of(theirs)
        self.pulse = Pulse(mmap.mmap(-1, PULSE_BYTES), 1)
        follower = Follower(self.followed, theirs, OrderReader(Reader(ring, link)), self.pulse)
        self.failure: BaseException | None = None
        self._thread = threading.Thread(target=self._follow, args=(follower,))
        self._thread.start()

    def runner(self) -> LeadRunner:
        return LeadRunner(self.lead, self.orders)

    def end(self) -> None:
        ours, link = self._sockets
        ours.close()
        self._thread.join(ENDED_S)
        link.close()
        assert not self._thread.is_alive()

    def _follow(self, follower: Follower) -> None:
        try:
            follower.run()
        except DivergedError as error:
            self.failure = error
            self._sockets[1].close()


@pytest.fixture
def pair() -> Iterator[Pair]:
    made = Pair(small_model())
    yield made
    made.end()


def script(**options: Any) -> Script:
    made = [
        sequence(prompt(i, 3 + 2 * i), request_id=str(i), max_tokens=12 + 3 * i, facts=SMALL_FACTS, seed=i, **options)
        for i in range(6)
    ]
    return {0: [Add(one) for one in made[:4]], 7: [Add(one) for one in made[4:]]}


@pytest.mark.parametrize(
    "options",
    [{"ignore_eos": True}, {"temperature": 1.0, "top_p": 0.9}, {"temperature": 1.0, "repetition_penalty": 1.3}],
    ids=["greedy", "drawn", "penalties"],
)
def test_a_follower_does_as_the_lead_does_with_tokens_in_flight(pair: Pair, options: dict[str, Any]) -> None:
    bench = Bench(script(**options), runner=pair.runner(), max_num_seqs=SEQS, block_size=PAGE)
    alone = Bench(script(**options), runner=runner(small_model(), ModelRunner), max_num_seqs=SEQS, block_size=PAGE)
    assert bench.ahead > 20
    assert [bench.answer(str(i)) for i in range(6)] == [alone.answer(str(i)) for i in range(6)]
    check_same_cache(pair)


def test_a_follower_verifies_what_the_lead_guesses(pair: Pair) -> None:
    """Right guesses and wrong ones, each drawn with penalties as if those before it were right."""
    options: dict[str, Any] = {"temperature": 1.0, "repetition_penalty": 1.3}
    alone = Bench(script(**options), runner=runner(small_model(), ModelRunner), max_num_seqs=SEQS, block_size=PAGE)
    texts = [prompt(i, 3 + 2 * i) + alone.answer(str(i)) for i in range(6)]
    with careless(texts, 0.7, random.Random(1)):
        speculation = Speculation(SEQS - 1, 1, max_batch=SEQS)
        bench = Bench(
            script(**options), runner=pair.runner(), max_num_seqs=SEQS, block_size=PAGE, speculation=speculation
        )
    drafted, right = bench.guessed
    assert drafted > right > 10
    assert [bench.answer(str(i)) for i in range(6)] == [alone.answer(str(i)) for i in range(6)]
    check_same_cache(pair)


def check_same_cache(pair: Pair) -> None:
    pair.end()
    assert pair.pulse.progress[0] == pair.orders.sent
    mine, theirs = pair.lead.cache, pair.followed.cache
    assert torch.equal(mine.keys, theirs.keys)
    assert torch.equal(mine.values, theirs.values)
    assert pair.failure is None


def test_a_follower_that_draws_other_tokens_ends() -> None:
    other = small_model()
    turned = replace(other.weights, norm=-other.weights.norm)
    pair = Pair(ErnieModel(SMALL, turned, gpu_ops() if ON_GPU else Ops()))
    with suppress(OSError):  # its end may be noticed before the lead's
        Bench(script(ignore_eos=True), runner=pair.runner(), max_num_seqs=SEQS, block_size=PAGE)
    pair.end()
    assert "rank 0" in str(pair.failure)
