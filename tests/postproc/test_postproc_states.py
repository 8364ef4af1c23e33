"""The state of open requests, without Redis: what is remembered, and what holds a stream."""

from postproc_stand_in import EOS, StandIn, request

from services.postproc.request_states import IGNORED, Journal, RequestStates, TurnOutput
from services.postproc.text.answer import Parsers
from services.postproc.text.detokenize import Vocabulary
from shared.bus.records import Record
from shared.messages import Attach, Begin, Finish, TokenRun, Tokens

WORDS = StandIn([b"a"])
A = WORDS.tokens([b"a"])[0]


def flows_of(*request_ids: str, shard: int = 0) -> RequestStates:
    states = RequestStates(Vocabulary(WORDS), Parsers(), journal_every=4)
    for request_id in request_ids:
        states.open(Record(request(request_id, shard=shard), 1, False, ("g1",)), Journal(), TurnOutput())
    return states


def fold(states: RequestStates, entry: int, *runs: TokenRun, begins: tuple[Begin, ...] = ()) -> TurnOutput:
    turn = TurnOutput()
    states.fold((entry, 0), Tokens(begins, runs), turn, replay=False)
    states.end_turn(turn)
    return turn


def test_strangers_are_who_is_neither_open_nor_ignored() -> None:
    states = flows_of("known")
    states.ignore(["gone"])
    runs = tuple(TokenRun(one, 1, 0, (A,)) for one in ("known", "gone", "new"))
    begun = Tokens((Begin("newer", 1, 0, 1, 0, 0, 0),), runs)
    attached = [Attach(one, "g1", 0) for one in ("known", "gone", "other")]
    assert states.strangers([begun, *attached]) == ({"new", "newer"}, {"gone", "other"})


def test_the_ignored_are_forgotten_with_their_finish_and_when_there_are_too_many() -> None:
    states = flows_of()
    states.ignore(["r1"])
    fold(states, 1, TokenRun("r1", 1, 0, (), finish=Finish("length")))
    assert states.strangers([Tokens((), (TokenRun("r1", 1, 1, (A,)),))]) == ({"r1"}, set())
    states.ignore(f"r{n}" for n in range(IGNORED + 1))
    runs = tuple(TokenRun(f"r{n}", 1, 0, (A,)) for n in (0, 1, IGNORED))
    assert states.strangers([Tokens((), runs)]) == ({"r0"}, set())


def test_an_entry_is_held_until_the_journal_has_all_of_it() -> None:
    states = flows_of("r1", "r2")
    assert states.oldest(0) is None
    fold(states, 1, begins=(Begin("r1", 1, 0, 1, 0, 0, 0),))
    assert states.oldest(0) == (1, 0)
    fold(states, 2, TokenRun("r2", 1, 0, (A, A)))
    due = fold(states, 3, TokenRun("r1", 1, 0, (A,) * 4)).due
    assert [state.request_id for state in due] == ["r1"]
    due[0].saved()
    assert states.oldest(0) == (2, 0)
    assert states.oldest(1) is None
    assert [state.request_id for state in states.waiting(0, before=(3, 0))] == ["r2"]
    assert states.waiting(0, before=(2, 0)) == []
    fold(states, 4, TokenRun("r2", 1, 2, (EOS,), finish=Finish("stop", stop_token=EOS)))
    assert states.oldest(0) is None
    for entry in (5, 6):
        fold(states, entry, TokenRun("r1", 1, entry - 1, (A,)))
        assert states.oldest(0) == (5, 0)
    due[0].saved()
    fold(states, 7, begins=(Begin("r1", 1, 0, 1, 0, 0, 0),))
    assert states.oldest(0) is None  # said before
    fold(states, 8, begins=(Begin("r1", 2, 6, 9, 9, 9, 9),))
    assert states.oldest(0) == (8, 0)
    assert due[0].begin() == Begin("r1", 2, 0, 1, 0, 0, 0)


def test_a_shard_given_up_takes_its_requests_with_it() -> None:
    states = flows_of("r1", shard=1)
    states.drop(0)
    assert len(states) == 1
    states.drop(1)
    assert len(states) == 0


def test_the_idle_are_those_of_which_nothing_came_since_the_last_look() -> None:
    states = flows_of("r1", "r2")
    assert states.idle() == []
    fold(states, 1, TokenRun("r1", 1, 0, (A,)))
    assert states.idle() == ["r2"]
    assert states.idle() == ["r1", "r2"]
    turn = TurnOutput()
    states.forget(["r1"], turn)
    [delta] = turn.deltas["g1"]
    assert (delta.seq, delta.start) == (2, 1)
    assert delta.failure is not None
    assert delta.failure.status == 503
    assert len(states) == 1
