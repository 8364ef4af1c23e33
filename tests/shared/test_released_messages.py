"""What 0.1.0 wrote is read, and what is written it reads: an upgrade from it, and its rollback, have both side by side.

`messages_0_1_0.json` has entries and values of records that 0.1.0 wrote, `messages_0_1_0.py` its types and decoder.
"""

import base64
import json
from pathlib import Path
from typing import Any

import messages_0_1_0 as old
import msgspec
import pytest
from test_messages import MESSAGES

from shared import messages
from shared.bus.leases import Replica
from shared.errors import Failure
from shared.message_codec import encode_logprob, from_entry, from_record_value, to_entry, to_record_value
from shared.message_fields import FIELDS, GENERATION, OPTIONAL_CALLS, UNHEEDED, generation_of
from shared.messages import (
    Begin,
    Encode,
    Finish,
    Generate,
    Grammar,
    Media,
    Message,
    Offer,
    Output,
    Request,
    Sampling,
    TokenLogprob,
)

RECORDED: dict[str, Any] = json.loads(Path(__file__).with_name("messages_0_1_0.json").read_bytes())
ENTRIES = [{name.encode(): base64.b64decode(value) for name, value in entry.items()} for entry in RECORDED["entries"]]
VALUES = {name: base64.b64decode(value) for name, value in RECORDED["values"].items()}
STRUCTS = {
    name: kind for name, kind in vars(old).items() if isinstance(kind, type) and issubclass(kind, msgspec.Struct)
}


def _today(name: str) -> type[msgspec.Struct]:
    kind: type[msgspec.Struct] = Failure if name == "Failure" else getattr(messages, name)
    return kind


def _fields(kind: type[msgspec.Struct]) -> dict[str, tuple[str, object]]:
    """Return (type, default) of each field by name, in order."""
    return {
        field.name: (
            repr(field.type)
            .replace("messages_0_1_0.", "")
            .replace("shared.messages.", "")
            .replace("shared.errors.", ""),
            _default(field),
        )
        for field in msgspec.structs.fields(kind)
    }


def _default(field: msgspec.structs.FieldInfo) -> object:
    made = field.default if field.default_factory is msgspec.NODEFAULT else field.default_factory()
    return msgspec.to_builtins(made) if made is not msgspec.NODEFAULT else made


def _missing(written: Any, read: Any) -> Any:
    """Return a part of `written` that `read`, the same in builtin types, has otherwise or not at all; None if none."""
    if isinstance(written, dict) and isinstance(read, dict):
        parts = [(value, read.get(name)) for name, value in written.items()]
    elif isinstance(written, list) and isinstance(read, list) and len(written) <= len(read):
        parts = list(zip(written, read, strict=False))
    else:
        return None if written == read else written
    return next((found for one, other in parts if (found := _missing(one, other)) is not None), None)


@pytest.mark.parametrize("entry", ENTRIES, ids=lambda entry: msgspec.msgpack.decode(entry[b"m"])["type"])
def test_every_entry_of_the_release_is_read_whole(entry: dict[bytes, bytes]) -> None:
    read = from_entry(entry)
    assert _missing(msgspec.msgpack.decode(entry[b"m"]), msgspec.msgpack.decode(msgspec.msgpack.encode(read))) is None


@pytest.mark.parametrize("name", VALUES)
def test_every_value_of_the_release_s_records_is_read_whole(name: str) -> None:
    read = from_record_value(_today(name), VALUES[name])
    assert _missing(msgspec.msgpack.decode(VALUES[name]), msgspec.msgpack.decode(msgspec.msgpack.encode(read))) is None


def test_all_that_the_release_wrote_is_recorded() -> None:
    written = {msgspec.msgpack.decode(entry[b"m"])["type"] for entry in ENTRIES}
    assert written == {kind.__name__ for kind in old.Message.__args__}
    assert set(VALUES) == {kind.__name__ for kind in (Request, Begin, Finish, TokenLogprob)}


