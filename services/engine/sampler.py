"""Draws one token a row from the model's logits.

Order of operations (the reference server's fused penalty kernel and sampler): logit bias; no end tokens before
min_tokens; repetition penalty over prompt and answer, then frequency and presence over the answer; temperature; bad
words; softmax; min_p; top_k; top_p. A row's result depends on its own logits, settings, seed and index only: every
operation works along rows, and the random number is a function of (seed, index).

What top_k and top_p keep is defined by value, so equally likely tokens stay or go together: with `p` after min_p,
top_k keeps p >= the k-th largest; of those, whose mass is S, top_p keeps the tokens for which the mass of all strictly
more likely ones is below top_p * S. Two strategies draw from that same distribution: `draw_sorted` finds the threshold
by sorting, `draw_rejecting` by drawing and raising a pivot until the draw is one to keep (exact, and no sort).
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from services.engine.philox import uniform
from services.engine.sampling import Entries, SamplingPlan
from services.engine.settings import SamplingClass
from shared.messages import TokenLogprob

BANNED = -1e10  # finite, so that a row of nothing but banned tokens is still a distribution
LEAST_LOGPROB = -9999.0  # what stands for minus infinity on the wire, as JSON has none


@dataclass(frozen=True, slots=True)
class Sampled:
    """One sequence's next token."""

    token: int
    logprob: TokenLogprob | None = None


@dataclass(frozen=True, slots=True)
class Rows:
    """The rows of a step that draw at random. `draw(n)` is [R] numbers in [0, 1), the n-th for each row."""

    top_k: Tensor  # [R] int64, 0: off
    top_p: Tensor  # [R] float64, above 0
    draw: Callable[[int], Tensor]

    @property
    def limits_k(self) -> bool:
        return bool((self.top_k > 0).any())

    @property
    def limits_p(self) -> bool:
        return bool((self.top_p < 1).any())


Strategy = Callable[[Tensor, Rows], Tensor]


class Sampler:
    """Batched sampling on one device."""

    def __init__(self, eos_ids: tuple[int, ...], sampling_class: SamplingClass, device: torch.device) -> None:
        self._device = device
        self._eos = torch.tensor(eos_ids, dtype=torch.int64, device=device)
        self._strategy: Strategy = {"base": draw_sorted, "rejection": draw_rejecting}[sampling_class]

    def sample(self, logits: Tensor, plan: SamplingPlan) -> list[Sampled]:
        """One token for each row.

        Args:
            logits: [R, vocabulary] float32; overwritten.
        """
        wanted = np.flatnonzero(plan.logprobs >= 0)
        raw = torch.log_softmax(logits[self._move(wanted)], dim=-1) if len(wanted) else None
        self._adjust(logits, plan)
        tokens = self._close_thinking(self._draw(logits, plan), plan)
        out = [Sampled(token) for token in tokens.tolist()]
        if raw is not None:
            reports = report(raw, tokens[self._move(wanted)], plan.logprobs[wanted])
            for row, logprob in zip(wanted.tolist(), reports, strict=True):
                out[row] = Sampled(out[row].token, logprob)
        return out

    def _adjust(self, logits: Tensor, plan: SamplingPlan) -> None:
        """Everything that acts on single logits, but for the temperature of rows that draw."""
        if len(plan.biased):
            logits[self._place(plan.biased)] += self._move(plan.bias)
        if len(plan.too_early):
            logits[self._place(plan.too_early)] = BANNED
        if len(plan.penalised):
            place, penalty = self._place(plan.penalised), self._move(plan.repetition)
            seen = logits[place]
            seen = torch.where(seen < 0, seen * penalty, seen / penalty)
            logits[place] = seen - self._move(plan.subtracted)
        if len(plan.bad):
            # Before the temperature instead of after it: dividing leaves a banned logit banned.
            logits[self._place(plan.bad)] = BANNED

    def _draw(self, logits: Tensor, plan: SamplingPlan) -> Tensor:
        """[R] token ids."""
        if plan.greedy.all():
            return logits.argmax(dim=-1)
        host = np.flatnonzero(~plan.greedy)
        rows = self._move(host)
        temperature = self._move(plan.temperature[host]).unsqueeze(1)
        probs = torch.softmax(logits[rows] / temperature, dim=-1)
        if plan.min_p[host].any():
            floor = self._move(plan.min_p[host]).unsqueeze(1) * probs.amax(dim=-1, keepdim=True)
            probs = probs.masked_fill(probs < floor, 0.0)
        seeds, indices = plan.seeds[host], plan.indices[host]
        drawn = self._strategy(
            probs,
            Rows(
                self._move(plan.top_k[host]),
                self._move(plan.top_p[host].astype(np.float64)),
                lambda n: self._move(uniform(seeds, indices, n)),
            ),
        )
        if len(host) == len(plan):
            return drawn
        return logits.argmax(dim=-1).index_copy_(0, rows, drawn)

    def _close_thinking(self, tokens: Tensor, plan: SamplingPlan) -> Tensor:
        """Put `</think>` where the thinking budget is used up, or an end token came before the thinking ended."""
        if (plan.close_ids < 0).all():
            return tokens
        close = self._move(plan.close_ids)
        forced = (close >= 0) & (self._move(plan.must_close) | torch.isin(tokens, self._eos))
        return torch.where(forced, close, tokens)

    def _place(self, entries: Entries) -> tuple[Tensor, Tensor]:
        return self._move(entries.rows), self._move(entries.tokens)

    def _move(self, array: NDArray[np.generic]) -> Tensor:
        return torch.from_numpy(array).to(self._device)


