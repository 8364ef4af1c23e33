"""Lead: the runner of rank 0. It computes its part of every step, and first tells the other ranks of it."""

from collections.abc import Callable

from torch import Tensor

from services.engine.model.ernie import ErnieModel
from services.engine.ranks.follower import check
from services.engine.ranks.orders import OrderWriter
from services.engine.run.assembly import parts_for, runner_of, step_builder
from services.engine.run.prompt_scorer import Scored
from services.engine.run.runner import DrawsTokens, Launched, Runner
from services.engine.run.sampler import Drawn, Sampled
from services.engine.run.sampling_plan import SamplingPlan
from services.engine.run.step import BuildsSteps, HostStep
from services.engine.schedule.scheduler import Plan
from services.engine.settings import EngineSettings


def lead_runner(
    model: ErnieModel, settings: EngineSettings, agree: Callable[[int], int], orders: OrderWriter
) -> tuple[Runner, int]:
    """Return the runner of rank 0, and the number of blocks of every rank's cache.

    Raises:
        ConfigError: as `parts_for`.
    """
    parts = parts_for(model, model.config, settings, agree)
    sampler = LeadSampler(parts.sampler, orders)
    builder = LeadBuilder(step_builder(model, model.config, settings), orders)
    return LeadRunner(runner_of(model, model.config, settings, parts, sampler, builder), orders), parts.blocks


class LeadBuilder:
    """Builder of steps that tells the ranks of each."""

    def __init__(self, builder: BuildsSteps, orders: OrderWriter) -> None:
        self._builder = builder
        self._orders = orders

    def build(self, plan: Plan) -> HostStep:
        step = self._builder.build(plan)
        self._orders.step(step)
        return step


class LeadSampler:
    """Sampler that tells the ranks of each draw."""

    def __init__(self, sampler: DrawsTokens, orders: OrderWriter) -> None:
        self._sampler = sampler
        self._orders = orders

    def draw(self, logits: Tensor, plan: SamplingPlan) -> Drawn:
        self._orders.sample(plan)
        return self._sampler.draw(logits, plan)


class LeadRunner:
    """Runner that lets the ranks check the tokens that it has read."""

    def __init__(self, runner: Runner, orders: OrderWriter) -> None:
        self._runner = runner
        self._orders = orders

    @property
    def overlaps(self) -> bool:
        return self._runner.overlaps

    def launch(self, plan: Plan, meanwhile: Callable[[], None]) -> Launched:
        return _LeadStep(self._runner.launch(plan, meanwhile), self._orders)


class _LeadStep:
    """Launched step."""

    def __init__(self, step: Launched, orders: OrderWriter) -> None:
        self._step = step
        self._orders = orders

    def sample(self) -> None:
        self._step.sample()

    def read(self) -> list[Sampled]:
        sampled = self._step.read()
        if sampled:
            self._orders.checked = check(self._orders.checked, sampled)
        return sampled

    def scores(self) -> list[Scored]:
        return self._step.scores()
