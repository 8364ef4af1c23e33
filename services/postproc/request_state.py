"""The state of one open request, and the output of one turn of the loop over all of them. No Redis here."""

import time
from enum import Enum

import msgspec

from services.postproc.text.answer import Answer
from shared.bus.records import Record
from shared.errors import Failure
from shared.messages import Begin, Delta, Finish, TokenLogprob

EntryId = tuple[int, int]  # milliseconds and sequence number of a stream entry


class Journal(msgspec.Struct, frozen=True):
    """The journaled part of a request."""

    tokens: list[int] = []
    logprobs: list[TokenLogprob | None] = []  # beside the tokens, where the request asked for them


class RequestPhase(Enum):
    """Phase of a request, by what is still expected of its engine."""

    GENERATING = "generating"  # tokens and a finish
    STOPPING = "stopping"  # a finish: the answer ended here before, and the engine is being cancelled
    ENDED = "ended"  # nothing: the engine has finished the request, or Redis has lost it


class RequestState:
    """One request of a shard that this replica owns: its answer, its tokens, and how many of them are journaled.

    Life: `RequestStates.open_request` makes it in GENERATING, from the record and the journal, when the first entry
    about the request is read. Every run of tokens is appended to `tokens` and folded into `answer`. If the answer ends
    before the engine's finish (a stop string, or a failure of ours), the engine is cancelled and the phase is STOPPING:
    tokens are still appended, and the answer ignores them. The engine's finish makes it ENDED, whereupon the record is
    kept for readers who come back, or deleted. A request that Redis has lost goes to ENDED with a failure. If the shard
    goes to another replica, the state is dropped in any phase, and the other replica makes it anew.

    Only RequestStates writes it, and the outbox through `mark_journaled` and `mark_unjournaled`, after its writes.
    `answer` changes its own state (AnswerState), which says how the answer ended; the phase says what is left to do.
    """

    __slots__ = (
        "answer",
        "begin_unsaved",
        "epoch",
        "failed_at",
        "finish",
        "gateways",
        "idle",
        "journaled",
        "logprobs",
        "opened_at",
        "phase",
        "request",
        "request_id",
        "shard",
        "tokens",
        "unsaved_since",
        "updated",
    )

    def __init__(self, record: Record, answer: Answer, journal: Journal) -> None:
        request, begin = record.request, record.begin
        self.phase = RequestPhase.GENERATING
        self.request = request
        self.opened_at = time.time()
        self.request_id = request.id
        self.shard = request.shard
        self.gateways = record.gateways  # recipients of its deltas
        self.answer = answer
        self.epoch = begin.epoch if begin else 0  # the newest seen
        # All that the engine generated, also behind a stop string, without a stop token.
        self.tokens = journal.tokens
        self.logprobs: list[TokenLogprob | None] | None = None  # of the tokens, for a request that asked for them
        if request.output.logprobs:
            self.logprobs = journal.logprobs + [None] * (len(journal.tokens) - len(journal.logprobs))
        self.journaled = len(journal.tokens)  # number of tokens in the journal
        self.begin_unsaved = False  # the record does not have the newest Begin
        self.unsaved_since: EntryId | None = None  # the first entry that journal and record do not hold completely
        self.finish = record.finish  # the end of the answer, unless a stop string ended it
        self.failed_at: int | None = None  # number of tokens folded when postproc ended the answer in an error
        self.updated = False  # by an entry of this turn
        self.idle = False  # no entry since the last sweep

    @property
    def cancelled(self) -> bool:
        """True if the engine cancelled it before the answer was complete."""
        return self.finish is not None and self.finish.reason == "cancelled" and not self.answer.succeeded

    def begin_to_record(self) -> Begin | None:
        """Return the Begin for the record: the counts of the first one, the epoch of the newest."""
        begin = self.answer.begin
        return None if begin is None else msgspec.structs.replace(begin, epoch=self.epoch)

    def finish_to_record(self) -> Finish:
        """Return the finish for the record of an answer that succeeded, from which the answer can be rebuilt."""
        finish = self.finish
        return finish if finish is not None and finish.reason in ("stop", "length") else Finish("stop")

    def fail(self, failure: Failure) -> None:
        """End the open answer in an error of postproc's own."""
        self.answer.fail(failure)
        self.finish = Finish("error", failure=failure)
        self.failed_at = self.answer.count

    def mark_journaled(self) -> None:
        """Note that journal and record hold everything."""
        self.journaled = len(self.tokens)
        self.begin_unsaved = False
        self.unsaved_since = None

    def mark_unjournaled(self) -> None:
        """Note that Redis has lost what was written: everything has to be written again."""
        self.journaled = 0
        self.begin_unsaved = True


class TurnOutput:
    """Output of one turn: deltas to send, journals to write, and requests to cancel, to retain or to delete."""

    __slots__ = (
        "deltas",
        "deltas_added",
        "ended",
        "failures",
        "finished",
        "queued",
        "to_cancel",
        "to_delete",
        "to_journal",
        "to_retain",
        "tokens_folded",
        "updated",
    )

    def __init__(self) -> None:
        self.updated: list[RequestState] = []  # requests with an entry in this turn
        self.deltas: dict[str, list[Delta]] = {}  # by gateway
        self.to_cancel: list[str] = []  # ended here, so that the engine has to be told
        self.to_journal: list[RequestState] = []  # with enough new tokens for a write of their journal
        self.to_retain: list[RequestState] = []  # succeeded, and kept for readers who come back
        self.to_delete: list[str] = []  # ended, and not kept
        self.ended: list[RequestState] = []  # ended in this turn
        self.finished: dict[str, RequestState] = {}  # ended in this turn, or before it and attached to in it
        self.queued: set[str] = set()  # attached to before an engine has begun
        self.tokens_folded = 0
        self.deltas_added = 0
        self.failures = 0

    def mark_updated(self, state: RequestState) -> None:
        if not state.updated:
            state.updated = True
            state.idle = False
            self.updated.append(state)

    def take_delta(self, state: RequestState) -> None:
        """Move what an answer has to show into a delta for each of its gateways."""
        delta = state.answer.take_delta()
        if delta is not None:
            for gateway in state.gateways:
                self.add_delta(gateway, delta)

    def add_delta(self, gateway: str, delta: Delta) -> None:
        self.deltas_added += 1
        self.deltas.setdefault(gateway, []).append(delta)

    def fail(self, state: RequestState, failure: Failure) -> None:
        """End an answer in an error of postproc's own, unless it has ended before."""
        if not state.answer.ended:
            state.fail(failure)
            self.failures += 1
