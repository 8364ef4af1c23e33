"""Messages as 0.1.0 had them, with its own decoder: what a replica of that release makes of today's bytes.

Copied from its shared/messages.py, and never changed. It goes when nobody upgrades from 0.1.0 any more.
"""

from typing import Literal

import msgspec

MediaKind = Literal["image", "video"]
FinishReason = Literal["stop", "length", "cancelled", "error"]


class Failure(msgspec.Struct, frozen=True):
    """Failure of one request, in OpenAI's terms."""

    status: int
    message: str
    type: str = "invalid_request_error"
    param: str | None = None
    code: str | None = None


class Sampling(msgspec.Struct, frozen=True, omit_defaults=True):
    """Sampling parameters: the engine's part of a Request. Validated and defaulted by the gateway."""

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
    """Options by which tokens become an answer: postproc's part of a Request, written by the gateway."""

    thinking: bool  # the prompt ends inside an open <think>
    stop: tuple[str, ...] = ()
    include_stop: bool = False  # keep the matched stop string in the text
    tools: bool = False  # tools were offered, so <tool_call> is a call and not text
    functions: tuple[str, ...] = ()  # the names of those tools
    parallel_tool_calls: bool = True
    logprobs: bool = False
    return_token_ids: bool = False


class Request(msgspec.Struct, frozen=True, omit_defaults=True):
    """Request for one choice of one HTTP request; with n > 1 each choice is a Request of its own."""

    id: str
    gateway: str  # the first receiver of its deltas; the record has the present ones
    shard: int  # number of its tokens stream
    created: float  # unix seconds
    sampling: Sampling
    output: Output
    deadline: float | None = None  # unix seconds
    retain_s: float = 0.0  # time for which record and journal outlive the request, for clients that come back
    trace: str | None = None  # W3C traceparent
    form: bytes = b""  # read by gateways alone (request/answer_format.py): the format of the answer


class VideoOptions(msgspec.Struct, frozen=True, omit_defaults=True):
    """Overrides of frame sampling for one video, part of Media; None keeps the server's setting."""

    fps: float | None = None
    min_frames: int | None = None
    max_frames: int | None = None
    target_frames: int | None = None
    frames_sample: Literal["leading", "middle", "rand"] | None = None


class Media(msgspec.Struct, frozen=True, omit_defaults=True):
    """Image or video as the client gave it, part of Encode: by `url` (http, https) or by `blob` (uploaded bytes)."""

    kind: MediaKind
    param: str  # the request field it came from, for error messages
    url: str | None = None
    blob: str | None = None  # key of a blob of kind "media"
    video: VideoOptions = VideoOptions()


class Encode(msgspec.Struct, frozen=True, tag=True):
    """Prompt with media: `segments[i]` (packed ids) comes before `media[i]`; there is one more segment than media."""

    request: Request
    segments: tuple[bytes, ...]
    media: tuple[Media, ...]


class MediaSpan(msgspec.Struct, frozen=True):
    """Place of one image or video in the prompt, and key of its embeddings; part of Generate."""

    kind: MediaKind
    key: str
    offset: int
    length: int
    grid: tuple[int, int, int]


class Generate(msgspec.Struct, frozen=True, tag=True):
    """Complete prompt, ready for the engine."""

    request: Request
    prompt: bytes  # packed ids, placeholders expanded
    max_tokens: int  # resolved against the context length
    spans: tuple[MediaSpan, ...] = ()


class Begin(msgspec.Struct, frozen=True, array_like=True):
    """Notice, part of Tokens, that an engine works on a request under a new epoch."""

    request_id: str
    epoch: int
    index: int
    prompt_tokens: int
    cached_tokens: int
    image_tokens: int
    video_tokens: int
    prompt: bytes = b""  # packed ids, placeholders expanded; only when the request asked for token ids


class TokenLogprob(msgspec.Struct, frozen=True, array_like=True):
    """Natural-log probability of a sampled token, and of the most likely ones as (id, logprob), best first."""

    logprob: float
    top: tuple[tuple[int, float], ...] = ()


class Finish(msgspec.Struct, frozen=True, array_like=True):
    """Reason why a request ended, part of TokenRun. On "stop" by a token."""

    reason: FinishReason
    stop_token: int | None = None
    failure: Failure | None = None


class TokenRun(msgspec.Struct, frozen=True, array_like=True):
    """Tokens [index, index + len(tokens)) of one request, written under `epoch`, the fencing token; part of Tokens."""

    request_id: str
    epoch: int
    index: int
    tokens: tuple[int, ...]
    logprobs: tuple[TokenLogprob, ...] | None = None
    finish: Finish | None = None


class Tokens(msgspec.Struct, frozen=True, tag=True):
    """Output of one engine step for one shard."""

    begins: tuple[Begin, ...]
    runs: tuple[TokenRun, ...]


class ToolDelta(msgspec.Struct, frozen=True, array_like=True):
    """Piece of tool call `index`, part of Delta. The first piece alone has `id` and `name`; arguments are appended."""

    index: int
    id: str | None
    name: str | None
    arguments: str


class ShownLogprob(msgspec.Struct, frozen=True, array_like=True):
    """Entry of OpenAI's logprobs.content, part of Delta: text and bytes of the token, and its alternatives."""

    token: str
    data: bytes
    logprob: float
    top: tuple[tuple[str, bytes, float], ...]


class Usage(msgspec.Struct, frozen=True, array_like=True):
    """Token counts of a finished request, part of its last Delta."""

    prompt_tokens: int
    completion_tokens: int
    reasoning_tokens: int
    cached_tokens: int
    image_tokens: int
    video_tokens: int


class Delta(msgspec.Struct, frozen=True, array_like=True):
    """Addition of some tokens to an answer, part of Deltas; in the order reasoning, content, tool calls, finish."""

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
    """Notice that a request with media passed all checks that answer 4xx: an answer or a 5xx follows."""

    request_id: str
    prompt_tokens: int


class Failed(msgspec.Struct, frozen=True, tag=True):
    """Notice that a request ended before any engine read it."""

    request_id: str
    failure: Failure


class Deltas(msgspec.Struct, frozen=True, tag=True):
    """Deltas of one postproc turn for one gateway."""

    items: tuple[Delta, ...]


class Cancel(msgspec.Struct, frozen=True, tag=True):
    """Order to stop working on these requests."""

    request_ids: tuple[str, ...]


class Attach(msgspec.Struct, frozen=True, tag=True):
    """Order to send this request's deltas to `gateway` too, beginning after sequence number `after`."""

    request_id: str
    gateway: str
    after: int
    until: int = 0  # if not 0, a delta must end there: the client has received part of that one


class Drain(msgspec.Struct, frozen=True, tag=True):
    """Order to one replica to finish its requests and end."""

    service: str
    replica: str


class Encoded(msgspec.Struct, frozen=True, tag=True):
    """Notice that a lock on the embeddings of `key` was released: they are stored, or their encoding was abandoned."""

    key: str


Message = Encode | Generate | Tokens | Attach | Accepted | Failed | Deltas | Cancel | Drain | Encoded
DECODER: msgspec.msgpack.Decoder[Message] = msgspec.msgpack.Decoder(Message)
