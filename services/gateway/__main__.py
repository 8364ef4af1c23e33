"""Composition root of the gateway: `python -m services.gateway`, configured by MILLRACE_* variables."""

from shared.termination import end_when_terminated

if __name__ == "__main__":
    end_when_terminated()  # before the other imports, which take seconds

import asyncio
import hashlib
import os
import secrets
import sys
import time
from functools import partial
from pathlib import Path
from socket import socket

import uvloop
from prometheus_client import REGISTRY, CollectorRegistry
from redis.asyncio import Redis

from services.gateway.batches.files import FileLimits, FileStore
from services.gateway.batches.requests import LineRequests
from services.gateway.batches.run import RunParts
from services.gateway.batches.runner import BatchRunner
from services.gateway.batches.store import BatchStore
from services.gateway.console import routes as console
from services.gateway.console.observer import RequestObserver
from services.gateway.dialects.chat import ChatDialect
from services.gateway.dialects.completions import CompletionsDialect
from services.gateway.dialects.dialect import Dialect
from services.gateway.dialects.messages import dialect as messages
from services.gateway.dialects.messages.dialect import MessagesDialect
from services.gateway.dialects.messages.schemas import CountRequest
from services.gateway.dialects.prompt_logprobs import TokenTexts
from services.gateway.dialects.responses.body import ResponsesRequest
from services.gateway.dialects.responses.responses import ResponsesDialect, count_body
from services.gateway.errors import FailureBodies
from services.gateway.grammars.check import GrammarCheck
from services.gateway.http.admission import Admission
from services.gateway.http.answer import AnswerWriter
from services.gateway.http.app import AppParts, Models, RequestLimits, build_app, paths
from services.gateway.http.batches import BatchRoutes
from services.gateway.http.body import BodyLimits
from services.gateway.http.connections import ConnectionLimits, Connections, affordable_connections
from services.gateway.http.counting import TokenCounter
from services.gateway.http.edge import Edge
from services.gateway.http.files import FileRoutes
from services.gateway.http.handler import RequestHandler
from services.gateway.http.health import readiness
from services.gateway.http.hosts import KnownHosts
from services.gateway.http.intake import Intake
from services.gateway.http.listener import bind, inherited
from services.gateway.http.memory import BodyMemory
from services.gateway.http.origins import allow_origins
from services.gateway.http.responses import StoredResponses
from services.gateway.http.resume import Resumption
from services.gateway.http.server import KEEP_ALIVE_S, Server
from services.gateway.http.tokens import TokenRoutes
from services.gateway.inflight.backlog import Backlog
from services.gateway.inflight.ended import EndedRequests
from services.gateway.inflight.inbox import Inbox
from services.gateway.inflight.pipeline import Pipeline
from services.gateway.inflight.registry import OpenRequestLimits, OpenRequests
from services.gateway.inflight.work_messages import PipelineOptions
from services.gateway.metrics import GatewayMetrics
from services.gateway.reference import routes as reference
from services.gateway.request.chat import ChatFormat
from services.gateway.request.media import MediaRules
from services.gateway.request.parsed import RequestParser
from services.gateway.request.sampling import ServerDefaults
from services.gateway.request.template import TemplateSource
from services.gateway.responses.ends import Ends
from services.gateway.responses.store import ResponseStore
from services.gateway.responses.turns import EarlierTurnsReader
from services.gateway.service import SERVICE, Gateway
from services.gateway.settings import GatewaySettings
from services.gateway.templates.renderer import TemplateRenderer
from services.gateway.tenants.keyring import Keyring
from services.gateway.tenants.limiter import Ceilings, Limiter
from services.gateway.tenants.metrics import TenantMetrics
from services.gateway.tenants.slots import TenantSlots
from shared.bus.blobs import UPLOADS_SHARE, Blobs
from shared.bus.client import connect_blobs
from shared.bus.keys import Keys
from shared.bus.records import Records
from shared.errors import CheckpointError
from shared.launch import launch
from shared.log import logger, warn_each
from shared.model.generation import load_generation_defaults
from shared.model.tokenizer import Tokenizer
from shared.open_files import raise_file_limit
from shared.tracing import OFF, Tracing
from shared.version import MILLRACE_VERSION
from shared.workers.process import worker_environ

TICK_S = 1.0


def build(settings: GatewaySettings, redis: Redis, *, tracing: Tracing = OFF) -> Gateway:
    """Build the gateway as the process runs it.

    Raises:
        CheckpointError: the model directory lacks a file that the gateway reads.
        ConfigError: a setting is invalid, or the port is in use.
    """
    raise_file_limit()
    handed_down = settings.listen_fd
    listener = bind(settings.host, settings.port) if handed_down is None else inherited(handed_down)
    return compose(settings, redis, listener, REGISTRY, TICK_S, tracing)


