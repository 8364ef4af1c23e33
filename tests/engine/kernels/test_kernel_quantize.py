"""Quantised weights: values, packing, error and size."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from services.engine.kernels.quantize import Bits, Quantized, dense, dequantize, factored, group_scales, quantize


def naive8(weight: np.ndarray) -> np.ndarray:
    """The integers of the scheme, one by one."""
    out = np.zeros(weight.shape, np.int64)
    for place in np.ndindex(*weight.shape[:-1]):
        amax = max(abs(weight[place]))
        for i, w in enumerate(weight[place]):
            scaled = w / amax * 127 if amax else 0.0
            out[(*place, i)] = int(np.sign(scaled)) * int(np.floor(abs(scaled) + 0.5))
    return out


def stored_values(q: Quantized) -> np.ndarray:
    """The integers in the tensor, nibble by nibble."""
    data = q.data.numpy().astype(np.int64)
    if q.bits == 8:
        return data
    out = np.empty((*data.shape[:-1], q.in_features), np.int64)
    for *row, i in np.ndindex(*out.shape):
        block, plane, lane = i // 512, i % 512 // 128, i % 128
        nibble = data[(*row, 128 * block + lane)] >> (4 * plane) & 0xF
        out[(*row, i)] = nibble - 16 if nibble >= 8 else nibble
    return out


def value_of(code: int) -> float:
    return float(2.0 ** (code // 16 - 15) * (1 + code % 16 / 16))


def stored_scales(q: Quantized) -> np.ndarray:
    """The scale of each input, in float64."""
    rows = q.scale.double().numpy()
    out = np.empty((*rows.shape, q.in_features))
    for *row, i in np.ndindex(*out.shape):
        if q.groups is None:
            out[(*row, i)] = rows[tuple(row)]
        else:
            code = int(q.groups[(*row[:-1], i // 512, row[-1])]) >> (8 * (i % 512 // 128)) & 0xFF
            out[(*row, i)] = value_of(code) * rows[tuple(row)]
    return out


SHAPES = pytest.mark.parametrize("shape", [(5, 6), (3, 4, 10), (1, 2), (2, 600), (1, 1025)])


@SHAPES
def test_eight_bits(shape: tuple[int, ...]) -> None:
    weight = torch.randn(shape)
    weight.flatten(0, -2)[0] = 0
    q = quantize(weight, 8)
    np.testing.assert_array_equal(stored_values(q), naive8(weight.numpy()))
    np.testing.assert_allclose(q.scale.numpy(), weight.abs().amax(-1).numpy() / 127, rtol=1e-6)


@pytest.mark.parametrize("bits", [4, 8])
@SHAPES
def test_packing(bits: Bits, shape: tuple[int, ...]) -> None:
    q = quantize(torch.randn(shape), bits)
    exact = stored_values(q) * stored_scales(q)
    np.testing.assert_allclose(dequantize(q).numpy(), exact, rtol=1e-6, atol=0)


@SHAPES
def test_four_bits_have_the_scale_of_least_error(shape: tuple[int, ...]) -> None:
    """No scale that a group could have is better than its own, of any in an octave around the largest weight's."""
    weight = torch.randn(shape) * 10 ** torch.randn(shape[:-1]).unsqueeze(-1)
    q = quantize(weight, 4)
    error = (dequantize(q) - weight).double().numpy() ** 2
    exact, row = weight.double().numpy(), q.scale.double().numpy()
    for *place, first in np.ndindex(*shape[:-1], -(-shape[-1] // 128)):
        group = (*place, slice(128 * first, 128 * first + 128))
        amax = abs(exact[group]).max()
        for code in range(256):
            scale = value_of(code) * row[tuple(place)]
            if amax / 7 / 1.3 <= scale <= amax / 7:
                other = (np.clip(np.round(exact[group] / scale), -8, 7) * scale - exact[group]) ** 2
                assert error[group].sum() <= other.sum() * (1 + 1e-4) + 1e-12 * amax**2


def test_ties_of_eight_bits_round_away_from_zero() -> None:
    weight = torch.tensor([[127.0, 0.5, -0.5, 1.5, -2.5, -127.0]])
    assert stored_values(quantize(weight, 8)).tolist() == [[127, 1, -1, 2, -3, -127]]


@pytest.mark.parametrize("outlier", [30.0, 1e4, 1e9])
def test_an_outlier_costs_only_its_group(outlier: float) -> None:
    weight = torch.randn(4, 512)
    plain = dequantize(quantize(weight, 4))
    weight[:, 200] = outlier
    error = (dequantize(quantize(weight, 4)) - weight)[:, 256:]
    if outlier < 2**14:  # of the range of scales
        assert error.norm() < 1.1 * (plain - weight)[:, 256:].norm()
    else:
        assert torch.isfinite(error).all()


@pytest.mark.parametrize("bits", [4, 8])
def test_a_row_of_zeros(bits: Bits) -> None:
    weight = torch.randn(3, 300)
    weight[1] = 0
    restored = dequantize(quantize(weight, bits))
    assert (restored[1] == 0).all()
    assert (restored[::2] != 0).any()


def test_error_of_eight_bits_is_at_most_half_a_step() -> None:
    weight = torch.randn(9, 64)
    step = weight.abs().amax(-1, keepdim=True) / 127
    assert ((dequantize(quantize(weight, 8)) - weight).abs() <= step * 0.5001).all()


@pytest.mark.parametrize(("bits", "bound"), [(8, 0.012), (4, 0.105)])
def test_relative_error_of_bf16_weights(bits: Bits, bound: float) -> None:
    """A uniform error of one step has deviation step / sqrt(12); amax of 512 normals is about 3.1 deviations, so the
    error of 8 bits is about 3.1 / (127 sqrt(12)) of the weights: 0.007. 4 bits: 0.1, by docs/engine-performance.md."""
    weight = (torch.randn(64, 512) * 0.02).bfloat16()
    q = quantize(weight, bits)
    assert q.scale.dtype == torch.bfloat16
    error = (dequantize(q).double() - weight.double()).norm() / weight.double().norm()
    assert 0 < float(error) < bound


def test_sizes() -> None:
    weight = torch.randn(3, 10, 512).bfloat16()
    assert quantize(weight, 8).nbytes == 3 * 10 * 512 + 3 * 10 * 2
    assert quantize(weight, 4).nbytes == 3 * 10 * 256 + 3 * 10 * 2 + 3 * 10 * 4
    for bits in (4, 8):
        q = quantize(weight, bits)
        assert (len(q), q.in_features) == (3, 512)


@pytest.mark.parametrize("bits", [4, 8])
def test_an_expert_of_a_stack_is_the_stack_s_slice(bits: Bits) -> None:
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


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_both_scales_are_found_again_in_their_products(dtype: torch.dtype) -> None:
    """float32 holds the products exactly; a row of several groups has hardly ever two such pairs."""
    weight = (torch.randn(500, 2560) * torch.rand(500, 1) * 0.05).to(dtype)
    weight[3] = 0
    q = quantize(weight, 4)
    assert q.groups is not None
    scales = group_scales(q.groups)
    products = scales * q.scale.float().unsqueeze(-1)
    both = factored(products, dtype)
    assert both is not None
    assert torch.equal(both[1] * both[0].float().unsqueeze(-1), products)
    same = both[0] == q.scale
    assert int(same.sum()) >= 498
    assert torch.equal(both[1][same & (q.scale > 0)], scales[same & (q.scale > 0)])
    assert factored(products * 1.001, dtype) is None
