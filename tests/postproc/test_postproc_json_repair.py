"""JSON as models write it, well and badly; json.loads and msgspec's stricter reader judge what comes out."""

import json
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import msgspec
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from postproc_stand_in import cuts, json_values

from services.postproc.json_repair import MAX_DEPTH, MAX_SCALAR, ValueRepair


def repaired(text: str, places: Sequence[int] = (), cut_off: bool = False) -> str:
    """What is given out of `text`, which ends at its end or is cut off there."""
    value = ValueRepair()
    shown = ""
    for start, end in pairwise(sorted({0, len(text), *(place % (len(text) + 1) for place in places)})):
        value.push(text[start:end], 0)
        shown += value.take()
    value.end(cut_off)
    return shown + value.take()


def loads(text: str) -> Any:
    """As two readers read it: the second refuses NaN, half surrogate pairs and control characters."""
    value = json.loads(text)
    assert msgspec.json.decode(text.encode()) == value
    return value


values = json_values(st.text(st.characters(codec="utf-8")))

# text -> what it is read as
REPAIRS = {
    "trailing comma": ('{"a": 1,}', '{"a": 1}'),
    "trailing comma and spaces": ('{"a": [1, 2 , ] , }', '{"a": [1, 2  ]  }'),
    "leading and doubled commas": ('{, "a": [,1,, 2],,"b": 3}', '{ "a": [1, 2],"b": 3}'),
    "missing commas": ('{"a": 1 "b": ["x" "y" 2 {} []]}', '{"a": 1, "b": ["x", "y", 2, {}, []]}'),
    "missing brackets inside": ('{"a": [1, {"b": 2]}', '{"a": [1, {"b": 2}]}'),
    "a missing bracket, and more": ('{"a": [{"b": [2}, 3], "c": 4}', '{"a": [{"b": [2]}, 3], "c": 4}'),
    "missing bracket at the end of all": ('{"a": [1, 2}', '{"a": [1, 2]}'),
    "a bracket that closes nothing": ('{"a": 1]}', '{"a": 1}'),
    "raw control characters": (
        '{"a": "x\ny\tz\r\x00\x1f", "b\n": 1}',
        '{"a": "x\\ny\\tz\\r\\u0000\\u001f", "b\\n": 1}',
    ),
    "unknown escapes": (r'{"a": "\d+\.\'\é", "\w": 1}', r'{"a": "\\d+\\.' + "'" + r'\\é", "\\w": 1}'),
    "unknown escape before the quote": ('{"a": "\\u12"}', '{"a": "\\\\u12"}'),
    "escape before a raw newline": ('{"a": "\\\n"}', '{"a": "\\\\\\n"}'),
    "half surrogate pairs": (
        r'{"a": "\ud83d", "b": "\ude00", "c": "\ud83d\ud83d\ude00 \ud83dx \ud83d\n"}',
        r'{"a": "\ufffd", "b": "\ufffd", "c": "\ufffd\ud83d\ude00 \ufffdx \ufffd\n"}',
    ),
    "Python's names": ('{"a": [True, False, None]}', '{"a": [true, false, null]}'),
    "nothing": ("", ""),
    "only a bracket": ("{", ""),
    "a key without a value": ('{"a": 1, "b"}', '{"a": 1}'),
    "a key without a value, alone": ('{"a": }', ""),
    "a word": ('{"a": 1, "b": celsius, "c": 2}', '{"a": 1}'),
    "a word first": ('{"a": celsius}', ""),
    "bare keys": ('{a: 1}', ""),
    "single quotes": ("{'a': 1}", ""),
    "NaN": ('{"a": 0, "b": NaN}', '{"a": 0}'),
    "numbers that are none": ('{"a": [1, 01]}', '{"a": [1]}'),
    "a quote inside a string": ('{"a": "say "hi" now"}', '{"a": "say "}'),
    "an open string": ('{"a": [{"b": "x}]}', '{"a": [{"b": "x}]}"}]}'),
    "an open string that ends in an escape": ('{"a": "x\\', '{"a": "x"}'),
    "brackets that lead to nothing": ('{"a": 1, "b": [{"c": [', '{"a": 1}'),
    "a last scalar": ('{"a": 1, "b": 12', '{"a": 1, "b": 12}'),
    "half a last scalar": ('{"a": 1, "b": tru', '{"a": 1}'),
    "an integer that json.loads refuses": ('{"a": 1, "b": ' + "9" * (MAX_SCALAR + 1) + "}", '{"a": 1}'),
    "an integer that it does not": ('{"a": ' + "9" * MAX_SCALAR + "}", '{"a": ' + "9" * MAX_SCALAR + "}"),
    "too deep": ('{"a": 1, "b":' + "[" * 5000 + "1", '{"a": 1}'),
    "a space that JSON does not know": ('{"a": 1,\u00a0"b": 2}', '{"a": 1}'),
}  # fmt: skip


