"""Quantised weights: values, packing, error and size."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from services.engine.kernels.quantize import Quantized, dense, dequantize, quantize

LIMIT = {8: 127, 4: 7}


def naive_values(weight: np.ndarray, bits: int) -> np.ndarray:
    """The integers of the scheme, one by one."""
    out = np.zeros(weight.shape, np.int64)
    for place in np.ndindex(*weight.shape[:-1]):
        amax = max(abs(weight[place]))
        for i, w in enumerate(weight[place]):
            scaled = w / amax * LIMIT[bits] if amax else 0.0
            out[(*place, i)] = int(np.sign(scaled)) * int(np.floor(abs(scaled) + 0.5))
    return out


def stored_values(q: Quantized) -> np.ndarray:
    """The integers in the tensor, nibble by nibble."""
    data = q.data.numpy().astype(np.int64)
    if q.bits == 8:
        return data
    out = np.empty((*data.shape[:-1], q.in_features), np.int64)
    for *row, i in np.ndindex(*out.shape):
        group, plane, lane = i // 256, i % 256 // 64, i % 64
        nibble = data[(*row, 64 * group + lane)] >> (4 * plane) & 0xF
        out[(*row, i)] = nibble - 16 if nibble >= 8 else nibble
    return out


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("shape", [(5, 6), (3, 4, 10), (1, 2), (2, 300), (1, 513)])
def test_values_scales_and_packing(bits: int, shape: tuple[int, ...]) -> None:
    weight = torch.randn(shape)
    weight.flatten(0, -2)[0] = 0
    q = quantize(weight, bits)
    np.testing.assert_array_equal(stored_values(q), naive_values(weight.numpy(), bits))
    np.testing.assert_allclose(q.scale.numpy(), weight.abs().amax(-1).numpy() / LIMIT[bits], rtol=1e-6)
    np.testing.assert_allclose(
        dequantize(q).numpy(), stored_values(q) * q.scale.double().numpy()[..., None], rtol=1e-6, atol=0
    )


def test_ties_round_away_from_zero() -> None:
    weight = torch.tensor([[7.0, 0.5, -0.5, 1.5, -2.5, -7.0]])
    assert stored_values(quantize(weight, 4)).tolist() == [[7, 1, -1, 2, -3, -7]]


@pytest.mark.parametrize("bits", [4, 8])
def test_error_is_at_most_half_a_step(bits: int) -> None:
    weight = torch.randn(9, 64)
    step = weight.abs().amax(-1, keepdim=True) / LIMIT[bits]
    assert ((dequantize(quantize(weight, bits)) - weight).abs() <= step * 0.5001).all()


@pytest.mark.parametrize(("bits", "bound"), [(8, 0.012), (4, 0.16)])
def test_relative_error_of_bf16_weights(bits: int, bound: float) -> None:
    """A uniform error of one step has deviation step / sqrt(12); amax of 512 normals is about 3.1 deviations, so the
    error is about 3.1 / (limit sqrt(12)) of the weights: 0.007 and 0.13."""
    weight = (torch.randn(64, 512) * 0.02).bfloat16()
    q = quantize(weight, bits)
    assert q.scale.dtype == torch.bfloat16
    error = (dequantize(q).double() - weight.double()).norm() / weight.double().norm()
    assert 0 < float(error) < bound


def test_sizes() -> None:
    weight = torch.randn(3, 10, 512).bfloat16()
    assert quantize(weight, 8).nbytes == 3 * 10 * 512 + 3 * 10 * 2
    assert quantize(weight, 4).nbytes == 3 * 10 * 256 + 3 * 10 * 2
    for bits in (4, 8):
        q = quantize(weight, bits)
        assert (len(q), q.in_features) == (3, 512)


@pytest.mark.parametrize("bits", [4, 8])
def test_an_expert_of_a_stack_is_the_stack_s_slice(bits: int) -> None:
    weight = torch.randn(3, 5, 8)
    stacked = quantize(weight, bits)
    assert torch.equal(dequantize(stacked[2]), dequantize(quantize(weight[2], bits)))
    assert stacked[2].data.data_ptr() == stacked.data[2].data_ptr()


def test_padding_of_the_last_group_is_zero() -> None:
    q = quantize(torch.randn(2, 300), 4)
    padded = replace(q, in_features=512)
    assert (stored_values(padded)[:, 300:] == 0).all()


def test_dense_is_the_weight_itself_where_it_is_not_quantized() -> None:
    weight = torch.randn(2, 4)
    assert dense(weight) is weight
    assert torch.equal(dense(quantize(weight, 8)), dequantize(quantize(weight, 8)))
