"""Carries out a plan: builds the step's tensors, runs the model, samples.

`Runner` is the engine's one seam to the machine it runs on: whatever has this shape can stand in for the model.
"""

from collections.abc import Callable
from typing import Protocol

from torch import Tensor

from services.engine.model.inputs import KVCache
from services.engine.run.graphs import DecodeGraphs
from services.engine.run.sampler import Sampled, Sampler
from services.engine.run.sampling_plan import plan_sampling
from services.engine.run.step import Model, StepBuilder
from services.engine.schedule.scheduler import Plan


class Launched(Protocol):
    """A step under way."""

    def read(self) -> list[Sampled]:
        """One token for each of `plan.sampling`, in its order. Waits for this step alone."""


class Runner(Protocol):
    """Executes plans, in the order they were made; the sequences themselves are left alone."""

    @property
    def overlaps(self) -> bool:
        """Whether a step of `Scheduler.schedule_ahead` may be launched before the one before it is read, and gains."""

    def launch(self, plan: Plan, meanwhile: Callable[[], None]) -> Launched:
        """Start a step.

        Args:
            meanwhile: called once, at a moment at which the caller's work costs the step least.
        """


class ModelRunner:
    """The runner that computes. Decode steps that were captured are replayed; every other step is launched. Where there
    is a device, nothing in `launch` waits for it."""

    def __init__(
        self, model: Model, cache: KVCache, sampler: Sampler, builder: StepBuilder, graphs: DecodeGraphs | None
    ) -> None:
        self._model = model
        self._cache = cache
        self._sampler = sampler
        self._builder = builder
        self._graphs = graphs

    @property
    def overlaps(self) -> bool:
        """Only a captured step takes tokens that are in flight."""
        return self._graphs is not None

    def launch(self, plan: Plan, meanwhile: Callable[[], None]) -> Launched:
        step = self._builder.build(plan)
        if self._graphs is not None and self._graphs.fits(step):
            launched = self._sample(plan, self._graphs.run(step))
            meanwhile()
            return launched
        # Launching a step, or computing it here, takes longer than whatever waits to be done.
        meanwhile()
        logits = self._model.forward(step.to(self._model.device, self._cache.block_size), self._cache)
        return self._sample(plan, logits)

    def _sample(self, plan: Plan, logits: Tensor) -> Launched:
        sampling = plan.sampling
        if not sampling:
            return NoTokens()
        drawn = self._sampler.draw(logits, plan_sampling(sampling))
        if self._graphs is not None:
            self._graphs.keep(drawn.tokens)
        return drawn


class NoTokens:
    """A step in which no sequence came to its end."""

    def read(self) -> list[Sampled]:
        return []
