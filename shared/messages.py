"""Schema of the messages that services exchange: the type is the wire format.

shared/message_codec.py turns them into entries of streams and values of records. Token ids of prompts travel packed as
little-endian uint32 (`pack_ids`), since they are many and no stage on the way reads them.

A field added at the end of a message, with a default, leaves the version as it is: a process that does not know the
field ignores it, and one that does reads the default where the field is missing. Every other change is a new version
(shared/message_versions.py).

    stream      message     writer                  reader          delivery
    encode      Encode      gateway, engine         mm_encoder      consumer group: at least once, to one replica
    generate    Generate    gateway, mm_encoder     engine          consumer group: at least once, to one replica
    tokens      Tokens      engine, mm_encoder      postproc        log: the shard's owner reads all, and again after a
                Attach      gateway                 postproc        crash; epoch and index make tokens exactly once
    deltas      Accepted    mm_encoder              gateway         log of one gateway: at least once; `start` and `seq`
                Failed      mm_encoder              gateway         of a delta tell repeats and gaps
                Deltas      postproc                gateway
    control     Cancel      gateway, postproc       all replicas    log: at most once, from when a replica starts; the
                Drain       operators               one replica     record has the same as a Cancel
                Encoded     mm_encoder              mm_encoder, engine
                Offer       mm_encoder              mm_encoder

Sequence numbers. Token `index` counts a request's generated tokens from 0. A delta's `seq` is the number of tokens up
to and including the last one that added something to it; with the finish, the number of all tokens plus one. However
tokens are grouped, a number stands for the same prefix of the answer, so that replaying the journal one token at a time
yields deltas that a reader can match against those it has already shown.
"""

import sys
from array import array
from collections.abc import Iterable
from typing import Literal

import msgspec

from shared.errors import Failure, ProtocolError

MediaKind = Literal["image", "video"]
FinishReason = Literal["stop", "length", "cancelled", "error"]


def pack_ids(ids: Iterable[int]) -> bytes:
    """Return token ids as little-endian uint32."""
    packed = array("I", ids)
    if sys.byteorder == "big":
        packed.byteswap()
    return packed.tobytes()


def unpack_ids(data: bytes) -> list[int]:
    """Return the token ids that `pack_ids` has packed.

    Raises:
        ProtocolError: `data` is not a whole number of ids.
    """
    packed = array("I")
    if len(data) % packed.itemsize:
        raise ProtocolError(f"{len(data)} bytes are no whole number of token ids")
    packed.frombytes(data)
    if sys.byteorder == "big":
        packed.byteswap()
    return packed.tolist()


# --------------------------------------------------------------------------------------------------- the request


class Grammar(msgspec.Struct, frozen=True):
    """Grammar that an answer's content must follow, part of Sampling; with a thinking prompt, from </think> on."""

    text: str  # as shared/grammar/forms.py writes it
    param: str  # the request field it came from, for error messages


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
    stop_token_ids: tuple[int, ...] = ()  # besides the model's own end tokens; see Output.stop_in_reasoning
    ignore_eos: bool = False
    bad_words: tuple[tuple[int, ...], ...] = ()  # token sequences that must not be completed
    logit_bias: dict[int, float] = {}
    logprobs: int | None = None  # None: off; n: the sampled token's and the n most likely ones'
    reasoning_max_tokens: int | None = None  # thinking budget; None: unlimited
    grammar: Grammar | None = None  # None: any text
    allowed_token_ids: tuple[int, ...] = ()  # after the thinking, and no others; (): all
    loop_repeats: int = 0  # copies of the same n-gram that close the thinking; 0: none do
    loop_tokens: int = 0  # the longest such n-gram
    # The same of the prompt's tokens, from the second on, as they were given and not drawn; see Begin.
    prompt_logprobs: int | None = None


class Output(msgspec.Struct, frozen=True, omit_defaults=True):
    """Options by which tokens become an answer: postproc's part of a Request, written by the gateway."""

    thinking: bool  # the prompt ends inside an open <think>
    stop: tuple[str, ...] = ()  # looked for in the content; in the reasoning only with `stop_in_reasoning`
    include_stop: bool = False  # keep the matched stop string in the text
    tools: bool = False  # tools were offered, so <tool_call> is a call and not text
    functions: tuple[str, ...] = ()  # the names of those tools
    parallel_tool_calls: bool = True
    logprobs: bool = False
    return_token_ids: bool = False
    continuous_usage: bool = False  # every delta has the usage so far
    stop_in_reasoning: bool = False  # stop strings and stop token ids end the reasoning too
    include_reasoning: bool = True  # False: the reasoning is not shown
    tool_call_ends_reasoning: bool = False  # the engine puts </think> where <tool_call> comes in reasoning
    force_nonempty_content: bool = False  # an answer without content or calls has its reasoning as its content
    named_tool: bool = False  # the one call was asked for by name: OpenAI's finish reason is "stop" then
    separate_reasoning: bool = True  # False: the reasoning is the beginning of the content
    special_tokens: bool = False  # special tokens inside the answer are shown by their names
    complete_logprobs: bool = False  # `logprobs` name special tokens, and have the one that ends the answer
    first_usage: bool = False  # the first delta has the usage so far: that of the prompt is known by then


