"""Every open request of the shards this replica owns: runs of tokens go in, deltas come out. It knows no Redis.

A run counts only once: what a former owner of the request writes is dropped by its epoch, what was seen before by its
index. A run that leaves a gap ends the request in an error, since its answer can no longer be right.
"""

from collections.abc import Iterable

import msgspec

from services.postproc.answer import Answer, Parsers
from services.postproc.detokenize import Vocabulary
from shared.errors import Failure, internal
from shared.log import logger
from shared.messages import Begin, Delta, Output, Request, TokenRun, Tokens
from shared.records import Record

IGNORED = 4096  # requests without a record that are remembered, so that each is asked for once

EntryId = tuple[int, int]  # milliseconds and sequence number of a stream entry

_log = logger(__name__)


class Flow:
    """One request: its answer, and how much of it is in the journal."""

    __slots__ = (
        "answer",
        "begin_due",
        "epoch",
        "gateway",
        "request_id",
        "shard",
        "since",
        "tokens",
        "told",
        "touched",
        "written",
    )

    def __init__(self, shard: int, request: Request, answer: Answer, epoch: int) -> None:
        self.shard = shard
        self.request_id = request.id
        self.gateway = request.gateway
        self.answer = answer
        self.epoch = epoch  # the newest seen
        self.tokens: list[int] = []  # all that the engine generated, even after a stop string
        self.written = 0  # of which in the journal
        self.begin_due = False  # the record does not have the newest Begin
        self.since: EntryId | None = None  # the first entry of which something is not in Redis but here and there
        self.told = False  # the engine knows that the answer has ended
        self.touched = False  # in this turn

    def begin(self) -> Begin | None:
        """For the record: the counts of the first Begin, the epoch of the newest."""
        begin = self.answer.begin
        return None if begin is None else msgspec.structs.replace(begin, epoch=self.epoch)

    def saved(self) -> None:
        """Journal and record hold everything."""
        self.written = len(self.tokens)
        self.begin_due = False
        self.since = None


class Turn:
    """What the entries of one turn mean for others."""

    __slots__ = ("deltas", "due", "finished", "sent", "tokens", "touched", "unasked")

    def __init__(self) -> None:
        self.deltas: dict[str, list[Delta]] = {}  # by gateway
        self.unasked: list[str] = []  # ended here, so that the engine has to be told
        self.finished: list[str] = []  # ended for good
        self.due: list[Flow] = []  # have enough new tokens for a write of their journal
        self.touched: list[Flow] = []
        self.tokens = 0
        self.sent = 0

    def take(self, flow: Flow) -> None:
        """Collect what is new in an answer."""
        delta = flow.answer.take()
        if delta is not None:
            self.sent += 1
            self.deltas.setdefault(flow.gateway, []).append(delta)

    def touch(self, flow: Flow) -> None:
        if not flow.touched:
            flow.touched = True
            self.touched.append(flow)


