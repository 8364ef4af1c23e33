"""Every open request of the shards this replica owns: runs of tokens go in, deltas come out. It knows no Redis.

A run counts only once: what a former owner of the request writes is dropped by its epoch, what was seen before by its
index. A run that leaves a gap ends the request in an error, since its answer can no longer be right.
"""

import time
from collections.abc import Iterable

import msgspec

from services.postproc.answer import Answer, Parsers
from services.postproc.catch_up import missed
from services.postproc.detokenize import Vocabulary
from shared.errors import Failure, internal
from shared.log import logger
from shared.messages import Attach, Begin, Delta, Finish, Output, TokenLogprob, TokenRun, Tokens
from shared.records import Record

IGNORED = 4096  # requests without a record that are remembered, so that each is asked for once

EntryId = tuple[int, int]  # milliseconds and sequence number of a stream entry

NOT_FOUND = Failure(404, "There is no such request, or its answer is no longer kept.", code="request_not_found")
LOST = internal("The server has lost this request.", "request_lost", status=503).failure

_log = logger(__name__)


class Journal(msgspec.Struct, frozen=True):
    """What is journaled of a request."""

    tokens: list[int] = []
    logprobs: list[TokenLogprob | None] = []  # beside the tokens, where the request asked for them


class Flow:
    """One request: its answer, and how much of it is in the journal."""

    __slots__ = (
        "answer",
        "begin_due",
        "cut",
        "epoch",
        "finish",
        "gateways",
        "idle",
        "logprobs",
        "opened",
        "request",
        "request_id",
        "shard",
        "since",
        "tokens",
        "told",
        "touched",
        "written",
    )

    def __init__(self, record: Record, answer: Answer, journal: Journal) -> None:
        request, begin = record.request, record.begin
        self.request = request
        self.opened = time.time()
        self.request_id = request.id
        self.shard = request.shard
        self.gateways = record.gateways  # where its deltas go
        self.answer = answer
        self.epoch = begin.epoch if begin else 0  # the newest seen
        self.tokens = journal.tokens  # all that the engine generated, even after a stop string, but for a stop token
        self.logprobs: list[TokenLogprob | None] | None = None  # of the tokens, for a request that asked
        if request.output.logprobs:
            self.logprobs = journal.logprobs + [None] * (len(journal.tokens) - len(journal.logprobs))
        self.written = len(journal.tokens)  # of which in the journal
        self.begin_due = False  # the record does not have the newest Begin
        self.since: EntryId | None = None  # the first entry of which something is not in Redis but here and there
        self.finish = record.finish  # what has ended the answer, if not itself
        self.cut: int | None = None  # tokens that counted when we ended it in an error
        self.told = False  # the engine knows that the answer has ended
        self.touched = False  # in this turn
        self.idle = False  # not touched since somebody last looked

    def begin(self) -> Begin | None:
        """For the record: the counts of the first Begin, the epoch of the newest."""
        begin = self.answer.begin
        return None if begin is None else msgspec.structs.replace(begin, epoch=self.epoch)

    def last_word(self) -> Finish:
        """How an answer that ended well ended, for who rebuilds it from its tokens."""
        finish = self.finish
        return finish if finish is not None and finish.reason in ("stop", "length") else Finish("stop")

    def saved(self) -> None:
        """Journal and record hold everything."""
        self.written = len(self.tokens)
        self.begin_due = False
        self.since = None

    def unsaved(self) -> None:
        """Redis has lost what was written: it all has to be written again."""
        self.written = 0
        self.begin_due = True


