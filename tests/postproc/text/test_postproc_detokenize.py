"""The detokenizer against bytes.decode, and what counts as a plain token."""

from itertools import pairwise

from hypothesis import example, given
from hypothesis import strategies as st
from postproc_stand_in import StandIn

from services.postproc.text.detokenize import Detokenizer, Vocabulary

some_bytes = st.one_of(
    st.text().map(str.encode), st.binary(), st.lists(st.sampled_from([*"aé€😀"])).map(lambda x: "".join(x).encode())
)


def pieces(data: bytes, cuts: list[int]) -> list[bytes]:
    places = sorted({0, len(data), *(place % (len(data) + 1) for place in cuts)})
    return [data[a:b] for a, b in pairwise(places)]


@given(st.lists(some_bytes).map(b"".join), st.lists(st.integers(0, 100)))
@example(b"\xf0\x9f\x98\x80", [1, 2, 3])
@example(b"\xe2\x82A\xe2\x82", [1, 2, 3])
@example(b"\xed\xa0\x80\xc0\xaf\xf8", [1, 2, 3, 4, 5])
def test_any_cut_decodes_to_what_the_whole_does(data: bytes, cuts: list[int]) -> None:
    detokenizer = Detokenizer()
    text = "".join(map(detokenizer.decode, pieces(data, cuts))) + detokenizer.flush()
    assert text == data.decode("utf-8", "replace")
    assert detokenizer.idle


@given(st.text())
def test_a_character_comes_with_its_last_byte(text: str) -> None:
    detokenizer = Detokenizer()
    for char in text:
        data = char.encode()
        assert "".join(detokenizer.decode(data[i : i + 1]) for i in range(len(data) - 1)) == ""
        assert detokenizer.decode(data[-1:]) == char


def test_an_impossible_byte_is_shown_when_it_is_certain() -> None:
    detokenizer = Detokenizer()
    assert detokenizer.decode(b"\xe2\x82") == ""
    assert detokenizer.decode(b"x") == "\ufffdx"


def test_plain_tokens_need_no_thought() -> None:
    odd = [b"\xe2\x82", b"a\n", b"\nb", b"\n", b"", b"\xff"]
    plain = [b" word", "é€".encode(), b"a\nb"]
    tokenizer = StandIn([*odd, *plain])
    vocabulary = Vocabulary(tokenizer)
    texts = {piece.decode(): vocabulary.plain.get(tokenizer.tokens([piece])[0]) for piece in plain}
    assert all(text == shown for text, shown in texts.items())
    assert not any(tokenizer.tokens([piece])[0] in vocabulary.plain for piece in odd if piece)
    markers = [tokenizer.token_id(marker) for marker in ("</s>", "</think>", "<tool_call>", "</tool_call>")]
    assert not vocabulary.plain.keys() & set(markers)


def test_ids_beyond_the_tokenizer_have_no_text() -> None:
    assert Vocabulary(StandIn([b"a"])).bytes_of(10**6) == b""


def test_markers_the_vocabulary_lacks_are_known_by_their_spelling() -> None:
    vocabulary = Vocabulary(StandIn([], spelled=["</tool_call>"]))
    assert list(vocabulary.call_markers.values()) == ["<tool_call>"]
    assert vocabulary.spelled_markers == ("</tool_call>",)
