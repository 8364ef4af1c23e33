"""The engine's loop alone, in the test's own thread: a script of commands by turn, and the output it gives."""

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from engine_cases import SumRunner
from prometheus_client import CollectorRegistry

from services.engine.loop.engine import Engine
from services.engine.loop.mailbox import Command, Mailbox
from services.engine.loop.step_output import StepOutput
from services.engine.metrics import EngineMetrics
from services.engine.run.runner import Launched, Runner
from services.engine.schedule.blocks import BlockPool
from services.engine.schedule.plan import Plan
from services.engine.schedule.scheduler import Limits, Scheduler
from services.engine.schedule.step_times import StepTimes
from shared.card_page import CardPage
from shared.messages import Begin, Finish, TokenRun

BLOCK = 4
Script = Mapping[int, Sequence[Command]]  # by turn


class ScriptedMailbox(Mailbox):
    """Closed when the script is over and nothing is left to do."""

    def __init__(self, script: Script) -> None:
        super().__init__()
        self._script = dict(script)
        self._turn = 0

    def receive(self, wait: bool) -> list[Command] | None:
        commands = self._script.pop(self._turn, [])
        self._turn += 1
        if wait and not commands:
            if not self._script:
                return None
            self._turn = min(self._script)
            return self.receive(wait)
        return commands


class Watched:
    """A runner that records its plans."""

    def __init__(self, inner: Runner) -> None:
        self._inner = inner
        self.plans: list[Plan] = []

    @property
    def overlaps(self) -> bool:
        return self._inner.overlaps

    @property
    def step_times(self) -> StepTimes | None:
        return self._inner.step_times

    def launch(self, plan: Plan, meanwhile: Callable[[], None]) -> Launched:
        self.plans.append(plan)
        return self._inner.launch(plan, meanwhile)


class Bench:
    """An engine that has run, on the sum model by default, and its output."""

    def __init__(
        self,
        script: Script,
        *,
        overlaps: bool = True,
        runner: Runner | None = None,
        blocks: int = 64,
        caching: bool = True,
        resumed: int | Mapping[str, int] = 0,
        page: CardPage | None = None,
        **bounds: Any,
    ) -> None:
        usual = {"max_num_seqs": 4, "max_num_batched_tokens": 16, "chunked_prefill": True, "block_size": BLOCK}
        limits = Limits(**{**usual, **bounds})
        self._most = 1 if limits.speculation is None else 1 + limits.speculation.most
        self.pool = BlockPool(blocks, caching)
        self.runner = Watched(runner or SumRunner(blocks, BLOCK, overlaps))
        self.registry = CollectorRegistry()
        self._resumed = resumed  # tokens that its one request had before, or each by its id
        self.runs: dict[str, list[TokenRun]] = defaultdict(list)
        self.begins: dict[str, list[Begin]] = defaultdict(list)
        self.step_outputs: list[dict[str, int]] = []  # tokens of each that has some
        metrics = EngineMetrics(self.registry)
        scheduler = Scheduler(self.pool, limits)
        Engine(ScriptedMailbox(script), scheduler, self.pool, self.runner, self._hear, metrics, page=page).run()
        assert self.pool.used == 0
        assert not scheduler.has_work

    def _hear(self, step_output: StepOutput) -> None:
        self.pool.check()
        said: dict[str, int] = defaultdict(int)
        for message in step_output.messages().values():
            for begin in message.begins:
                self.begins[begin.request_id].append(begin)
            for run in message.runs:
                said[run.request_id] += len(run.tokens)
                self._follow(run)
        assert max(said.values(), default=0) <= self._most, "steps are said one by one"
        if said:
            self.step_outputs.append(dict(said))

    def _follow(self, run: TokenRun) -> None:
        before = self.runs[run.request_id + " again" * (run.epoch - 1)]
        assert not before or before[-1].finish is None, "said after its end"
        resumed = self._resumed if isinstance(self._resumed, int) else self._resumed[run.request_id]
        assert run.index == resumed + sum(len(r.tokens) for r in before)
        before.append(run)

    def answer(self, request_id: str) -> list[int]:
        return [token for run in self.runs[request_id] for token in run.tokens]

    def finish(self, request_id: str) -> Finish | None:
        return self.runs[request_id][-1].finish

    @property
    def ahead(self) -> int:
        """Rows whose token was in flight."""
        return sum(chunk.source is not None for plan in self.runner.plans for chunk in plan.chunks)

    @property
    def guessed(self) -> tuple[int, int]:
        """Guessed tokens that were verified, and how many of them were right."""
        drafted, right = (self.metric(f"spec_decode_num_{kind}_tokens_total") for kind in ("draft", "accepted"))
        assert drafted == sum(plan.drafts for plan in self.runner.plans)
        return int(drafted), int(right)

    @property
    def right_at(self) -> list[float]:
        """Guesses that were right, by their place among those guessed together."""
        name, found = "millrace_spec_decode_num_accepted_tokens_per_pos_total", []
        while (value := self.registry.get_sample_value(name, {"position": f"{len(found)}"})) is not None:
            found.append(value)
        return found

    def metric(self, name: str) -> float:
        value = self.registry.get_sample_value(f"millrace_{name}")
        assert value is not None
        return value


def prompt(seed: int, length: int) -> list[int]:
    return [10 + (seed * 37 + i * i) % 90 for i in range(length)]