class Turn:
    """What the entries of one turn mean for others."""

    __slots__ = (
        "closed",
        "deltas",
        "due",
        "ended",
        "failures",
        "gone",
        "kept",
        "queued",
        "sent",
        "tokens",
        "touched",
        "unasked",
    )

    def __init__(self) -> None:
        self.deltas: dict[str, list[Delta]] = {}  # by gateway
        self.unasked: list[str] = []  # ended here, so that the engine has to be told
        self.kept: list[Flow] = []  # ended well, and somebody may come back for them
        self.gone: list[str] = []  # ended, and nobody will
        self.due: list[Flow] = []  # have enough new tokens for a write of their journal
        self.queued: set[str] = set()  # attached to before any engine began
        self.ended: list[Flow] = []  # ended in this turn
        self.closed: dict[str, Flow] = {}  # ended in this turn or before it
        self.touched: list[Flow] = []
        self.tokens = 0
        self.sent = 0
        self.failures = 0

    def take(self, flow: Flow) -> None:
        """Collect what is new in an answer."""
        delta = flow.answer.take()
        if delta is not None:
            for gateway in flow.gateways:
                self.say(gateway, delta)

    def say(self, gateway: str, delta: Delta) -> None:
        self.sent += 1
        self.deltas.setdefault(gateway, []).append(delta)

    def touch(self, flow: Flow) -> None:
        if not flow.touched:
            flow.touched = True
            flow.idle = False
            self.touched.append(flow)

    def fail(self, flow: Flow, failure: Failure) -> None:
        """End an answer on our account."""
        if not flow.answer.ended:
            flow.answer.fail(failure)
            flow.answer.unasked = True
            flow.finish = Finish("error", failure=failure)
            flow.cut = flow.answer.count
            self.failures += 1


