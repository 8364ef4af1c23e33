import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shared.errors import Failure, ProtocolError, context_length, internal, invalid
from shared.message_codec import (
    decode_logprob,
    encode_logprob,
    from_entry,
    from_record_value,
    to_entry,
    to_record_value,
)
from shared.messages import (
    Accepted,
    Attach,
    Begin,
    Cancel,
    Content,
    Delta,
    Deltas,
    Drain,
    Encode,
    Encoded,
    Failed,
    Finish,
    Generate,
    Media,
    MediaSpan,
    Message,
    Offer,
    Offered,
    Output,
    PromptLogprobs,
    Request,
    Sampling,
    ShownLogprob,
    TokenLogprob,
    TokenRun,
    Tokens,
    ToolDelta,
    Usage,
    VideoOptions,
    pack_ids,
    unpack_ids,
)

REQUEST = Request(
    id="ab12",
    gateway="gateway-0",
    shard=3,
    created=12.5,
    sampling=Sampling(seed=2**63, temperature=0.0, bad_words=((1, 2), (3,)), logit_bias={5: -100.0}, logprobs=0),
    output=Output(thinking=True, stop=("\n", "é"), tools=True),
    deadline=99.0,
    retain_s=60.0,
)
FAILURE = Failure(400, "bad", param="messages[0]", code="x")
USAGE = Usage(1, 2, 3, 4, 5, 6)
MESSAGES: list[Message] = [
    Encode(
        REQUEST,
        segments=(pack_ids([1]), b""),
        media=(
            Media("video", "messages[0].content[1]", url="http://x", video=VideoOptions(fps=2.0)),
            Media("image", "messages[0].content[2]", blob="ab12-1", content=Content(b"\xff" * 32, 1 << 20)),
        ),
    ),
    Generate(REQUEST, pack_ids(range(1000)), 7, (MediaSpan("image", "hash", 3, 4, (1, 4, 4)),)),
    Tokens(
        (Begin("ab12", 2, 5, 1, 2, 3, 4, pack_ids([1])),),
        (
            TokenRun("ab12", 2, 5, (1, 2)),
            TokenRun("cd", 1, 0, (9,), (TokenLogprob(-0.5, ((9, -0.5), (8, -1.5))),), Finish("error", None, FAILURE)),
        ),
    ),
    Attach("ab12", "gateway-1", 40),
    Accepted("ab12", 17),
    Failed("ab12", FAILURE),
    Deltas(
        (
            Delta("ab12", 5, content="hé", start=3),
            Delta("ab12", 1, content="hé", prompt=pack_ids([1])),
            Delta(
                "ab12",
                2,
                tool_calls=(ToolDelta(0, "call_1", "f", '{"'),),
                logprobs=(ShownLogprob("a", b"\xff", -1.0, (("b", b"b", -2.0),)),),
                finish_reason="tool_calls",
                usage=USAGE,
            ),
        )
    ),
    Cancel(("ab12", "cd")),
    Drain("engine", "engine-0"),
    Encoded("hash"),
    Offer((Offered("hash", Media("image", "messages[0].content[0]", url="https://example.com/a.png")),)),
]


@pytest.mark.parametrize("message", MESSAGES, ids=lambda message: type(message).__name__)
def test_the_type_is_the_wire(message: Message) -> None:
    assert from_entry(to_entry(message)) == message


def test_every_message_is_tried() -> None:
    assert {type(message) for message in MESSAGES} == set(Message.__args__)


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {b"v": b"1"},
        {b"m": b"\x80"},
        {b"v": b"2", b"m": to_entry(MESSAGES[0])[b"m"]},
        {b"v": b"1", b"m": b"not msgpack"},
        {b"v": b"1", b"m": msgspec.msgpack.encode({"type": "Unheard"})},
        {b"v": b"1", b"m": msgspec.msgpack.encode({"type": "Cancel", "request_ids": [1]})},
    ],
)
def test_anything_else_is_refused(fields: dict[bytes, bytes]) -> None:
    with pytest.raises(ProtocolError):
        from_entry(fields)


SCORES = PromptLogprobs(1, b"logprobs", b"ids", b"ranks")


@pytest.mark.parametrize(
    "added",
    [
        (Begin("ab12", 2, 5, 1, 2, 3, 4, b"ids", SCORES), "prompt_logprobs", None),
        (Delta("ab12", 5, start=3, prompt_logprobs=SCORES, stop="x", later=3), "later", 0),
        (Finish("stop", 2, None, TokenLogprob(-0.5)), "logprob", None),
    ],
)
def test_a_field_added_at_the_end_needs_no_other_version(added: tuple[Begin | Delta | Finish, str, object]) -> None:
    """Releases before it read what is written with it, and it is read from what they write."""
    message, name, default = added
    kind = type(message)
    fields = [(field.name, field.type) for field in msgspec.structs.fields(kind)]
    assert fields.pop()[0] == name
    older = msgspec.defstruct(f"Older{kind.__name__}", fields, array_like=True, frozen=True)
    values = [getattr(message, field) for field, _ in fields]
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(message), type=older) == older(*values)
    written = msgspec.msgpack.encode(older(*values))
    assert msgspec.msgpack.decode(written, type=kind) == msgspec.structs.replace(message, **{name: default})


LOGPROB = TokenLogprob(-0.5, ((9, -0.5),))


@pytest.mark.parametrize("value", [REQUEST, Begin("ab12", 2, 5, 1, 2, 3, 4), Finish("stop", 7), LOGPROB])
def test_what_a_record_holds(value: msgspec.Struct) -> None:
    assert from_record_value(type(value), to_record_value(value)) == value
    with pytest.raises(ProtocolError, match="request record"):
        from_record_value(type(value), b"\x80")


def test_a_token_may_have_come_without_its_probability() -> None:
    assert [decode_logprob(encode_logprob(each)) for each in (LOGPROB, None)] == [LOGPROB, None]


@given(st.lists(st.integers(0, 2**32 - 1)))
def test_packed_ids(ids: list[int]) -> None:
    packed = pack_ids(ids)
    assert packed == b"".join(i.to_bytes(4, "little") for i in ids)
    assert unpack_ids(packed) == ids


def test_errors_in_openais_terms() -> None:
    assert invalid("no", "temperature").failure.openai_body() == {
        "error": {"message": "no", "type": "invalid_request_error", "param": "temperature", "code": "invalid_value"}
    }
    too_long = context_length(40000, 32768).failure
    assert (too_long.status, too_long.code, too_long.param) == (400, "context_length_exceeded", "messages")
    assert "40000" in too_long.message
    assert "32768" in too_long.message
    assert (internal("down", status=503).failure.status, internal("down").failure.type) == (503, "server_error")
