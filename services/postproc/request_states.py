"""Registry of all open requests of the shards that this replica owns: runs of tokens go in, deltas come out. No Redis.

A run counts once: tokens of a former owner of the request are dropped by their epoch, tokens seen before by their
index. A run behind a gap ends the request in an error, since its answer can no longer be right.
"""

from collections.abc import Iterable

import msgspec

from services.postproc.request_state import EntryId, Journal, RequestPhase, RequestState, TurnOutput
from services.postproc.text.answer import Answer, AnswerState, Parsers
from services.postproc.text.catch_up import missed_deltas
from services.postproc.text.detokenize import Vocabulary
from shared.bus.records import Record
from shared.errors import Failure, internal, unreadable
from shared.log import logger
from shared.messages import Attach, Begin, Delta, Finish, Output, TokenRun, Tokens
from shared.token_runs import Verdict, judge_run, known_tokens

IGNORED = 4096  # requests without a record that are remembered, so that each record is asked for once

NOT_FOUND = Failure(404, "There is no such request, or its answer is no longer kept.", code="request_not_found")
LOST = internal("The server has lost this request.", "request_lost", status=503).failure

# Bound once, since members of an Enum are slow to look up and every turn compares every request with them.
_OPEN, _ENDED = AnswerState.OPEN, RequestPhase.ENDED

_log = logger(__name__)


