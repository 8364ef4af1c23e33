"""Scorer of prompts: log-probabilities of the tokens that a prompt has, which are given and not drawn.

The logits of a whole prompt would be gigabytes. So they are computed for some rows at a time, reduced to a few numbers
a row, and dropped.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from services.engine.run.download import Download
from services.engine.run.sampler import MIN_LOGPROB
from services.engine.run.step import HostStep
from services.engine.run.upload import upload
from services.engine.schedule.plan import Plan
from services.engine.schedule.prompt_scores import ScoredRows
from services.engine.schedule.sequence import Sequence

MAX_ROWS = 64  # whose logits exist at a time; and never more than a step may sample, for which there is memory


class Scored(NamedTuple):
    """Scores that a step has computed for a sequence: of its prompt's tokens from the one behind `start` on."""

    sequence: Sequence
    start: int
    rows: ScoredRows


class Part(NamedTuple):
    """Rows of a step that score a sequence's prompt: row `first + i` is of token `start + i`, and scores the next."""

    sequence: Sequence
    most: int  # number of the most likely tokens that are wanted
    first: int
    start: int
    stop: int


def parts_of(plan: Plan, step: HostStep) -> list[Part]:
    """Return the parts of a step that score prompts."""
    found = []
    for chunk, row in zip(plan.parts, step.query_start.tolist(), strict=False):
        scores, most = chunk.sequence.scores, chunk.sequence.sampling.prompt_logprobs
        if scores is None or most is None:
            continue
        start, stop = max(chunk.start, scores.known), min(chunk.stop, chunk.sequence.prompt_len - 1)
        if start < stop:
            found.append(Part(chunk.sequence, most, row + start - chunk.start, start, stop))
    return found


class LaunchedScores:
    """Scores of a step, on their way to the host."""

    def __init__(self, parts: list[Part], tensors: tuple[Tensor, Tensor, Tensor]) -> None:
        self._parts = parts
        self._coming = Download(tensors)

    def read(self) -> list[Scored]:
        """Return the scores of each part; waits for the device."""
        logprobs, ids, ranks = self._coming.read()
        scored, row = [], 0
        for part in self._parts:
            end = row + part.stop - part.start
            rows = ScoredRows(logprobs[row:end, : 1 + part.most], ids[row:end, : part.most], ranks[row:end])
            scored.append(Scored(part.sequence, part.start, rows))
            row = end
        return scored


class PromptScorer:
    """Scorer of one model's prompts."""

    def __init__(self, project: Callable[[Tensor], Tensor], max_rows: int, padded: Callable[[int], int]) -> None:
        """`project` returns [n, vocabulary] float32 logits of [n, hidden] rows; it is given `max_rows` at most, and
        only numbers of rows that `padded` returns."""
        self._project = project
        self._max_rows, self._padded = min(max_rows, MAX_ROWS), padded

    def launch(self, x: Tensor, parts: list[Part]) -> LaunchedScores:
        """Score the prompts of a step. Returns while the device computes.

        Args:
            x: [N, hidden] the last layer's output for every row of the step.
        """
        rows = np.concatenate([np.arange(part.stop - part.start) + part.first for part in parts])
        targets = np.concatenate([part.sequence.tokens[part.start + 1 : part.stop + 1] for part in parts])
        count = max(part.most for part in parts)
        last = len(rows) % self._max_rows
        missing = self._padded(last) - last if last else 0
        on_device = upload([np.pad(rows, (0, missing)), np.pad(targets, (0, missing))], x.device)
        slices = zip(*(torch.split(tensor, self._max_rows) for tensor in on_device), strict=True)
        scored = [score(self._project(x[where]), wanted, count) for where, wanted in slices]
        logprobs, ids, ranks = (torch.cat(tensors) for tensors in zip(*scored, strict=True))
        return LaunchedScores(parts, (logprobs, ids, ranks))


def score(logits: Tensor, targets: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """Score given tokens as the model does before anything a request asks for.

    Args:
        logits: [n, vocabulary] float32.
        targets: [n] ids.
        count: number of most likely tokens to report.

    Returns:
        [n, 1 + count] log-probabilities of the target and of the most likely tokens, [n, count] these, best first, and
        [n] the target's rank: 1 if no token is more likely.
    """
    own = logits.gather(1, targets.unsqueeze(1))
    ranks = (logits > own).sum(dim=1) + 1
    most = logits.topk(count, dim=1)
    total = logits.logsumexp(dim=1, keepdim=True)
    return (torch.cat([own, most.values], dim=1) - total).clamp(min=MIN_LOGPROB), most.indices, ranks