def compose(
    settings: GatewaySettings,
    redis: Redis,
    listener: socket,
    registry: CollectorRegistry,
    tick_s: float,
    tracing: Tracing = OFF,
) -> Gateway:
    """Build a gateway that listens on `listener` and has its metrics in `registry`.

    Raises:
        CheckpointError: the model directory lacks a file that the gateway reads.
        ConfigError: the URL of the blobs' Redis is malformed, or the key file is wrong.
    """
    keys = Keys(settings.namespace)
    metrics = GatewayMetrics(registry)
    tenant_metrics = TenantMetrics(registry)
    keyring = Keyring(settings.api_keys, settings.api_keys_file, tenant_metrics.reloads)
    uploads = int(UPLOADS_SHARE * settings.blob_budget_bytes)
    ceilings = Ceilings(settings.max_queue, settings.max_num_queued_tokens, settings.tenant_share, uploads)
    # New with every process, so that no answer to a predecessor's requests is read as ours.
    address = f"{settings.name}.{secrets.token_hex(4)}"
    has_tenants = bool(settings.api_keys_file)
    limiter = Limiter(redis, keys, address, ceilings, tenant_metrics, has_tenants=has_tenants)
    slots = TenantSlots(ceilings.share(settings.max_concurrency), tenant_metrics)
    admission = Admission(settings.max_concurrency, metrics.rejections)
    template = TemplateSource.load(Path(settings.model))
    parser = _parser(settings, template)
    blob_redis = connect_blobs(settings, redis)
    pipeline = _pipeline(settings, redis, blob_redis, keys, address, limiter, metrics)
    limits = OpenRequestLimits(settings.keep_alive_s, settings.watch_s, settings.max_pending_bytes)
    responses_dialect = ResponsesDialect(parser.defaults, settings.responses_keep_s, _response_limit(settings))
    dialects: dict[str, Dialect] = {dialect.name: dialect for dialect in (*_dialects(parser), responses_dialect)}
    bodies = FailureBodies({dialect.path: dialect.failure for dialect in dialects.values()})
    endpoints = {name: dialect.path for name, dialect in dialects.items()}
    ended = EndedRequests(metrics.ended, settings.model_names().listed[0], endpoints)
    open_requests = OpenRequests(limits, pipeline, metrics, ended, time.time)
    writer = AnswerWriter(dialects, _fingerprint(Path(settings.model)), settings.hold_headers_s)
    workers = worker_environ(os.environ)
    templates = TemplateRenderer(template, settings.max_prompt_chars, workers)
    grammars = GrammarCheck(Path(settings.model), workers)
    intake = Intake(
        admission,
        BodyMemory(settings.max_bodies_bytes, metrics.rejections, metrics.body_bytes),
        BodyLimits(settings.max_body_bytes, settings.body_timeout_s, settings.body_stall_s),
    )
    handler = RequestHandler(
        intake=intake,
        parser=parser,
        templates=templates,
        grammars=grammars,
        open_requests=open_requests,
        count=pipeline.count,
        writer=writer,
        max_text_bytes=settings.max_text_bytes,
        request_timeout_s=settings.request_timeout_s,
        decoding=asyncio.Lock(),
    )
    models = Models(settings.model_names(), int(time.time()), settings.max_model_len, _limits(settings))
    store = ResponseStore(Blobs(redis, keys.responses(), settings.responses_keep_s, settings.responses_budget_bytes))
    responses = StoredResponses(
        admission=admission,
        pipeline=pipeline,
        open_requests=open_requests,
        writer=writer,
        dialect=responses_dialect,
        store=store,
        turns=EarlierTurnsReader(Ends(store, pipeline, open_requests), settings.max_body_bytes),
    )
    counters = [
        TokenCounter(handler, "/v1/messages/count_tokens", CountRequest, messages.read_count, messages.count_body),
        TokenCounter(
            handler,
            "/v1/responses/input_tokens",
            ResponsesRequest,
            responses_dialect.read,
            count_body,
            responses.counting_session,
        ),
    ]
    files = FileStore(redis, keys, _file_limits(settings))
    batches = BatchStore(redis, keys, files, address, settings.lease_ms)
    file_routes = FileRoutes(files, intake, settings.request_timeout_s, settings.allowed_origins)
    batch_work = asyncio.Event()
    app = build_app(
        AppParts(
            handler=handler,
            dialects=dialects.values(),
            resumption=Resumption(admission, pipeline, open_requests, writer),
            responses=responses,
            files=file_routes,
            batches=BatchRoutes(batches, file_routes, intake, batch_work),
            served=models,
            tokens=TokenRoutes(handler, TokenTexts(parser.tokenizer), template),
            counters=counters,
            ready=partial(readiness, redis, keys, admission),
            count_refusal=ended.count_refusal,
            bodies=bodies,
        )
    )
    observer = RequestObserver(redis, keys, settings.shards)
    media = console.Limits(settings.media_limits(), settings.max_body_bytes, settings.max_media_bytes)
    app.router.routes += console.routes(console.Console(redis, keys, observer, media, blob_redis))
    app.router.routes += reference.routes()
    known = [*paths(app), *console.PATHS, *reference.ASSETS]
    hosts = KnownHosts(settings.allowed_origins)
    edge = Edge(app, keyring, slots, tenant_metrics, known, bodies, metrics, hosts, tracing)
    line_slots = asyncio.Semaphore(settings.batch_concurrency)
    line_requests = LineRequests(app, keyring, slots, pipeline, tracing)
    parts = RunParts(batches, files, line_requests, line_slots, settings.batch_concurrency, metrics.batch_lines)
    return Gateway(
        own_clients=[] if blob_redis is redis else [blob_redis],
        admission=admission,
        templates=templates,
        grammars=grammars,
        open_requests=open_requests,
        keyring=keyring,
        limiter=limiter,
        batches=BatchRunner(parts, batch_work, metrics.batches),
        inbox=Inbox(redis, keys, address, open_requests),
        server=Server(
            allow_origins(edge, settings.allowed_origins),
            listener,
            _connections(settings, metrics),
            bodies,
        ),
        metrics=metrics,
        tick_s=tick_s,
        watch_s=tick_s,
    )


