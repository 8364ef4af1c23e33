"""Rows copied in the order of experts, as the grouped GEMM reads them.

Without a GPU this runs in Triton's interpreter.
"""

import os

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
pytest.importorskip("triton")

from services.engine.kernels.quantize import quantize, stored_inputs
from services.engine.kernels.triton.moe import grouped
from services.engine.kernels.triton.moe.sort import sort_pairs

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.mark.parametrize("bits", [4, 8, 16])
@pytest.mark.parametrize("hidden", [72, 512, 1024, 600])
def test_every_input_of_a_row_is_where_its_weight_is_stored(
    hidden: int, bits: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows, top_k, experts, tile = 21, 2, 4, 16
    generator = torch.Generator().manual_seed(hidden)
    x = torch.randn(rows, hidden + 8, generator=generator).to(DEVICE)[:, :hidden]
    ids = torch.randint(0, experts, (rows, top_k), generator=generator).to(torch.int32).to(DEVICE)
    plain = torch.randn(experts, 8, hidden, generator=generator).to(DEVICE)
    weight = plain if bits == 16 else quantize(plain, bits)  # type: ignore[arg-type]
    order = sort_pairs(ids.flatten(), experts, tile)
    empty = torch.empty

    def poisoned(*args: int, **kwargs: object) -> Tensor:
        tensor: Tensor = empty(*args, **kwargs)  # type: ignore[call-overload]
        return tensor.fill_(float("nan"))

    monkeypatch.setattr(torch, "empty", poisoned)
    copied = grouped._in_order(x, order, top_k, weight)
    used = int(order.tile_bounds[2]) * tile
    pairs = order.sorted_pair_ids[:used].long()
    expected = F.pad(x, (0, stored_inputs(weight) - hidden))[(pairs // top_k).clamp(min=0)]
    if bits == 4:  # 16 inputs of each of a block's four planes by turns
        expected = expected.view(used, -1, 4, 8, 16).transpose(2, 3).reshape(used, -1)
    expected[pairs < 0] = 0
    assert (pairs < 0).any()
    assert (pairs >= 0).sum() == rows * top_k
    assert torch.equal(copied[:used], expected)
