"""Lead: rank 0, whose runner lets the other ranks check the tokens that it has read."""

from collections.abc import Callable

from services.engine.ranks.follower import check
from services.engine.ranks.orders import OrderWriter
from services.engine.run.prompt_scorer import Scored
from services.engine.run.runner import Launched, Runner
from services.engine.run.sampler import Sampled
from services.engine.schedule.plan import Plan
from services.engine.schedule.step_times import StepTimes


class LeadRunner:
    """Runner whose steps tell what they drew, with the next order."""

    def __init__(self, runner: Runner, orders: OrderWriter) -> None:
        self._runner = runner
        self._orders = orders

    @property
    def overlaps(self) -> bool:
        return self._runner.overlaps

    @property
    def step_times(self) -> StepTimes | None:
        return self._runner.step_times

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
