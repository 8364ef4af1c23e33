"""Every open request of the shards this replica owns: runs of tokens go in, deltas come out. It knows no Redis.

A run counts only once: what a former owner of the request writes is dropped by its epoch, what was seen before by its
index. A run that leaves a gap ends the request in an error, since its answer can no longer be right.
"""

import time
from collections.abc import Iterable

import msgspec

from services.postproc.text.answer import Answer, Parsers
from services.postproc.text.catch_up import missed
from services.postproc.text.detokenize import Vocabulary
from shared.bus.records import Record
from shared.errors import Failure, internal
from shared.log import logger
from shared.messages import Attach, Begin, Delta, Finish, Output, TokenLogprob, TokenRun, Tokens
from shared.token_runs import Verdict, judge_run, known_tokens

IGNORED = 4096  # requests without a record that are remembered, so that each is asked for once

EntryId = tuple[int, int]  # milliseconds and sequence number of a stream entry

NOT_FOUND = Failure(404, "There is no such request, or its answer is no longer kept.", code="request_not_found")
LOST = internal("The server has lost this request.", "request_lost", status=503).failure

_log = logger(__name__)


class Journal(msgspec.Struct, frozen=True):
    """What is journaled of a request."""

    tokens: list[int] = []
    logprobs: list[TokenLogprob | None] = []  # beside the tokens, where the request asked for them


class RequestState:
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


class TurnOutput:
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
        self.kept: list[RequestState] = []  # ended well, and somebody may come back for them
        self.gone: list[str] = []  # ended, and nobody will
        self.due: list[RequestState] = []  # have enough new tokens for a write of their journal
        self.queued: set[str] = set()  # attached to before any engine began
        self.ended: list[RequestState] = []  # ended in this turn
        self.closed: dict[str, RequestState] = {}  # ended in this turn or before it
        self.touched: list[RequestState] = []
        self.tokens = 0
        self.sent = 0
        self.failures = 0

    def take(self, state: RequestState) -> None:
        """Collect what is new in an answer."""
        delta = state.answer.take()
        if delta is not None:
            for gateway in state.gateways:
                self.say(gateway, delta)

    def say(self, gateway: str, delta: Delta) -> None:
        self.sent += 1
        self.deltas.setdefault(gateway, []).append(delta)

    def touch(self, state: RequestState) -> None:
        if not state.touched:
            state.touched = True
            state.idle = False
            self.touched.append(state)

    def fail(self, state: RequestState, failure: Failure) -> None:
        """End an answer on our account."""
        if not state.answer.ended:
            state.answer.fail(failure)
            state.answer.unasked = True
            state.finish = Finish("error", failure=failure)
            state.cut = state.answer.count
            self.failures += 1


