"""Steps as arrays: the quick way for decoding says what the general one does; tables follow their sequences."""

import numpy as np
import pytest
import torch
from engine_cases import CONFIG, sequence

from services.engine.run.decode_rows import BlockTables
from services.engine.run.graphs import capture_sizes
from services.engine.run.step import HostStep, StepBuilder
from services.engine.schedule.embeds import Embeds
from services.engine.schedule.plan import Chunk, Plan
from shared.messages import MediaSpan

BLOCK = 4


class Model:
    dtype = torch.float32
    device = torch.device("cpu")
    hidden_size = 8


def decoding() -> tuple[Chunk, ...]:
    """Sequences of several lengths; the last one has a token more to catch up with, so it does not sample."""
    chunks = []
    for row, (prompt, generated) in enumerate([(3, 1), (9, 5), (4, 4), (5, 3)]):
        made = sequence(range(10, 10 + prompt), range(50, 50 + generated), max_tokens=20)
        made.blocks.extend(range(7 * row, 7 * row + 7))
        behind = row == 3
        chunks.append(Chunk(made, made.num_tokens - 1 - behind, 1, samples=not behind))
    return tuple(chunks)


def assert_same(actual: HostStep, expected: HostStep) -> None:
    for name in HostStep.__dataclass_fields__:
        ours, theirs = getattr(actual, name), getattr(expected, name)
        if isinstance(theirs, np.ndarray):
            assert ours.dtype == theirs.dtype, name
            np.testing.assert_array_equal(ours, theirs, name)
        elif isinstance(theirs, torch.Tensor):
            assert torch.equal(ours, theirs), name
        else:
            assert ours == theirs, name


def test_decoding_is_built_as_any_step_is() -> None:
    builder, chunks = StepBuilder(Model(), BLOCK, image_patch_id=52), decoding()
    quick, general = builder._decode(chunks), builder._mixed(chunks)
    assert_same(quick, general)
    assert not quick.samples_all


@pytest.mark.parametrize("decodes", range(5))
def test_decoding_beside_prompts_is_built_as_any_step_is(decodes: int) -> None:
    """A prompt with an image, of which a chunk is computed, and the last token of one."""
    builder = StepBuilder(Model(), BLOCK, image_patch_id=52)
    image = Embeds(torch.randn(6, 8).view(torch.uint8).numpy().tobytes(), "float32")
    made = sequence([52] * 15, spans=(MediaSpan("image", "a", 2, 6, (1, 4, 6)),), embeds=(image,))
    other = sequence(range(10, 15))
    for row, one in enumerate((made, other)):
        one.blocks.extend(range(100 + 5 * row, 105 + 5 * row))
    in_flight = Chunk(decoding()[0].sequence, 4, 1, samples=True, source=2)
    prompts = (Chunk(made, 4, 7, samples=False), Chunk(other, 4, 1, samples=True), in_flight)
    chunks = (*decoding()[:decodes], *prompts)
    assert_same(builder.build(Plan(chunks)), builder._mixed(chunks))


def guessed() -> Plan:
    """Sequences of which some have guesses; the last one computes the end of its prompt."""
    chunks = []
    for row, (prompt, generated, drafts) in enumerate([(3, 1, 2), (9, 5, 0), (4, 0, 3)]):
        made = sequence(range(10, 10 + prompt), range(50, 50 + generated), max_tokens=20)
        made.blocks.extend(range(7 * row, 7 * row + 7))
        made.draft([60 + row] * drafts)
        chunks.append(Chunk(made, made.num_tokens - 1, 1 + drafts, samples=True, drafts=drafts))
    return Plan(tuple(chunks), drafts=5)


