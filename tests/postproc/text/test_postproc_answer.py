"""One request's pipeline: deltas, their numbers, stop strings, log-probabilities, usage and every kind of end."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from postproc_stand_in import BEGIN, EOS, StandIn, collect, cut, cuts, every_byte, request, run, run_pieces

from services.postproc.text.answer import Answer, AnswerState, Parsers
from services.postproc.text.detokenize import Vocabulary
from shared.errors import Failure
from shared.messages import Delta, Finish, ShownLogprob, TokenLogprob, Usage

ANSWER = (
    "Hm.\n\nA cat, I think…\n</think>\n\n"
    'A "cat" 😀\n<tool_call>{"name": "f", "arguments": {"a": 1}}</tool_call>\nDone\n'
)

THOUGHT = 'Hm.\nA cat…\n<tool_call>{"name": "f", "arguments": {"a": "cat 😀"}}</tool_call>\n'

output_options = st.fixed_dictionaries(
    {
        "thinking": st.booleans(),
        "tools": st.booleans(),
        "functions": st.sampled_from([(), ("f",)]),
        "stop": st.sampled_from([(), ("cat",), ("\n\n", "Do"), (",",), ("😀\nD", "nope")]),
        "include_stop": st.booleans(),
        "stop_in_reasoning": st.booleans(),
        "include_reasoning": st.booleans(),
        "separate_reasoning": st.booleans(),
        "force_nonempty_content": st.booleans(),
    }
)


def answer_of(pieces: list[bytes | str], **output: object) -> tuple[Answer, list[int]]:
    tokenizer = StandIn([piece for piece in pieces if isinstance(piece, bytes)])
    answer = Answer(request(**output), Vocabulary(tokenizer), Parsers())
    answer.begin = BEGIN
    return answer, tokenizer.tokens(pieces)


def stream(answer: Answer, tokens: list[int], finish: Finish | None = None) -> list[Delta]:
    deltas = []
    for token in tokens:
        answer.push_token(token)
        deltas.append(answer.take_delta())
    if finish:
        answer.apply_finish(finish)
        deltas.append(answer.take_delta())
    return [delta for delta in deltas if delta]


# ------------------------------------------------------------------------------------------------ deltas


def test_a_delta_is_numbered_by_the_tokens_up_to_it() -> None:
    pieces: list[bytes | str] = [b"I", b" see", b".\n", b"\n", "</think>", b"\n\n", b"A", b"\xe2\x82", b"\xac", b"!"]
    answer, tokens = answer_of(pieces)
    deltas = stream(answer, tokens, Finish("stop"))
    shown = [(delta.seq, delta.reasoning, delta.content) for delta in deltas]
    assert shown == [
        (1, "I", ""),
        (2, " see", ""),
        (3, ".", ""),
        (7, "", "A"),
        (9, "", "€"),
        (10, "", "!"),
        (11, "", ""),
    ]
    assert deltas[-1].finish_reason == "stop"


@given(st.sampled_from([ANSWER, THOUGHT]), cuts, output_options, st.lists(st.integers(0, 100)), st.integers(0, 100))
def test_a_replay_token_by_token_fits_whatever_was_sent_before(
    text: str, places: list[int], output: dict[str, object], takes: list[int], crash: int
) -> None:
    pieces = cut(text, places)
    whole, tokens = answer_of(pieces, **output)
    expected = collect(stream(whole, tokens, Finish("stop")))

    before, _ = answer_of(pieces, **output)
    sent: list[Delta] = []
    for place, token in enumerate(tokens[: crash % (len(tokens) + 1)]):
        before.push_token(token)
        if place in takes and (delta := before.take_delta()):
            sent.append(delta)
    after, _ = answer_of(pieces, **output)
    seen = sent[-1].seq if sent else 0
    replayed = [delta for delta in stream(after, tokens, Finish("stop")) if delta.seq > seen]
    assert collect([*sent, *replayed]) == expected


@given(st.sampled_from([ANSWER, THOUGHT]), cuts, output_options)
def test_the_short_way_of_plain_tokens_leads_to_the_same_answer(
    text: str, places: list[int], output: dict[str, object]
) -> None:
    # Whoever asks for token ids gets every token folded the long way.
    short, long = run(text, places, **output), run(text, places, return_token_ids=True, **output)
    assert (short.reasoning, short.content, short.calls) == (long.reasoning, long.content, long.calls)
    assert (short.seq, short.usage, short.finish_reason) == (long.seq, long.usage, long.finish_reason)


def test_a_token_with_no_text_makes_no_delta() -> None:
    answer, _ = answer_of([])
    assert stream(answer, [EOS, EOS]) == []
    assert answer.count == 2


# ------------------------------------------------------------------------------------------------ the end


@pytest.mark.parametrize(("named", "content"), [(False, "ab"), (True, "a</s>b")])
def test_special_tokens_are_named_where_asked(named: bool, content: str) -> None:
    tokenizer = StandIn([b"a", b"b"])
    asked = request(thinking=False, special_tokens=named, logprobs=True)
    answer = Answer(asked, Vocabulary(tokenizer), Parsers())
    answer.begin = BEGIN
    for token in tokenizer.tokens([b"a", "</s>", b"b"]):
        answer.push_token(token, TokenLogprob(-1.0, ()))
    answer.push_stop_token(EOS)
    answer.apply_finish(Finish("stop"))
    delta = answer.take_delta()
    assert delta is not None
    assert (delta.content, "".join(shown.token for shown in delta.logprobs)) == (content, content)


def test_usage_of_a_finished_request() -> None:
    text = "ab</think>cd"
    shown = run(text, every_byte(text))
    assert shown.usage == Usage(7, 6, 3, 3, 2, 1)  # five tokens and </s>; a, b and </think>
    assert shown.seq == 7


def test_usage_of_every_delta_where_it_was_asked_for() -> None:
    """A delta's usage counts the tokens up to its number, however many have been folded."""
    answer, tokens = answer_of([b"a", b"b", "</think>", b"c", b"\xe2\x82", b"d"], continuous_usage=True)
    deltas = stream(answer, tokens, Finish("stop"))
    counts = [(delta.seq, delta.usage) for delta in deltas]
    assert counts[:3] == [(1, Usage(7, 1, 1, 3, 2, 1)), (2, Usage(7, 2, 2, 3, 2, 1)), (4, Usage(7, 4, 3, 3, 2, 1))]
    assert counts[-1] == (7, Usage(7, 6, 3, 3, 2, 1))


