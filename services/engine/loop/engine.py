"""The engine's loop: receive, schedule, launch, read the step before. Runs in a thread of its own; torch releases the
interpreter lock.

A device computes the next step while the host processes the last: the loop launches a step before it reads the previous
one, wherever that one's tokens cannot change what is launched. See `Scheduler.schedule_ahead`.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass

from services.engine.loop.mailbox import Abort, Add, Command, FinishUnstarted, Forget, Mailbox, Supply
from services.engine.loop.step_output import StepOutput, error_finish
from services.engine.metrics import EngineMetrics
from services.engine.run.runner import Launched, Runner
from services.engine.run.sampler import Sampled
from services.engine.schedule.blocks import BlockPool
from services.engine.schedule.plan import Plan
from services.engine.schedule.prompt_scores import ScoredRows
from services.engine.schedule.scheduler import Progress, Scheduler
from services.engine.schedule.sequence import Sequence
from shared.card_page import CardPage
from shared.crash_points import crash_point
from shared.messages import TokenRun
from shared.watchdog import Watch, unwatched

Emit = Callable[[StepOutput], None]


@dataclass(frozen=True, slots=True)
class LaunchedStep:
    """A step that was launched and has not been read."""

    plan: Plan
    launched: Launched
    started: float  # perf_counter


class Engine:
    """The loop over a mailbox, a scheduler and a runner. Keeps nothing beyond a request but the prefix cache."""

    def __init__(
        self,
        mailbox: Mailbox,
        scheduler: Scheduler,
        pool: BlockPool,
        runner: Runner,
        emit: Emit,
        metrics: EngineMetrics,
        watch: Watch = unwatched,
        page: CardPage | None = None,
    ) -> None:
        """`page`: of a GPU that encoders may use, too."""
        self._mailbox = mailbox
        self._scheduler = scheduler
        self._pool = pool
        self._runner = runner
        self._emit = emit
        self._metrics = metrics
        self._watch = watch
        self._page = page
        self._unsent = StepOutput()
        self._launched: LaunchedStep | None = None  # launched, not read
        self._stuck = False  # nothing can be computed before a command comes
        self._ended = 0.0  # when the last step was read
        self._prefilling: set[Sequence] = set()  # started, and without a token yet
        self._last_tokens_at: float | None = None  # when the last step was read, if it gave tokens

    def run(self) -> None:
        """Work until the mailbox is closed. An exception out of a step is not the fault of one request: it ends the
        process, and the engine that takes over resumes every request from its journal.

        At most two steps are launched and not read, and the second only while the loop waits for the first. A step that
        depends on the tokens of the first waits for it: then one iteration launches nothing, and the next one sees the
        commands that have come meanwhile.
        """
        while (commands := self._receive()) is not None:
            with self._watch("schedule", 0):
                for command in commands:
                    self._execute(command)
                plan = self._next_plan()
            with self._watch(*self._step_size(plan)):
                self._step(plan)
            self._update_gauges()
        self._send(self._take_unsent())

    def _step(self, plan: Plan | None) -> None:
        """Launch a step, read the one before, and let the new one sample if that needs the tokens just read."""
        crash_point("engine.step.before")
        launched = self._launch(plan)
        if self._launched is not None:
            self._read(self._launched)
        if launched is not None:
            launched.launched.sample()
        self._launched = launched
        self._announce(plan)
        crash_point("engine.step.after")

    def _announce(self, plan: Plan | None) -> None:
        """Tell encoders on the same GPU whether sequences wait for the step that it computes now."""
        if self._page is None:
            return
        decodes, prefills = (False, False) if plan is None else plan.kinds
        if decodes:
            self._page.begin_step(prefills)
        else:
            self._page.end_step()

    def _step_size(self, plan: Plan | None) -> tuple[str, int]:
        """Return the kind and the rows of what `_step` waits for: the step that it launches, or that it reads."""
        read = None if self._launched is None else self._launched.plan
        plans = [one for one in (plan, read) if one is not None]
        prefills = any(chunk.length > 1 for one in plans for chunk in one.chunks)
        return ("prefill" if prefills else "decode"), max((one.num_tokens for one in plans), default=0)

    def _receive(self) -> list[Command] | None:
        """Return the commands received; with nothing to compute, wait for some. None: the mailbox was closed."""
        if self._launched is not None or (self._scheduler.has_work and not self._stuck):
            return self._mailbox.receive(wait=False)
        self._send(self._take_unsent())
        return self._mailbox.receive(wait=True)

    def _next_plan(self) -> Plan | None:
        """Return the next step; None if the one in flight has to be read first."""
        if self._launched is None:
            plan = self._scheduler.schedule()
            self._stuck = not plan.chunks and not plan.preempted
            self._count_preemptions(plan)
            return plan
        return self._scheduler.schedule_ahead() if self._runner.overlaps else None

    def _launch(self, plan: Plan | None) -> LaunchedStep | None:
        """Start a step, if there is one, and send the previous output while the device computes."""
        unsent = self._take_unsent()
        if plan is None or not plan.chunks:
            self._send(unsent)
            return None
        self._count_plan(plan)
        for sequence in plan.begun:
            self._begin(sequence)
        started = time.perf_counter()
        return LaunchedStep(plan, self._runner.launch(plan, lambda: self._send(unsent)), started)

    def _read(self, launched: LaunchedStep) -> None:
        """Wait for a step, and record its tokens."""
        sampled = launched.launched.read()
        for sequence, start, rows in launched.launched.scores():
            self._add_scores(sequence, start, rows)
        now = time.perf_counter()
        progress = self._scheduler.commit(launched.plan, [s.token for s in sampled])
        for sequence, row, appended, finish in progress:
            self._unsent.add_tokens(sequence, sampled[row : row + appended], finish)
        if self._prefilling:
            self._note_first_tokens()
        # A step launched while another ran began when that one ended.
        took = now - max(launched.started, self._ended)
        if self._page is None or not self._page.encoder_works():
            self._scheduler.learn(launched.plan, 1000 * (now - self._ended), 1000 * took)
        self._metrics.step_seconds.observe(took)
        self._ended = now
        if launched.plan.drafts:
            right = [made.appended - 1 for made in progress]
            self._metrics.observe_guesses([c.drafts for c in launched.plan.chunks if c.drafts], right, took)
        self._count_tokens(progress, now)

    def _add_scores(self, sequence: Sequence, start: int, rows: ScoredRows) -> None:
        """Record scores of a prompt, and announce them when they are complete: before the prompt's first token."""
        if self._scheduler.record_scores(sequence, start, rows):
            self._unsent.add_begin(sequence.shard, sequence.begin())

    def _take_unsent(self) -> StepOutput:
        step_output, self._unsent = self._unsent, StepOutput()
        return step_output

    def _send(self, step_output: StepOutput) -> None:
        for end in step_output.ended:
            self._metrics.finished.labels(end.reason).inc()
        if step_output:
            self._emit(step_output)

    def _execute(self, command: Command) -> None:
        match command:
            case Add(sequence):
                self._add(sequence)
            case Supply(request_id, arrived):
                self._scheduler.supply(request_id, arrived)
            case Abort(request_id, finish):
                removed = self._remove(request_id)
                if removed is not None:
                    self._unsent.add_end(removed, finish)
            case Forget(request_id):
                self._remove(request_id)
            case FinishUnstarted(shard, begin, finish):
                self._unsent.add_begin(shard, begin)
                self._unsent.add_run(shard, TokenRun(begin.request_id, begin.epoch, begin.index, (), None, finish))

    def _add(self, sequence: Sequence) -> None:
        finish = sequence.finish()
        if finish is not None:
            # The journal has the whole answer, but its engine died before it sent the finish.
            self._unsent.add_begin(sequence.shard, sequence.begin())
            self._unsent.add_tokens(sequence, [Sampled(int(sequence.generated[-1]))], finish)
            return
        refusal = self._scheduler.add(sequence)
        if refusal is not None:
            self._unsent.add_end(sequence, error_finish(refusal))

    def _remove(self, request_id: str) -> Sequence | None:
        removed = self._scheduler.remove(request_id)
        if removed is not None:
            self._prefilling.discard(removed)
        return removed

    def _begin(self, sequence: Sequence) -> None:
        self._unsent.add_begin(sequence.shard, sequence.begin())
        times = sequence.timeline
        times.scheduled = time.time()
        times.cached_tokens, times.resumed_tokens = sequence.cached_tokens, sequence.num_generated
        self._prefilling.add(sequence)

    def _note_first_tokens(self) -> None:
        now = time.time()
        for sequence in [s for s in self._prefilling if s.num_generated > s.timeline.resumed_tokens]:
            sequence.timeline.first_token = now
            self._prefilling.remove(sequence)

    def _count_tokens(self, progress: list[Progress], now: float) -> None:
        """Count the tokens; observe the time since the last step with some, if a sequence continues from it."""
        if self._last_tokens_at is not None and any(made.sequence.num_generated > 1 for made in progress):
            self._metrics.inter_token.observe(now - self._last_tokens_at)
        self._last_tokens_at = now if progress else None
        self._metrics.generation_tokens.inc(sum(made.appended for made in progress))
        self._metrics.loops.inc(sum(made.sequence.loops_in_thinking for made in progress))

    def _count_plan(self, plan: Plan) -> None:
        metrics = self._metrics
        metrics.prompt_tokens.inc(sum(s.prompt_len for s in plan.begun))
        metrics.cached_tokens.inc(sum(s.cached_tokens for s in plan.begun))
        metrics.prefix_queries.inc(plan.asked_tokens)
        metrics.prefix_hits.inc(plan.hit_tokens)
        metrics.step_tokens.observe(plan.num_tokens)

    def _count_preemptions(self, plan: Plan) -> None:
        """Count the sequences that lost their blocks, of a plan that has nothing left to compute, too."""
        self._metrics.preemptions.inc(len(plan.preempted))
        for sequence in plan.preempted:
            sequence.timeline.preemptions += 1

    def _update_gauges(self) -> None:
        self._metrics.running.set(self._scheduler.num_running)
        self._metrics.waiting.set(self._scheduler.num_waiting)
        self._metrics.kv_usage.set(self._pool.used / self._pool.num_blocks)
