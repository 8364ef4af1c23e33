"""Messages that submit a request: a parsed request and its metadata, as the stages behind the gateway read them."""

import zlib
from collections.abc import Iterable

import msgspec

from services.gateway.inflight.headers import IdempotencyKey
from services.gateway.inflight.request import Choice, OpenRequest
from services.gateway.request import answer_format
from services.gateway.request.media import MediaItem
from services.gateway.request.parsed import ParsedRequest
from services.gateway.request.sampling import choice_seed
from services.gateway.tenants.limiter import Quota
from shared.bus.blobs import upload_keys
from shared.messages import Encode, Generate, Media, Request, pack_ids


class PipelineOptions(msgspec.Struct, frozen=True):
    """Addressing and time limits of requests."""

    gateway: str  # this process's name, to whose stream the deltas are sent
    shards: int
    retain_s: float  # time for which an answer can be read again after its end
    submit_s: float  # limit for Redis to accept a request, or to say whether it knows one


class RequestMetadata(msgspec.Struct, frozen=True):
    """Everything about a request that is not in its body."""

    created: float  # unix seconds
    deadline: float
    owner: str
    key: IdempotencyKey | None
    trace: str | None
    http_id: str = ""  # X-Request-ID
    quota: Quota | None = None  # the tenant whose limits hold; None: nobody's


def work_messages(
    open_request: OpenRequest, parsed: ParsedRequest, metadata: RequestMetadata, options: PipelineOptions
) -> list[Encode] | list[Generate]:
    """Return a message for each choice: an `Encode` if there are media, else a `Generate`."""
    requests = [_request_message(choice, parsed, metadata, options) for choice in open_request.choices]
    segments = tuple(map(pack_ids, parsed.segments))
    if parsed.prompts:
        prompts = [(pack_ids(prompt.tokens), prompt.max_tokens) for prompt in parsed.prompts]
        each = parsed.answers_per_prompt
        return [Generate(request, *prompts[index // each]) for index, request in enumerate(requests)]
    if not parsed.media:
        return [Generate(request, segments[0], parsed.max_tokens) for request in requests]
    return [
        Encode(request, segments, tuple(_media_message(item, key) for key, item in _with_blob_keys(request.id, parsed)))
        for request in requests
    ]


def uploads_of(open_request: OpenRequest, parsed: ParsedRequest) -> dict[str, bytes]:
    """Return the bytes that each choice brings, by the key of their blob."""
    return {
        key: item.data
        for choice in open_request.choices
        for key, item in _with_blob_keys(choice.request_id, parsed)
        if item.data is not None
    }


def shard_of(request_id: str, shards: int) -> int:
    """Return the number of the tokens stream of a choice."""
    return zlib.crc32(request_id.encode()) % shards


def _request_message(
    choice: Choice, parsed: ParsedRequest, metadata: RequestMetadata, options: PipelineOptions
) -> Request:
    retain_s = max(options.retain_s, parsed.keep_s)
    if retain_s and parsed.n > 1:
        retain_s += metadata.deadline - metadata.created  # an early choice is kept until the last one has ended
    # The answers to each prompt are those that a request for it alone would have.
    seed = choice_seed(parsed.sampling.seed, choice.index % parsed.answers_per_prompt)
    return Request(
        id=choice.request_id,
        gateway=options.gateway,
        shard=shard_of(choice.request_id, options.shards),
        created=metadata.created,
        sampling=msgspec.structs.replace(parsed.sampling, seed=seed),
        output=parsed.output,
        deadline=metadata.deadline,
        retain_s=retain_s,
        trace=metadata.trace,
        form=answer_format.encode(choice.open_request.answer_format),
        cache_salt=_cache_salt(parsed.cache_salt, metadata.quota),
        share=None if metadata.quota is None else metadata.quota.share,
        http_id=metadata.http_id,
    )


def _cache_salt(given: str, quota: Quota | None) -> str:
    """Return the salt of a request's prefixes. Those of tenants begin with @, and so never with a client's."""
    if quota is not None and quota.tenant is not None:
        return quota.tenant.salt(given)
    return f"={given}" if given.startswith("@") else given


def _with_blob_keys(request_id: str, parsed: ParsedRequest) -> Iterable[tuple[str, MediaItem]]:
    return zip(upload_keys(request_id, len(parsed.media)), parsed.media, strict=True)


def _media_message(item: MediaItem, key: str) -> Media:
    blob = None if item.data is None else key
    return Media(
        kind=item.kind,
        param=item.param,
        url=item.url,
        blob=blob,
        video=item.video,
        min_pixels=item.min_pixels,
        max_pixels=item.max_pixels,
        wished_max_pixels=item.wished_max_pixels,
        content=item.content,
    )
