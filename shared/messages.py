"""Every message two services exchange: the type is the wire.

A stream entry has two fields: `v` (the version) and `m` (one message, msgpack, tagged with its type). Token ids of
prompts travel packed as little-endian uint32 (`pack_ids`), since they are many and never looked at on the way.

A field added at the end of a message, with a default, leaves VERSION as it is: a process that does not know the field
passes over it, and one that does reads the default where the field is missing.

    encode      Encode                      gateway -> mm_encoder
    generate    Generate                    gateway or mm_encoder -> engine
    tokens      Tokens, Attach              engine -> postproc; Attach: gateway -> postproc
    deltas      Accepted, Failed, Deltas    mm_encoder or postproc -> gateway
    control     Cancel, Drain, Landed       anyone -> everyone

Sequence numbers. Token `index` counts a request's generated tokens from 0. A delta's `seq` is the number of tokens up
to and including the last that added something to it; with the finish, the number of all tokens and one more. However
tokens are grouped, a number stands for the same beginning of the answer, so that replaying the journal one token at a
time yields deltas that a reader can match against what it has already shown.
"""

import sys
from array import array
from collections.abc import Iterable, Mapping
from typing import Literal, TypeVar

import msgspec

from shared.errors import Failure, ProtocolError

VERSION = b"1"

MediaKind = Literal["image", "video"]
FinishReason = Literal["stop", "length", "cancelled", "error"]

T = TypeVar("T")


def pack_ids(ids: Iterable[int]) -> bytes:
    """Token ids as little-endian uint32."""
    packed = array("I", ids)
    if sys.byteorder == "big":
        packed.byteswap()
    return packed.tobytes()


def unpack_ids(data: bytes) -> list[int]:
    """The inverse of `pack_ids`."""
    packed = array("I")
    packed.frombytes(data)
    if sys.byteorder == "big":
        packed.byteswap()
    return packed.tolist()


# --------------------------------------------------------------------------------------------------- the request


class Sampling(msgspec.Struct, frozen=True, omit_defaults=True):
    """How tokens are drawn: the engine's part of a request. Already validated and defaulted by the gateway."""

    seed: int
    temperature: float = 1.0  # 0 is greedy
    top_p: float = 1.0
    top_k: int = 0  # 0: off
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    max_tokens: int | None = None  # None: as many as the context holds
    min_tokens: int = 0
    stop_token_ids: tuple[int, ...] = ()  # besides the model's own end tokens
    ignore_eos: bool = False
    bad_words: tuple[tuple[int, ...], ...] = ()  # token sequences that must not be completed
    logit_bias: dict[int, float] = {}
    logprobs: int | None = None  # None: off; n: the sampled token's and the n most likely ones'
    reasoning_max_tokens: int | None = None  # thinking budget; None: unlimited


class Output(msgspec.Struct, frozen=True, omit_defaults=True):
    """How tokens become an answer: postproc's part of a request."""

    thinking: bool  # the prompt ends inside an open <think>
    stop: tuple[str, ...] = ()
    include_stop: bool = False  # keep the matched stop string in the text
    tools: bool = False  # tools were offered, so <tool_call> is a call and not text
    functions: tuple[str, ...] = ()  # the names of those tools
    parallel_tool_calls: bool = True
    logprobs: bool = False
    return_token_ids: bool = False


class Request(msgspec.Struct, frozen=True, omit_defaults=True):
    """What every stage knows of one choice of one HTTP request. With n > 1 each choice is a request of its own."""

    id: str
    gateway: str  # replica name: where deltas go at first; its record says where they go now
    shard: int  # which tokens stream
    created: float  # unix seconds
    sampling: Sampling
    output: Output
    deadline: float | None = None  # unix seconds
    retain_s: float = 0.0  # how long record and journal outlive the request, for clients that come back
    trace: str | None = None  # W3C traceparent
    form: bytes = b""  # the gateways' own (services/gateway/form.py): how the answer is written, by whichever of them


# ---------------------------------------------------------------------------------------------------- work streams


class VideoOptions(msgspec.Struct, frozen=True, omit_defaults=True):
    """Per-item overrides of frame sampling; None keeps the server's setting."""

    fps: float | None = None
    min_frames: int | None = None
    max_frames: int | None = None
    target_frames: int | None = None
    frames_sample: Literal["leading", "middle", "rand"] | None = None