class RequestStates:
    """The one place of per-request state. RequestState describes the life of an entry."""

    def __init__(self, vocabulary: Vocabulary, parsers: Parsers, journal_every: int) -> None:
        self._vocabulary = vocabulary
        self._parsers = parsers
        self._journal_every = journal_every
        self._states: dict[str, RequestState] = {}
        self._ignored: dict[str, None] = {}  # in the order of arrival

    def __len__(self) -> int:
        return len(self._states)

    # ------------------------------------------------------------------------------------------------ opening, dropping

    def find_unknown(self, messages: Iterable[Tokens | Attach]) -> tuple[set[str], set[str]]:
        """Return the requests in `messages` without a state: (those with tokens, those attached to)."""
        states, ignored = self._states, self._ignored
        generating: set[str] = set()
        attached: set[str] = set()
        for message in messages:
            if isinstance(message, Attach):
                attached.add(message.request_id)
            else:
                generating.update([run.request_id for run in message.runs if run.request_id not in states])
                generating.update([begin.request_id for begin in message.begins if begin.request_id not in states])
        return generating - ignored.keys(), attached - states.keys()

    def open_request(self, record: Record, journal: Journal, output: TurnOutput) -> None:
        """Make a state from a record and a journal, whose tokens were sent as deltas before they were journaled."""
        try:
            state = RequestState(record, self._new_answer(record), journal)
            missed_deltas(state.answer, state.tokens, state.logprobs, None, len(state.tokens))
        except Exception:
            _log.exception("request cannot be opened", extra=record.request.log_fields)
            state = RequestState(record, self._placeholder_answer(record), journal)
            state.answer.count = state.answer.taken = len(state.tokens)
            output.fail(state, internal("This request could not be processed.").failure)
        self._states[state.request_id] = state

    def restore_finished(self, record: Record, journal: Journal, output: TurnOutput) -> None:
        """Bring back an answer that has ended, for the gateways that attach to it in this turn."""
        state = RequestState(record, self._placeholder_answer(record), journal)
        state.phase = RequestPhase.ENDED
        output.finished[state.request_id] = state

    def ignore(self, request_ids: Iterable[str]) -> None:
        """Ignore later tokens of these requests, which have no record, or one of an answer that has ended."""
        self._ignored.update(dict.fromkeys(request_ids))
        while len(self._ignored) > IGNORED:
            del self._ignored[next(iter(self._ignored))]

    def drop_shard(self, shard: int) -> None:
        """Drop the requests of a shard that goes to another replica."""
        self._states = {request_id: state for request_id, state in self._states.items() if state.shard != shard}

    def sweep_idle(self) -> list[str]:
        """Return the requests without an entry since the last sweep, and start the next one."""
        idle = [state.request_id for state in self._states.values() if state.idle]
        for state in self._states.values():
            state.idle = True
        return idle

    def fail_lost(self, request_ids: Iterable[str], output: TurnOutput) -> None:
        """End requests that Redis has lost: no engine will ever finish them."""
        for request_id in request_ids:
            state = self._states.pop(request_id)
            state.phase = RequestPhase.ENDED
            output.fail(state, LOST)
            output.ended.append(state)
            output.to_delete.append(request_id)
            output.take_delta(state)

    def fail_unreadable(self, request_id: str, gateways: Iterable[str], reason: str, output: TurnOutput) -> None:
        """End a request without a state whose record or journal is damaged: nobody can go on with it."""
        _log.error("unreadable request", extra={"request_id": request_id, "reason": reason})
        self.ignore([request_id])
        for gateway in gateways:
            output.add_delta(gateway, _failure_delta(request_id, 0, unreadable("the record")))
        output.to_cancel.append(request_id)
        output.to_delete.append(request_id)
        output.failures += 1

    def _new_answer(self, record: Record) -> Answer:
        answer = Answer(record.request, self._vocabulary, self._parsers)
        answer.begin = record.begin
        return answer

    def _placeholder_answer(self, record: Record) -> Answer:
        """Make an answer in place of one that is never read, or that cannot be made."""
        request = msgspec.structs.replace(record.request, output=Output(thinking=False))
        return self._new_answer(msgspec.structs.replace(record, request=request))

    # ------------------------------------------------------------------------------------------------ folding

    def fold_step(self, entry: EntryId, message: Tokens, output: TurnOutput, replay: bool) -> None:
        """Fold one engine step.

        With `replay` every token makes a delta of its own: whatever part of these tokens a former owner of the shard
        has sent, a gateway can then tell the new part by the sequence number alone.
        """
        for begin in message.begins:
            if known := self._states.get(begin.request_id):
                _apply_begin(known, begin, entry)
                output.mark_updated(known)
        for run in message.runs:
            state = self._states.get(run.request_id)
            if state is None:
                if run.finish is not None:
                    self._ignored.pop(run.request_id, None)
                continue
            if not state.updated:
                output.mark_updated(state)
            try:
                if (
                    run.epoch == state.epoch
                    and run.index == len(state.tokens)
                    and run.finish is None
                    and state.logprobs is None
                    and not replay
                ):
                    # The usual case, inline for speed: the next tokens of the newest epoch, which a turn collects.
                    for token in run.tokens:
                        state.answer.push_token(token)
                    state.tokens += run.tokens
                    output.tokens_folded += len(run.tokens)
                    if state.unsaved_since is None:
                        state.unsaved_since = entry
                else:
                    _fold_run(state, run, entry, output, replay)
            except Exception:
                _log.exception("request cannot be processed", extra=state.request.log_fields)
                output.fail(state, internal("The answer could not be processed.").failure)
            if run.finish is not None and run.epoch >= state.epoch:
                self._end(state, _finish_of(run, run.finish), output)

    def collect(self, output: TurnOutput) -> None:
        """Add to `output` the deltas, cancellations and due journals of the requests that this turn has updated."""
        for state in output.updated:
            state.updated = False
            if state.phase is _ENDED:
                continue
            output.take_delta(state)
            if state.answer.state is not _OPEN and state.phase is RequestPhase.GENERATING:
                state.phase = RequestPhase.STOPPING
                output.to_cancel.append(state.request_id)
            if len(state.tokens) - state.journaled >= self._journal_every:
                output.to_journal.append(state)

    def _end(self, state: RequestState, finish: Finish, output: TurnOutput) -> None:
        """End a request that the engine has finished."""
        output.take_delta(state)
        del self._states[state.request_id]
        state.phase = RequestPhase.ENDED
        output.finished[state.request_id] = state
        output.ended.append(state)
        state.finish = state.finish or finish
        if state.answer.succeeded and state.request.retain_s > 0:
            output.to_retain.append(state)
            return
        output.to_delete.append(state.request_id)
        if state.cancelled:
            for gateway in state.gateways:
                if gateway != state.request.gateway:  # a reader came back there, and cannot have cancelled it
                    output.add_delta(gateway, _not_found(state.request_id, state.answer.taken))

    # ------------------------------------------------------------------------------------------------ reconnecting

    def attach(self, message: Attach, output: TurnOutput) -> None:
        """Send a gateway the part of an answer that it has missed, and from now on the rest.

        The gateway drops by its sequence number what it has already, as when a new owner of the shard reads this
        message again.
        """
        request_id, gateway = message.request_id, message.gateway
        state = self._states.get(request_id)
        if state is not None:
            output.take_delta(state)
            if gateway not in state.gateways:
                state.gateways += (gateway,)
        elif request_id in output.queued:
            return  # its record names its gateways
        else:
            state = output.finished.get(request_id)
        if state is None or state.cancelled:
            output.add_delta(gateway, _not_found(request_id, message.after))
            return
        for delta in self._missed_deltas(state, message):
            output.add_delta(gateway, delta)

    def _missed_deltas(self, state: RequestState, message: Attach) -> list[Delta]:
        try:
            answer = Answer(state.request, self._vocabulary, self._parsers)
            answer.begin = state.answer.begin
            tokens = state.tokens[: state.failed_at]
            return missed_deltas(answer, tokens, state.logprobs, state.finish, message.after, message.until)
        except Exception:
            _log.exception("answer cannot be rebuilt", extra=state.request.log_fields)
            failure = internal("This request could not be processed.").failure
            return [_failure_delta(state.request_id, message.after, failure)]

    # ------------------------------------------------------------------------------------------------ the journal

    def unsaved_before(self, shard: int, entry: EntryId) -> list[RequestState]:
        """Return the requests with tokens or a Begin older than `entry` that are in no journal or record yet."""
        return [
            state
            for state in self._states.values()
            if state.shard == shard and state.unsaved_since is not None and state.unsaved_since < entry
        ]

    def oldest_unsaved(self, shard: int) -> EntryId | None:
        """Return the first entry that a new owner of the shard would need; None if journals and records hold all."""
        return min(
            (
                state.unsaved_since
                for state in self._states.values()
                if state.shard == shard and state.unsaved_since is not None
            ),
            default=None,
        )


