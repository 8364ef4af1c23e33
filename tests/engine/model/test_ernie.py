"""The decoder against transformers, through the paged cache."""

import pytest
import torch
from decoder_judge import Judge, Piece
from msgspec.structs import replace
from paged_driver import BLOCK_SIZE, Driver, Paged

from services.engine.model.ernie import ErnieModel, rotary_plan

TOLERANCE = 1e-4  # absolute, on logits of up to 7

PROMPTS: dict[str, tuple[Piece, ...]] = {
    "text": ([5, 6, 7, 8, 33, 1, 77, 2, 64, 12, 9],),
    "one image": ([5, 6], ("image", (1, 4, 6)), [7, 8, 9]),
    "images": ([5], ("image", (1, 4, 6)), [7], ("image", (1, 2, 10)), [9, 8], ("image", (1, 6, 2)), [3]),
    "video": ([11, 12], ("video", (4, 4, 6)), [13, 14]),
    "mix": ([5, 6], ("video", (6, 6, 4)), [7], ("image", (1, 4, 4)), [8, 9], ("video", (2, 2, 4)), [10]),
}


@pytest.mark.parametrize("chunk", [1, 7, 1000])
@pytest.mark.parametrize("name", PROMPTS)
def test_logits_are_transformers(judge: Judge, model: ErnieModel, name: str, chunk: int) -> None:
    sequence, expected = judge.prompt(*PROMPTS[name])
    actual = Driver(model).run(sequence, chunk)
    assert actual.dtype == torch.float32
    assert float((actual - expected).abs().max()) <= TOLERANCE


def test_routing_goes_by_id_wherever_the_chunk_begins(judge: Judge, model: ErnieModel) -> None:
    """Start and end tokens of media have no embedding of their own; alone in a chunk they are still vision tokens."""
    sequence, expected = judge.prompt([5, judge.markers["image"][0], 6, judge.markers["video"][1]])
    assert float((Driver(model).run(sequence, 1) - expected).abs().max()) <= TOLERANCE
    step = Driver(model).plan([(Paged(sequence.ids, sequence.positions), 4)], None)
    assert step.vision.tolist() == [False, True, False, True]


def test_sequences_of_every_kind_share_steps(judge: Judge, model: ErnieModel) -> None:
    """Decode rows beside prefill chunks, sequences that come and go: each row is what it would be alone."""
    cases = [judge.prompt(*pieces, seed=i) for i, pieces in enumerate(PROMPTS.values())]
    sequences, pace, driver = [sequence for sequence, _ in cases], [1, 5, 3, 1, 64], Driver(model, 96)
    rows: list[list[torch.Tensor]] = [[] for _ in cases]
    mixed = False
    while any(s.computed < len(s.ids) for s in sequences):
        active = [i for i, s in enumerate(sequences) if s.computed < len(s.ids)]
        work = [(sequences[i], min(pace[i], len(sequences[i].ids) - sequences[i].computed)) for i in active]
        counts = [count for _, count in work]
        mixed |= min(counts) == 1 < max(counts)
        for i, logits in zip(active, driver.step(work), strict=True):
            rows[i].append(logits)
    assert mixed
    for logits, (_, expected) in zip(rows, cases, strict=True):
        assert float((torch.cat(logits) - expected).abs().max()) <= TOLERANCE


def test_a_cached_prefix_is_taken_over(judge: Judge, model: ErnieModel) -> None:
    driver = Driver(model)
    first, _ = judge.prompt([5, 6], ("image", (1, 4, 6)), [7, 8, 9, 10])
    driver.run(first, 1000)
    second, expected = judge.prompt([5, 6], ("image", (1, 4, 6)), [7, 8, 30, 31, 32])
    second.computed = 12  # two tokens, start, six placeholders, end, two tokens
    second.table = first.table[: second.computed // BLOCK_SIZE]
    kept = [driver.cache.keys[:, block].clone() for block in second.table]
    actual = driver.run(second, 2)
    assert float((actual - expected[12:]).abs().max()) <= TOLERANCE
    assert all(torch.equal(driver.cache.keys[:, b], k) for b, k in zip(second.table, kept, strict=False))


def test_only_the_wanted_rows_have_logits(judge: Judge, model: ErnieModel) -> None:
    sequence, expected = judge.prompt(*PROMPTS["text"])
    driver = Driver(model)
    (none,) = driver.step([(sequence, 3)], [])
    assert none.shape == (0, model.config.vocab_size)
    (some,) = driver.step([(sequence, 8)], [7, 0])
    assert float((some - expected[[10, 3]]).abs().max()) <= TOLERANCE


def test_greedy_decode_is_transformers_generate(judge: Judge, model: ErnieModel) -> None:
    """Each token is fed back at the position after the last one."""
    sequence, _ = judge.prompt(*PROMPTS["one image"])
    driver, logits = Driver(model), torch.empty(0)
    following = int(sequence.positions.max()) + 1
    for _ in range(6):
        logits = driver.step([(sequence, len(sequence.ids) - sequence.computed)])[0]
        sequence.ids.append(int(logits[-1].argmax()))
        sequence.positions = torch.cat([sequence.positions, torch.full((3, 1), following)], 1)
        following += 1
    answer = sequence.ids[-6:]
    assert max(answer) < model.config.image_patch_id, "transformers routes no generated token to the vision experts"
    prompt = PROMPTS["one image"]
    for count in range(6):
        _, expected = judge.prompt(*prompt, answer[:count])
        assert int(expected[-1].argmax()) == answer[count]


def test_frequencies_and_axes_of_the_full_size_model(model: ErnieModel) -> None:
    config = replace(model.config, head_dim=128, time_freqs=20, rope_theta=500000.0)
    frequencies, axes = rotary_plan(config, torch.device("cpu"))
    assert axes.tolist() == [1, 2] * 22 + [0] * 20
    assert frequencies.shape == (64,)
    for i in (0, 1, 43, 63):
        assert float(frequencies[i]) == pytest.approx(500000 ** (-2 * i / 128), rel=1e-6)