def test_guesses_are_rows_of_a_decode_step() -> None:
    plan = guessed()
    step = StepBuilder(Model(), BLOCK, image_patch_id=62).build(plan)
    assert (step.max_query_len, step.samples_all, len(step)) == (1, True, 3 + 1 + 4), "as captured steps are"
    assert step.token_ids.tolist() == [50, 60, 60, 54, 13, 62, 62, 62]
    assert step.vision.tolist() == [False] * 5 + [True] * 3
    assert step.positions.tolist() == [[3, 4, 5, 13, 3, 4, 5, 6]] * 3
    assert step.context_lens.tolist() == [4, 5, 6, 14, 4, 5, 6, 7]
    assert step.slots.tolist() == [3, 4, 5, 7 * 4 + 13, 14 * 4 + 3, 14 * 4 + 4, 14 * 4 + 5, 14 * 4 + 6]
    assert step.blocks == [part.sequence.blocks.tobytes() for part in plan.parts]


def test_a_step_knows_its_lengths_on_the_host() -> None:
    step = StepBuilder(Model(), BLOCK, image_patch_id=52)._decode(decoding()).to(Model.device, BLOCK)
    (part,) = step.attention
    assert part.lengths == tuple(zip(part.query_start.diff().tolist(), part.context_lens.tolist(), strict=True))
    assert part.lengths == ((1, 4), (1, 14), (1, 8), (1, 7))


@pytest.mark.parametrize(("first_of_vision", "expected"), [(52, True), (99, False)])
def test_a_step_says_if_a_row_is_the_vision_experts(first_of_vision: int, expected: bool) -> None:
    step = StepBuilder(Model(), BLOCK, image_patch_id=first_of_vision)._mixed(decoding())
    moved = step.to(torch.device("cpu"), BLOCK)
    assert (moved.vision is not None) == expected
    if moved.vision is not None:
        assert moved.vision.tolist() == [token >= first_of_vision for token in step.token_ids.tolist()]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_embeddings_of_media_are_those_of_the_chunk(dtype: torch.dtype) -> None:
    """Of two images, stored in two dtypes, the first is cut by the chunk's begin and the second by its end."""
    stored = [torch.randn(length, 8).to(kind) for length, kind in ((6, torch.float32), (4, torch.bfloat16))]
    names = ("float32", "bfloat16")
    media = tuple(
        Embeds(rows.view(torch.uint8).numpy().tobytes(), name) for rows, name in zip(stored, names, strict=True)
    )
    spans = (MediaSpan("image", "a", 2, 6, (1, 4, 6)), MediaSpan("image", "b", 9, 4, (1, 4, 4)))
    made = sequence([CONFIG.image_patch_id] * 15, spans=spans, embeds=media)
    made.blocks.extend(range(4))
    other = sequence(range(10, 13))
    other.blocks.extend(range(4, 8))
    model = type("Cast", (Model,), {"dtype": dtype})()
    chunks = (Chunk(other, 0, 3, samples=True), Chunk(made, 4, 7, samples=False))
    host = StepBuilder(model, BLOCK, CONFIG.image_patch_id).build(Plan(chunks))
    step = host.to(Model.device, BLOCK)
    assert step.embed_rows.tolist() == [3, 4, 5, 6, 8, 9]
    assert torch.equal(step.embeds, torch.cat([stored[0][2:], stored[1][:2]]).to(dtype))


def test_tables_hold_the_blocks_of_every_row() -> None:
    tables = BlockTables(4, 6, torch.device("cpu"))
    rows = [np.array(blocks, np.int32).tobytes() for blocks in ([5, 6, 7], [1], [2, 3])]
    tables.update(rows)
    assert tables.device[0, :3].tolist() == [5, 6, 7]
    assert tables.device[1, 0] == 1
    assert tables.device[2, :2].tolist() == [2, 3]
    grown = [np.array(blocks, np.int32).tobytes() for blocks in ([5, 6, 7], [9], [2, 3, 4])]
    tables.update(grown)
    assert tables.device[0, :3].tolist() == [5, 6, 7]
    assert tables.device[1, 0] == 9
    assert tables.device[2, :3].tolist() == [2, 3, 4]


@pytest.mark.parametrize(("most", "sizes"), [(1, (1,)), (5, (1, 2, 4, 5)), (16, (1, 2, 4, 8, 16))])
def test_the_largest_batch_is_captured(most: int, sizes: tuple[int, ...]) -> None:
    assert capture_sizes(most) == sizes