class Media(msgspec.Struct, frozen=True, omit_defaults=True):
    """One image or video as the client gave it: either by `url` (http, https) or by `blob` (uploaded bytes)."""

    kind: MediaKind
    param: str  # the request field it came from, for error messages
    url: str | None = None
    blob: str | None = None  # key of a blob of kind "media"
    video: VideoOptions = VideoOptions()


class Encode(msgspec.Struct, frozen=True, tag=True):
    """A prompt with media in it: `segments[i]` (packed ids) comes before `media[i]`; one more segment than media."""

    request: Request
    segments: tuple[bytes, ...]
    media: tuple[Media, ...]


class MediaSpan(msgspec.Struct, frozen=True):
    """Where one image or video sits in the prompt, and where its embeddings are.

    Tokens [offset, offset + length) are placeholders. `grid` is (frames, patch rows, patch columns) in 14-pixel
    patches, as the processor made it (images have one frame). `key` is the content hash: the blob of kind "embeds"
    with that key holds [length, hidden] rows, and prefix-cache hashes cover it.
    """

    kind: MediaKind
    key: str
    offset: int
    length: int
    grid: tuple[int, int, int]


class Generate(msgspec.Struct, frozen=True, tag=True):
    """A complete prompt, ready for the engine."""

    request: Request
    prompt: bytes  # packed ids, placeholders expanded
    max_tokens: int  # resolved against the context length
    spans: tuple[MediaSpan, ...] = ()


# ---------------------------------------------------------------------------------------------------- the token path


class Begin(msgspec.Struct, frozen=True, array_like=True):
    """The engine has taken a request (again): postproc should load its record. `index` is the first token to come."""

    request_id: str
    epoch: int
    index: int
    prompt_tokens: int
    cached_tokens: int
    image_tokens: int
    video_tokens: int
    prompt: bytes = b""  # packed ids, placeholders expanded; only when the request asked for token ids


class TokenLogprob(msgspec.Struct, frozen=True, array_like=True):
    """Natural-log probability of the sampled token, and of the most likely ones as (id, logprob), best first."""

    logprob: float
    top: tuple[tuple[int, float], ...] = ()


class Finish(msgspec.Struct, frozen=True, array_like=True):
    """Why a request ended. On "stop" by a token, `stop_token` is the last token of the run and is not shown."""

    reason: FinishReason
    stop_token: int | None = None
    failure: Failure | None = None


class TokenRun(msgspec.Struct, frozen=True, array_like=True):
    """Tokens [index, index + len(tokens)) of one request, written under `epoch`."""

    request_id: str
    epoch: int
    index: int
    tokens: tuple[int, ...]
    logprobs: tuple[TokenLogprob, ...] | None = None
    finish: Finish | None = None


class Tokens(msgspec.Struct, frozen=True, tag=True):
    """One engine step as one shard sees it."""

    begins: tuple[Begin, ...]
    runs: tuple[TokenRun, ...]


# --------------------------------------------------------------------------------------------------- the answer path


class ToolDelta(msgspec.Struct, frozen=True, array_like=True):
    """A piece of tool call `index`. The first piece alone has `id` and `name`; arguments are appended."""

    index: int
    id: str | None
    name: str | None
    arguments: str


class ShownLogprob(msgspec.Struct, frozen=True, array_like=True):
    """One entry of OpenAI's logprobs.content: text and bytes of the token, and its alternatives."""

    token: str
    data: bytes
    logprob: float
    top: tuple[tuple[str, bytes, float], ...]


class Usage(msgspec.Struct, frozen=True, array_like=True):
    """Token counts of one finished request."""

    prompt_tokens: int
    completion_tokens: int
    reasoning_tokens: int
    cached_tokens: int
    image_tokens: int
    video_tokens: int


class Delta(msgspec.Struct, frozen=True, array_like=True):
    """What one or more tokens added to an answer; shown in the order reasoning, content, tool calls, finish."""

    request_id: str
    seq: int
    reasoning: str = ""
    content: str = ""
    tool_calls: tuple[ToolDelta, ...] = ()
    logprobs: tuple[ShownLogprob, ...] = ()
    token_ids: tuple[int, ...] = ()  # only when the request asked for them
    finish_reason: Literal["stop", "length", "tool_calls"] | None = None
    usage: Usage | None = None  # with the finish
    failure: Failure | None = None  # ends the request instead of a finish
    # `seq` of the delta before: a reader that has seen less has missed something, one that has seen more and less than
    # `seq` cannot use this one; both send Attach.
    start: int = 0
    prompt: bytes = b""  # packed ids, with what starts at 0; only when the request asked for token ids


