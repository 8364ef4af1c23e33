"""Follower beside the lead in one process: both have the whole model, so both must end with the same cache."""

import mmap
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
from small_model import BLOCKS, LONGEST, ON_GPU, PAGE, SEQS, SMALL, SMALL_FACTS, Computed, runner, small_model

from services.engine.kernels.ops import Ops
from services.engine.kernels.triton.ops import gpu_ops
from services.engine.loop.mailbox import Add
from services.engine.model.ernie import ErnieModel
from services.engine.model.inputs import KVCache
from services.engine.ranks.follower import DivergedError, Follower
from services.engine.ranks.lead import LeadBuilder, LeadRunner, LeadSampler
from services.engine.ranks.orders import OrderReader, OrderWriter
from services.engine.ranks.pulse import PAGE as PULSE_BYTES
from services.engine.ranks.pulse import Pulse
from services.engine.ranks.ring import Reader, Writer
from services.engine.run.assembly import sampling_ops
from services.engine.run.decode_rows import DecodeRows
from services.engine.run.grammar_masks import GrammarMasks
from services.engine.run.graphs import DecodeGraphs
from services.engine.run.runner import ModelRunner
from services.engine.run.sampler import Sampler
from services.engine.run.step import StepBuilder

RING = 1 << 16
ENDED_S = 60.0


class Machine:
    """What computes steps on one rank."""

    def __init__(self, model: ErnieModel) -> None:
        shape = SMALL.num_layers, BLOCKS + 1, PAGE, SMALL.num_kv_heads, SMALL.head_dim
        self.model = model
        self.cache = KVCache.allocate(*shape, model.dtype, str(model.device))
        rows = DecodeRows(model, SEQS, LONGEST, PAGE, BLOCKS, SMALL.image_patch_id)
        self.graphs = (DecodeGraphs if ON_GPU else Computed)(model, self.cache, rows, SEQS)
        self.sampler = Sampler(SMALL.eos_ids, sampling_ops("base", ON_GPU), model.device)


class Pair:
    """A lead, and a follower in a thread of its own."""

    def __init__(self, theirs: ErnieModel) -> None:
        ours, link = self._sockets = socket.socketpair()
        ring = mmap.mmap(-1, RING)
        self.lead, self.followed = Machine(small_model()), Machine(theirs)
        self.orders = OrderWriter(Writer(ring, [ours]))
        self.pulse = Pulse(mmap.mmap(-1, PULSE_BYTES), 1)
        other = self.followed
        follower = Follower(
            other.model, other.cache, other.sampler, other.graphs, OrderReader(Reader(ring, link)), self.pulse
        )
        self.failure: BaseException | None = None
        self._thread = threading.Thread(target=self._follow, args=(follower,))
        self._thread.start()

    def runner(self) -> LeadRunner:
        lead = self.lead
        builder = LeadBuilder(StepBuilder(lead.model, PAGE, SMALL.image_patch_id), self.orders)
        sampler = LeadSampler(lead.sampler, self.orders)
        masks = GrammarMasks(SMALL.vocab_size, 1)
        return LeadRunner(ModelRunner(lead.model, lead.cache, sampler, builder, masks, lead.graphs, SEQS), self.orders)

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
    pair.end()
    assert pair.pulse.progress[0] == pair.orders.sent
    assert torch.equal(pair.lead.cache.keys, pair.followed.cache.keys)
    assert torch.equal(pair.lead.cache.values, pair.followed.cache.values)
    assert pair.failure is None


def test_a_follower_that_draws_other_tokens_ends() -> None:
    other = small_model()
    turned = replace(other.weights, norm=-other.weights.norm)
    pair = Pair(ErnieModel(SMALL, turned, gpu_ops() if ON_GPU else Ops()))
    with suppress(OSError):  # its end may be noticed before the lead's
        Bench(script(ignore_eos=True), runner=pair.runner(), max_num_seqs=SEQS, block_size=PAGE)
    pair.end()
    assert "rank 0" in str(pair.failure)
