"""Settings of the gateway."""

from pathlib import Path
from typing import Annotated

from msgspec import Meta, field

from services.gateway.request.model_names import MAX_CHARS, ModelNames
from services.gateway.request.schemas import MAX_LOOP_REPEATS, MAX_LOOP_TOKENS
from shared.config import CommonSettings, Port, Positive, variable
from shared.errors import ConfigError
from shared.messages import MediaKind

Seconds = Annotated[float, Meta(gt=0)]
# Of each kind, as the reference server is launched: every turn sends the history again. What they take is bounded by
# max_body_bytes, max_media_bytes, max_model_len, and by the encoder's limits on bytes, pixels and memory.
MAX_MEDIA = 100

ModelName = Annotated[str, Meta(min_length=1, max_length=MAX_CHARS)]

# Half of the time for which an admitted request keeps its place without a record (tenants/tenant_hash.lua: STALE).
MAX_SUBMIT_S = 30

# Of the memory for bodies, what large ones may take: uploads must not turn away requests without any.
LARGE_SHARE = 0.75


class GatewaySettings(CommonSettings, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Settings of `python -m services.gateway`, besides the common ones.

    Raises:
        ConfigError: an API key is empty, or one body may be longer than all of them; names the setting, and no key.
    """

    host: str = "0.0.0.0"  # the address the API listens on
    port: Port = 8180  # port of the API
    # Descriptor of a socket that listens, which the process is started with; none: one of its own, at host and port.
    listen_fd: Annotated[int, Meta(ge=0)] | None = None
    # The model's names for clients, and no others; none: any name, and the checkpoint directory's in /v1/models.
    served_model_names: tuple[ModelName, ...] = ()
    api_keys: tuple[str, ...] = ()  # keys of which clients must send one; none: everybody may call
    api_keys_file: str = ""  # keys with names, weights and limits (docs/tenants.md); read again when it changes
    # the most of max_concurrency, max_queue, max_num_queued_tokens and the room of uploads that one key of the file may
    # take.
    tenant_share: Annotated[float, Meta(gt=0, le=1)] = 0.5
    # Origins of web pages that browsers may call the API from (`https://chat.example.org`), `*` for all; none: no CORS.
    allowed_origins: tuple[Annotated[str, Meta(min_length=1)], ...] = ()
    # How many images and videos a prompt may have, history included; a kind that is not named keeps the limit of 100.
    limit_mm_per_prompt: dict[MediaKind, Annotated[int, Meta(ge=0)]] = field(default_factory=dict)
    max_concurrency: Positive = 512  # requests at a time; more are answered 429
    max_n: Positive = 8  # choices that one request may ask for
    max_connections: Positive = 4096  # open connections; an idle one is closed for a new one, else 503
    # The same from one address, else 429; a proxy in front of the gateway is one address.
    max_connections_per_address: Positive = 1024
    head_timeout_s: Seconds = 15.0  # how long a client may take to send the head of a request
    max_body_bytes: Positive = 128 << 20  # the longest request body; longer ones are answered 413
    # The most bytes of a body beside its uploads (data URLs), escapes included.
    max_text_bytes: Positive = 32 << 20
    # Bytes of all bodies that are being read, decoded or stored; beyond it requests are answered 429.
    max_bodies_bytes: Positive = 192 << 20
    max_media_bytes: Positive = 64 << 20  # the largest uploaded image or video, decoded from base64
    max_prompt_chars: Positive = 4 << 20  # the longest rendered prompt: 32 for each of 131072 tokens
    body_timeout_s: Seconds = 60.0  # how long a client may take to send its request
    body_stall_s: Seconds = 10.0  # and for each 64 KiB of it, so that it cannot be endlessly slow
    request_timeout_s: Seconds = (
        600.0  # the longest time from arrival to the last token; the openai client's own default
    )
    max_queue: Positive = 4096  # requests in the pipeline, waiting and running; more are answered 429
    # tokens of prompts whose answer has not begun, at all gateways; beyond it requests are answered 429. 0: no limit.
    max_num_queued_tokens: Annotated[int, Meta(ge=0)] = 0
    # how long Redis may take to accept a request, 30 s at most; a restart takes one or two
    submit_timeout_s: Annotated[float, Meta(gt=0, le=MAX_SUBMIT_S)] = 10.0
    retain_s: Annotated[float, Meta(ge=0)] = 60.0  # how long an answer can be read again after its end
    # how long a response of /v1/responses is kept after it was used last
    responses_keep_s: Positive = 24 * 3600
    # inputs and outputs of these responses in Redis; beyond it the least recently used of the key with most are deleted
    responses_budget_bytes: Positive = 512 << 20
    # how long files of /v1/files are kept at the most, and batches after their end
    files_keep_s: Annotated[int, Meta(ge=3600)] = 30 * 86400
    # files in Redis; beyond it uploads are refused and results wait. One key of the file has tenant_share of it.
    files_budget_bytes: Positive = 1 << 30
    max_file_bytes: Positive = 100 << 20  # the largest file
    max_batch_lines: Positive = 50_000  # lines of one file
    max_batch_line_bytes: Positive = 16 << 20  # the longest line of a file
    batch_concurrency: Positive = 64  # lines of batches that one gateway has under way
    watch_s: Seconds = 3.0  # silence after which a request is looked up, for Redis may have lost it
    # How long the status of a streamed answer waits until the request's media are known to be good.
    hold_headers_s: Annotated[float, Meta(ge=0)] = 15.0
    keep_alive_s: Seconds = 10.0  # silence after which a comment is sent on a stream
    max_pending_bytes: Positive = 1 << 20  # bytes queued for a client that does not read; above, it is cut off
    trust_request_chat_template: bool = False  # let requests bring a chat template, which is rendered within limits
    tool_call_ends_reasoning: bool = False  # a call that begins in reasoning ends it, for requests that do not say
    force_nonempty_content: bool = False  # reasoning alone is sent as content too, for requests that do not say
    # So many copies of the same tokens in a row, 48 tokens at least, close the thinking, for requests that do not say;
    # 0: none do.
    thinking_loop_repeats: Annotated[int, Meta(ge=0, le=MAX_LOOP_REPEATS)] = 0
    # The longest such run of tokens, for requests that do not say.
    thinking_loop_tokens: Annotated[int, Meta(ge=1, le=MAX_LOOP_TOKENS)] = 64
    force_include_usage: bool = False  # send the usage chunk to clients that did not ask

    def __post_init__(self) -> None:
        if self.thinking_loop_repeats == 1:
            raise ConfigError(f"{variable('thinking_loop_repeats')} is 1; it must be at least 2, or 0 for none")
        if not all(self.api_keys):
            raise ConfigError(f"{variable('api_keys')}: a key is empty, which would let everybody in; remove it")
        if self.max_body_bytes > self.max_bodies_bytes * LARGE_SHARE:
            raise ConfigError(
                f"{variable('max_bodies_bytes')} is {self.max_bodies_bytes}, of which large bodies may take "
                f"{LARGE_SHARE:.0%}: too little for one of {variable('max_body_bytes')}={self.max_body_bytes}"
            )

    def model_names(self) -> ModelNames:
        """Return the names that clients may call the model by."""
        return ModelNames(Path(self.model).resolve().name, self.served_model_names)

    def media_limits(self) -> dict[MediaKind, int]:
        """Return the limit of each kind of media in one prompt; a kind that is not set has that of `MAX_MEDIA`."""
        return {"image": MAX_MEDIA, "video": MAX_MEDIA, **self.limit_mm_per_prompt}