@pytest.mark.parametrize("message", MESSAGES, ids=lambda message: type(message).__name__)
def test_the_release_reads_what_is_written(message: Message) -> None:
    entry = to_entry(message)
    assert entry[b"v"] == b"1"
    if isinstance(message, Offer):  # which nobody relies on
        with pytest.raises(msgspec.ValidationError):
            old.DECODER.decode(entry[b"m"])
    else:
        assert type(old.DECODER.decode(entry[b"m"])).__name__ == type(message).__name__


@pytest.mark.parametrize(
    "value",
    [MESSAGES[0].request, MESSAGES[2].begins[0], MESSAGES[2].runs[1].finish],
    ids=["Request", "Begin", "Finish"],
)
def test_the_release_reads_values_of_records(value: msgspec.Struct) -> None:
    kind = getattr(old, type(value).__name__)
    assert isinstance(msgspec.msgpack.decode(to_record_value(value), type=kind), kind)
    assert msgspec.msgpack.decode(encode_logprob(TokenLogprob(-1.0)), type=old.TokenLogprob) == old.TokenLogprob(-1.0)


@pytest.mark.parametrize("name", STRUCTS)
def test_a_message_has_changed_by_new_fields_at_its_end_alone(name: str) -> None:
    """Anything else is a new VERSION, with a translation, as long as replicas of the release may be beside ours."""
    before, now = STRUCTS[name], _today(name)
    assert (before.__struct_config__.array_like, before.__struct_config__.tag) == (
        now.__struct_config__.array_like,
        now.__struct_config__.tag,
    )
    fields, ours = _fields(before), _fields(now)
    assert {each: ours.get(each) for each in fields} == fields
    if now.__struct_config__.array_like:
        assert list(ours)[: len(fields)] == list(fields)
    assert all(default is not msgspec.NODEFAULT for each, (_, default) in ours.items() if each not in fields)


def test_of_every_new_field_of_a_request_somebody_has_said_what_an_older_build_does_with_it() -> None:
    for name in ("Request", "Sampling", "Output", "VideoOptions", "Media", "Encode", "MediaSpan", "Generate"):
        added = _fields(_today(name)).keys() - _fields(STRUCTS[name]).keys()
        assert added == FIELDS.get(name, {}).keys(), f"{name}: enter the new field in shared/message_fields.py"
    generations = {each for fields in FIELDS.values() for each in fields.values()}
    assert generations == set(range(UNHEEDED, GENERATION + 1))
    looked_at = {"Request", "Sampling", "Output", "Media"}  # by generation_of
    assert not any(each for name in FIELDS.keys() - looked_at for each in FIELDS[name].values())


PLAIN = Sampling(seed=1)
TEXT = Output(thinking=False)


def asking(sampling: Sampling = PLAIN, output: Output = TEXT) -> Generate:
    """Return a request for this, with a prompt of no tokens."""
    return Generate(Request("r", "g", 0, 0.0, sampling, output), b"", 1)


def test_a_request_needs_the_generation_of_its_latest_field() -> None:
    assert generation_of(asking()) == (0, [])
    guided = Sampling(seed=1, grammar=Grammar("x", "response_format"), loop_repeats=3)
    assert generation_of(asking(guided, Output(False, special_tokens=True))) == (1, ["grammar", "special_tokens"])
    strict = Sampling(seed=1, grammar=Grammar("x", OPTIONAL_CALLS))
    assert generation_of(asking(strict)) == (0, []), "as 0.1.0 took such tools"
    assert generation_of(asking(Sampling(seed=1, prompt_logprobs=0))) == (1, ["prompt_logprobs"])


def test_what_the_release_would_show_a_model_in_another_size_needs_a_generation() -> None:
    small, low = Media("image", "p", max_pixels=3136), Media("image", "p", wished_max_pixels=3136)
    request = asking().request
    assert generation_of(Encode(request, (b"", b"", b""), (low, small))) == (1, ["max_pixels"])
    assert generation_of(Encode(request, (b"", b""), (low,))) == (0, []), "0.1.0 took any `detail`"


def test_a_lease_of_the_release_heeds_no_later_field() -> None:
    lease = b'{"service":"engine","name":"e","state":"ready","version":"0.1.0","load":{"held":1.0},"started":1.5}'
    assert msgspec.json.decode(lease, type=Replica).fields == 0
