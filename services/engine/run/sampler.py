"""Draws one token a row from the model's logits.

Order of operations (the reference server's fused penalty kernel and sampler): logit bias; no end tokens before
min_tokens; repetition penalty over prompt and answer, then frequency and presence over the answer; temperature; bad
words; softmax; min_p; top_k; top_p. A row's result depends on its own logits, settings, seed and index only: every
operation works along rows, and the random number is a function of (seed, index).

What top_k and top_p keep is defined by value (kernels/threshold.py), so equally likely tokens stay or go together; the
draw is the inverse of the cumulated probabilities (kernels/pick.py), one number a token.

The device is given a step's arrays in one copy and launches, and is waited for where the result is read.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from services.engine.kernels.sampling_ops import SamplingOps
from services.engine.run.download import Download
from services.engine.run.sampling_plan import SamplingPlan, heaviest
from services.engine.run.upload import upload
from shared.messages import TokenLogprob

BANNED = -1e10  # finite, so that a row of nothing but banned tokens is still a distribution
LEAST_LOGPROB = -9999.0  # what stands for minus infinity on the wire, as JSON has none


Moved = dict[str, Tensor]  # the arrays of a SamplingPlan that are not empty, on the device


@dataclass(frozen=True, slots=True)
class Sampled:
    """One sequence's next token."""

    token: int
    logprob: TokenLogprob | None = None


class Drawn:
    """A step's tokens, on the device and on their way to the host."""

    def __init__(self, tokens: Tensor, plan: SamplingPlan, reported: tuple[Tensor, Tensor] | None) -> None:
        """
        Args:
            tokens: [R] ids; not to be changed until they are read.
            reported: see `best`; None where no row asks.
        """
        self.tokens = tokens
        self._plan = plan
        self._coming = Download([tokens, *(reported or ())])

    def read(self) -> list[Sampled]:
        """One for each row; waits for the device."""
        tokens, *reported = self._coming.read()
        out = [Sampled(token) for token in tokens.tolist()]
        if reported:
            arrays = (self._plan.wanted, self._plan.logprobs, *reported)
            for row, count, tops, (sampled, *logprobs) in zip(*(array.tolist() for array in arrays), strict=True):
                report = TokenLogprob(sampled, tuple(zip(tops[:count], logprobs[:count], strict=True)))
                out[row] = Sampled(out[row].token, report)
        return out


class Sampler:
    """Batched sampling on one device."""

    def __init__(self, eos_ids: tuple[int, ...], ops: SamplingOps, device: torch.device) -> None:
        self._device = device
        self._eos = torch.tensor(eos_ids, dtype=torch.int64, device=device)
        self._ops = ops
        # A plain number would be copied to the device when it is put, and waited for.
        self._banned = torch.tensor(BANNED, device=device)

    def draw(self, logits: Tensor, plan: SamplingPlan) -> Drawn:
        """One token for each row. Returns while the device works.

        Args:
            logits: [R, vocabulary] float32, contiguous; overwritten.
        """
        arrays = plan.arrays()
        on = dict(zip(arrays, upload(list(arrays.values()), self._device), strict=True))
        raw = torch.log_softmax(logits[on["wanted"]], dim=-1) if "wanted" in on else None
        self._adjust(logits, on)
        tokens = self._draw(logits, plan, on)
        if "thinking" in on:
            self._close_thinking(tokens, on)
        return Drawn(tokens, plan, None if raw is None else best(tokens, on["wanted"], raw, plan))

    def rehearse(self, logits: Tensor) -> None:
        """Hold what the heaviest step would, and compile what it needs.

        Args:
            logits: as for `draw`.
        """
        self.draw(logits, heaviest(len(logits))).read()

    def _adjust(self, logits: Tensor, on: Moved) -> None:
        """Everything that acts on single logits, but for the temperature of rows that draw."""
        if "bias" in on:
            logits[on["biased_rows"], on["biased_tokens"]] += on["bias"]
        if "early_rows" in on:
            logits[on["early_rows"], on["early_tokens"]] = self._banned
        if "repetition" in on:
            place = on["penalised_rows"], on["penalised_tokens"]
            seen = logits[place]
            seen = torch.where(seen < 0, seen * on["repetition"], seen / on["repetition"])
            logits[place] = seen - on["subtracted"]
        if "bad_rows" in on:
            # Before the temperature instead of after it: dividing leaves a banned logit banned.
            logits[on["bad_rows"], on["bad_tokens"]] = self._banned

    def _draw(self, logits: Tensor, plan: SamplingPlan, on: Moved) -> Tensor:
        """[R] token ids."""
        if not len(plan.drawing):
            return self._ops.argmax(logits)
        if len(plan.drawing) == len(logits):
            return self._draw_at_random(logits, plan, on)
        drawn = self._draw_at_random(logits[on["drawing"]], plan, on)
        return self._ops.argmax(logits).index_copy_(0, on["drawing"], drawn)

    def _draw_at_random(self, logits: Tensor, plan: SamplingPlan, on: Moved) -> Tensor:
        """[D] token ids of [D, vocabulary] logits, which are overwritten."""
        probs = torch.softmax(logits.div_(on["temperature"].unsqueeze(1)), dim=-1)
        # Where no row asks for min_p, all of it is 0 and a floor as it stands.
        least = on["min_p"] * probs.amax(dim=-1) if plan.min_p.any() else on["min_p"]
        if (plan.top_k > 0).any() or (plan.top_p < 1).any():
            least = self._ops.threshold(probs, least, on["top_k"], on["top_p"])
        return self._ops.pick(probs, least, on["numbers"])

    def _close_thinking(self, tokens: Tensor, on: Moved) -> None:
        """Put `</think>` where the thinking budget is used up, or an end token came before the thinking ended."""
        drawn = tokens[on["thinking"]]
        ended = (drawn.unsqueeze(1) == self._eos).any(dim=1)
        tokens.index_copy_(0, on["thinking"], torch.where(on["must_close"] | ended, on["close_ids"], drawn))


def best(tokens: Tensor, wanted: Tensor, raw: Tensor, plan: SamplingPlan) -> tuple[Tensor, Tensor]:
    """Log-probabilities as the model gave them, before anything a request asked for.

    Args:
        tokens: [R] sampled.
        wanted: [L] rows that asked.
        raw: [L, vocabulary] log-softmax.

    Returns:
        [L, K] the most likely tokens, and [L, 1 + K] log-probabilities of the sampled token and of these.
    """
    most = raw.topk(min(max(int(plan.logprobs.max()), 1), raw.shape[1]), dim=-1)
    own = raw.gather(1, tokens[wanted].unsqueeze(1))
    return most.indices, torch.cat([own, most.values], dim=1).clamp(min=LEAST_LOGPROB)
