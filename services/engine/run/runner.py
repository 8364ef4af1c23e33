"""Runner: carries out a plan. Builds the step's tensors, runs the model, samples.

`Runner` is the engine's one interface to the machine it runs on: tests stand in for the model with anything of this
shape.
"""

from collections.abc import Callable
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from services.engine.model.inputs import KVCache
from services.engine.run.grammar_masks import GrammarMasks
from services.engine.run.graphs import DecodeGraphs
from services.engine.run.pieces import StepPieces
from services.engine.run.prompt_scorer import LaunchedScores, PromptScorer, Scored, parts_of
from services.engine.run.sampler import Drawn, Sampled, Sampler
from services.engine.run.sampling_plan import SamplingPlan, plan_sampling
from services.engine.run.step import HostStep, Model, StepBuilder
from services.engine.run.upload import upload
from services.engine.schedule.plan import Plan
from services.engine.schedule.step_times import StepTimes


class Launched(Protocol):
    """A step under way."""

    def sample(self) -> None:
        """Start to sample, if that had to wait for the tokens of the step before; to be called before `read`."""

    def read(self) -> list[Sampled]:
        """Return one token for each of `plan.draws()`, in its order. Waits for this step alone."""

    def scores(self) -> list[Scored]:
        """Return what it has computed of prompts' own tokens, once it was read."""


class Runner(Protocol):
    """Executes plans, in the order they were made; does not change the sequences."""

    @property
    def overlaps(self) -> bool:
        """True if a step of `Scheduler.schedule_ahead` may be launched before the previous one is read, and gains by
        it."""

    @property
    def step_times(self) -> StepTimes | None:
        """Time of steps with prefill as measured at the start, if it was."""

    def launch(self, plan: Plan, meanwhile: Callable[[], None]) -> Launched:
        """Start a step. One of a plan that `samples_later` waits for `Launched.sample`.

        Args:
            meanwhile: called once, when the caller's work delays the step least.
        """


class Followers(Protocol):
    """Interface of the ranks that do as this one does: see `services.engine.ranks.orders.OrderWriter`."""

    def step(self, step: HostStep) -> None:
        """Let them compute a step."""

    def sample(self, plan: SamplingPlan) -> None:
        """Let them draw from the logits of the last step."""


class ModelRunner:
    """Runner of the real model. Replays decode steps that were captured and the captured pieces of others, and launches
    the rest. On a GPU nothing in `launch` waits for the device."""

    def __init__(
        self,
        model: Model,
        cache: KVCache,
        sampler: Sampler,
        builder: StepBuilder,
        grammar_masks: GrammarMasks,
        graphs: DecodeGraphs | None,
        max_seqs: int,
        pieces: StepPieces | None = None,
        step_times: StepTimes | None = None,
        followers: Followers | None = None,
    ) -> None:
        self.model = model
        self.cache = cache
        self._sampler = sampler
        self._builder = builder
        self._grammar_masks = grammar_masks
        self._graphs = graphs
        self._followers = followers
        self.pieces = pieces
        self.step_times = step_times
        # The vendor library has a kernel for every few numbers of logits. Its first use waits for the device, and is
        # behind us for the sizes that were captured.
        self._padded = int if graphs is None else graphs.padded
        self._scorer = PromptScorer(model.project, max_seqs, self._padded)

    @property
    def overlaps(self) -> bool:
        """True with captured steps: only they can read tokens that are in flight."""
        return self._graphs is not None

    def launch(self, plan: Plan, meanwhile: Callable[[], None]) -> Launched:
        step = self._builder.build(plan)
        if self._followers is not None:
            self._followers.step(step)
        if self._graphs is not None and self._graphs.captures(step):
            launched = self._start_sampling(plan, self._graphs.run(step))
            meanwhile()
            return launched
        # The caller's work comes first. The host takes longer to launch such a step, or to compute it here: tokens
        # would wait as long, and come as unevenly. A GPU mostly does not wait for it, as it computes another step.
        meanwhile()
        return self._finish(plan, step, self._hidden(step))

    def _hidden(self, step: HostStep) -> Tensor:
        if self.pieces is not None:
            return self.pieces.hidden(step)
        return self.model.hidden(step.to(self.model.device, self.cache.block_size), self.cache)

    def _finish(self, plan: Plan, step: HostStep, x: Tensor) -> Launched:
        """Start to sample from the rows of a step that ask for it, and to score those of prompts that do."""
        parts = parts_of(plan, step)
        # First: its logits are gone when those to sample from are computed.
        scores = self._scorer.launch(x, parts) if parts else None
        launched: Launched = self._start_sampling(plan, self._project(step, x)) if plan.sampling else NoTokens(x)
        return launched if scores is None else ScoringStep(launched, scores)

    def _project(self, step: HostStep, x: Tensor) -> Tensor:
        """Return the logits of the rows of `_hidden` that the step asks for."""
        count = len(step.logit_rows)
        (rows,) = upload([np.pad(step.logit_rows, (0, self._padded(count) - count))], x.device)
        return self.model.project(x.index_select(0, rows))[:count]

    def _start_sampling(self, plan: Plan, logits: Tensor) -> Launched:
        step = SamplingStep(lambda: self._draw(plan, logits))
        if not plan.samples_later:
            step.sample()
        return step

    def _draw(self, plan: Plan, logits: Tensor) -> Drawn:
        sampling = plan_sampling(plan.draws(), self._grammar_masks)
        if self._followers is not None:
            self._followers.sample(sampling)
        return self.draw(logits, sampling)

    def logits(self, step: HostStep) -> Tensor:
        """Compute a step that another rank has planned, the way that `launch` does: exchanges must be of one shape."""
        if self._graphs is not None and self._graphs.captures(step):
            return self._graphs.run(step)
        return self._project(step, self._hidden(step))

    def draw(self, logits: Tensor, plan: SamplingPlan) -> Drawn:
        """Draw the tokens of the last step, and keep them for the next."""
        drawn = self._sampler.draw(logits, plan)
        if self._graphs is not None:
            self._graphs.keep_tokens(drawn.tokens)
        return drawn


class SamplingStep:
    """A step whose logits the device computes, and whose tokens it draws from them once `sample` was called."""

    def __init__(self, draw: Callable[[], Drawn]) -> None:
        self._draw = draw
        self._drawn: Drawn | None = None

    def sample(self) -> None:
        if self._drawn is None:
            self._drawn = self._draw()

    def read(self) -> list[Sampled]:
        assert self._drawn is not None, "read before it was sampled"
        return self._drawn.read()

    def scores(self) -> list[Scored]:
        return []


class ScoringStep:
    """A step that scores prompts, beside what else it does."""

    def __init__(self, step: Launched, scores: LaunchedScores) -> None:
        self._step = step
        self._scores = scores

    def sample(self) -> None:
        self._step.sample()

    def read(self) -> list[Sampled]:
        return self._step.read()

    def scores(self) -> list[Scored]:
        return self._scores.read()


class NoTokens:
    """A step in which no sequence samples."""

    def __init__(self, x: Tensor) -> None:
        """`x`: what it computes. Without a wait for it the loop would launch one such step after the other."""
        self._computed = torch.cuda.Event() if x.is_cuda else None  # type: ignore[no-untyped-call]
        if self._computed is not None:
            self._computed.record()

    def sample(self) -> None:
        """Do nothing."""

    def read(self) -> list[Sampled]:
        if self._computed is not None:
            self._computed.synchronize()
        return []

    def scores(self) -> list[Scored]:
        return []
