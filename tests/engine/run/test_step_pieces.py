"""Steps in captured pieces: on a GPU as graphs, elsewhere computed again into the same memory. They say what steps
launched whole say, however prompts are cut and whatever decodes beside them."""

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from engine_cases import sequence
from engine_loop import Bench, Script, prompt
from hypothesis import given
from hypothesis import strategies as st
from small_model import BLOCKS, DEVICE, PAGE, SEQS, SMALL, SMALL_FACTS, runner, small_model

from services.engine.loop.mailbox import Add
from services.engine.model.ernie import ErnieModel
from services.engine.run.attention_parts import attention_parts, cut
from services.engine.run.graphs import DecodeGraphs, capture_sizes
from services.engine.run.pieces import ALIGNMENT, CAPTURED_ROWS, StepPieces, captured_sizes, padded_rows
from services.engine.run.runner import ModelRunner
from services.engine.run.step import HostStep, StepBuilder
from services.engine.schedule.embeds import Embeds
from services.engine.schedule.plan import Chunk, Plan
from shared.messages import MediaSpan


@pytest.fixture(scope="module")
def model() -> ErnieModel:
    return small_model()


@given(st.integers(1, 9000), st.integers(0, 9000))
def test_a_step_is_padded_to_a_size_that_was_captured(rows: int, max_rows: int) -> None:
    sizes = captured_sizes(max_rows)
    size = padded_rows(rows, max(sizes, default=0))
    assert size % ALIGNMENT == 0
    assert rows <= size < rows + max(ALIGNMENT, rows / 2)
    assert size in sizes or (rows > min(max_rows, CAPTURED_ROWS) and size < rows + ALIGNMENT), "no more than it must be"
    if rows > 128:
        assert size <= 1.26 * rows, "what padding costs is bounded"


def media_request(name: str, length: int, **options: Any) -> Add:
    """A prompt with an image in its middle."""
    span = MediaSpan("image", name, 3, 6, (1, 4, 6))
    rows = torch.randn(6, SMALL.hidden_size, generator=torch.Generator().manual_seed(len(name)))
    embeds = (Embeds(rows.view(torch.uint8).numpy().tobytes(), "float32"),)
    ids = [*prompt(1, 3), *[SMALL.image_patch_id] * 6, *prompt(2, length - 9)]
    return Add(sequence(ids, request_id=name, spans=(span,), embeds=embeds, facts=SMALL_FACTS, **options))


def text_request(name: str, nth: int, length: int, **options: Any) -> Add:
    return Add(sequence(prompt(nth, length), request_id=name, facts=SMALL_FACTS, **options))


def script() -> Script:
    """Prompts of several lengths that come while others decode."""
    drawn = {"temperature": 1.0, "seed": 5}
    return {
        0: [text_request("a", 1, 9, max_tokens=20), media_request("b", 24, max_tokens=9, **drawn)],
        4: [text_request("c", 3, 40, max_tokens=6), text_request("d", 4, 3, max_tokens=12, **drawn)],
        6: [
            media_request("ee", 17, max_tokens=8, logprobs=2),
            text_request("f", 5, 30, max_tokens=3, prompt_logprobs=1),
        ],
    }


@pytest.fixture(scope="module")
def whole(model: ErnieModel) -> Bench:
    """Every step launched whole, prompts uncut."""
    return Bench(
        script(), runner=runner(model, ModelRunner, captured=False), max_num_seqs=SEQS, block_size=PAGE,
        max_num_batched_tokens=128,
    )  # fmt: skip


@pytest.mark.parametrize("budget", [7, 16, 33, 128])
@pytest.mark.parametrize("piece_rows", [0, 16, 64])
def test_pieces_say_what_whole_steps_say(model: ErnieModel, whole: Bench, budget: int, piece_rows: int) -> None:
    """Prompts are cut by the budget, and steps beyond `piece_rows` are not captured."""
    bench = Bench(
        script(), runner=runner(model, ModelRunner, piece_rows=piece_rows), max_num_seqs=SEQS, block_size=PAGE,
        max_num_batched_tokens=budget,
    )  # fmt: skip
    mixed = [plan for plan in bench.runner.plans if len({chunk.length for chunk in plan.chunks}) > 1]
    assert any(chunk.source is not None for plan in mixed for chunk in plan.chunks)
    for name in ("a", "b", "c", "d", "ee", "f"):
        assert bench.answer(name) == whole.answer(name)
        assert bench.finish(name) == whole.finish(name)
    assert bench.begins["f"][-1].prompt_logprobs is not None


