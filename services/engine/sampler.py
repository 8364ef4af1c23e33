"""Draws one token a row from the model's logits.

Order of operations (the reference server's fused penalty kernel and sampler): logit bias; no end tokens before
min_tokens; repetition penalty over prompt and answer, then frequency and presence over the answer; temperature; bad
words; softmax; min_p; top_k; top_p. A row's result depends on its own logits, settings, seed and index only: every
operation works along rows, and the random number is a function of (seed, index).

What top_k and top_p keep is defined by value (kernels/threshold.py), so equally likely tokens stay or go together; the
draw is the inverse of the cumulated probabilities (kernels/pick.py), one number a token.

The device is given a step's arrays in one copy and launches, and is waited for once, where the result is read.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from services.engine.kernels.sampling_ops import SamplingOps
from services.engine.philox import uniform
from services.engine.sampling import SamplingPlan, heaviest
from services.engine.upload import upload
from shared.messages import TokenLogprob

BANNED = -1e10  # finite, so that a row of nothing but banned tokens is still a distribution
LEAST_LOGPROB = -9999.0  # what stands for minus infinity on the wire, as JSON has none


@dataclass(frozen=True, slots=True)
class Sampled:
    """One sequence's next token."""

    token: int
    logprob: TokenLogprob | None = None


@dataclass(frozen=True, slots=True)
class Moved:
    """A SamplingPlan on the device, of D rows that draw at random and L whose log-probabilities are asked for."""

    wanted: Tensor  # [L] rows
    drawing: Tensor  # [D] rows
    temperature: Tensor  # [D]
    top_k: Tensor  # [D]
    top_p: Tensor  # [D] float64
    min_p: Tensor  # [D]
    numbers: Tensor  # [D] float64 in [0, 1)
    biased_rows: Tensor
    biased_tokens: Tensor
    bias: Tensor
    early_rows: Tensor
    early_tokens: Tensor
    penalised_rows: Tensor
    penalised_tokens: Tensor
    repetition: Tensor
    subtracted: Tensor
    bad_rows: Tensor
    bad_tokens: Tensor
    close_ids: Tensor  # [R]
    must_close: Tensor  # [R]

    @staticmethod
    def of(plan: SamplingPlan, device: torch.device) -> "Moved":
        drawing = np.flatnonzero(~plan.greedy)
        arrays: dict[str, NDArray[Any]] = {
            "wanted": np.flatnonzero(plan.logprobs >= 0),
            "drawing": drawing,
            "temperature": plan.temperature[drawing],
            "top_k": plan.top_k[drawing],
            "top_p": plan.top_p[drawing].astype(np.float64),
            "min_p": plan.min_p[drawing],
            "numbers": uniform(plan.seeds[drawing], plan.indices[drawing]),
            "biased_rows": plan.biased.rows,
            "biased_tokens": plan.biased.tokens,
            "bias": plan.bias,
            "early_rows": plan.too_early.rows,
            "early_tokens": plan.too_early.tokens,
            "penalised_rows": plan.penalised.rows,
            "penalised_tokens": plan.penalised.tokens,
            "repetition": plan.repetition,
            "subtracted": plan.subtracted,
            "bad_rows": plan.bad.rows,
            "bad_tokens": plan.bad.tokens,
            "close_ids": plan.close_ids,
            "must_close": plan.must_close,
        }
        return Moved(**dict(zip(arrays, upload(list(arrays.values()), device), strict=True)))