class Accepted(msgspec.Struct, frozen=True, tag=True):
    """A request with media passed every check that can answer 4xx; what follows is an answer or a 5xx."""

    request_id: str
    prompt_tokens: int


class Failed(msgspec.Struct, frozen=True, tag=True):
    """A request ended before it reached the engine."""

    request_id: str
    failure: Failure


class Deltas(msgspec.Struct, frozen=True, tag=True):
    """Everything one postproc turn has for one gateway."""

    items: tuple[Delta, ...]


# ------------------------------------------------------------------------------------------------------------ control


class Cancel(msgspec.Struct, frozen=True, tag=True):
    """Stop working on these requests, wherever they are. The record's `cancelled` field says the same to latecomers."""

    request_ids: tuple[str, ...]


class Attach(msgspec.Struct, frozen=True, tag=True):
    """From now on this request's deltas go to `gateway` too; first those after sequence number `after`, from the
    journal.

    Sent into the tokens stream of the request's shard, so that whoever owns the shard reads it in order and a new owner
    reads it again. A gateway sends it for a client that comes back, and when the deltas it gets leave a gap.
    """

    request_id: str
    gateway: str
    after: int
    until: int = 0  # if not 0, a delta is to end there: the one that the client has the first events of


class Drain(msgspec.Struct, frozen=True, tag=True):
    """Ask a replica to finish what it has and leave."""

    service: str
    replica: str


class Landed(msgspec.Struct, frozen=True, tag=True):
    """Whoever waited for these embeddings may look for them: they are stored, or the one that made them gave up."""

    key: str


Message = Encode | Generate | Tokens | Attach | Accepted | Failed | Deltas | Cancel | Drain | Landed

_encoder = msgspec.msgpack.Encoder()
_decoder: msgspec.msgpack.Decoder[Message] = msgspec.msgpack.Decoder(Message)
_request_decoder = msgspec.msgpack.Decoder(Request)
_begin_decoder = msgspec.msgpack.Decoder(Begin)
_finish_decoder = msgspec.msgpack.Decoder(Finish)
_logprob_decoder: msgspec.msgpack.Decoder[TokenLogprob | None] = msgspec.msgpack.Decoder(TokenLogprob | None)


def to_entry(message: Message) -> dict[bytes, bytes]:
    """The fields of a stream entry that carries `message`."""
    return {b"v": VERSION, b"m": _encoder.encode(message)}


def from_entry(fields: Mapping[bytes, bytes]) -> Message:
    """The message of a stream entry.

    Raises:
        ProtocolError: the entry has another version or is not one of our messages.
    """
    if fields.get(b"v") != VERSION:
        raise ProtocolError(f"stream entry of version {fields.get(b'v')!r}; this process reads {VERSION!r}")
    try:
        return _decoder.decode(fields.get(b"m", b""))
    except msgspec.MsgspecError as error:
        raise ProtocolError(f"unreadable stream entry: {error}") from error


def encode_request(request: Request) -> bytes:
    """The `request` field of a request's record."""
    return _encoder.encode(request)


def decode_request(data: bytes) -> Request:
    """The inverse of `encode_request`.

    Raises:
        ProtocolError: the record was written by another version.
    """
    return _of_record(_request_decoder, data)


def encode_begin(begin: Begin) -> bytes:
    """The `begin` field of a request's record."""
    return _encoder.encode(begin)


def decode_begin(data: bytes) -> Begin:
    """The inverse of `encode_begin`.

    Raises:
        ProtocolError: the record was written by another version.
    """
    return _of_record(_begin_decoder, data)


def encode_finish(finish: Finish) -> bytes:
    """The `finish` field of a request's record."""
    return _encoder.encode(finish)


def decode_finish(data: bytes) -> Finish:
    """The inverse of `encode_finish`.

    Raises:
        ProtocolError: the record was written by another version.
    """
    return _of_record(_finish_decoder, data)


def encode_logprob(logprob: TokenLogprob | None) -> bytes:
    """An element of a request's list of log-probabilities; None for a token that came without."""
    return _encoder.encode(logprob)


def decode_logprob(data: bytes) -> TokenLogprob | None:
    """The inverse of `encode_logprob`.

    Raises:
        ProtocolError: the list was written by another version.
    """
    return _of_record(_logprob_decoder, data)


def _of_record(decoder: msgspec.msgpack.Decoder[T], data: bytes) -> T:
    try:
        return decoder.decode(data)
    except msgspec.MsgspecError as error:
        raise ProtocolError(f"unreadable request record: {error}") from error
