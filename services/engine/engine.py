"""The engine's loop: receive, schedule, run, emit. Runs in a thread of its own; torch releases the interpreter lock."""

import time
from collections.abc import Callable

from services.engine.blocks import BlockPool
from services.engine.emission import Emission, error
from services.engine.mailbox import Abort, Add, Answer, Command, Forget, Mailbox
from services.engine.metrics import EngineMetrics
from services.engine.runner import Runner
from services.engine.sampler import Sampled
from services.engine.scheduler import Plan, Scheduler
from services.engine.sequence import Sequence
from shared.messages import TokenRun

Emit = Callable[[Emission], None]


class Engine:
    """Composed of what it drives. Nothing here outlives a request but the prefix cache."""

    def __init__(
        self,
        mailbox: Mailbox,
        scheduler: Scheduler,
        pool: BlockPool,
        runner: Runner,
        emit: Emit,
        metrics: EngineMetrics,
    ) -> None:
        self._mailbox = mailbox
        self._scheduler = scheduler
        self._pool = pool
        self._runner = runner
        self._emit = emit
        self._metrics = metrics
        self._unsent = Emission()
        self._prefilling: set[Sequence] = set()  # begun, and without a token yet
        self._spoke: float | None = None  # when the last step gave tokens, if it did

    def run(self) -> None:
        """Work until the mailbox is closed. An exception out of a step is not the fault of one request: it ends the
        process, and whoever takes over resumes every request from its journal."""
        while (commands := self._receive()) is not None:
            emission = Emission()
            for command in commands:
                self._obey(command, emission)
            plan = self._scheduler.schedule()
            for sequence in plan.begun:
                self._begin(sequence, emission)
            sampled = self._execute(plan)
            progress = self._scheduler.commit(plan, [s.token for s in sampled])
            for (sequence, finish), drawn in zip(progress, sampled, strict=True):
                emission.last_token(sequence, drawn.logprob, finish)
            if self._prefilling:
                self._note_first_tokens()
            self._count(plan, emission, len(sampled))
            self._unsent = emission
        self._send()

    def _receive(self) -> list[Command] | None:
        """Commands there are; with nothing to compute, some there will be. None: the mailbox was closed."""
        if self._scheduler.has_work:
            return self._mailbox.receive(wait=False)
        self._send()
        return self._mailbox.receive(wait=True)

    def _send(self) -> None:
        """Send what the last step said."""
        emission, self._unsent = self._unsent, Emission()
        self._emit(emission)

    def _execute(self, plan: Plan) -> list[Sampled]:
        """Run the step, and send what the one before it said while a device computes."""
        if not plan.chunks:
            self._send()
            return []
        started = time.perf_counter()
        sampled = self._runner.execute(plan, self._send)
        self._metrics.step_seconds.observe(time.perf_counter() - started)
        return sampled

    def _obey(self, command: Command, emission: Emission) -> None:
        match command:
            case Add(sequence):
                self._add(sequence, emission)
            case Abort(request_id, finish):
                removed = self._remove(request_id)
                if removed is not None:
                    emission.end(removed, finish)
            case Forget(request_id):
                self._remove(request_id)
            case Answer(shard, begin, finish):
                emission.begin(shard, begin)
                emission.run(shard, TokenRun(begin.request_id, begin.epoch, begin.index, (), None, finish))

    def _add(self, sequence: Sequence, emission: Emission) -> None:
        finish = sequence.finish()
        if finish is not None:
            # The journal has all of the answer, but whoever wrote it did not live to say so.
            emission.begin(sequence.shard, sequence.begin())
            emission.last_token(sequence, None, finish)
            return
        refusal = self._scheduler.add(sequence)
        if refusal is not None:
            emission.end(sequence, error(refusal))

    def _remove(self, request_id: str) -> Sequence | None:
        removed = self._scheduler.remove(request_id)
        if removed is not None:
            self._prefilling.discard(removed)
        return removed

    def _begin(self, sequence: Sequence, emission: Emission) -> None:
        emission.begin(sequence.shard, sequence.begin())
        times = sequence.timeline
        times.scheduled = time.time()
        times.cached_tokens, times.resumed_tokens = sequence.cached_tokens, sequence.num_generated
        self._prefilling.add(sequence)

    def _note_first_tokens(self) -> None:
        now = time.time()
        for sequence in [s for s in self._prefilling if s.num_generated > s.timeline.resumed_tokens]:
            sequence.timeline.first_token = now
            self._prefilling.remove(sequence)

    def _note_tokens(self, plan: Plan, generated: int) -> None:
        """Time the step against the last, from which those who go on had their tokens."""
        now = time.perf_counter()
        if self._spoke is not None and any(c.samples and c.sequence.num_generated > 1 for c in plan.chunks):
            self._metrics.inter_token.observe(now - self._spoke)
        self._spoke = now if generated else None

    def _count(self, plan: Plan, emission: Emission, generated: int) -> None:
        metrics = self._metrics
        metrics.running.set(self._scheduler.num_running)
        metrics.waiting.set(self._scheduler.num_waiting)
        metrics.kv_usage.set(self._pool.used / self._pool.num_blocks)
        metrics.prompt_tokens.inc(sum(s.prompt_len for s in plan.begun))
        metrics.generation_tokens.inc(generated)
        metrics.cached_tokens.inc(sum(s.cached_tokens for s in plan.begun))
        metrics.prefix_queries.inc(plan.asked_tokens)
        metrics.prefix_hits.inc(plan.hit_tokens)
        metrics.preemptions.inc(len(plan.preempted))
        if plan.chunks:
            metrics.step_tokens.observe(plan.num_tokens)
        self._note_tokens(plan, generated)
        for sequence in plan.preempted:
            sequence.timeline.preemptions += 1
        for end in emission.ended:
            metrics.finished.labels(end.reason).inc()