def draw_sorted(probs: Tensor, rows: Rows) -> Tensor:
    """Inverse-CDF sampling from what top_k and top_p keep, the threshold found by sorting.

    Args:
        probs: [R, vocabulary] float32, after min_p.

    Returns:
        [R] token ids.
    """
    if rows.limits_k or rows.limits_p:
        ordered = probs.sort(dim=-1, descending=True).values.double()
        ordered = ordered.masked_fill(ordered < kth_largest(ordered, rows.top_k), 0.0)
        above = ordered.cumsum(dim=-1) - ordered
        # Equals share the mass that is above the first of them.
        first = torch.searchsorted(-ordered, -ordered)
        kept = mass_allows(above.gather(1, first), ordered, rows) & (ordered > 0)
        threshold = ordered.masked_fill(~kept, torch.inf).amin(dim=-1, keepdim=True)
        probs = probs.masked_fill(probs.double() < threshold, 0.0)
    return pick(probs.double(), rows.draw(0))


def draw_rejecting(probs: Tensor, rows: Rows) -> Tensor:
    """The same distribution by rejection over pivots: draw among what is more likely than the pivot; keep the draw if
    top_p would, else make it the pivot.

    Every token that top_p keeps is more likely than any it drops, so a pivot only ever removes dropped ones, and given
    that the draw is kept it is distributed as it should be. The most likely token is always kept, so this ends.
    """
    weights = probs.double()
    if rows.limits_k:
        largest = weights.topk(int(rows.top_k.clamp(max=weights.shape[1]).max()), dim=-1).values
        weights = weights.masked_fill(weights < kth_largest(largest, rows.top_k), 0.0)
    pivot = weights.new_zeros(len(weights), 1)
    chosen = torch.full((len(weights),), -1, dtype=torch.int64, device=weights.device)
    round_ = 0
    while bool((chosen < 0).any()):
        drawn = pick(weights.masked_fill(weights <= pivot, 0.0), rows.draw(round_))
        q = weights.gather(1, drawn.unsqueeze(1))
        above = weights.masked_fill(weights <= q, 0.0).sum(dim=-1, keepdim=True)
        kept = mass_allows(above, weights, rows).squeeze(1)
        chosen = torch.where((chosen < 0) & kept, drawn, chosen)
        pivot = torch.maximum(pivot, torch.where(kept.unsqueeze(1), pivot, q))
        round_ += 1
    return chosen


def kth_largest(ordered: Tensor, top_k: Tensor) -> Tensor:
    """[R, 1] the smallest value that top_k keeps, of values sorted downwards; 0 where top_k is off."""
    last = (top_k - 1).clamp(0, ordered.shape[1] - 1).unsqueeze(1)
    # A top_k of a row beyond what was sorted for its neighbours cannot be: the sort covers the largest of them.
    return ordered.gather(1, last).masked_fill((top_k <= 0).unsqueeze(1), 0.0)


def mass_allows(above: Tensor, weights: Tensor, rows: Rows) -> Tensor:
    """Whether top_p keeps tokens with a mass of `above` over them: above < top_p * S.

    S is 1 without top_k: min_p takes nothing away from the mass that top_p is a share of.
    """
    kept_mass = torch.where(rows.top_k.unsqueeze(1) > 0, weights.sum(dim=-1, keepdim=True), 1.0)
    top_p = rows.top_p.unsqueeze(1)
    return (top_p >= 1) | (above < top_p * kept_mass)


def pick(weights: Tensor, numbers: Tensor) -> Tensor:
    """[R] indices drawn in proportion to [R, vocabulary] float64 weights by [R] numbers in [0, 1).

    Always in the order of the vocabulary, whatever was zeroed, so that a row without limits draws the same token
    whether or not a neighbour's limits made the batch look for thresholds.
    """
    cumulative = weights.cumsum(dim=-1)
    targets = numbers * cumulative[:, -1]
    return torch.searchsorted(cumulative, targets.unsqueeze(1), right=True).squeeze(1)


def report(raw: Tensor, tokens: Tensor, wanted: NDArray[np.int64]) -> list[TokenLogprob]:
    """Log-probabilities as the model gave them, before anything a request asked for.

    Args:
        raw: [L, vocabulary] log-softmax.
        tokens: [L] sampled.
        wanted: [L] how many alternatives.
    """
    raw = raw.clamp(min=LEAST_LOGPROB)
    sampled = raw.gather(1, tokens.unsqueeze(1)).squeeze(1).tolist()
    best = raw.topk(int(wanted.max()), dim=-1)
    rows = zip(sampled, best.indices.tolist(), best.values.tolist(), wanted.tolist(), strict=True)
    return [TokenLogprob(own, tuple(zip(ids[:n], values[:n], strict=True))) for own, ids, values, n in rows]
