"""Runner: carries out a plan. Builds the step's tensors, runs the model, samples.

`Runner` is the engine's one interface to the machine it runs on: tests stand in for the model with anything of this
shape.
"""

from collections.abc import Callable
from typing import Protocol

from torch import Tensor

from services.engine.model.inputs import KVCache, StepInput
from services.engine.run.grammar_masks import GrammarMasks
from services.engine.run.graphs import DecodeGraphs
from services.engine.run.prompt_scorer import LaunchedScores, Part, PromptScorer, Scored, parts_of
from services.engine.run.sampler import Drawn, Sampled, Sampler
from services.engine.run.sampling_plan import plan_sampling
from services.engine.run.step import Model, StepBuilder
from services.engine.schedule.scheduler import Plan


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

    def launch(self, plan: Plan, meanwhile: Callable[[], None]) -> Launched:
        """Start a step. One of a plan that `samples_later` waits for `Launched.sample`.

        Args:
            meanwhile: called once, when the caller's work delays the step least.
        """


class ModelRunner:
    """Runner of the real model. Replays decode steps that were captured and launches all others. On a GPU nothing in
    `launch` waits for the device."""

    def __init__(
        self,
        model: Model,
        cache: KVCache,
        sampler: Sampler,
        builder: StepBuilder,
        grammar_masks: GrammarMasks,
        graphs: DecodeGraphs | None,
        max_seqs: int,
    ) -> None:
        self._model = model
        self._cache = cache
        self._sampler = sampler
        self._builder = builder
        self._grammar_masks = grammar_masks
        self._graphs = graphs
        self._scorer = PromptScorer(model.project, max_seqs)

    @property
    def overlaps(self) -> bool:
        """True with captured steps: only they can read tokens that are in flight."""
        return self._graphs is not None

    def launch(self, plan: Plan, meanwhile: Callable[[], None]) -> Launched:
        step = self._builder.build(plan)
        if self._graphs is not None and self._graphs.captures(step):
            launched = self._start_sampling(plan, self._graphs.run(step))
            meanwhile()
            return launched
        # The caller's work comes first: launching a step, or computing it here, takes longer.
        meanwhile()
        inputs = step.to(self._model.device, self._cache.block_size)
        if parts := parts_of(plan, step):
            return self._launch_scoring(plan, inputs, parts)
        return self._start_sampling(plan, self._model.forward(inputs, self._cache))

    def _launch_scoring(self, plan: Plan, inputs: StepInput, parts: list[Part]) -> Launched:
        x = self._model.hidden(inputs, self._cache)
        scores = self._scorer.launch(x, parts)  # first: its logits are gone when those to sample from are computed
        return ScoringStep(self._start_sampling(plan, self._model.project(x[inputs.logit_rows])), scores)

    def _start_sampling(self, plan: Plan, logits: Tensor) -> Launched:
        if not plan.sampling:
            return NoTokens()
        step = SamplingStep(lambda: self._draw(plan, logits))
        if not plan.samples_later:
            step.sample()
        return step

    def _draw(self, plan: Plan, logits: Tensor) -> Drawn:
        drawn = self._sampler.draw(logits, plan_sampling(plan.draws(), self._grammar_masks))
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

    def sample(self) -> None:
        """Do nothing."""

    def read(self) -> list[Sampled]:
        return []

    def scores(self) -> list[Scored]:
        return []