class Flows:
    """The one place of per-request state. A flow opens with its record and closes with the engine's finish, when Redis
    has forgotten the request, or when its shard goes to another replica."""

    def __init__(self, vocabulary: Vocabulary, parsers: Parsers, journal_every: int) -> None:
        self._vocabulary = vocabulary
        self._parsers = parsers
        self._journal_every = journal_every
        self._flows: dict[str, Flow] = {}
        self._ignored: dict[str, None] = {}  # in the order of arrival

    def __len__(self) -> int:
        return len(self._flows)

    # ------------------------------------------------------------------------------------------------ coming, going

    def strangers(self, messages: Iterable[Tokens | Attach]) -> tuple[set[str], set[str]]:
        """The requests in `messages` of which nothing is known: those with tokens, and those attached to."""
        seen: set[str] = set()
        asked: set[str] = set()
        for message in messages:
            if isinstance(message, Attach):
                asked.add(message.request_id)
            else:
                seen.update(run.request_id for run in message.runs)
                seen.update(begin.request_id for begin in message.begins)
        return seen - self._flows.keys() - self._ignored.keys(), asked - self._flows.keys()

    def open(self, record: Record, journal: Journal, turn: Turn) -> None:
        """Start from a record and what is in its journal, whose deltas were sent before it was written there."""
        try:
            flow = Flow(record, self._answer(record), journal)
            missed(flow.answer, flow.tokens, flow.logprobs, None, len(flow.tokens))
        except Exception:
            _log.exception("request cannot be started", extra={"request_id": record.request.id})
            flow = Flow(record, self._nothing(record), journal)
            flow.answer.count = flow.answer.taken = len(flow.tokens)
            turn.fail(flow, internal("This request could not be processed.").failure)
        self._flows[flow.request_id] = flow

    def recall(self, record: Record, journal: Journal, turn: Turn) -> None:
        """Bring back an answer that has ended, for who attaches to it in this turn."""
        turn.closed[record.request.id] = Flow(record, self._nothing(record), journal)

    def ignore(self, request_ids: Iterable[str]) -> None:
        """These have no record, or one of an answer that has ended: nothing more is to be said of them."""
        self._ignored.update(dict.fromkeys(request_ids))
        while len(self._ignored) > IGNORED:
            del self._ignored[next(iter(self._ignored))]

    def drop(self, shard: int) -> None:
        """Another replica goes on with this shard."""
        self._flows = {request_id: flow for request_id, flow in self._flows.items() if flow.shard != shard}

    def idle(self) -> list[str]:
        """The requests of which nothing came since the last call."""
        idle = [flow.request_id for flow in self._flows.values() if flow.idle]
        for flow in self._flows.values():
            flow.idle = True
        return idle

    def forget(self, request_ids: Iterable[str], turn: Turn) -> None:
        """Redis has lost these requests: no engine will ever say how they ended."""
        for request_id in request_ids:
            flow = self._flows.pop(request_id)
            turn.fail(flow, LOST)
            turn.ended.append(flow)
            turn.take(flow)

    def _answer(self, record: Record) -> Answer:
        answer = Answer(record.request, self._vocabulary, self._parsers)
        answer.begin = record.begin
        return answer

    def _nothing(self, record: Record) -> Answer:
        """In place of an answer that is never read, or cannot be."""
        request = msgspec.structs.replace(record.request, output=Output(thinking=False))
        return self._answer(msgspec.structs.replace(record, request=request))

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
                    and flow.logprobs is None
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
                turn.fail(flow, internal("The answer could not be processed.").failure)
            if run.finish is not None and run.epoch >= flow.epoch:
                self._close(flow, run.finish, turn)

    def end_turn(self, turn: Turn) -> None:
        """Collect what the touched flows have for others."""
        for flow in turn.touched:
            flow.touched = False
            if flow.request_id in turn.closed:
                continue
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
                turn.tokens += 1
                if place == last:
                    flow.answer.push_stop_token(token)
                    break
                logprob = run.logprobs[place] if run.logprobs is not None else None
                flow.answer.push(token, logprob)
                if flow.logprobs is not None:
                    flow.logprobs.append(logprob)
                flow.tokens.append(token)
                flow.since = flow.since or entry
                if replay:
                    turn.take(flow)
        elif finish is None or finish.reason in ("stop", "length"):
            lost = f"Tokens {len(flow.tokens)} to {run.index - 1} of the answer were lost."
            _log.error("tokens lost", extra={"request_id": flow.request_id, "have": len(flow.tokens), "got": run.index})
            turn.fail(flow, internal(lost).failure)
        if finish is not None:
            flow.answer.finish(finish)

    def _close(self, flow: Flow, finish: Finish, turn: Turn) -> None:
        turn.take(flow)
        del self._flows[flow.request_id]
        turn.closed[flow.request_id] = flow
        turn.ended.append(flow)
        flow.finish = flow.finish or finish
        if flow.answer.answered and flow.request.retain_s > 0:
            turn.kept.append(flow)
            return
        turn.gone.append(flow.request_id)
        if flow.finish.reason == "cancelled" and not flow.answer.answered:
            for gateway in flow.gateways:
                if gateway != flow.request.gateway:  # somebody came back there, and cannot have cancelled it
                    turn.say(gateway, _not_found(flow.request_id, flow.answer.taken))

    # ------------------------------------------------------------------------------------------------ coming back

    def attach(self, message: Attach, turn: Turn) -> None:
        """Send what a gateway has missed of an answer, and from now on the rest. What it had before is dropped there by
        its number, as when a new owner of the shard reads this again."""
        request_id, gateway = message.request_id, message.gateway
        flow = self._flows.get(request_id)
        if flow is not None:
            turn.take(flow)
            if gateway not in flow.gateways:
                flow.gateways += (gateway,)
        elif request_id in turn.queued:
            return  # its record says who reads it
        else:
            flow = turn.closed.get(request_id)
        if flow is None or (flow.finish is not None and flow.finish.reason == "cancelled" and not flow.answer.answered):
            turn.say(gateway, _not_found(request_id, message.after))
            return
        for delta in self._missed(flow, message):
            turn.say(gateway, delta)

    def _missed(self, flow: Flow, message: Attach) -> list[Delta]:
        try:
            answer = Answer(flow.request, self._vocabulary, self._parsers)
            answer.begin = flow.answer.begin
            tokens = flow.tokens[: flow.cut]
            return missed(answer, tokens, flow.logprobs, flow.finish, message.after, message.until)
        except Exception:
            _log.exception("answer cannot be rebuilt", extra={"request_id": flow.request_id})
            failure = internal("This request could not be processed.").failure
            return [_last(flow.request_id, message.after, failure)]

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


def _not_found(request_id: str, after: int) -> Delta:
    return _last(request_id, after, NOT_FOUND)


def _last(request_id: str, after: int, failure: Failure) -> Delta:
    return Delta(request_id, after + 1, failure=failure, start=after)