def test_logits_are_of_a_size_that_was_captured(model: ErnieModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """The library's first product of another size would wait for the device."""
    made, sizes, project = runner(model, ModelRunner), set[int](), ErnieModel.project

    def noted(model: ErnieModel, x: torch.Tensor) -> torch.Tensor:
        sizes.add(len(x))
        return project(model, x)

    monkeypatch.setattr(ErnieModel, "project", noted)
    scored = text_request("f", 5, 30, max_tokens=2, prompt_logprobs=1)
    prompts = [text_request(f"p{nth}", nth, 3 + nth, max_tokens=2) for nth in range(3)]
    Bench({0: prompts, 4: [scored]}, runner=made, max_num_seqs=SEQS, block_size=PAGE, max_num_batched_tokens=128)
    assert sizes == {1, 4} <= set(capture_sizes(SEQS))


def test_output_goes_out_before_a_step_with_prefill_is_launched(
    model: ErnieModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its launch takes the host long; that of a captured decode step does not, and the device waits for it."""
    made, said = runner(model, ModelRunner), list[str]()
    for kind, launch in ((StepPieces, "hidden"), (DecodeGraphs, "run")):
        monkeypatch.setattr(kind, launch, noting(said, launch, getattr(kind, launch)))
    prompts = Plan((Chunk(filled(0, 5), 0, 5, samples=True),))
    made.launch(prompts, lambda: said.append("output")).read()
    decode = Plan((Chunk(filled(1, 5, [50]), 5, 1, samples=True),))
    made.launch(decode, lambda: said.append("output")).read()
    assert said == ["output", "hidden", "run", "output"]


def noting(said: list[str], what: str, run: Callable[..., Any]) -> Callable[..., Any]:
    def noted(*args: Any) -> Any:
        said.append(what)
        return run(*args)

    return noted


def filled(nth: int, length: int, generated: Sequence[int] = ()) -> Any:
    """Return a sequence with blocks for all its tokens."""
    made = sequence(prompt(nth, length), generated, request_id=str(nth), facts=SMALL_FACTS, max_tokens=9)
    made.blocks.extend(range(8 * nth, 8 * nth + 8))
    return made


class Counting:
    """Notes what is captured and what is replayed."""

    def __init__(self, inner: Any) -> None:
        self._inner = inner
        self.replays: Counter[int] = Counter()
        self.recorded = 0

    def record(self, compute: Callable[[], Any]) -> Any:
        made, replay = self._inner.record(compute)
        nth = self.recorded
        self.recorded += 1

        def counted() -> None:
            self.replays[nth] += 1
            replay()

        return made, counted


def mixed_step(builder: StepBuilder) -> HostStep:
    """A step of 3 sequences: one that decodes, and chunks of two prompts."""
    made = [filled(i, length, known) for i, (length, known) in enumerate([(6, [50, 51]), (20, []), (7, [])])]
    chunks = (Chunk(made[0], 7, 1, True), Chunk(made[1], 0, 5, False), Chunk(made[2], 0, 7, True))
    return builder.build(Plan(chunks))


def test_a_step_replays_each_of_its_pieces_once_and_padding_disturbs_nothing(
    model: ErnieModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    import small_model as parts

    kind = "GraphRecorder" if DEVICE.type == "cuda" else "Recomputed"
    inner = getattr(parts, kind)(DEVICE) if DEVICE.type == "cuda" else getattr(parts, kind)()
    counting = Counting(inner)
    monkeypatch.setattr(parts, kind, lambda *_: counting)
    made = runner(model, ModelRunner, piece_rows=32)
    pieces, cache = made.pieces, made.cache
    assert isinstance(pieces, StepPieces)
    assert counting.recorded == len(pieces.sizes) * (SMALL.num_layers + 1)
    cache.keys.fill_(7)
    cache.values.fill_(7)
    step = mixed_step(made._builder)
    x = pieces.hidden(step)
    assert sorted(counting.replays.values()) == [1] * (SMALL.num_layers + 1)
    written = {int(slot) // PAGE for slot in step.slots} | {BLOCKS}
    others = [block for block in range(BLOCKS + 1) if block not in written]
    assert (cache.keys[:, others] == 7).all()
    assert (cache.values[:, others] == 7).all()
    plain = model.hidden(step.to(DEVICE, PAGE), cache)
    torch.testing.assert_close(x, plain)


def test_attention_is_cut_where_its_kind_changes() -> None:
    assert cut(((1, 9), (1, 4), (5, 5), (30, 90), (1, 1))) == [(0, 2), (2, 4), (4, 5)]
    assert cut(((1, 9), (5000, 5000), (4096, 4096), (4, 4), (5000, 5001))) == [(0, 1), (1, 2), (2, 3), (3, 5)]


def test_parts_count_rows_from_their_own_first_one() -> None:
    blocks = [np.arange(n, dtype=np.int32).tobytes() for n in (3, 2, 5)]
    query_start, contexts = np.array([0, 1, 6, 8], np.int32), np.array([9, 5, 17], np.int32)
    second, first = attention_parts(blocks, query_start, contexts, 4, torch.device("cpu"))
    assert (first.rows, second.rows) == (slice(0, 1), slice(1, 8))
    assert second.query_start.tolist() == [0, 5, 7]
    assert second.context_lens.tolist() == [5, 17]
    assert second.block_tables.tolist() == [[0, 1, 0, 0, 0], [0, 1, 2, 3, 4]]
    assert (second.max_query_len, second.max_context_len, second.lengths) == (5, 17, ((5, 5), (2, 17)))


def test_those_that_decode_are_computed_beside_the_last_of_the_others() -> None:
    """But one part of them only, and none where nothing else is computed."""
    blocks = [np.arange(1, dtype=np.int32).tobytes()] * 5

    def beside(new: list[int]) -> list[tuple[slice, bool]]:
        query_start = np.cumsum([0, *new]).astype(np.int32)
        parts = attention_parts(blocks[: len(new)], query_start, np.array(new, np.int32), 4, torch.device("cpu"))
        return [(part.rows, part.beside) for part in parts]

    assert beside([1, 1, 3]) == [(slice(2, 5), False), (slice(0, 2), True)]
    assert beside([1, 3, 1]) == [(slice(1, 4), False), (slice(0, 1), True), (slice(4, 5), False)]
    assert beside([1, 1]) == [(slice(0, 2), False)]
    assert beside([3, 4]) == [(slice(0, 7), False)]