class RequestStates:
    """The one place of per-request state. A flow opens with its record and closes with the engine's finish, when Redis
    has forgotten the request, or when its shard goes to another replica."""

    def __init__(self, vocabulary: Vocabulary, parsers: Parsers, journal_every: int) -> None:
        self._vocabulary = vocabulary
        self._parsers = parsers
        self._journal_every = journal_every
        self._states: dict[str, RequestState] = {}
        self._ignored: dict[str, None] = {}  # in the order of arrival

    def __len__(self) -> int:
        return len(self._states)

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
        return seen - self._states.keys() - self._ignored.keys(), asked - self._states.keys()

    def open(self, record: Record, journal: Journal, turn: TurnOutput) -> None:
        """Start from a record and what is in its journal, whose deltas were sent before it was written there."""
        try:
            state = RequestState(record, self._answer(record), journal)
            missed(state.answer, state.tokens, state.logprobs, None, len(state.tokens))
        except Exception:
            _log.exception("request cannot be started", extra={"request_id": record.request.id})
            state = RequestState(record, self._nothing(record), journal)
            state.answer.count = state.answer.taken = len(state.tokens)
            turn.fail(state, internal("This request could not be processed.").failure)
        self._states[state.request_id] = state

    def recall(self, record: Record, journal: Journal, turn: TurnOutput) -> None:
        """Bring back an answer that has ended, for who attaches to it in this turn."""
        turn.closed[record.request.id] = RequestState(record, self._nothing(record), journal)

    def ignore(self, request_ids: Iterable[str]) -> None:
        """These have no record, or one of an answer that has ended: nothing more is to be said of them."""
        self._ignored.update(dict.fromkeys(request_ids))
        while len(self._ignored) > IGNORED:
            del self._ignored[next(iter(self._ignored))]

    def drop(self, shard: int) -> None:
        """Another replica goes on with this shard."""
        self._states = {request_id: state for request_id, state in self._states.items() if state.shard != shard}

    def idle(self) -> list[str]:
        """The requests of which nothing came since the last call."""
        idle = [state.request_id for state in self._states.values() if state.idle]
        for state in self._states.values():
            state.idle = True
        return idle

    def forget(self, request_ids: Iterable[str], turn: TurnOutput) -> None:
        """Redis has lost these requests: no engine will ever say how they ended."""
        for request_id in request_ids:
            state = self._states.pop(request_id)
            turn.fail(state, LOST)
            turn.ended.append(state)
            turn.take(state)

    def _answer(self, record: Record) -> Answer:
        answer = Answer(record.request, self._vocabulary, self._parsers)
        answer.begin = record.begin
        return answer

    def _nothing(self, record: Record) -> Answer:
        """In place of an answer that is never read, or cannot be."""
        request = msgspec.structs.replace(record.request, output=Output(thinking=False))
        return self._answer(msgspec.structs.replace(record, request=request))

    # ------------------------------------------------------------------------------------------------ folding

    def fold(self, entry: EntryId, message: Tokens, turn: TurnOutput, replay: bool) -> None:
        """Fold one engine step. With `replay` every token makes a delta of its own: whatever part of these tokens a
        former owner of the shard has sent, a reader can then tell what is new by the sequence number alone."""
        for begin in message.begins:
            if known := self._states.get(begin.request_id):
                self._begin(known, begin, entry)
                turn.touch(known)
        for run in message.runs:
            state = self._states.get(run.request_id)
            if state is None:
                if run.finish is not None:
                    self._ignored.pop(run.request_id, None)
                continue
            if not state.touched:
                turn.touch(state)
            try:
                if (
                    run.epoch == state.epoch
                    and run.index == len(state.tokens)
                    and run.finish is None
                    and state.logprobs is None
                    and not replay
                ):
                    for token in run.tokens:
                        state.answer.push(token)
                    state.tokens += run.tokens
                    turn.tokens += len(run.tokens)
                    if state.since is None:
                        state.since = entry
                else:
                    self._fold_carefully(state, run, entry, turn, replay)
            except Exception:
                _log.exception("request cannot be processed", extra={"request_id": state.request_id})
                turn.fail(state, internal("The answer could not be processed.").failure)
            if run.finish is not None and run.epoch >= state.epoch:
                self._close(state, run.finish, turn)

    def end_turn(self, turn: TurnOutput) -> None:
        """Collect what the touched flows have for others."""
        for state in turn.touched:
            state.touched = False
            if state.request_id in turn.closed:
                continue
            turn.take(state)
            if state.answer.unasked and not state.told:
                state.told = True
                turn.unasked.append(state.request_id)
            if len(state.tokens) - state.written >= self._journal_every:
                turn.due.append(state)

    def _begin(self, state: RequestState, begin: Begin, entry: EntryId) -> None:
        if state.answer.begin is None:
            state.answer.begin = begin
        elif begin.epoch <= state.epoch:
            return
        state.epoch = max(state.epoch, begin.epoch)
        state.begin_due = True
        state.since = state.since or entry

    def _fold_carefully(
        self, state: RequestState, run: TokenRun, entry: EntryId, turn: TurnOutput, replay: bool
    ) -> None:
        count = len(state.tokens)
        verdict = judge_run(run, state.epoch, count)
        if verdict is Verdict.STALE:
            return
        state.epoch, finish = run.epoch, run.finish
        if verdict is Verdict.NEXT:
            self._append(state, run, known_tokens(run, count), entry, turn, replay)
        elif finish is None or finish.reason in ("stop", "length"):
            _log.error("tokens lost", extra={"request_id": state.request_id, "have": count, "got": run.index})
            lost = f"Tokens {count} to {run.index - 1} of the answer were lost."
            turn.fail(state, internal(lost).failure)
        if finish is not None:
            state.answer.finish(finish)

    def _append(
        self, state: RequestState, run: TokenRun, known: int, entry: EntryId, turn: TurnOutput, replay: bool
    ) -> None:
        """Append the tokens of a run from the place `known` on."""
        stopped = run.finish is not None and run.finish.stop_token is not None
        for place in range(known, len(run.tokens)):
            token = run.tokens[place]
            turn.tokens += 1
            if stopped and place == len(run.tokens) - 1:
                state.answer.push_stop_token(token)
                break
            logprob = run.logprobs[place] if run.logprobs is not None else None
            state.answer.push(token, logprob)
            if state.logprobs is not None:
                state.logprobs.append(logprob)
            state.tokens.append(token)
            state.since = state.since or entry
            if replay:
                turn.take(state)

    def _close(self, state: RequestState, finish: Finish, turn: TurnOutput) -> None:
        turn.take(state)
        del self._states[state.request_id]
        turn.closed[state.request_id] = state
        turn.ended.append(state)
        state.finish = state.finish or finish
        if state.answer.answered and state.request.retain_s > 0:
            turn.kept.append(state)
            return
        turn.gone.append(state.request_id)
        if state.finish.reason == "cancelled" and not state.answer.answered:
            for gateway in state.gateways:
                if gateway != state.request.gateway:  # somebody came back there, and cannot have cancelled it
                    turn.say(gateway, _not_found(state.request_id, state.answer.taken))

    # ------------------------------------------------------------------------------------------------ coming back

    def attach(self, message: Attach, turn: TurnOutput) -> None:
        """Send what a gateway has missed of an answer, and from now on the rest. What it had before is dropped there by
        its number, as when a new owner of the shard reads this again."""
        request_id, gateway = message.request_id, message.gateway
        state = self._states.get(request_id)
        if state is not None:
            turn.take(state)
            if gateway not in state.gateways:
                state.gateways += (gateway,)
        elif request_id in turn.queued:
            return  # its record says who reads it
        else:
            state = turn.closed.get(request_id)
        if state is None or (
            state.finish is not None and state.finish.reason == "cancelled" and not state.answer.answered
        ):
            turn.say(gateway, _not_found(request_id, message.after))
            return
        for delta in self._missed(state, message):
            turn.say(gateway, delta)

    def _missed(self, state: RequestState, message: Attach) -> list[Delta]:
        try:
            answer = Answer(state.request, self._vocabulary, self._parsers)
            answer.begin = state.answer.begin
            tokens = state.tokens[: state.cut]
            return missed(answer, tokens, state.logprobs, state.finish, message.after, message.until)
        except Exception:
            _log.exception("answer cannot be rebuilt", extra={"request_id": state.request_id})
            failure = internal("This request could not be processed.").failure
            return [_last(state.request_id, message.after, failure)]

    # ------------------------------------------------------------------------------------------------ the journal

    def waiting(self, shard: int, before: EntryId) -> list[RequestState]:
        """The flows that have kept something to themselves since an entry older than `before`."""
        return [
            state
            for state in self._states.values()
            if state.shard == shard and state.since is not None and state.since < before
        ]

    def oldest(self, shard: int) -> EntryId | None:
        """The first entry that a new owner of the shard would need; None if journals and records hold everything."""
        return min(
            (state.since for state in self._states.values() if state.shard == shard and state.since), default=None
        )


def _not_found(request_id: str, after: int) -> Delta:
    return _last(request_id, after, NOT_FOUND)


def _last(request_id: str, after: int, failure: Failure) -> Delta:
    return Delta(request_id, after + 1, failure=failure, start=after)