@pytest.mark.parametrize(("text", "expected"), REPAIRS.values(), ids=REPAIRS)
def test_repairs(text: str, expected: str) -> None:
    for places in ([], range(len(text))):
        assert repaired(text, places) == expected
    if expected:
        loads(expected)


def test_as_deep_as_allowed() -> None:
    text = '{"a":' * MAX_DEPTH + "1" + "}" * MAX_DEPTH
    assert repaired(text) == text


def test_a_scalar_that_a_limit_cut_off_is_left_out() -> None:
    assert repaired('{"a": 1, "b": 12', cut_off=True) == '{"a": 1}'
    assert repaired('{"a": 1, "b": 12 ', cut_off=True) == '{"a": 1, "b": 12}'
    assert repaired('{"a": 1, "b": "12', cut_off=True) == '{"a": 1, "b": "12"}'


@given(values, st.booleans(), st.sampled_from([None, 1]), cuts)
def test_valid_json_comes_out_as_it_is(value: Any, ascii_only: bool, indent: int | None, places: list[int]) -> None:
    text = json.dumps(value, ensure_ascii=ascii_only, indent=indent)
    assert repaired(text, places) == text


@given(st.dictionaries(st.text("ab", max_size=2), values, max_size=4), st.booleans(), st.integers(0))
def test_cut_off_json_says_nothing_that_the_whole_does_not(value: dict[str, Any], ascii_only: bool, end: int) -> None:
    text = json.dumps(value, ensure_ascii=ascii_only)
    if shown := repaired(text[: end % (len(text) + 1)], cut_off=True):
        assert is_part(loads(shown), value)


def is_part(part: Any, whole: Any) -> bool:
    if isinstance(whole, dict):
        return isinstance(part, dict) and all(key in whole and is_part(part[key], whole[key]) for key in part)
    if isinstance(whole, list):
        return isinstance(part, list) and len(part) <= len(whole) and all(map(is_part, part, whole))
    if isinstance(whole, str):
        return isinstance(part, str) and whole.startswith(part)
    return bool(part == whole)


pieces = st.sampled_from(
    [*'{}[]",:\\ \n\t1-.eu', '{"a": ', '"b": [', "true", "None", "nul", "\\u12", "\\ud83d", "\\ude00", "é", "\x01", "'"]
)


@given(st.lists(pieces, max_size=30).map(lambda parts: '{"k": ' + "".join(parts)), cuts, st.booleans())
@example('{"k": "' + "\\ud83d" * 3, [8, 9, 20], False)
@example('{"k": [1,] , ,}', [9, 10, 11], False)
def test_whatever_comes_it_is_the_beginning_of_an_object(text: str, places: list[int], cut_off: bool) -> None:
    whole = repaired(text, cut_off=cut_off)
    assert repaired(text, places, cut_off) == repaired(text, range(len(text)), cut_off) == whole
    if whole:
        assert isinstance(loads(whole), dict)
    value, shown = ValueRepair(), ""
    for end, char in enumerate(text, start=1):
        value.push(char, 0)
        shown += value.take()
        assert repaired(text[:end], cut_off=True).startswith(shown)
    assert whole.startswith(shown)
