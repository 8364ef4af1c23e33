"""What the gateway is told."""

from pathlib import Path
from typing import Annotated

from msgspec import Meta, field

from services.gateway.model_names import MAX_CHARS, ModelNames
from shared.config import CommonSettings, Port, Positive
from shared.messages import MediaKind

Seconds = Annotated[float, Meta(gt=0)]
ModelName = Annotated[str, Meta(min_length=1, max_length=MAX_CHARS)]


class GatewaySettings(CommonSettings, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Settings of `python -m services.gateway`, besides the common ones."""

    host: str = "0.0.0.0"
    port: Port = 8180
    served_model_names: tuple[ModelName, ...] = ()  # empty: any name, and the checkpoint directory's in /v1/models
    api_keys: tuple[str, ...] = ()  # empty: everybody may call
    limit_mm_per_prompt: dict[MediaKind, Annotated[int, Meta(ge=0)]] = field(default_factory=dict)
    max_concurrency: Positive = 512  # requests at a time; more are answered 429
    max_n: Positive = 8
    max_body_bytes: Positive = 128 << 20
    max_media_bytes: Positive = 64 << 20  # of one uploaded image or video, decoded from base64
    max_prompt_chars: Positive = 4 << 20  # of the rendered prompt: 32 for each of 131072 tokens
    body_timeout_s: Seconds = 60.0  # for the client to send its request
    request_timeout_s: Seconds = 600.0  # from arrival to the last token; the openai client's own default
    max_queue: Positive = 4096  # requests in the pipeline, waiting and running; more are answered 429
    submit_timeout_s: Seconds = 10.0  # for Redis to take a request in; a restart of it takes a second or two
    retain_s: Annotated[float, Meta(ge=0)] = 60.0  # how long an answer can be read again after its end
    watch_s: Seconds = 3.0  # silence after which a request is looked up, for Redis may have lost it
    hold_headers_s: Annotated[float, Meta(ge=0)] = (
        15.0  # how long a stream's status waits to know that its media are good
    )
    keep_alive_s: Seconds = 10.0  # silence after which a comment is sent on a stream
    max_pending_bytes: Positive = 1 << 20  # text a stream may owe to a client that does not read
    force_include_usage: bool = False  # send the usage chunk to clients that did not ask

    def model_names(self) -> ModelNames:
        """What clients may call the model."""
        return ModelNames(Path(self.model).resolve().name, self.served_model_names)

    def media_limits(self) -> dict[MediaKind, int]:
        """How many of each kind one prompt may have; a kind that is not named keeps the limit of one."""
        return {"image": 1, "video": 1, **self.limit_mm_per_prompt}
