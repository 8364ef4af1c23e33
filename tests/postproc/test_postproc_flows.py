"""The state of open requests, without Redis: what is remembered, and what holds a stream."""

from postproc_stand_in import EOS, StandIn, request

from services.postproc.answer import Parsers
from services.postproc.detokenize import Vocabulary
from services.postproc.flows import IGNORED, Flows, Journal, Turn
from shared.messages import Attach, Begin, Finish, TokenRun, Tokens
from shared.records import Record

WORDS = StandIn([b"a"])
A = WORDS.tokens([b"a"])[0]


def flows_of(*request_ids: str, shard: int = 0) -> Flows:
    flows = Flows(Vocabulary(WORDS), Parsers(), journal_every=4)
    for request_id in request_ids:
        flows.open(Record(request(request_id, shard=shard), 1, False, ("g1",)), Journal(), Turn())
    return flows


def fold(flows: Flows, entry: int, *runs: TokenRun, begins: tuple[Begin, ...] = ()) -> Turn:
    turn = Turn()
    flows.fold((entry, 0), Tokens(begins, runs), turn, replay=False)
    flows.end_turn(turn)
    return turn


def test_strangers_are_who_is_neither_open_nor_ignored() -> None:
    flows = flows_of("known")
    flows.ignore(["gone"])
    runs = tuple(TokenRun(one, 1, 0, (A,)) for one in ("known", "gone", "new"))
    begun = Tokens((Begin("newer", 1, 0, 1, 0, 0, 0),), runs)
    attached = [Attach(one, "g1", 0) for one in ("known", "gone", "other")]
    assert flows.strangers([begun, *attached]) == ({"new", "newer"}, {"gone", "other"})


def test_the_ignored_are_forgotten_with_their_finish_and_when_there_are_too_many() -> None:
    flows = flows_of()
    flows.ignore(["r1"])
    fold(flows, 1, TokenRun("r1", 1, 0, (), finish=Finish("length")))
    assert flows.strangers([Tokens((), (TokenRun("r1", 1, 1, (A,)),))]) == ({"r1"}, set())
    flows.ignore(f"r{n}" for n in range(IGNORED + 1))
    runs = tuple(TokenRun(f"r{n}", 1, 0, (A,)) for n in (0, 1, IGNORED))
    assert flows.strangers([Tokens((), runs)]) == ({"r0"}, set())


def test_an_entry_is_held_until_the_journal_has_all_of_it() -> None:
    flows = flows_of("r1", "r2")
    assert flows.oldest(0) is None
    fold(flows, 1, begins=(Begin("r1", 1, 0, 1, 0, 0, 0),))
    assert flows.oldest(0) == (1, 0)
    fold(flows, 2, TokenRun("r2", 1, 0, (A, A)))
    due = fold(flows, 3, TokenRun("r1", 1, 0, (A,) * 4)).due
    assert [flow.request_id for flow in due] == ["r1"]
    due[0].saved()
    assert flows.oldest(0) == (2, 0)
    assert flows.oldest(1) is None
    assert [flow.request_id for flow in flows.waiting(0, before=(3, 0))] == ["r2"]
    assert flows.waiting(0, before=(2, 0)) == []
    fold(flows, 4, TokenRun("r2", 1, 2, (EOS,), finish=Finish("stop", stop_token=EOS)))
    assert flows.oldest(0) is None
    for entry in (5, 6):
        fold(flows, entry, TokenRun("r1", 1, entry - 1, (A,)))
        assert flows.oldest(0) == (5, 0)
    due[0].saved()
    fold(flows, 7, begins=(Begin("r1", 1, 0, 1, 0, 0, 0),))
    assert flows.oldest(0) is None  # said before
    fold(flows, 8, begins=(Begin("r1", 2, 6, 9, 9, 9, 9),))
    assert flows.oldest(0) == (8, 0)
    assert due[0].begin() == Begin("r1", 2, 0, 1, 0, 0, 0)


def test_a_shard_given_up_takes_its_requests_with_it() -> None:
    flows = flows_of("r1", shard=1)
    flows.drop(0)
    assert len(flows) == 1
    flows.drop(1)
    assert len(flows) == 0


def test_the_idle_are_those_of_which_nothing_came_since_the_last_look() -> None:
    flows = flows_of("r1", "r2")
    assert flows.idle() == []
    fold(flows, 1, TokenRun("r1", 1, 0, (A,)))
    assert flows.idle() == ["r2"]
    assert flows.idle() == ["r1", "r2"]
    turn = Turn()
    flows.forget(["r1"], turn)
    [delta] = turn.deltas["g1"]
    assert (delta.seq, delta.start) == (2, 1)
    assert delta.failure is not None
    assert delta.failure.status == 503
    assert len(flows) == 1