BATCH_PRIORITY = 3  # class of the requests of batches


class Share(msgspec.Struct, frozen=True, array_like=True):
    """Tenant of a request and its place among others, part of Request; see shared/bus/scripts/turns.lua."""

    name: str
    weight: float = 1.0
    priority: int = 1  # class: 0 is served first, then 1, then 2, and BATCH_PRIORITY last

    def place(self, cost: int, most: int) -> bytes:
        """Return the field k of an entry that costs so much, and `most` tokens of an answer at most."""
        return f"{self.priority} {self.weight:.6g} {cost} {most} {self.name}".encode()


class Request(msgspec.Struct, frozen=True, omit_defaults=True):
    """Request for one choice of one HTTP request; with n > 1 each choice is a Request of its own.

    Written by the gateway; all stages read it, in work entries and in the request's record.
    """

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
    cache_salt: str = ""  # the prefix cache is shared among requests with the same one only; a tenant's: @NAME=GIVEN
    share: Share | None = None  # None: requests are served in the order of their arrival
    http_id: str = ""  # X-Request-ID of the HTTP request: the client's own, or the gateway's

    @property
    def log_fields(self) -> dict[str, str]:
        """Its ids, as a line of a log has them."""
        return {"request_id": self.id, "http_request_id": self.http_id}


# ---------------------------------------------------------------------------------------------------- work streams


class VideoOptions(msgspec.Struct, frozen=True, omit_defaults=True):
    """Overrides of frame sampling for one video, part of Media; None keeps the server's setting."""

    fps: float | None = None
    min_frames: int | None = None
    max_frames: int | None = None
    target_frames: int | None = None
    frames_sample: Literal["leading", "middle", "rand"] | None = None


class Content(msgspec.Struct, frozen=True):
    """Digest (SHA-256) and size of uploaded bytes, by the gateway that stored them; part of Media.

    Embeddings are found by it, for whoever shows the same bytes. So nobody else may state it.
    """

    digest: bytes
    size: int


class Media(msgspec.Struct, frozen=True, omit_defaults=True):
    """Image or video as the client gave it, part of Encode: by `url` (http, https) or by `blob` (uploaded bytes)."""

    kind: MediaKind
    param: str  # the request field it came from, for error messages
    url: str | None = None
    blob: str | None = None  # key of a blob of kind "media"
    video: VideoOptions = VideoOptions()
    # Bounds of the pixels that the model sees of an image, or of a frame; None: the server's.
    min_pixels: int | None = None
    max_pixels: int | None = None
    wished_max_pixels: int | None = None  # gives way to all other bounds
    content: Content | None = None  # of the blob; None: from a gateway of an older build


class Encode(msgspec.Struct, frozen=True, tag=True):
    """Prompt with media: `segments[i]` (packed ids) comes before `media[i]`; there is one more segment than media.

    Written to `encode` by the gateway, and by an engine that sends a request back for its embeddings; read by one
    mm_encoder, at least once.
    """

    request: Request
    segments: tuple[bytes, ...]
    media: tuple[Media, ...]


