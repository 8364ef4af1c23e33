"""Orders to the ranks: what is read is what was sent, field by field, for steps and plans of every kind."""

import mmap
import socket
from collections.abc import Iterator
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from engine_cases import PATCH, sequence
from engine_loop import prompt
from small_model import PAGE, SMALL, SMALL_FACTS, small_model

from services.engine.ranks.follower import check
from services.engine.ranks.orders import END, SAMPLE, SET_UP, STEP, Checked, OrderReader, OrderWriter
from services.engine.ranks.ring import Reader, Writer
from services.engine.run.sampler import Sampled
from services.engine.run.sampling_plan import SamplingPlan, heaviest
from services.engine.run.step import HostStep, StepBuilder
from services.engine.schedule.embeds import Embeds
from services.engine.schedule.plan import Chunk, Plan
from shared.messages import MediaSpan

ROOM = 1 << 16


@pytest.fixture
def ends() -> Iterator[tuple[OrderWriter, OrderReader]]:
    ours, theirs = socket.socketpair()
    memory = mmap.mmap(-1, ROOM)
    with ours, theirs:
        yield OrderWriter(Writer(memory, [ours])), OrderReader(Reader(memory, theirs))


def same(sent: Any, found: Any) -> None:
    if isinstance(sent, torch.Tensor):
        assert sent.dtype == found.dtype
        assert torch.equal(sent, found)
    elif isinstance(sent, np.ndarray):
        assert (sent.dtype, sent.shape) == (found.dtype, found.shape)
        assert np.array_equal(sent, found)
    else:
        assert sent == found


def steps() -> Iterator[HostStep]:
    """A prompt with an image beside the next token of another, and a decode step."""
    builder = StepBuilder(small_model(), PAGE, SMALL.image_patch_id)
    rows = torch.randn(4, SMALL.hidden_size)
    span = MediaSpan("image", "k", 2, 4, (1, 4, 4))
    media = sequence(
        [10, 11, *[PATCH] * 4, 12], spans=(span,), facts=SMALL_FACTS,
        embeds=(Embeds(rows.numpy().tobytes(), "float32"),),
    )  # fmt: skip
    text = sequence(prompt(1, 9), [20, 21], facts=SMALL_FACTS)
    for number, one in enumerate((media, text)):
        one.blocks.extend(range(4 * number, 4 * number + 4))
    mixed = (Chunk(media, 1, 6, samples=True), Chunk(text, 10, 1, samples=True))
    yield builder.build(Plan(mixed))
    yield builder.build(Plan((Chunk(text, 10, 1, samples=True),)))


def test_steps_arrive_as_they_were_sent(ends: tuple[OrderWriter, OrderReader]) -> None:
    writer, reader = ends
    kinds = set()
    for step in steps():
        writer.step(step)
        order = reader.read(torch.float32, SMALL.hidden_size)
        assert order.kind == STEP
        for name in HostStep.__slots__:
            same(getattr(step, name), getattr(order.content, name))
        kinds.add((step.max_query_len > 1, len(step.embeds) > 0))
    assert kinds == {(True, True), (False, False)}


def test_plans_arrive_without_reports(ends: tuple[OrderWriter, OrderReader]) -> None:
    writer, reader = ends
    full = heaviest(3, 70)
    for plan in (SamplingPlan(), full):
        writer.sample(plan)
        order = reader.read()
        assert order.kind == SAMPLE
        for name in SamplingPlan.__struct_fields__:
            expected = getattr(SamplingPlan() if name in ("wanted", "logprobs") else plan, name)
            same(expected, getattr(order.content, name))


def test_a_plan_has_no_field_that_orders_leave_out(ends: tuple[OrderWriter, OrderReader]) -> None:
    """Every array of a plan, with other values than its default."""
    writer, reader = ends
    arrays = {
        f.name: np.arange(1, 4).astype(getattr(SamplingPlan(), f.name).dtype)
        for f in msgspec.structs.fields(SamplingPlan)
    }
    arrays["masks"] = np.ones((3, 5), np.uint8)
    writer.sample(SamplingPlan(**arrays))
    content = reader.read().content
    for name in arrays.keys() - {"wanted", "logprobs"}:
        same(arrays[name], getattr(content, name))


def test_the_head_says_what_was_read(ends: tuple[OrderWriter, OrderReader]) -> None:
    writer, reader = ends
    writer.set_up(b'{"a": 1}')
    assert (order := reader.read()).kind == SET_UP
    assert (order.content, order.checked) == (b'{"a": 1}', Checked())
    writer.checked = check(writer.checked, [Sampled(5), Sampled(6)])
    writer.end()
    order = reader.read()
    assert (order.kind, order.checked) == (END, check(Checked(), [Sampled(5), Sampled(6)]))
    assert order.checked != check(Checked(), [Sampled(6), Sampled(5)])
