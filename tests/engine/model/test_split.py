"""The decoder split over ranks: the logits of the whole, from parts that together are the whole and no more."""

from collections.abc import Callable
from dataclasses import fields, is_dataclass

import msgspec
import pytest
import torch
from paged_driver import Driver, Paged
from rank_threads import on_ranks
from small_model import SMALL, Drawn
from torch import Tensor

from services.engine.kernels.ops import Ops
from services.engine.kernels.quantize import Quantized
from services.engine.kernels.reference.parallel import parallel_ops, sum_parts
from services.engine.model.ernie import ErnieModel
from services.engine.model.split import WHOLE, Split
from services.engine.model.weights import load_model
from shared.errors import ConfigError
from shared.model.config_file import Quantization
from shared.model.division import divided

CONFIG = msgspec.structs.replace(SMALL, num_kv_heads=4)
TOLERANCE = 1e-4  # absolute, on logits of up to 100: the order of sums differs
IDS = [5, 6, 7, 210, 33, 1, 220, 2, 64, 12, 9]


def load(split: Split, ops: Ops, quantization: Quantization | None = None) -> ErnieModel:
    return load_model(Drawn(), CONFIG, "cpu", quantization, ops, split)


def logits(model: ErnieModel) -> Tensor:
    """Logits of a prompt in chunks of three, with media in two of them."""
    positions = torch.arange(len(IDS)).expand(3, -1)
    embeds = {at: torch.full((CONFIG.hidden_size,), 0.1 * at) for at in (3, 6)}
    return Driver(model).run(Paged(IDS, positions, embeds), 3)


def split_logits(size: int, quantization: Quantization | None = None) -> tuple[list[Tensor], int]:
    def work(rank: int, gather: Callable[[Tensor], Tensor]) -> Tensor:
        return logits(load(Split(rank, size), parallel_ops(gather), quantization))

    return on_ranks(size, work)


@pytest.mark.parametrize("size", [2, 4])
def test_ranks_compute_the_logits_of_the_whole(size: int) -> None:
    expected = logits(load(WHOLE, Ops()))
    found, exchanges = split_logits(size)
    assert float((found[0] - expected).abs().max()) <= TOLERANCE
    assert float(expected.std()) > 1
    assert all(torch.equal(found[0], other) for other in found[1:]), "ranks draw tokens from these"
    assert exchanges == 2 * CONFIG.num_layers * -(-len(IDS) // 3)


@pytest.mark.parametrize("quantization", ["wint8", "wint4"])
def test_quantised_parts_compute_much_the_same(quantization: Quantization) -> None:
    """A row that ranks sum has a scale in each of them, so the roundings are others, and no larger."""
    exact = logits(load(WHOLE, Ops()))
    found, _ = split_logits(2, quantization)
    whole = logits(load(WHOLE, Ops(), quantization))
    assert torch.equal(found[0], found[1])
    assert float((found[0] - exact).square().mean()) < 1.5 * float((whole - exact).square().mean())


def tensors_of(part: object) -> list[Tensor]:
    if isinstance(part, Tensor):
        return [part]
    if isinstance(part, tuple):
        return [tensor for item in part for tensor in tensors_of(item)]
    if is_dataclass(part) and not isinstance(part, Quantized):
        return [tensor for field in fields(part) for tensor in tensors_of(getattr(part, field.name))]
    return []


@pytest.mark.parametrize("size", [2, 4])
def test_parts_are_the_whole_and_no_more(size: int) -> None:
    """Every tensor is either the whole one on each rank, or they are its pieces."""
    whole = tensors_of(load(WHOLE, Ops()).weights)
    parts = [tensors_of(load(Split(rank, size), Ops()).weights) for rank in range(size)]
    kinds = set()
    for tensor, *pieces in zip(whole, *parts, strict=True):
        if pieces[0].shape == tensor.shape:
            assert all(torch.equal(piece, tensor) for piece in pieces)
            kinds.add("whole")
        else:
            assert sum(piece.numel() for piece in pieces) == tensor.numel()
            found, expected = torch.cat([piece.flatten() for piece in pieces]), tensor.flatten()
            assert torch.equal(found.sort().values, expected.sort().values)
            kinds.add("piece")
        assert all(piece.is_contiguous() for piece in pieces)
    assert kinds == {"whole", "piece"}


def test_the_sum_is_in_the_order_of_ranks_and_in_float32() -> None:
    parts = torch.tensor([[[256.0]], [[1.0]], [[1.0]]], dtype=torch.bfloat16)
    assert sum_parts(parts).item() == 258, "in bfloat16 256 + 1 is 256"


@pytest.mark.parametrize(
    ("size", "said"), [(8, "8.* 4 attention heads and 4 key-value heads"), (3, "it can be 1, 2, 4$")]
)
def test_what_does_not_divide_is_refused_with_its_numbers(size: int, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        divided(CONFIG, size)


def test_the_published_model_divides_by_two_and_four() -> None:
    published = msgspec.structs.replace(
        SMALL, num_heads=20, num_kv_heads=4, intermediate_size=12288, text_expert_size=1536, vision_expert_size=512,
        shared_expert_size=3072,
    )  # fmt: skip
    for size in (1, 2, 4):
        assert divided(published, size).num_heads == 20 // size
    with pytest.raises(ConfigError, match=r"8, and this model's 20 attention heads and 4 .* it can be 1, 2, 4$"):
        divided(published, 8)
