"""Sampler: draws one token a row from the model's logits.

Order of operations (the reference server's fused penalty kernel and sampler): logit bias; no end tokens before
min_tokens; repetition penalty over prompt and answer, then frequency and presence over the answer; temperature; bad
words; grammar; softmax; min_p; top_k; top_p. A row's result depends on its own logits, settings, seed and index only:
every operation works along rows, and the random number is a function of (seed, index).

top_k and top_p keep tokens by value (kernels/reference/threshold.py), so equally likely tokens stay or go together; the
draw inverts the cumulative probabilities (kernels/reference/pick.py), with one random number a token.

A step's arrays go to the device in one copy, and the host waits for the device only where the result is read.
"""

from dataclasses import dataclass

import msgspec
import numpy as np
import torch
from torch import Tensor

from services.engine.kernels.sampling_ops import SamplingOps
from services.engine.run.download import Download
from services.engine.run.sampling_plan import SamplingPlan, heaviest
from services.engine.run.upload import upload
from shared.messages import TokenLogprob

BANNED = -1e10  # finite, so that a row of nothing but banned tokens is still a distribution
MIN_LOGPROB = -9999.0  # stands for minus infinity on the wire, as JSON has none


DeviceArrays = dict[str, Tensor]  # the arrays of a SamplingPlan that are not empty, on the device


@dataclass(frozen=True, slots=True)
class Sampled:
    """One sequence's next token."""

    token: int
    logprob: TokenLogprob | None = None


class Drawn:
    """Tokens of a step, on the device and on their way to the host."""

    def __init__(self, tokens: Tensor, plan: SamplingPlan, reported: tuple[Tensor, Tensor] | None) -> None:
        """
        Args:
            tokens: [R] ids; not to be changed until they are read.
            reported: see `report_logprobs`; None if no row asks.
        """
        self.tokens = tokens
        self._plan = plan
        self._coming = Download([tokens, *(reported or ())])

    def read(self) -> list[Sampled]:
        """Return one for each row; waits for the device."""
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
        # A Python number would be copied to the device at each use, with a wait.
        self._banned = torch.tensor(BANNED, device=device)

    def draw(self, logits: Tensor, plan: SamplingPlan) -> Drawn:
        """Draw one token for each row. Returns while the device computes.

        Args:
            logits: [R, vocabulary] float32, contiguous; overwritten.
        """
        arrays = plan.arrays()
        on_device = dict(zip(arrays, upload(list(arrays.values()), self._device), strict=True))
        raw = torch.log_softmax(logits[on_device["wanted"]], dim=-1) if "wanted" in on_device else None
        self._adjust(logits, on_device)
        tokens = self._draw(logits, plan, on_device)
        if "thinking" in on_device:
            self._close_thinking(tokens, on_device)
        return Drawn(tokens, plan, None if raw is None else report_logprobs(tokens, on_device["wanted"], raw, plan))

    def rehearse(self, logits: Tensor) -> None:
        """Allocate and compile all that the heaviest step needs.

        Args:
            logits: as for `draw`.
        """
        self.draw(logits, heaviest(*logits.shape)).read()

    def rehearse_kinds(self, vocab_size: int) -> None:
        """Run steps of other kinds than the heaviest: all rows greedy, one row of two, and a row alone."""
        logits = torch.zeros(2, vocab_size, device=self._device)
        one = heaviest(1, vocab_size)
        self.draw(logits, SamplingPlan()).read()
        self.draw(logits, msgspec.structs.replace(one, drawing=np.ones(1, np.int64))).read()
        self.draw(logits[:1], one).read()

    def _adjust(self, logits: Tensor, on_device: DeviceArrays) -> None:
        """Apply every change of single logits, but for the temperature of rows that draw."""
        if "bias" in on_device:
            logits[on_device["biased_rows"], on_device["biased_tokens"]] += on_device["bias"]
        if "early_rows" in on_device:
            logits[on_device["early_rows"], on_device["early_tokens"]] = self._banned
        if "repetition" in on_device:
            place = on_device["penalised_rows"], on_device["penalised_tokens"]
            seen = logits[place]
            seen = torch.where(seen < 0, seen * on_device["repetition"], seen / on_device["repetition"])
            logits[place] = seen - on_device["subtracted"]
        if "bad_rows" in on_device:
            # Before the temperature instead of after it: dividing leaves a banned logit banned.
            logits[on_device["bad_rows"], on_device["bad_tokens"]] = self._banned
        if "masks" in on_device:
            # Last, and with minus infinity: where all that a grammar allows is banned, a grammar's token is drawn.
            self._ops.mask_logits(logits, on_device["masked_rows"], on_device["masks"])

    def _draw(self, logits: Tensor, plan: SamplingPlan, on_device: DeviceArrays) -> Tensor:
        """Return [R] token ids."""
        if not len(plan.drawing):
            return self._ops.argmax(logits)
        if len(plan.drawing) == len(logits):
            return self._draw_at_random(logits, plan, on_device)
        drawn = self._draw_at_random(logits[on_device["drawing"]], plan, on_device)
        return self._ops.argmax(logits).index_copy_(0, on_device["drawing"], drawn)

    def _draw_at_random(self, logits: Tensor, plan: SamplingPlan, on_device: DeviceArrays) -> Tensor:
        """Return [D] token ids of [D, vocabulary] logits, which are overwritten."""
        probs = torch.softmax(logits.div_(on_device["temperature"].unsqueeze(1)), dim=-1)
        # If no row asks for min_p, it is 0 everywhere, which is a floor already.
        least = on_device["min_p"] * probs.amax(dim=-1) if plan.min_p.any() else on_device["min_p"]
        if (plan.top_k > 0).any() or (plan.top_p < 1).any():
            least = self._ops.threshold(probs, least, on_device["top_k"], on_device["top_p"])
        return self._ops.pick(probs, least, on_device["numbers"])

    def _close_thinking(self, tokens: Tensor, on_device: DeviceArrays) -> None:
        """Put `</think>` where the thinking budget is used up, or an end token or a call came within the thinking."""
        drawn = tokens[on_device["thinking"]]
        ended = (drawn.unsqueeze(1) == self._eos).any(dim=1) | (drawn == on_device["call_ids"])
        closed = torch.where(on_device["must_close"] | ended, on_device["close_ids"], drawn)
        tokens.index_copy_(0, on_device["thinking"], closed)


def report_logprobs(tokens: Tensor, wanted: Tensor, raw: Tensor, plan: SamplingPlan) -> tuple[Tensor, Tensor]:
    """Report log-probabilities as the model gave them, before anything a request asked for.

    Args:
        tokens: [R] sampled.
        wanted: [L] rows that asked.
        raw: [L, vocabulary] log-softmax.

    Returns:
        [L, K] the most likely tokens, and [L, 1 + K] log-probabilities of the sampled token and of these.
    """
    most = raw.topk(min(max(int(plan.logprobs.max()), 1), raw.shape[1]), dim=-1)
    own = raw.gather(1, tokens[wanted].unsqueeze(1))
    return most.indices, torch.cat([own, most.values], dim=1).clamp(min=MIN_LOGPROB)