def test_usage_of_the_first_delta_where_it_was_asked_for() -> None:
    """However many tokens come with it."""
    pieces: list[bytes | str] = [b"a", b"b", "</think>", b"c"]
    answer, tokens = answer_of(pieces, first_usage=True)
    usages = [delta.usage for delta in stream(answer, tokens, Finish("stop"))]
    assert usages == [Usage(7, 1, 1, 3, 2, 1), None, None, Usage(7, 4, 3, 3, 2, 1)]
    answer, tokens = answer_of(pieces, first_usage=True)
    for token in tokens[:2]:
        answer.push_token(token)
    assert [delta.usage for delta in stream(answer, tokens[2:])] == [Usage(7, 2, 2, 3, 2, 1), None]


@pytest.mark.parametrize(
    ("pieces", "stops", "found"),
    [
        ([b"ab", b"cd", b"ef"], ("ef", "cd"), "cd"),
        ([b"ab", b"c", b"d"], ("cd",), "cd"),
        ([b"ab\n"], ("x", "b\n"), "b\n"),
        ([b"ab", b"cd"], ("cde",), ""),
    ],
)
def test_the_end_says_which_stop_string_was_found(
    pieces: list[bytes | str], stops: tuple[str, ...], found: str
) -> None:
    answer, tokens = answer_of(pieces, thinking=False, stop=stops)
    last = stream(answer, tokens, Finish("stop"))[-1]
    assert (last.finish_reason, last.stop) == ("stop", found)


def test_a_stop_token_counts_and_is_not_shown() -> None:
    answer, tokens = answer_of([b"a", b"b"], thinking=False, return_token_ids=True)
    answer.push_token(tokens[0])
    answer.push_stop_token(tokens[1])
    answer.apply_finish(Finish("stop", stop_token=tokens[1]))
    shown = collect([answer.take_delta()])
    assert (shown.content, shown.token_ids, shown.finish_reason) == ("a", tokens, "stop")
    assert shown.usage is not None
    assert shown.usage.completion_tokens == 2


def test_the_end_shows_what_was_held_back() -> None:
    shown = run_pieces([b"a\n", b"\xe2\x82"], finish="length")
    assert (shown.reasoning, shown.content, shown.finish_reason) == ("a\n\ufffd", "", "length")
    shown = run_pieces(["</think>", b"st", b"o\n", b"\xe2"], finish="length", stop=("stop",), tools=True)
    assert (shown.content, shown.finish_reason) == ("sto\n\ufffd", "length")


def test_cancelled_says_nothing() -> None:
    answer, tokens = answer_of([b"a", b"\n"])
    assert stream(answer, tokens, Finish("cancelled")) == [Delta("r1", 1, "a")]
    assert answer.state is AnswerState.CANCELLED


