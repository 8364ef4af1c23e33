"""Four-bit weights by Triton's kernels: quantised, and with every scale there is.

Without a GPU this runs in Triton's interpreter.
"""

import os

import pytest
import torch
from torch import Tensor

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
pytest.importorskip("triton")

from services.engine.kernels.quantize import Quantized, dequantize, pack, pack_codes, quantize
from services.engine.kernels.triton.dense import linear as gpu_linear
from services.engine.kernels.triton.dense import quantize as gpu_quantize

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# The interpreter cannot multiply matrices of bfloat16, and cuts off instead of rounding to it.
DOT_DTYPES = [torch.float32, torch.bfloat16 if DEVICE == "cuda" else torch.float16]


def draw(*shape: int, dtype: torch.dtype) -> Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(*shape, generator=generator).to(dtype).to(DEVICE)


@pytest.mark.parametrize("dtype", DOT_DTYPES)
def test_every_scale_of_every_four_bits(dtype: torch.dtype) -> None:
    """Unpacked as the products unpack them: a product with ones in turn."""
    values = torch.arange(-8, 8).to(torch.int8).repeat(32).expand(256, -1)
    codes = torch.arange(256).view(-1, 1).expand(-1, 4)
    w = Quantized(
        pack(values).to(DEVICE), torch.ones(256, dtype=dtype, device=DEVICE), 4, 512, pack_codes(codes).to(DEVICE)
    )
    exact = values[:, :16].double() * (2.0 ** (codes[:, :1] // 16 - 15) * (1 + codes[:, :1] % 16 / 16)).double()
    ones = torch.zeros(16, 512, dtype=dtype, device=DEVICE)
    ones[torch.arange(16), torch.arange(16) * 17 + 200] = 1
    product = gpu_linear.partial_linear(ones, w).double().sum(0).T.cpu()
    expected = exact[:, (torch.arange(16) * 17 + 200) % 16]
    # Of float16, the least scales have no exact product.
    assert torch.equal(product[112:], expected[112:]) if dtype == torch.float16 else torch.equal(product, expected)


@pytest.mark.parametrize("dtype", DOT_DTYPES)
@pytest.mark.parametrize("shape", [(3, 5, 600), (7, 130)])
def test_quantize(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    plain = draw(*shape, dtype=dtype)
    plain.flatten(0, -2)[1] = 0
    own, expected = gpu_quantize.quantize(plain, 4), quantize(plain, 4)
    assert own.groups is not None
    assert expected.groups is not None
    assert (own.groups.shape, own.data.shape) == (expected.groups.shape, expected.data.shape)
    assert torch.equal(own.scale, expected.scale)
    errors = [float((dequantize(q).float() - plain.float()).norm()) for q in (own, expected)]
    assert errors[0] == pytest.approx(errors[1], rel=1e-3)
    assert (own.data != expected.data).float().mean() < 0.02, "ties apart, the same"
