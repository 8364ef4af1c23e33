"""The registry of open requests, without Redis: which requests it knows, and which entries of a stream they hold."""

import re
from pathlib import Path

import msgspec
import pytest
from postproc_stand_in import EOS, StandIn, request

from services.postproc.request_state import Journal, TurnOutput
from services.postproc.request_states import IGNORED, RequestStates
from services.postproc.text.answer import Parsers
from services.postproc.text.detokenize import Vocabulary
from shared.bus.records import Record
from shared.messages import Attach, Begin, Finish, TokenRun, Tokens

WORDS = StandIn([b"a"])
A = WORDS.tokens([b"a"])[0]


def states_of(*request_ids: str, shard: int = 0) -> RequestStates:
    states = RequestStates(Vocabulary(WORDS), Parsers(), journal_every=4)
    for request_id in request_ids:
        states.open_request(Record(request(request_id, shard=shard), 1, False, ("g1",)), Journal(), TurnOutput())
    return states


def fold(states: RequestStates, entry: int, *runs: TokenRun, begins: tuple[Begin, ...] = ()) -> TurnOutput:
    output = TurnOutput()
    states.fold_step((entry, 0), Tokens(begins, runs), output, replay=False)
    states.collect(output)
    return output


def test_unknown_requests_are_neither_open_nor_ignored() -> None:
    states = states_of("known")
    states.ignore(["gone"])
    runs = tuple(TokenRun(one, 1, 0, (A,)) for one in ("known", "gone", "new"))
    begun = Tokens((Begin("newer", 1, 0, 1, 0, 0, 0),), runs)
    attached = [Attach(one, "g1", 0) for one in ("known", "gone", "other")]
    assert states.find_unknown([begun, *attached]) == ({"new", "newer"}, {"gone", "other"})


def test_the_ignored_are_forgotten_with_their_finish_and_when_there_are_too_many() -> None:
    states = states_of()
    states.ignore(["r1"])
    fold(states, 1, TokenRun("r1", 1, 0, (), finish=Finish("length")))
    assert states.find_unknown([Tokens((), (TokenRun("r1", 1, 1, (A,)),))]) == ({"r1"}, set())
    states.ignore(f"r{n}" for n in range(IGNORED + 1))
    runs = tuple(TokenRun(f"r{n}", 1, 0, (A,)) for n in (0, 1, IGNORED))
    assert states.find_unknown([Tokens((), runs)]) == ({"r0"}, set())


def test_an_entry_is_held_until_the_journal_has_all_of_it() -> None:
    states = states_of("r1", "r2")
    assert states.oldest_unsaved(0) is None
    fold(states, 1, begins=(Begin("r1", 1, 0, 1, 0, 0, 0),))
    assert states.oldest_unsaved(0) == (1, 0)
    fold(states, 2, TokenRun("r2", 1, 0, (A, A)))
    due = fold(states, 3, TokenRun("r1", 1, 0, (A,) * 4)).to_journal
    assert [state.request_id for state in due] == ["r1"]
    due[0].mark_journaled()
    assert states.oldest_unsaved(0) == (2, 0)
    assert states.oldest_unsaved(1) is None
    assert [state.request_id for state in states.unsaved_before(0, (3, 0))] == ["r2"]
    assert states.unsaved_before(0, (2, 0)) == []
    fold(states, 4, TokenRun("r2", 1, 2, (EOS,), finish=Finish("stop", stop_token=EOS)))
    assert states.oldest_unsaved(0) is None
    for entry in (5, 6):
        fold(states, entry, TokenRun("r1", 1, entry - 1, (A,)))
        assert states.oldest_unsaved(0) == (5, 0)
    due[0].mark_journaled()
    fold(states, 7, begins=(Begin("r1", 1, 0, 1, 0, 0, 0),))
    assert states.oldest_unsaved(0) is None  # said before
    fold(states, 8, begins=(Begin("r1", 2, 6, 9, 9, 9, 9),))
    assert states.oldest_unsaved(0) == (8, 0)
    assert due[0].begin_to_record() == Begin("r1", 2, 0, 1, 0, 0, 0)


def test_a_shard_given_up_takes_its_requests_with_it() -> None:
    states = states_of("r1", shard=1)
    states.drop_shard(0)
    assert len(states) == 1
    states.drop_shard(1)
    assert len(states) == 0


def test_the_idle_are_those_of_which_nothing_came_since_the_last_look() -> None:
    states = states_of("r1", "r2")
    assert states.sweep_idle() == []
    fold(states, 1, TokenRun("r1", 1, 0, (A,)))
    assert states.sweep_idle() == ["r2"]
    assert states.sweep_idle() == ["r1", "r2"]
    output = TurnOutput()
    states.fail_lost(["r1"], output)
    [delta] = output.deltas["g1"]
    assert (delta.seq, delta.start) == (2, 1)
    assert delta.failure is not None
    assert delta.failure.status == 503
    assert len(states) == 1


def test_lines_about_a_request_have_its_clients_id(caplog: pytest.LogCaptureFixture) -> None:
    states = states_of()
    asked = msgspec.structs.replace(request("r1"), http_id="mine")
    states.open_request(Record(asked, 1, False, ("g1",)), Journal(), TurnOutput())
    fold(states, 1, TokenRun("r1", 1, 5, (A,)))
    (line,) = caplog.records
    assert (line.message, line.__dict__["request_id"], line.__dict__["http_request_id"]) == (
        "tokens lost",
        "r1",
        "mine",
    )


def test_no_stage_writes_the_pipelines_id_alone_where_it_has_the_request() -> None:
    root = Path(__file__).resolve().parents[2] / "services"
    alone = {
        f"{path.relative_to(root)}: {text}"
        for service in ("mm_encoder", "engine", "postproc")
        for path in (root / service).rglob("*.py")
        for text in re.findall(r'"([^"]+)",\s*extra=\{"request_id"', path.read_text())
    }
    assert alone == {"engine/transport/resume.py: unreadable journal", "postproc/request_states.py: unreadable request"}