def _apply_begin(state: RequestState, begin: Begin, entry: EntryId) -> None:
    known = state.answer.begin
    if known is None:
        state.answer.begin = begin
    elif begin.prompt_logprobs is not None and known.prompt_logprobs is None:
        # They are a function of the request, whichever engine has computed them.
        state.answer.begin = msgspec.structs.replace(known, prompt_logprobs=begin.prompt_logprobs)
    elif begin.epoch <= state.epoch:
        return
    state.epoch = max(state.epoch, begin.epoch)
    state.begin_unsaved = True
    state.unsaved_since = state.unsaved_since or entry


def _fold_run(state: RequestState, run: TokenRun, entry: EntryId, output: TurnOutput, replay: bool) -> None:
    count = len(state.tokens)
    verdict = judge_run(run, state.epoch, count)
    if verdict is Verdict.STALE:
        return
    state.epoch, finish = run.epoch, run.finish
    if verdict is Verdict.NEXT:
        _append(state, run, known_tokens(run, count), entry, output, replay)
    elif finish is None or finish.reason in ("stop", "length"):
        _log.error("tokens lost", extra={**state.request.log_fields, "have": count, "got": run.index})
        lost = f"Tokens {count} to {run.index - 1} of the answer were lost."
        output.fail(state, internal(lost).failure)
    if finish is not None:
        state.answer.apply_finish(finish)


def _append(state: RequestState, run: TokenRun, known: int, entry: EntryId, output: TurnOutput, replay: bool) -> None:
    """Append the tokens of a run from index `known` of the run on."""
    ends_in_stop_token = run.finish is not None and run.finish.stop_token is not None
    for place in range(known, len(run.tokens)):
        token = run.tokens[place]
        output.tokens_folded += 1
        logprob = run.logprobs[place] if run.logprobs is not None else None
        if ends_in_stop_token and place == len(run.tokens) - 1:
            state.answer.push_stop_token(token, logprob)
            break
        state.answer.push_token(token, logprob)
        if state.logprobs is not None:
            state.logprobs.append(logprob)
        state.tokens.append(token)
        state.unsaved_since = state.unsaved_since or entry
        if replay:
            output.take_delta(state)


def _finish_of(run: TokenRun, finish: Finish) -> Finish:
    """Return a run's finish as the record keeps it: with what no journal has of a stop token."""
    if finish.stop_token is None or not run.logprobs:
        return finish
    return msgspec.structs.replace(finish, logprob=run.logprobs[-1])


def _not_found(request_id: str, after: int) -> Delta:
    return _failure_delta(request_id, after, NOT_FOUND)


def _failure_delta(request_id: str, after: int, failure: Failure) -> Delta:
    return Delta(request_id, after + 1, failure=failure, start=after)