@pytest.mark.parametrize("failure", [Failure(503, "no room", type="server_error"), None])
def test_an_error_ends_the_answer_with_a_failure(failure: Failure | None) -> None:
    answer, tokens = answer_of([b"a", b"\n"])
    deltas = stream(answer, tokens, Finish("error", failure=failure))
    assert [delta.seq for delta in deltas] == [1, 3]
    shown = deltas[-1].failure
    assert shown is not None
    assert shown == failure if failure else shown.status == 500
    assert (deltas[-1].finish_reason, deltas[-1].usage) == (None, None)


def test_without_a_begin_there_is_no_usage_and_so_an_error() -> None:
    answer, tokens = answer_of([b"a"])
    answer.begin = None
    failure = stream(answer, tokens, Finish("stop"))[-1].failure
    assert failure is not None
    assert failure.status == 500


def test_after_the_end_nothing_counts() -> None:
    answer, tokens = answer_of([b"a"])
    answer.apply_finish(Finish("length"))
    last = answer.take_delta()
    answer.push_token(tokens[0])
    answer.push_stop_token(EOS)
    answer.apply_finish(Finish("error"))
    assert last is not None
    assert (last.seq, answer.count, answer.take_delta()) == (1, 0, None)


# ------------------------------------------------------------------------------------------------ stop strings

STOPS = {
    "in reasoning": ("Hm. The end.\n</think>\nX", ("The",), "Hm. ", "", 7),
    "in content": ("Hm.\n</think>\n\nOne two three", ("two", "three"), "Hm.", "One ", 14),
    "not across the boundary": ("sto\n</think>\n\np. stop", ("stop",), "sto", "p. ", 14),
    "not in newlines that separate": ("a\n</think>\n\nb\nc", ("\n",), "a", "b", 7),
    "in newlines that do not": ("a\n\nb</think>c", ("\n\n",), "a", "", 4),
    "at the very end": ("</think>abc", ("abc",), "", "", 4),
    "a newline at the end": ("</think>abc\n", ("\n",), "", "abc", 5),
}


@pytest.mark.parametrize("tools", [False, True])
@pytest.mark.parametrize(("text", "stop", "reasoning", "content", "tokens"), STOPS.values(), ids=STOPS)
def test_stop_strings(text: str, stop: tuple[str, ...], reasoning: str, content: str, tokens: int, tools: bool) -> None:
    shown = run(text, every_byte(text), stop=stop, tools=tools, stop_in_reasoning=True)
    assert (shown.reasoning, shown.content, shown.finish_reason) == (reasoning, content, "stop")
    assert shown.usage is not None
    if not tools:  # with tools, newlines wait for what follows
        assert shown.usage.completion_tokens == tokens
    whole = run(text, stop=stop, tools=tools, stop_in_reasoning=True)
    assert (whole.reasoning, whole.content, whole.finish_reason) == (reasoning, content, "stop")


@pytest.mark.parametrize("tools", [False, True])
def test_stop_strings_are_not_looked_for_in_reasoning_unless_asked(tools: bool) -> None:
    text = "The cat.\n</think>\n\nA cat sat"
    shown = run(text, every_byte(text), stop=("cat",), tools=tools)
    assert (shown.reasoning, shown.content, shown.finish_reason) == ("The cat.", "A ", "stop")
    assert run("The cat", stop=("cat",), tools=tools).reasoning == "The cat"


@pytest.mark.parametrize("tools", [False, True])
def test_reasoning_that_is_not_wanted_is_not_shown(tools: bool) -> None:
    text = "Hm. A cat.\n</think>\n\nA cat sat"
    for places in ([], every_byte(text)):
        shown = run(text, places, tools=tools, include_reasoning=False)
        assert (shown.reasoning, shown.content, shown.finish_reason) == ("", "A cat sat", "stop")
        assert shown.usage is not None
        assert shown.usage.reasoning_tokens > 0
    assert run("Hm.", tools=tools, include_reasoning=False).reasoning == ""


def test_reasoning_that_is_not_shown_makes_no_deltas() -> None:
    answer, tokens = answer_of([b"H", b"m", "</think>", b"Yes"], include_reasoning=False)
    assert [(delta.seq, delta.start, delta.content) for delta in stream(answer, tokens)] == [(4, 0, "Yes")]


def test_reasoning_that_is_not_separated_begins_the_content() -> None:
    text = "Hm. A cat.\n</think>\n\nA cat sat"
    for places in ([], every_byte(text)):
        shown = run(text, places, separate_reasoning=False)
        assert (shown.reasoning, shown.content) == ("", text)


def test_the_token_that_completes_a_stop_string_is_the_last_that_counts() -> None:
    answer, tokens = answer_of(["</think>", b"a s", b"to", b"p it", b" more"], stop=("stop",))
    deltas = stream(answer, tokens)
    assert [(delta.seq, delta.content) for delta in deltas] == [(2, "a "), (5, "")]
    assert deltas[-1].finish_reason == "stop"
    assert deltas[-1].usage == Usage(7, 4, 1, 3, 2, 1)
    assert answer.state is AnswerState.STOPPED
    assert answer.count == 4


