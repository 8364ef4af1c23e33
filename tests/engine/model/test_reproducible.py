"""A row's logits are the same bits whatever is computed beside it, however its prompt is cut, on any number of
threads."""

import random
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from machine import has_reproducible_products
from paged_driver import Driver, Paged

from cli.demo import Dtype, write_demo
from services.engine.kernels.ops import Ops
from services.engine.model.ernie import ErnieModel
from services.engine.model.weights import load_model
from services.engine.run.rows import rows_depend_on_others
from shared.model.checkpoint import Checkpoint
from shared.model.config import load_model_config
from shared.model.config_file import Quantization

pytestmark = pytest.mark.skipif(not has_reproducible_products(), reason="another processor than those tried")

LENGTH = 140  # more than one tile of keys
MANY, SOME = (0, 1, 7, 16), (3,)  # sequences beside; dequantising takes long


def random_sequence(model: ErnieModel, length: int, rng: random.Random) -> Paged:
    """Text and placeholders, so that both pools of experts are used; an embedding for every tenth token."""
    ids = [rng.randrange(model.config.vocab_size) for _ in range(length)]
    generator = torch.Generator().manual_seed(rng.randrange(1 << 30))
    embeds = {at: torch.randn(model.config.hidden_size, generator=generator) for at in range(5, length, 10)}
    return Paged(ids, torch.arange(length).expand(3, -1), embeds)


def computed_among(model: ErnieModel, sequence: Paged, others: int, rng: random.Random) -> torch.Tensor:
    """Return the logits of all tokens, computed in chunks of any size among others that come and go."""
    driver, rows = Driver(model, 600), []
    fresh = Paged(sequence.ids, sequence.positions, sequence.embeds)
    beside = [random_sequence(model, rng.randrange(1, 30), rng) for _ in range(others)]
    while left := len(fresh.ids) - fresh.computed:
        work = [
            (other, rng.choice((1, rng.randint(1, len(other.ids) - other.computed))))
            for other in beside
            if other.computed < len(other.ids) and rng.random() < 0.8
        ]
        place = rng.randint(0, len(work))
        work.insert(place, (fresh, rng.choice((1, min(20, left), rng.randint(1, left)))))
        rows.append(driver.step(work)[place])
    return torch.cat(rows)


def demo(directory: Path, dtype: Dtype, quantization: Quantization | None = None) -> ErnieModel:
    write_demo(directory, dtype=dtype)
    return load_model(Checkpoint(directory), load_model_config(directory), "cpu", quantization, Ops())


@pytest.mark.parametrize(
    ("dtype", "quantization", "counts"),
    [
        ("float32", None, MANY),
        ("bfloat16", None, MANY),
        ("float16", None, SOME),
        ("float32", "wint8", SOME),
        ("bfloat16", "wint4", SOME),
    ],
)
def test_logits_are_the_same_bits_in_any_company(
    tmp_path: Path, dtype: Dtype, quantization: Quantization | None, counts: Sequence[int]
) -> None:
    model = demo(tmp_path / "model", dtype, quantization)
    assert not rows_depend_on_others(model.dtype), "this CPU's sums are not reproducible (shared/reproducible.py)"
    rng = random.Random(f"{dtype} {quantization}")
    sequence = random_sequence(model, LENGTH, rng)
    alone = Driver(model).run(sequence, LENGTH)
    for others in counts:
        among = computed_among(model, sequence, others, rng)
        differ = (among != alone).any(1).nonzero().flatten().tolist()
        assert not differ, f"rows {differ} have other logits with {others} sequences beside theirs"


def test_logits_are_the_same_bits_with_any_number_of_threads(tmp_path: Path) -> None:
    model = demo(tmp_path / "model", "float32")
    sequence = random_sequence(model, LENGTH, random.Random(0))
    before, found = torch.get_num_threads(), []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        fresh = Paged(sequence.ids, sequence.positions, sequence.embeds)
        found.append(Driver(model).run(fresh, LENGTH - 1))
    torch.set_num_threads(before)
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])
