"""Output of one step, gathered by shard."""

import time
from collections.abc import Sequence as Ordered
from dataclasses import dataclass

from services.engine.run.sampler import Sampled
from services.engine.schedule.sequence import Sequence
from shared.errors import Failure
from shared.messages import Begin, Finish, FinishReason, TokenRun, Tokens


@dataclass(frozen=True, slots=True)
class End:
    """End of a request under this epoch; under a later one it may go on."""

    request_id: str
    epoch: int
    reason: FinishReason
    generated: int  # tokens of the answer, here and before
    error: str | None  # its code
    at: float  # unix seconds


class StepOutput:
    """Begins and token runs of one step; one message a shard."""

    def __init__(self) -> None:
        self._begins: dict[int, list[Begin]] = {}
        self._runs: dict[int, list[TokenRun]] = {}
        self.ended: list[End] = []

    def __bool__(self) -> bool:
        return bool(self._begins or self._runs)

    @property
    def begins(self) -> bool:
        """True if a request has begun."""
        return bool(self._begins)

    def add_begin(self, shard: int, begin: Begin) -> None:
        self._begins.setdefault(shard, []).append(begin)

    def add_run(self, shard: int, run: TokenRun) -> None:
        self._runs.setdefault(shard, []).append(run)
        if run.finish is not None:
            self.ended.append(_end(run, run.finish))

    def add_tokens(self, sequence: Sequence, sampled: Ordered[Sampled], finish: Finish | None) -> None:
        """Add the last tokens of a sequence, as they were sampled: all with log-probabilities, or none."""
        index = sequence.num_generated - len(sampled)
        tokens = tuple([one.token for one in sampled])
        logprobs = None
        if sampled[0].logprob is not None:
            logprobs = tuple([one.logprob for one in sampled if one.logprob is not None])
        self.add_run(sequence.shard, TokenRun(sequence.request_id, sequence.epoch, index, tokens, logprobs, finish))

    def add_end(self, sequence: Sequence, finish: Finish) -> None:
        """End a sequence without another token."""
        if not sequence.begun:
            self.add_begin(sequence.shard, sequence.begin())
        self.add_run(
            sequence.shard, TokenRun(sequence.request_id, sequence.epoch, sequence.num_generated, (), None, finish)
        )

    def messages(self) -> dict[int, Tokens]:
        """Return the message of each shard; empty if there is nothing to send."""
        shards = self._begins.keys() | self._runs.keys()
        return {s: Tokens(tuple(self._begins.get(s, ())), tuple(self._runs.get(s, ()))) for s in shards}


def _end(run: TokenRun, finish: Finish) -> End:
    code = None if finish.failure is None else finish.failure.kind
    return End(run.request_id, run.epoch, finish.reason, run.index + len(run.tokens), code, time.time())


def error_finish(failure: Failure) -> Finish:
    return Finish("error", failure=failure)
