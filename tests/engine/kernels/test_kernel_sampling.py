"""Thresholds and draws: all implementations against the definition in exact arithmetic, on rows that try to break them.

The Triton ones run on the GPU where there is one, else in Triton's interpreter.
"""

import math
from collections.abc import Callable
from fractions import Fraction
from functools import cache

import numpy as np
import pytest
import torch
from torch import Tensor

from services.engine.kernels.reference.argmax import argmax
from services.engine.kernels.reference.pick import WHOLE, pick
from services.engine.kernels.reference.threshold import threshold, threshold_by_search
from services.engine.kernels.triton.sampling import argmax as gpu_argmax
from services.engine.kernels.triton.sampling import pick as gpu_pick
from services.engine.kernels.triton.sampling import threshold as gpu_threshold

GPU = "cuda" if torch.cuda.is_available() else "cpu"

Threshold = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
THRESHOLDS: list[tuple[Threshold, str]] = [
    (threshold, "cpu"),
    (threshold_by_search, "cpu"),
    (gpu_threshold.threshold, GPU),
]
PICKS = [(pick, "cpu"), (gpu_pick.pick, GPU)]


@pytest.fixture(autouse=True)
def poison(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fill allocations with values that no result may have: NaN, or a large negative number."""
    empty, empty_like = torch.empty, torch.empty_like

    def fill(tensor: Tensor) -> Tensor:
        return tensor.fill_(float("nan")) if tensor.is_floating_point() else tensor.fill_(-(1 << 30))

    monkeypatch.setattr(torch, "empty", lambda *a, **k: fill(empty(*a, **k)))
    monkeypatch.setattr(torch, "empty_like", lambda *a, **k: fill(empty_like(*a, **k)))


# ---------------------------------------------------------------------------------------------------------- the rows


def spread(vocabulary: int, scale: float, seed: int = 0) -> Tensor:
    """[vocabulary] the probabilities of normal logits."""
    logits = torch.randn(vocabulary, generator=torch.Generator().manual_seed(seed)) * scale
    return torch.softmax(logits, dim=-1)


def of_logits(vocabulary: int, **values: float) -> Tensor:
    """The probabilities of logits that are all `rest` but for those given as t<id>."""
    logits = torch.full((vocabulary,), values.pop("rest"))
    for name, value in values.items():
        logits[int(name[1:])] = value
    return torch.softmax(logits, dim=-1)


def powers(vocabulary: int) -> Tensor:
    """1/2, 1/4, 1/8 ... and the last again: every sum is a float, and shares are met exactly."""
    exponents = torch.arange(1, vocabulary + 1).clamp(max=vocabulary - 1)
    return torch.pow(2.0, -exponents.float())


def tied(vocabulary: int) -> Tensor:
    """Five values, each many times, mixed."""
    return torch.softmax((torch.arange(vocabulary) * 7 % 5).float(), dim=-1)


ROWS: dict[str, Tensor] = {
    "one token": torch.ones(1),
    "two tokens": torch.tensor([0.25, 0.75]),
    "flat": torch.full((300,), 1 / 300),
    "flat, more than a slice": torch.full((4500,), 1 / 4500),
    "one-hot": of_logits(100, rest=-math.inf, t63=0.0),
    "one-hot but for underflow": of_logits(100, rest=-95.0, t63=0.0, t99=-80.0),
    "banned": of_logits(100, rest=-1e10),
    "half minus infinity": torch.cat([spread(70, 2.0), torch.zeros(60)]),
    "two of all": of_logits(2049, rest=-math.inf, t0=1.0, t2048=1.0),
    "two of all, late in their slices": of_logits(2200, rest=-math.inf, t0=1.0, t2100=1.0),
    "tied": tied(301),
    "tied, more than a slice": tied(2500),
    "powers": powers(24),
    "powers, past what a float has": powers(90),
    "at a power, one float below, and less": torch.tensor(
        [2.0**-10] * 512 + [2.0**-10 - 2.0**-34] * 300 + [0.75 * 2.0**-10] * 282
    ),
    "neighbouring floats": torch.softmax(torch.tensor([1.0, 1.0 + 2**-22, 1.0 - 2**-22] * 40), dim=-1),
    "peaked": spread(1000, 8.0),
    "even": spread(5000, 1.0),
    "almost flat": spread(4097, 0.01),
}

# min_p, top_k, top_p
LIMITS: list[tuple[float, int, float]] = [
    (0.0, 0, 1.0),
    (0.0, 1, 1.0),
    (0.0, 2, 1.0),
    (0.0, 7, 1.0),
    (0.0, 512, 1.0),
    (0.0, 700, 1.0),
    (0.0, 10**6, 1.0),
    (0.0, 0, 0.5),
    (0.0, 0, 0.75),
    (0.0, 0, 0.9),
    (0.0, 0, 0.999999),
    (0.0, 0, 1e-5),
    (0.3, 0, 1.0),
    (1.0, 0, 1.0),
    (0.1, 3, 1.0),
    (0.1, 0, 0.8),
    (0.0, 5, 0.5),
    (0.0, 5, 0.8),
    (0.01, 60, 0.95),
    (0.5, 1000, 0.3),
]


def kept_by_definition(row: Tensor, floor: float, top_k: int, top_p: float) -> set[int]:
    """Return the tokens that stay, sorted and summed in exact arithmetic."""
    probs = {token: p for token, p in enumerate(row.tolist()) if p >= floor and p > 0}
    if top_k > 0:
        smallest = sorted(probs.values(), reverse=True)[:top_k][-1]
        probs = {token: p for token, p in probs.items() if p >= smallest}
    if top_p >= 1:
        return set(probs)
    # Masses are counted in multiples of 2^-60; the limit is a double, like the setting.
    share = sum(map(_mass, probs.values())) if top_k > 0 else WHOLE
    limit = Fraction(top_p * float(share))
    equals: dict[float, list[int]] = {}
    for token, p in probs.items():
        equals.setdefault(p, []).append(token)
    above, kept = 0, set()
    for value in sorted(equals, reverse=True):
        if above >= limit:
            break
        kept.update(equals[value])
        above += len(equals[value]) * _mass(value)
    return kept


@cache
def _mass(p: float) -> int:
    return math.floor(Fraction(p) * WHOLE)


def limits(rows: int, settings: list[tuple[float, int, float]]) -> tuple[Tensor, Tensor, Tensor]:
    """min_p [R] float32, top_k [R] int64 and top_p [R] float64, as the sampler gives them."""
    chosen = [settings[nth % len(settings)] for nth in range(rows)]
    min_p, top_k, top_p = zip(*chosen, strict=True)
    return torch.tensor(min_p), torch.tensor(top_k), torch.tensor(top_p, dtype=torch.float32).double()


@pytest.mark.parametrize(("find", "device"), THRESHOLDS, ids=["sorted", "searched", "triton"])
@pytest.mark.parametrize("name", ROWS)
def test_what_is_kept_is_what_the_definition_keeps(find: Threshold, device: str, name: str) -> None:
    """Every row under all limits at once: a batch whose rows want different things."""
    row = ROWS[name]
    min_p, top_k, top_p = limits(len(LIMITS), LIMITS)
    probs = row.expand(len(LIMITS), -1).contiguous()
    floor = min_p * row.max()
    least = find(*(t.to(device) for t in (probs, floor, top_k, top_p))).cpu()
    assert least.shape == (len(LIMITS),)
    for nth, limit in enumerate(LIMITS):
        kept = set(((row >= least[nth]) & (row > 0)).nonzero().flatten().tolist())
        assert kept == kept_by_definition(row, float(floor[nth]), limit[1], float(top_p[nth])), limit


@pytest.mark.parametrize(("find", "device"), THRESHOLDS, ids=["sorted", "searched", "triton"])
def test_a_share_that_is_met_exactly_keeps_no_more(find: Threshold, device: str) -> None:
    """Over the second token lies a half, which is not below half of the whole."""
    probs = powers(10).expand(3, -1).contiguous().to(device)
    top_p = torch.tensor([0.5, 0.75, math.nextafter(0.75, 1.0)], dtype=torch.float64, device=device)
    nothing = torch.zeros(3, device=device)
    least = find(probs, nothing, nothing.long(), top_p)
    assert (probs >= least.unsqueeze(1)).sum(dim=1).tolist() == [1, 2, 3]


@pytest.mark.parametrize(("find", "device"), THRESHOLDS[1:], ids=["searched", "triton"])
def test_rows_are_searched_alike_alone_and_together(find: Threshold, device: str) -> None:
    names = ["tied", "flat", "two tokens", "peaked"]
    widest = max(len(ROWS[name]) for name in names)
    probs = torch.stack([torch.nn.functional.pad(ROWS[name], (0, widest - len(ROWS[name]))) for name in names])
    min_p, top_k, top_p = limits(len(names), LIMITS[15:])
    batch = [t.to(device) for t in (probs, min_p * probs.amax(dim=-1), top_k, top_p)]
    together = find(*batch)
    for nth in range(len(names)):
        assert torch.equal(find(*(t[nth : nth + 1].clone() for t in batch)), together[nth : nth + 1])


# ------------------------------------------------------------------------------------------------------------- drawing


NUMBERS = [0.0, 2.0**-53, 0.1, 0.25, 1 / 3, 0.5, 0.75, 0.9, 0.999999, 1 - 2.0**-53]


def drawn_by_definition(row: Tensor, least: float, number: float) -> int:
    kept = [_mass(p) if p >= least else 0 for p in row.tolist()]
    point = int(number * float(sum(kept)))
    for token, mass in enumerate(kept):
        point -= mass
        if point < 0:
            return token
    raise AssertionError("the point is inside")


@pytest.mark.parametrize(("most", "device"), [(argmax, "cpu"), (gpu_argmax.argmax, GPU)], ids=["torch", "triton"])
def test_the_most_likely_token_is_the_first_of_the_largest(most: Callable[[Tensor], Tensor], device: str) -> None:
    logits = torch.randn(5, 9001, generator=torch.Generator().manual_seed(0))
    places = [0, 9000, 4095, 4096, 5000]
    for row, place in enumerate(places):
        logits[row, place] = 50.0
        logits[row, max(place, 8500)] = 50.0  # again, in another slice
    on_device = logits.to(device)
    assert most(on_device).tolist() == places
    assert most(on_device).tolist() == places, "what counts programs is 0 again"
    assert 0 <= most(torch.full((1, 4097), float("nan"), device=device)).item() < 4097


@pytest.mark.parametrize(("draw", "device"), PICKS, ids=["torch", "triton"])
@pytest.mark.parametrize("name", ROWS)
def test_a_draw_is_the_token_at_its_point(draw: Callable[..., Tensor], device: str, name: str) -> None:
    row = ROWS[name]
    least = [0.0, float(row.max()), float(row[row > 0].median())]
    probs = row.expand(len(NUMBERS), -1).contiguous().to(device)
    numbers = torch.tensor(NUMBERS, dtype=torch.float64, device=device)
    for value in least:
        drawn = draw(probs, torch.full((len(NUMBERS),), value, device=device), numbers)
        assert drawn.dtype == torch.int64
        assert drawn.tolist() == [drawn_by_definition(row, value, number) for number in NUMBERS]


@pytest.mark.parametrize(("draw", "device"), PICKS, ids=["torch", "triton"])
def test_a_row_that_is_no_distribution_gives_some_token(draw: Callable[..., Tensor], device: str) -> None:
    probs = torch.zeros(2, 2500, device=device)
    drawn = draw(probs, torch.zeros(2, device=device), torch.tensor([0.0, 0.9], dtype=torch.float64, device=device))
    assert all(0 <= token < 2500 for token in drawn.tolist())


def test_triton_draws_from_what_is_kept_as_often_as_it_should() -> None:
    """Chi-square over fixed numbers, on a row in three slices with a tie across two of them."""
    draws, vocabulary = 400, 5000
    row = spread(vocabulary, 3.0)
    row[[10, 2100, 4999]] = row.max()
    row /= row.sum()
    probs = row.expand(draws, -1).contiguous().to(GPU)
    _, top_k, top_p = (t.to(GPU) for t in limits(draws, [(0.0, 6, 0.7)]))
    least = gpu_threshold.threshold(probs[:1], torch.zeros(1, device=GPU), top_k[:1], top_p[:1]).expand(draws)
    numbers = torch.rand(draws, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).to(GPU)
    drawn = gpu_pick.pick(probs, least.contiguous(), numbers).tolist()
    kept = sorted(kept_by_definition(row, 0.0, 6, float(top_p[0])))
    assert {10, 2100, 4999} <= set(kept)
    assert set(drawn) <= set(kept)
    expected = row[kept] / row[kept].sum() * draws
    counts = np.array([drawn.count(token) for token in kept])
    statistic = float(((counts - expected.numpy()) ** 2 / expected.numpy()).sum())
    # Exceeded once in ten thousand seeds with the freedom of up to five.
    assert 2 <= len(kept) - 1 <= 5
    assert statistic < 25.7
