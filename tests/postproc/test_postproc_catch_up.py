"""What was missed of an answer, and that a number stands for the same beginning of it however deltas were taken."""

from hypothesis import given
from hypothesis import strategies as st
from postproc_stand_in import BEGIN, EOS, Shown, StandIn, collect, cut, cuts, every_byte, request

from services.postproc.answer import Answer, Parsers
from services.postproc.catch_up import missed
from services.postproc.detokenize import Vocabulary
from shared.errors import Failure
from shared.messages import Delta, Finish, TokenLogprob

TEXT = (
    "Hm.\n\nA cat, I think…\n</think>\n\n"
    'A "cat" 😀\n<tool_call>{"name": "f", "arguments": {"a": 1}}</tool_call>\nDone\n'
)

THOUGHT = 'Hm.\nA cat…\n<tool_call>{"name": "f", "arguments": {"a": "cat 😀"}}</tool_call>\n'

outputs = st.fixed_dictionaries(
    {
        "thinking": st.booleans(),
        "tools": st.booleans(),
        "functions": st.sampled_from([(), ("f",)]),
        "stop": st.sampled_from([(), ("cat",), ("\n\n", "Do"), (",",), ("😀\nD", "nope")]),
        "include_stop": st.booleans(),
        "logprobs": st.booleans(),
        "return_token_ids": st.booleans(),
    }
)
finishes = st.sampled_from(
    [Finish("stop", EOS), Finish("stop"), Finish("length"), Finish("error", failure=Failure(503, "gone")), None]
)


class Case:
    """One answer, cut into tokens in some way."""

    def __init__(self, places: list[int], finish: Finish | None, output: dict[str, object], text: str = TEXT) -> None:
        pieces = cut(text, places)
        tokenizer = StandIn([piece for piece in pieces if isinstance(piece, bytes)])
        self.vocabulary = Vocabulary(tokenizer)
        self.request = request(**output)
        self.finish = finish
        self.tokens = tokenizer.tokens(pieces)
        self.logprobs = [TokenLogprob(-n / 2) for n in range(len(self.tokens))] if output.get("logprobs") else None

    def answer(self) -> Answer:
        answer = Answer(self.request, self.vocabulary, Parsers())
        answer.begin = BEGIN
        return answer

    def deltas(self, takes: set[int] | None = None) -> list[Delta]:
        """Taken after every token, or only after those with one of these indexes."""
        answer, deltas = self.answer(), list[Delta | None]()
        for place, token in enumerate(self.tokens):
            answer.push(token, self.logprobs[place] if self.logprobs else None)
            if takes is None or place in takes:
                deltas.append(answer.take())
        if self.finish is not None and self.finish.stop_token is not None:
            answer.push_stop_token(self.finish.stop_token)
        if self.finish is not None:
            answer.finish(self.finish)
        deltas.append(answer.take())
        return [delta for delta in deltas if delta is not None]

    def missed(self, after: int, until: int = 0) -> list[Delta]:
        return missed(self.answer(), self.tokens, self.logprobs, self.finish, after, until)


cases = st.builds(Case, cuts, finishes, outputs, st.sampled_from([TEXT, THOUGHT]))


@given(cases, st.sets(st.integers(0, 200)))
def test_a_number_stands_for_the_same_beginning_however_deltas_are_taken(case: Case, takes: set[int]) -> None:
    one_by_one = {0: Shown()}
    shown = Shown()
    for delta in case.deltas():
        shown.add(delta)
        one_by_one[delta.seq] = collect(case.deltas()[: len(one_by_one)])
    shown = Shown()
    for delta in case.deltas(takes):
        shown.add(delta)
        assert shown == one_by_one[delta.seq]
    assert shown.seq == max(one_by_one)


@given(cases, st.data())
def test_what_was_seen_and_what_was_missed_are_the_answer(case: Case, data: st.DataObject) -> None:
    deltas = case.deltas()
    seen = data.draw(st.integers(0, len(deltas)))
    shown = collect(deltas[:seen])
    missed = case.missed(shown.seq)
    if shown.done:
        [delta] = missed
        assert (delta.finish_reason, delta.failure) == (shown.finish_reason, shown.failure)
        assert (delta.seq, delta.content, delta.reasoning, delta.tool_calls) == (shown.seq, "", "", ())
    else:
        for delta in missed:
            shown.add(delta)
    assert shown == collect(deltas)


@given(cases, st.sets(st.integers(0, 200)), st.data())
def test_who_has_some_of_a_delta_gets_that_delta_again(case: Case, takes: set[int], data: st.DataObject) -> None:
    deltas = case.deltas(takes)
    if not deltas:
        return
    place = data.draw(st.integers(0, len(deltas) - 1))
    again, *rest = case.missed(deltas[place].start, deltas[place].seq)
    assert again == deltas[place]
    assert len(rest) == (place + 1 < len(deltas))
    assert collect([*deltas[:place], again, *rest]) == collect(deltas)


@given(cases, st.integers(0, 300), st.integers(0, 300))
def test_places_that_no_stream_has_do_no_harm(case: Case, after: int, until: int) -> None:
    at = after
    for delta in case.missed(after, until):
        assert delta.start == at or delta.start == after
        at = delta.seq


@given(cases)
def test_who_has_seen_more_than_there_is_misses_nothing(case: Case) -> None:
    missed = case.missed(1000)
    for delta in missed:
        assert (delta.content, delta.reasoning, delta.logprobs, delta.token_ids) == ("", "", (), ())
    assert len(missed) == collect(case.deltas()).done


def test_a_number_in_between_is_taken_for_the_last_before_it() -> None:
    case = Case(every_byte(TEXT), None, {"thinking": False})
    shown = [delta.seq for delta in case.deltas()]
    gap = next(number for number in range(1, max(shown)) if number not in shown)
    before = max(number for number in shown if number < gap)
    [between], [after] = case.missed(gap), case.missed(before)
    assert (between.content, between.start) == (after.content, gap)