class MediaSpan(msgspec.Struct, frozen=True):
    """Place of one image or video in the prompt, and key of its embeddings; part of Generate.

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
    """Complete prompt, ready for the engine.

    Written to `generate` by the gateway, or by mm_encoder in place of an Encode; read by one engine, at least once.
    """

    request: Request
    prompt: bytes  # packed ids, placeholders expanded
    max_tokens: int  # resolved against the context length
    spans: tuple[MediaSpan, ...] = ()


# ---------------------------------------------------------------------------------------------------- the token path


class PromptLogprobs(msgspec.Struct, frozen=True, array_like=True):
    """Log-probabilities of the N tokens of a prompt from the second on, part of Begin and Delta; packed: they are many.

    Arrays are little-endian and row-major, each row of one token. Ids are those of the `count` most likely tokens in
    its place, best first.
    """

    count: int
    logprobs: bytes  # float32 [N - 1, 1 + count]: of the token itself, and of the most likely ones
    ids: bytes  # uint32 [N - 1, count]
    ranks: bytes  # uint32 [N - 1]: of the token itself; 1 is the most likely one


class Begin(msgspec.Struct, frozen=True, array_like=True):
    """Notice, part of Tokens, that an engine works on a request under a new epoch, after which older epochs are void.

    postproc loads the request's record and keeps the counts for its usage. `index` is that of the first token to come.
    A request for log-probabilities of its prompt has a second one, with them, in the message of its first token.
    """

    request_id: str
    epoch: int
    index: int
    prompt_tokens: int
    cached_tokens: int
    image_tokens: int
    video_tokens: int
    prompt: bytes = b""  # packed ids, placeholders expanded; only when the request asked for token ids
    prompt_logprobs: PromptLogprobs | None = None  # once they are known, if the request asked for them


class TokenLogprob(msgspec.Struct, frozen=True, array_like=True):
    """Natural-log probability of a sampled token, and of the most likely ones as (id, logprob), best first.

    Part of TokenRun; journaled by postproc.
    """

    logprob: float
    top: tuple[tuple[int, float], ...] = ()


class Finish(msgspec.Struct, frozen=True, array_like=True):
    """Reason why a request ended, part of TokenRun. On "stop" by a token, `stop_token` is the run's last and not shown.

    postproc keeps it in the record for as long as the answer is retained.
    """

    reason: FinishReason
    stop_token: int | None = None
    failure: Failure | None = None
    logprob: TokenLogprob | None = None  # of the stop token; set by postproc, since no journal has that token


class TokenRun(msgspec.Struct, frozen=True, array_like=True):
    """Tokens [index, index + len(tokens)) of one request, written under `epoch`, the fencing token; part of Tokens."""

    request_id: str
    epoch: int
    index: int
    tokens: tuple[int, ...]
    logprobs: tuple[TokenLogprob, ...] | None = None
    finish: Finish | None = None


class Tokens(msgspec.Struct, frozen=True, tag=True):
    """Output of one engine step for one shard.

    Written to `tokens` by the engine, and by mm_encoder to end a request that an engine has begun. Read by the postproc
    that owns the shard, and by an engine that resumes a request. shared/token_runs.py is the rule of which runs count.
    """

    begins: tuple[Begin, ...]
    runs: tuple[TokenRun, ...]


# --------------------------------------------------------------------------------------------------- the answer path


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
    """Token counts of a request, part of its last Delta; of the first or each, so far, where the request says so."""

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
    usage: Usage | None = None  # with the finish, with `Output.continuous_usage`, or first with `Output.first_usage`
    failure: Failure | None = None  # ends the request instead of a finish
    # `seq` of the delta before: a reader that has seen less has missed something, one that has seen more and less than
    # `seq` cannot use this one; both send Attach.
    start: int = 0
    prompt: bytes = b""  # packed ids, with what starts at 0; only when the request asked for token ids
    prompt_logprobs: PromptLogprobs | None = None  # with what starts at 0; only when the request asked for them
    stop: str = ""  # with the finish "stop": the stop string that ended the answer; empty: something else did
    later: int = 0  # characters at the end of `content` that stand behind the answer's first tool call


class Accepted(msgspec.Struct, frozen=True, tag=True):
    """Notice that a request with media passed all checks that answer 4xx: an answer or a 5xx follows.

    Written to `deltas` of the request's gateways by mm_encoder, at least once.
    """

    request_id: str
    prompt_tokens: int


class Failed(msgspec.Struct, frozen=True, tag=True):
    """Notice that a request ended before any engine read it.

    Written to `deltas` of the request's gateways by mm_encoder, once, in one step with the end of the entry.
    """

    request_id: str
    failure: Failure


class Deltas(msgspec.Struct, frozen=True, tag=True):
    """Deltas of one postproc turn for one gateway.

    Written to `deltas` of that gateway by postproc, at least once, under the fencing token of the shards.
    """

    items: tuple[Delta, ...]


# ------------------------------------------------------------------------------------------------------------ control


class Cancel(msgspec.Struct, frozen=True, tag=True):
    """Order to stop working on these requests.

    Written to `control` with the record's field `cancelled`, which replicas find that missed the message; read by all.
    """

    request_ids: tuple[str, ...]


class Attach(msgspec.Struct, frozen=True, tag=True):
    """Order to send this request's deltas to `gateway` too, beginning after sequence number `after`, from the journal.

    Written by a gateway to the tokens stream of the request's shard, for a client that comes back, and when the deltas
    it reads leave a gap. The postproc that owns the shard reads it in order; a new owner reads it again.
    """

    request_id: str
    gateway: str
    after: int
    until: int = 0  # if not 0, a delta must end there: the client has received part of that one


class Drain(msgspec.Struct, frozen=True, tag=True):
    """Order to one replica to finish its requests and end.

    Written to `control` by operators or tests; read by that replica, if it runs.
    """

    service: str
    replica: str


class Encoded(msgspec.Struct, frozen=True, tag=True):
    """Notice that a lock on the embeddings of `key` was released: they are stored, or their encoding was abandoned.

    Written to `control` by the mm_encoder that held the lock, at most once; read by those that wait for it.
    """

    key: str


class Offered(msgspec.Struct, frozen=True, array_like=True):
    """Image or video whose embeddings are wanted, part of Offer; `key` is the content hash that they have."""

    key: str
    media: Media


class Offer(msgspec.Struct, frozen=True, tag=True):
    """Invitation to make some of a request's embeddings.

    Written to `control` by the mm_encoder that has the request, at most once; read by those that have nothing to do.
    Nobody relies on it: replicas of a build that does not know it skip it.
    """

    items: tuple[Offered, ...]


Message = Encode | Generate | Tokens | Attach | Accepted | Failed | Deltas | Cancel | Drain | Encoded | Offer