def _dialects(parser: RequestParser) -> tuple[Dialect, ...]:
    texts = TokenTexts(parser.tokenizer)
    return ChatDialect(texts=texts), CompletionsDialect(texts), MessagesDialect()


def _parser(settings: GatewaySettings, template: TemplateSource) -> RequestParser:
    directory = Path(settings.model)
    tokenizer = Tokenizer.load(directory)
    defaults = load_generation_defaults(directory)
    warn_each(logger(__name__), (*tokenizer.warnings, *defaults.warnings))
    return RequestParser(
        chat=ChatFormat(template.name, tokenizer, settings.trust_request_chat_template),
        tokenizer=tokenizer,
        defaults=defaults,
        rules=MediaRules(settings.media_limits(), settings.max_media_bytes),
        names=settings.model_names(),
        max_n=settings.max_n,
        max_model_len=settings.max_model_len,
        force_include_usage=settings.force_include_usage,
        server=ServerDefaults(
            tool_call_ends_reasoning=settings.tool_call_ends_reasoning,
            force_nonempty_content=settings.force_nonempty_content,
            thinking_loop_repeats=settings.thinking_loop_repeats,
            thinking_loop_tokens=settings.thinking_loop_tokens,
        ),
    )


def _limits(settings: GatewaySettings) -> RequestLimits:
    media = settings.media_limits()
    return RequestLimits(
        images=media["image"],
        videos=media["video"],
        choices=settings.max_n,
        body_bytes=settings.max_body_bytes,
        text_bytes=settings.max_text_bytes,
        media_bytes=settings.max_media_bytes,
        timeout_s=settings.request_timeout_s,
    )


def _pipeline(
    settings: GatewaySettings,
    redis: Redis,
    blob_redis: Redis,
    keys: Keys,
    address: str,
    limiter: Limiter,
    metrics: GatewayMetrics,
) -> Pipeline:
    options = PipelineOptions(address, settings.shards, settings.retain_s, settings.submit_timeout_s)
    backlog = Backlog(redis, keys, settings.max_queue, metrics.rejections)
    blobs = Blobs(blob_redis, keys, settings.blob_ttl_s, settings.blob_budget_bytes)
    return Pipeline(options, redis, keys, backlog, blobs, Records(redis, keys), limiter, metrics.rejections)


def _file_limits(settings: GatewaySettings) -> FileLimits:
    budget = settings.files_budget_bytes
    own = int(budget * settings.tenant_share) if settings.api_keys_file else budget
    return FileLimits(
        keep_s=settings.files_keep_s,
        budget_bytes=budget,
        owner_bytes=own,
        file_bytes=settings.max_file_bytes,
        lines=settings.max_batch_lines,
        line_bytes=settings.max_batch_line_bytes,
    )


def _response_limit(settings: GatewaySettings) -> int:
    """Return the most bytes of one request whose response is kept: no conversation may evict most of the others."""
    return settings.responses_budget_bytes // 4


def _connections(settings: GatewaySettings, metrics: GatewayMetrics) -> Connections:
    total = affordable_connections(settings.max_connections)
    if total < settings.max_connections:
        fields = {"max_connections": total, "wanted": settings.max_connections}
        logger(__name__).warning("fewer connections than set: this process may not open more files", extra=fields)
    limits = ConnectionLimits(total, settings.max_connections_per_address, settings.head_timeout_s, KEEP_ALIVE_S)
    return Connections(limits, metrics.connections, metrics.connections_closed)


def _fingerprint(directory: Path) -> str:
    """Return a fingerprint of the checkpoint's configuration and our version, which the answer to a seed depends on."""
    try:
        content = (directory / "config.json").read_bytes()
    except OSError as error:
        raise CheckpointError(f"config.json: {error.strerror or error}") from error
    return f"fp_{hashlib.sha256(content + MILLRACE_VERSION.encode()).hexdigest()[:12]}"


def main() -> int:
    """Run the process; return its exit status."""
    return launch(SERVICE, GatewaySettings, build, os.environ, uvloop.new_event_loop)


if __name__ == "__main__":
    sys.exit(main())
