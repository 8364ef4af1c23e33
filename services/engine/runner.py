"""Carries out a plan: builds the step's tensors, runs the model, samples.

`Runner` is the engine's one seam to the machine it runs on: whatever has this method can stand in for the model.
"""

from collections.abc import Callable
from typing import Protocol

from torch import Tensor

from services.engine.graphs import DecodeGraphs
from services.engine.model.inputs import KVCache
from services.engine.sampler import Sampled, Sampler
from services.engine.sampling import plan_sampling
from services.engine.scheduler import Plan
from services.engine.step import Model, StepBuilder


class Runner(Protocol):
    """Executes plans, in the order they were made."""

    def execute(self, plan: Plan, meanwhile: Callable[[], None]) -> list[Sampled]:
        """One token for each of `plan.sampling`, in its order; the sequences themselves are left alone.

        Args:
            meanwhile: called once, at a moment at which the caller's work costs the step least.
        """


class ModelRunner:
    """The runner that computes. Decode steps that were captured are replayed; every other step is launched."""

    def __init__(
        self, model: Model, cache: KVCache, sampler: Sampler, builder: StepBuilder, graphs: DecodeGraphs | None
    ) -> None:
        self._model = model
        self._cache = cache
        self._sampler = sampler
        self._builder = builder
        self._graphs = graphs

    def execute(self, plan: Plan, meanwhile: Callable[[], None]) -> list[Sampled]:
        logits = self._logits(plan, meanwhile)
        sequences = plan.sampling
        # Planned while a device computes: nothing above waits for it.
        return self._sampler.sample(logits, plan_sampling(sequences)) if sequences else []

    def _logits(self, plan: Plan, meanwhile: Callable[[], None]) -> Tensor:
        step = self._builder.build(plan)
        if self._graphs is not None and self._graphs.fits(step):
            logits = self._graphs.run(step)
            meanwhile()
            return logits
        # Launching a step, or computing it here, takes longer than whatever waits to be done.
        meanwhile()
        return self._model.forward(step.to(self._model.device, self._cache.block_size), self._cache)