def test_include_stop_shows_the_match() -> None:
    shown = run("</think>a stop it", every_byte("a stop it"), stop=("stop",), include_stop=True)
    assert shown.content == "a stop"


def test_no_stop_string_in_a_call() -> None:
    text = '</think>A stop\n<tool_call>{"name": "stop", "arguments": {"a": "stop"}}</tool_call>'
    shown = run(text.replace("A stop", "A sto"), every_byte(text), stop=("stop",), tools=True)
    assert (shown.content, shown.functions) == ("A sto", [("stop", '{"a": "stop"}')])
    assert shown.finish_reason == "tool_calls"
    shown = run(text, every_byte(text), stop=("stop",), tools=True)
    assert (shown.content, shown.functions, shown.finish_reason) == ("A ", [], "stop")


def test_no_stop_string_across_a_call() -> None:
    text = '</think>A sto<tool_call>{"name": "f"}</tool_call>p it'
    shown = run(text, every_byte(text), stop=("stop",), tools=True)
    assert (shown.content, shown.functions) == ("A stop it", [("f", "{}")])


def test_a_stop_string_after_a_call_leaves_the_call_to_be_answered() -> None:
    shown = run('</think><tool_call>{"name": "f"}</tool_call>A stop.', stop=("stop",), tools=True)
    assert (shown.content, shown.functions, shown.finish_reason) == ("A ", [("f", "{}")], "tool_calls")


@pytest.mark.parametrize("shown_reasoning", [True, False])
def test_reasoning_becomes_the_content_where_there_is_none(shown_reasoning: bool) -> None:
    options: dict[str, object] = {"force_nonempty_content": True, "include_reasoning": shown_reasoning}
    reasoning = "Hm.\n\nYes." if shown_reasoning else ""
    for text in ("\nHm.\n\nYes.", "\nHm.\n\nYes.\n</think>\n\n"):
        for places in ([], every_byte(text)):
            for finish in ("stop", "length"):
                shown = run(text, places, finish=finish, tools=True, **options)
                assert (shown.reasoning.strip("\n"), shown.content) == (reasoning, "Hm.\n\nYes.")
    assert run("Hm.</think>A", **options).content == "A"
    called = run('Hm.</think><tool_call>{"name": "f"}</tool_call>', tools=True, **options)
    assert (called.content, called.functions) == ("", [("f", "{}")])
    assert run("Hm.").content == ""


def test_a_call_that_was_asked_for_by_name_ends_as_openai_ends_it() -> None:
    text = '</think><tool_call>{"name": "f"}</tool_call>'
    assert run(text, tools=True, named_tool=True).finish_reason == "stop"
    assert run(text, tools=True).finish_reason == "tool_calls"


def test_a_limit_is_a_stop_if_a_stop_string_was_held_back() -> None:
    shown = run("</think>abc\n", stop=("c\n",), tools=True, finish="length")
    assert (shown.content, shown.finish_reason) == ("ab", "stop")


# ------------------------------------------------------------------------------------------------ log-probabilities


def test_log_probabilities_come_with_their_token_even_if_its_text_is_held_back() -> None:
    answer, tokens = answer_of(["</think>", b"a\xe2\x82", b"\xac", b"st", b"op"], stop=("stop",), logprobs=True)
    deltas = []
    for token in tokens:
        answer.push_token(token, TokenLogprob(-0.5, ((token, -0.5), (EOS, -2.0))))
        deltas.append(answer.take_delta())
    assert all(deltas)
    shown = collect(deltas)
    assert shown.content == "a€"
    assert shown.logprobs[0] == ShownLogprob(
        "</think>", b"</think>", -0.5, (("</think>", b"</think>", -0.5), ("", b"", -2.0))
    )
    texts = [(logprob.token, logprob.data) for logprob in shown.logprobs if isinstance(logprob, ShownLogprob)]
    assert texts[1:] == [("a\ufffd", b"a\xe2\x82"), ("\ufffd", b"\xac"), ("st", b"st"), ("op", b"op")]


def test_log_probabilities_nobody_asked_for_are_not_shown() -> None:
    answer, tokens = answer_of([b"a"])
    answer.push_token(tokens[0], TokenLogprob(-0.5))
    assert answer.take_delta() == Delta("r1", 1, "a")


def test_token_ids_come_when_asked_for() -> None:
    answer, tokens = answer_of([b"a", b"\n", "</think>"], return_token_ids=True)
    assert [delta.token_ids for delta in stream(answer, tokens)] == [(token,) for token in tokens]