class Flows:
    """The one place of per-request state. A flow opens with its record and closes with the engine's finish, or when
    its shard goes to another replica."""

    def __init__(self, vocabulary: Vocabulary, parsers: Parsers, journal_every: int) -> None:
        self._vocabulary = vocabulary
        self._parsers = parsers
        self._journal_every = journal_every
        self._flows: dict[str, Flow] = {}
        self._ignored: dict[str, None] = {}  # in the order of arrival

    def __len__(self) -> int:
        return len(self._flows)

    # ------------------------------------------------------------------------------------------------ coming, going

    def strangers(self, messages: Iterable[Tokens]) -> set[str]:
        """The requests in `messages` of which nothing is known yet."""
        seen = {run.request_id for message in messages for run in message.runs}
        seen.update(begin.request_id for message in messages for begin in message.begins)
        return seen - self._flows.keys() - self._ignored.keys()

    def open(self, shard: int, record: Record, journal: list[int]) -> None:
        """Start from a record and the tokens in its journal, whose deltas were sent before they were written there."""
        request, begin = record.request, record.begin
        try:
            flow = self._flow(shard, request, begin)
            flow.answer.restore(journal)
        except Exception:
            _log.exception("request cannot be started", extra={"request_id": request.id})
            flow = self._flow(shard, msgspec.structs.replace(request, output=Output(thinking=False)), begin)
            _fail(flow, internal("This request could not be processed.").failure)
        flow.tokens = journal
        flow.written = len(journal)
        self._flows[request.id] = flow

    def ignore(self, request_ids: Iterable[str]) -> None:
        """These have no record: they ended long ago, or were never ours."""
        self._ignored.update(dict.fromkeys(request_ids))
        while len(self._ignored) > IGNORED:
            del self._ignored[next(iter(self._ignored))]

    def drop(self, shard: int) -> None:
        """Another replica goes on with this shard."""
        self._flows = {request_id: flow for request_id, flow in self._flows.items() if flow.shard != shard}

    def _flow(self, shard: int, request: Request, begin: Begin | None) -> Flow:
        answer = Answer(request, self._vocabulary, self._parsers)
        answer.begin = begin
        return Flow(shard, request, answer, begin.epoch if begin else 0)

    # ------------------------------------------------------------------------------------------------ folding

    def fold(self, entry: EntryId, message: Tokens, turn: Turn, replay: bool) -> None:
        """Fold one engine step. With `replay` every token makes a delta of its own: whatever part of these tokens a
        former owner of the shard has sent, a reader can then tell what is new by the sequence number alone."""
        for begin in message.begins:
            if known := self._flows.get(begin.request_id):
                self._begin(known, begin, entry)
                turn.touch(known)
        for run in message.runs:
            flow = self._flows.get(run.request_id)
            if flow is None:
                if run.finish is not None:
                    self._ignored.pop(run.request_id, None)
                continue
            if not flow.touched:
                turn.touch(flow)
            try:
                if (
                    run.epoch == flow.epoch
                    and run.index == len(flow.tokens)
                    and run.finish is None
                    and run.logprobs is None
                    and not replay
                ):
                    for token in run.tokens:
                        flow.answer.push(token)
                    flow.tokens += run.tokens
                    turn.tokens += len(run.tokens)
                    if flow.since is None:
                        flow.since = entry
                else:
                    self._fold_carefully(flow, run, entry, turn, replay)
            except Exception:
                _log.exception("request cannot be processed", extra={"request_id": flow.request_id})
                _fail(flow, internal("The answer could not be processed.").failure)
            if run.finish is not None and run.epoch >= flow.epoch:
                self._close(flow, turn)

    def end_turn(self, turn: Turn) -> None:
        """Collect what the touched flows have for others."""
        for flow in turn.touched:
            flow.touched = False
            turn.take(flow)
            if flow.answer.unasked and not flow.told:
                flow.told = True
                turn.unasked.append(flow.request_id)
            if len(flow.tokens) - flow.written >= self._journal_every:
                turn.due.append(flow)

    def _begin(self, flow: Flow, begin: Begin, entry: EntryId) -> None:
        if flow.answer.begin is None:
            flow.answer.begin = begin
        elif begin.epoch <= flow.epoch:
            return
        flow.epoch = max(flow.epoch, begin.epoch)
        flow.begin_due = True
        flow.since = flow.since or entry

    def _fold_carefully(self, flow: Flow, run: TokenRun, entry: EntryId, turn: Turn, replay: bool) -> None:
        if run.epoch < flow.epoch:
            return
        flow.epoch = run.epoch
        finish, known = run.finish, len(flow.tokens) - run.index
        if known >= 0:
            last = len(run.tokens) - 1 if finish is not None and finish.stop_token is not None else -1
            for place in range(known, len(run.tokens)):
                token = run.tokens[place]
                if place == last:
                    flow.answer.push_stop_token(token)
                else:
                    flow.answer.push(token, run.logprobs[place] if run.logprobs is not None else None)
                flow.tokens.append(token)
                flow.since = flow.since or entry
                turn.tokens += 1
                if replay:
                    turn.take(flow)
        elif finish is None or finish.reason in ("stop", "length"):
            lost = f"Tokens {len(flow.tokens)} to {run.index - 1} of the answer were lost."
            _log.error("tokens lost", extra={"request_id": flow.request_id, "have": len(flow.tokens), "got": run.index})
            _fail(flow, internal(lost).failure)
        if finish is not None:
            flow.answer.finish(finish)

    def _close(self, flow: Flow, turn: Turn) -> None:
        turn.take(flow)
        turn.finished.append(flow.request_id)
        flow.told = True
        flow.saved()
        del self._flows[flow.request_id]

    # ------------------------------------------------------------------------------------------------ the journal

    def waiting(self, shard: int, before: EntryId) -> list[Flow]:
        """The flows that have kept something to themselves since an entry older than `before`."""
        return [
            flow
            for flow in self._flows.values()
            if flow.shard == shard and flow.since is not None and flow.since < before
        ]

    def oldest(self, shard: int) -> EntryId | None:
        """The first entry that a new owner of the shard would need; None if journals and records hold everything."""
        return min((flow.since for flow in self._flows.values() if flow.shard == shard and flow.since), default=None)


def _fail(flow: Flow, failure: Failure) -> None:
    """End the answer on our account."""
    if not flow.answer.ended:
        flow.answer.fail(failure)
        flow.answer.unasked = True
