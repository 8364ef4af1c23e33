"""Lines and forms, however their bytes are cut. Pure."""

import json
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.gateway.batches.lines import BOM, Line, LineCounter, LineSplitter, answered, check_body, unanswered
from services.gateway.http.form import FormReader
from shared.errors import RequestError

LINE = st.binary(max_size=6).map(lambda line: line.replace(b"\n", b"-"))


def pieces(data: bytes, cuts: list[int]) -> list[bytes]:
    """Data in pieces, some of them empty."""
    places = sorted({0, len(data), *(cut % (len(data) + 1) for cut in cuts)})
    return [data[begin:end] for begin, end in pairwise(places)]


@given(st.lists(LINE, max_size=12), st.sampled_from([b"\n", b"\r\n"]), st.lists(st.integers(0, 200)))
def test_every_cut_of_a_file_has_the_same_lines(lines: list[bytes], end: bytes, cuts: list[int]) -> None:
    splitter = LineSplitter(100)
    found = [each for piece in pieces(end.join(lines), cuts) for each in splitter.feed(piece)]
    found += splitter.end()
    wanted = [(number, line.strip()) for number, line in enumerate(lines or [b""], 1) if line.strip()]
    assert found == wanted
    assert splitter.count == max(1, len(lines))


@given(
    st.lists(st.lists(st.sampled_from([b"", BOM, BOM[:2], b" ", b"\r", b"x"]), max_size=3).map(b"".join), max_size=5),
    st.lists(st.integers(0, 60)),
)
def test_lines_are_counted_as_they_are_divided(lines: list[bytes], cuts: list[int]) -> None:
    splitter, counter = LineSplitter(100), LineCounter(100)
    filled = 0
    for piece in pieces(b"\n".join(lines), cuts):
        filled += len(list(splitter.feed(piece)))
        counter.feed(piece)
    filled += len(list(splitter.end()))
    counter.end()
    assert (counter.count, counter.filled) == (splitter.count, filled)


@pytest.mark.parametrize("cut", range(14))
def test_a_line_that_is_counted_is_as_long_as_one_that_is_divided(cut: int) -> None:
    data = BOM + b"0123456\n0123456789" + b"!"
    counter = LineCounter(10)
    counter.feed(data[:cut])
    with pytest.raises(RequestError) as refused:
        counter.feed(data[cut:])
    assert refused.value.failure.message.startswith("Line 2 ")


def test_a_long_line_is_refused_before_it_has_ended() -> None:
    splitter = LineSplitter(10)
    assert list(splitter.feed(b"0123456789\n01234567")) == [(1, b"0123456789")]
    with pytest.raises(RequestError) as refused:
        list(splitter.feed(b"890"))
    assert refused.value.failure.message.startswith("Line 2 ")


@given(st.binary(max_size=40), st.lists(st.integers(0, 400)))
def test_every_cut_of_a_form_has_the_same_file(content: bytes, cuts: list[int]) -> None:
    head = b'--x\r\nContent-Disposition: form-data; name="purpose"\r\n\r\nbatch\r\n'
    head += b'--x\r\nContent-Disposition: form-data; name="file"; filename="a"\r\nContent-Type: text/x\r\n\r\n'
    reader = FormReader("multipart/form-data; boundary=x")
    content = content.replace(b"--x", b"")
    got = b"".join(reader.feed(piece) for piece in pieces(head + content + b"\r\n--x--\r\n", cuts))
    assert (got, reader.ended) == (content, True)
    assert (reader.form.filename, reader.form.fields) == ("a", {"purpose": "batch"})


@pytest.mark.parametrize(
    "data",
    [
        b"--x\r\nA" * 9,
        b"--x\r\n: b\r\n\r\n",
        b"--x\r\n" + b"A" * 5000 + b": b\r\n",
        b"--x\r\n" + b"A: b\r\n" * 50,
        b"".join(b'--x\r\nContent-Disposition: form-data; name="%d"\r\n\r\nv\r\n' % n for n in range(20)),
    ],
)
def test_bytes_that_are_no_form(data: bytes) -> None:
    with pytest.raises(RequestError) as refused:
        FormReader("multipart/form-data; boundary=x").feed(data)
    assert refused.value.failure.status == 400


def test_a_boundary_that_no_client_makes() -> None:
    with pytest.raises(RequestError) as refused:
        FormReader("multipart/form-data; boundary=" + "x" * 10_000)
    assert refused.value.failure.status == 400


def test_results_are_lines_of_json() -> None:
    line = Line(7, "a\n☕", b"{}")
    good = answered("batch_ab", line, 200, "r", b'{"x": "\\n"}')
    bad = unanswered("batch_ab", line, "batch_expired", "late")
    assert good.count(b"\n") == bad.count(b"\n") == 1
    assert json.loads(good) == {
        "id": "batch_req_ab-7",
        "custom_id": "a\n☕",
        "response": {"status_code": 200, "request_id": "r", "body": {"x": "\n"}},
        "error": None,
    }
    assert json.loads(bad)["error"] == {"code": "batch_expired", "message": "late"}


@pytest.mark.parametrize(
    "body",
    [
        b'{"stream": true}',
        b'{"x": 1, "background": true}',
        b'{"stream": "true", "x": "\\ud800"}',
        b'{"stream": true, "background": "maybe"}',
        b'{"stream": [], "background": 1}',
    ],
)
def test_a_line_has_one_answer(body: bytes) -> None:
    with pytest.raises(RequestError):
        check_body(body)


@pytest.mark.parametrize("body", [b'{"stream": false}', b'{"stream": null}', b'{"stream": [3]}', b"{", b"{}"])
def test_what_is_wrong_otherwise_is_left_to_the_api(body: bytes) -> None:
    check_body(body)
