"""Masks of logits by bits, against the definition. Triton's runs on the GPU where there is one, else interpreted."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from services.engine.kernels.reference.mask_logits import mask_logits
from services.engine.kernels.triton.sampling import mask_logits as gpu_mask_logits

GPU = "cuda" if torch.cuda.is_available() else "cpu"
MASKS = [(mask_logits, "cpu"), (gpu_mask_logits.mask_logits, GPU)]


@pytest.mark.parametrize(("mask", "device"), MASKS, ids=["torch", "triton"])
@pytest.mark.parametrize("vocabulary", [8, 31, 5000])
def test_what_has_no_bit_is_minus_infinity(
    mask: Callable[[Tensor, Tensor, Tensor], None], device: str, vocabulary: int
) -> None:
    rows = [3, 0]
    rng = np.random.default_rng(0)
    allowed = rng.random((len(rows), -(-vocabulary // 32) * 32)) < 0.5
    logits = torch.from_numpy(rng.normal(size=(5, vocabulary)).astype(np.float32))
    logits[0, 0] = float("nan")  # adding minus infinity would keep it
    allowed[rows.index(0), 0] = False
    expected = logits.clone()
    for row, bits in zip(rows, allowed, strict=True):
        expected[row, torch.from_numpy(~bits[:vocabulary])] = float("-inf")
    bits = torch.from_numpy(np.packbits(allowed, axis=1, bitorder="little"))
    made = logits.to(device)
    mask(made, torch.tensor(rows, device=device), bits.to(device))
    assert torch.equal(made.cpu(), expected)
