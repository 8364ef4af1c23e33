"""Operations on rows alone: norms, rotary, SwiGLU's gate, embeddings, projections."""

import numpy as np
import pytest
import torch

from services.engine.kernels.quantize import Bits, dequantize, quantize
from services.engine.kernels.reference.embed import embed
from services.engine.kernels.reference.linear import linear
from services.engine.kernels.reference.logits import logits
from services.engine.kernels.reference.rms_norm import add_rms_norm, rms_norm
from services.engine.kernels.reference.rotary import rotary, rotary_tables
from services.engine.kernels.reference.silu_mul import silu_mul

pytestmark = pytest.mark.usefixtures("poisoned_allocations")

TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 2e-2}
DTYPES = list(TOLERANCE)


def close(actual: torch.Tensor, expected: np.ndarray, dtype: torch.dtype) -> None:
    np.testing.assert_allclose(actual.double().numpy(), expected, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


def naive_norm(x: np.ndarray, weight: np.ndarray, eps: float) -> np.ndarray:
    return np.stack([row / np.sqrt((row * row).sum() / len(row) + eps) * weight for row in x])


@pytest.mark.parametrize("dtype", DTYPES)
def test_rms_norm(dtype: torch.dtype) -> None:
    x, weight = torch.randn(5, 7).to(dtype), torch.randn(7).to(dtype)
    actual = rms_norm(x, weight, 0.1)
    assert actual.dtype == dtype
    close(actual, naive_norm(x.double().numpy(), weight.double().numpy(), 0.1), dtype)


def test_rms_norm_of_zeros_is_zero() -> None:
    assert torch.equal(rms_norm(torch.zeros(1, 3), torch.ones(3), 1e-5), torch.zeros(1, 3))


@pytest.mark.parametrize("dtype", DTYPES)
def test_add_rms_norm(dtype: torch.dtype) -> None:
    x, residual, weight = torch.randn(3, 9).to(dtype), torch.randn(3, 9).to(dtype), torch.randn(9).to(dtype)
    before = x.clone(), residual.clone()
    normed, total = add_rms_norm(x, residual, weight, 1e-5)
    assert torch.equal(x, before[0])
    assert torch.equal(residual, before[1])
    close(total, x.double().numpy() + residual.double().numpy(), dtype)
    close(normed, naive_norm(total.double().numpy(), weight.double().numpy(), 1e-5), dtype)


def test_rotary_tables_take_each_frequency_from_its_axis() -> None:
    positions = torch.tensor([[0, 3, 70000], [1, 5, 2], [2, 8, 9]])
    frequencies, axes = torch.tensor([1.0, 0.25, 0.001]), torch.tensor([1, 2, 0])
    cos, sin = rotary_tables(positions, frequencies, axes)
    for n in range(3):
        for i in range(3):
            angle = float(positions[axes[i], n]) * float(frequencies[i])
            assert float(cos[n, i]) == pytest.approx(np.cos(angle), abs=5e-6)
            assert float(sin[n, i]) == pytest.approx(np.sin(angle), abs=5e-6)


@pytest.mark.parametrize("dtype", DTYPES)
def test_rotary_turns_neighbouring_pairs_in_place_and_leaves_the_values(dtype: torch.dtype) -> None:
    qkv = torch.randn(3, 5, 6).to(dtype)
    before = qkv.clone()
    angles = torch.randn(3, 3, dtype=torch.float64)
    rotary(qkv[:, :4], angles.cos().float(), angles.sin().float())
    assert torch.equal(qkv[:, 4], before[:, 4])
    expected = np.empty((3, 4, 6))
    for n, head, i in np.ndindex(3, 4, 3):
        turned = complex(before[n, head, 2 * i], before[n, head, 2 * i + 1]) * np.exp(1j * float(angles[n, i]))
        expected[n, head, 2 * i], expected[n, head, 2 * i + 1] = turned.real, turned.imag
    close(qkv[:, :4], expected, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_silu_mul_gates_with_the_first_half(dtype: torch.dtype) -> None:
    x = (torch.randn(4, 10) * 5).to(dtype)
    gate, up = x.double().numpy()[:, :5], x.double().numpy()[:, 5:]
    actual = silu_mul(x)
    assert actual.dtype == dtype
    np.testing.assert_allclose(actual.double().numpy(), gate / (1 + np.exp(-gate)) * up, rtol=TOLERANCE[dtype])


def test_embed_replaces_rows_and_leaves_the_table() -> None:
    table = torch.randn(6, 4)
    before = table.clone()
    embeds = torch.randn(2, 4)
    out = embed(table, torch.tensor([5, 0, 3, 3]), torch.tensor([3, 1]), embeds)
    assert torch.equal(out, torch.stack([before[5], embeds[1], before[3], embeds[0]]))
    out.zero_()
    assert torch.equal(table, before)


def test_embed_without_media() -> None:
    table = torch.randn(6, 4)
    out = embed(table, torch.tensor([1]), torch.empty(0, dtype=torch.long), torch.empty(0, 4))
    assert torch.equal(out, table[1:2])


@pytest.mark.parametrize("dtype", DTYPES)
def test_linear(dtype: torch.dtype) -> None:
    x, weight = torch.randn(3, 5).to(dtype), torch.randn(7, 5).to(dtype)
    expected = np.einsum("ni,oi->no", x.double().numpy(), weight.double().numpy())
    actual = linear(x, weight)
    assert actual.dtype == dtype
    close(actual, expected, dtype)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("dtype", DTYPES)
def test_linear_with_a_quantized_weight_is_dequantize_then_matmul(bits: Bits, dtype: torch.dtype) -> None:
    x, weight = torch.randn(3, 10).to(dtype), quantize(torch.randn(7, 10).to(dtype), bits)
    assert torch.equal(linear(x, weight), linear(x, dequantize(weight)))


def test_logits_are_float32() -> None:
    x, weight = torch.randn(2, 5), torch.randn(11, 5)
    close(logits(x, weight), np.einsum("ni,oi->no", x.double().numpy(), weight.double().numpy()), torch.float32)
    assert logits(x.bfloat16(), weight.bfloat16()).dtype == torch.float32
    assert logits(x[:0], weight).shape == (0, 11)