class Sampler:
    """Batched sampling on one device."""

    def __init__(self, eos_ids: tuple[int, ...], ops: SamplingOps, device: torch.device) -> None:
        self._device = device
        self._eos = torch.tensor(eos_ids, dtype=torch.int64, device=device)
        self._ops = ops
        # A plain number would be copied to the device when it is put, and waited for.
        self._banned = torch.tensor(BANNED, device=device)

    def sample(self, logits: Tensor, plan: SamplingPlan) -> list[Sampled]:
        """One token for each row.

        Args:
            logits: [R, vocabulary] float32, contiguous; overwritten.
        """
        on = Moved.of(plan, self._device)
        raw = torch.log_softmax(logits[on.wanted], dim=-1) if len(on.wanted) else None
        self._adjust(logits, on)
        tokens = self._close_thinking(self._draw(logits, plan, on), plan, on)
        if raw is None:
            return [Sampled(token) for token in tokens.tolist()]
        return read(tokens, on.wanted, raw, plan)

    def rehearse(self, logits: Tensor) -> None:
        """Hold what the heaviest step would, and compile what it needs.

        Args:
            logits: as for `sample`.
        """
        self.sample(logits, heaviest(len(logits)))

    def _adjust(self, logits: Tensor, on: Moved) -> None:
        """Everything that acts on single logits, but for the temperature of rows that draw."""
        if len(on.bias):
            logits[on.biased_rows, on.biased_tokens] += on.bias
        if len(on.early_rows):
            logits[on.early_rows, on.early_tokens] = self._banned
        if len(on.repetition):
            place = on.penalised_rows, on.penalised_tokens
            seen = logits[place]
            seen = torch.where(seen < 0, seen * on.repetition, seen / on.repetition)
            logits[place] = seen - on.subtracted
        if len(on.bad_rows):
            # Before the temperature instead of after it: dividing leaves a banned logit banned.
            logits[on.bad_rows, on.bad_tokens] = self._banned

    def _draw(self, logits: Tensor, plan: SamplingPlan, on: Moved) -> Tensor:
        """[R] token ids."""
        drawing = ~plan.greedy
        if not drawing.any():
            return logits.argmax(dim=-1)
        if drawing.all():
            return self._draw_at_random(logits, plan, on)
        drawn = self._draw_at_random(logits[on.drawing], plan, on)
        return logits.argmax(dim=-1).index_copy_(0, on.drawing, drawn)

    def _draw_at_random(self, logits: Tensor, plan: SamplingPlan, on: Moved) -> Tensor:
        """[D] token ids of [D, vocabulary] logits, which are overwritten."""
        drawing = ~plan.greedy
        probs = torch.softmax(logits.div_(on.temperature.unsqueeze(1)), dim=-1)
        # Where no row asks for min_p, all of it is 0 and a floor as it stands.
        least = on.min_p * probs.amax(dim=-1) if plan.min_p[drawing].any() else on.min_p
        if (plan.top_k[drawing] > 0).any() or (plan.top_p[drawing] < 1).any():
            least = self._ops.threshold(probs, least, on.top_k, on.top_p)
        return self._ops.pick(probs, least, on.numbers)

    def _close_thinking(self, tokens: Tensor, plan: SamplingPlan, on: Moved) -> Tensor:
        """Put `</think>` where the thinking budget is used up, or an end token came before the thinking ended."""
        if (plan.close_ids < 0).all():
            return tokens
        ended = (tokens.unsqueeze(1) == self._eos).any(dim=1)
        return torch.where((on.close_ids >= 0) & (on.must_close | ended), on.close_ids, tokens)


def read(tokens: Tensor, wanted: Tensor, raw: Tensor, plan: SamplingPlan) -> list[Sampled]:
    """Fetch the tokens, and log-probabilities as the model gave them, before anything a request asked for.

    Args:
        tokens: [R] sampled.
        wanted: [L] rows that asked.
        raw: [L, vocabulary] log-softmax.
    """
    asked = plan.logprobs[plan.logprobs >= 0].tolist()
    best = raw.topk(min(max(*asked, 1), raw.shape[1]), dim=-1)
    own = raw.gather(1, tokens[wanted].unsqueeze(1))
    values = torch.cat([own, best.values], dim=1).clamp(min=LEAST_LOGPROB)
    # One array of 32 bits, so that the device is waited for once.
    parts = tokens.int(), best.indices.int().flatten(), values.view(torch.int32).flatten()
    numbers, ids, bits = np.split(torch.cat(parts).cpu().numpy(), np.cumsum([len(part) for part in parts])[:2])
    out = [Sampled(token) for token in numbers.tolist()]
    shown = zip(
        np.flatnonzero(plan.logprobs >= 0).tolist(),
        ids.reshape(len(asked), -1).tolist(),
        bits.view(np.float32).reshape(len(asked), -1).tolist(),
        asked,
        strict=True,
    )
    for row, tops, (sampled, *logprobs), count in shown:
        report = TokenLogprob(sampled, tuple(zip(tops[:count], logprobs[:count], strict=True)))
        out[row] = Sampled(out[row].token, report)
    return out
