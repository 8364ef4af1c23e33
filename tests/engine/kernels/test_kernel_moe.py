"""Routing and the routed experts of both pools."""

import dataclasses

import numpy as np
import pytest
import torch

from services.engine.kernels.quantize import Bits, dense, dequantize, quantize
from services.engine.kernels.reference.experts import ExpertPool, experts
from services.engine.kernels.reference.router import router

pytestmark = pytest.mark.usefixtures("poisoned_allocations")


def naive_route(x: np.ndarray, gate: np.ndarray, bias: np.ndarray, top_k: int) -> tuple[list[int], list[float]]:
    """One token, one pool."""
    scores = np.exp([sum(row * x) for row in gate])
    p = scores / scores.sum()
    chosen = sorted(range(len(p)), key=lambda e: -(p[e] + bias[e]))[:top_k]
    total = sum(p[e] for e in chosen)
    return chosen, [p[e] / total for e in chosen]


@pytest.mark.parametrize(("rows", "count", "top_k"), [(1, 3, 1), (13, 7, 3), (5, 4, 4)])
def test_router(rows: int, count: int, top_k: int) -> None:
    x, gate, bias = torch.randn(rows, 6), torch.randn(2 * count, 6), torch.randn(2 * count) * 0.3
    vision = torch.arange(rows) % 3 == 1
    ids, weights = router(x, gate, bias, vision, top_k)
    assert (ids.dtype, weights.dtype) == (torch.int32, torch.float32)
    for n in range(rows):
        first = count if vision[n] else 0
        pool = slice(first, first + count)
        chosen, expected = naive_route(
            x[n].double().numpy(), gate[pool].double().numpy(), bias[pool].double().numpy(), top_k
        )
        assert ids[n].tolist() == [first + e for e in chosen]
        np.testing.assert_allclose(weights[n].numpy(), expected, rtol=1e-5)


def test_no_row_of_the_vision_pool() -> None:
    x, gate, bias = torch.randn(5, 6), torch.randn(8, 6), torch.randn(8)
    for actual, expected in zip(
        router(x, gate, bias, None, 2), router(x, gate, bias, torch.zeros(5, dtype=torch.bool), 2), strict=True
    ):
        assert torch.equal(actual, expected)


def test_the_bias_chooses_and_does_not_weigh() -> None:
    gate = torch.tensor([[4.0], [1.0], [0.0], [0.0], [0.0], [0.0]])
    bias = torch.tensor([0.0, 0.0, 9.0, 0.0, 0.0, 0.0])
    ids, weights = router(torch.ones(1, 1), gate, bias, torch.tensor([False]), 2)
    assert ids.tolist() == [[2, 0]]
    p = np.exp([4.0, 0.0])
    np.testing.assert_allclose(weights[0].numpy(), [p[1] / p.sum(), p[0] / p.sum()], rtol=1e-5)


def test_weights_of_vanishing_probabilities_stay_finite() -> None:
    """Softmax underflows to 0 for the chosen expert: the sum is clamped instead of dividing by zero."""
    gate, bias = torch.tensor([[200.0], [0.0]] * 2), torch.tensor([0.0, 5.0] * 2)
    ids, weights = router(torch.ones(1, 1), gate, bias, torch.tensor([True]), 1)
    assert ids.tolist() == [[3]]
    assert weights.tolist() == [[0.0]]


def test_routing_of_bf16_activations_is_float32() -> None:
    x, gate, bias = torch.randn(9, 6).bfloat16(), torch.randn(8, 6), torch.zeros(8)
    vision = torch.zeros(9, dtype=torch.bool)
    for actual, expected in zip(
        router(x, gate, bias, vision, 2), router(x.float(), gate, bias, vision, 2), strict=True
    ):
        assert torch.equal(actual, expected)


HIDDEN, COUNT = 6, 3


def pool(size: int, dtype: torch.dtype) -> ExpertPool:
    return ExpertPool(torch.randn(COUNT, 2 * size, HIDDEN).to(dtype), torch.randn(COUNT, HIDDEN, size).to(dtype))


def naive_experts(
    x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor, text: ExpertPool, vision: ExpertPool
) -> np.ndarray:
    out = np.zeros(x.shape)
    for n, k in np.ndindex(*ids.shape):
        expert = int(ids[n, k])
        chosen, index = (text, expert) if expert < COUNT else (vision, expert - COUNT)
        gate_up = dense(chosen.gate_up[index]).double().numpy() @ x[n].double().numpy()
        gate, up = np.split(gate_up, 2)
        inner = gate / (1 + np.exp(-gate)) * up
        out[n] += float(weights[n, k]) * (dense(chosen.down[index]).double().numpy() @ inner)
    return out


@pytest.mark.parametrize(
    "ids",
    [
        [[0, 2], [5, 3], [2, 1], [4, 3], [0, 1]],
        [[1, 0]],  # text only
        [[5, 4], [4, 5]],  # vision only, one pool idle
        [[2, 1]] * 17,  # all on the same experts
    ],
)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 5e-2)])
def test_experts(ids: list[list[int]], dtype: torch.dtype, tolerance: float) -> None:
    chosen = torch.tensor(ids, dtype=torch.int32)
    x, weights = torch.randn(len(ids), HIDDEN).to(dtype), torch.rand(chosen.shape)
    text, vision = pool(4, dtype), pool(2, dtype)
    actual = experts(x, chosen, weights, text, vision)
    assert actual.dtype == dtype
    expected = naive_experts(x, chosen, weights, text, vision)
    scale = np.abs(expected).max()
    np.testing.assert_allclose(actual.double().numpy() / scale, expected / scale, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("bits", [4, 8])
def test_quantized_experts_are_dequantize_then_experts(bits: Bits) -> None:
    exact = [pool(4, torch.bfloat16), pool(2, torch.bfloat16)]
    stacks = [[quantize(dense(stack), bits) for stack in (p.gate_up, p.down)] for p in exact]
    packed = [ExpertPool(gate_up, down) for gate_up, down in stacks]
    restored = [ExpertPool(dequantize(gate_up), dequantize(down)) for gate_up, down in stacks]
    ids = torch.tensor([[0, 2], [5, 3], [2, 1]], dtype=torch.int32)
    x, weights = torch.randn(3, HIDDEN).bfloat16(), torch.rand(3, 2)
    assert torch.equal(experts(x, ids, weights, *packed), experts(x, ids, weights, *restored))
    assert not torch.equal(experts(x, ids, weights, *packed), experts(x, ids, weights, *exact))


def test_a_row_does_not_depend_on_the_others() -> None:
    text, vision = pool(4, torch.float32), pool(2, torch.float32)
    ids = torch.tensor([[0, 2], [5, 3], [2, 0], [2, 0]], dtype=torch.int32)
    x, weights = torch.randn(4, HIDDEN), torch.rand(4, 2)
    together = experts(x, ids, weights, text, vision)
    for n in range(4):
        row = slice(n, n + 1)
        torch.testing.assert_close(experts(x[row], ids[row], weights[row], text, vision), together[row])


def test_pools_say_how_many_experts_they_have() -> None:
    exact = pool(4, torch.float32)
    assert len(exact) == COUNT
    assert len(dataclasses.replace(exact, down=quantize(dense(exact.down), 8))) == COUNT
