"""Runs one gateway: the composition root."""

import hashlib
import os
import secrets
import sys
import time
from functools import partial
from importlib.metadata import version
from pathlib import Path
from socket import socket

import uvloop
from prometheus_client import REGISTRY, CollectorRegistry
from redis.asyncio import Redis

from services.gateway import console
from services.gateway.admission import Admission
from services.gateway.answer import Answerer
from services.gateway.app import Models, paths, routes
from services.gateway.backlog import Backlog
from services.gateway.chat import ChatFormat
from services.gateway.completions import ChatCompletions
from services.gateway.desk import Desk, DeskRules
from services.gateway.edge import Edge
from services.gateway.health import readiness
from services.gateway.inbox import Inbox
from services.gateway.media import MediaRules
from services.gateway.metrics import GatewayMetrics
from services.gateway.order import OrderTaker
from services.gateway.pipeline import Pipeline, Route
from services.gateway.returns import Returns
from services.gateway.server import Server, bind
from services.gateway.service import SERVICE, Gateway
from services.gateway.settings import GatewaySettings
from services.gateway.template import Template
from shared import bus, service
from shared.blobs import Blobs
from shared.errors import CheckpointError
from shared.keys import Keys
from shared.log import logger, warn_each
from shared.model_config import load_generation_defaults
from shared.tokenizer import Tokenizer
from shared.tracing import OFF, Tracing

TICK_S = 1.0


def build(settings: GatewaySettings, redis: Redis, *, tracing: Tracing = OFF) -> Gateway:
    """The gateway as the process runs it.

    Raises:
        CheckpointError: the model directory lacks what the gateway reads.
        ConfigError: the URL of the blobs' Redis is malformed, or the port is taken.
    """
    return compose(settings, redis, bind(settings.host, settings.port), REGISTRY, TICK_S, tracing)


def compose(
    settings: GatewaySettings,
    redis: Redis,
    listener: socket,
    registry: CollectorRegistry,
    tick_s: float,
    tracing: Tracing = OFF,
) -> Gateway:
    """A gateway on `listener`, with its metrics in `registry`.

    Raises:
        CheckpointError: the model directory lacks what the gateway reads.
        ConfigError: the URL of the blobs' Redis is malformed.
    """
    keys = Keys(settings.namespace)
    figures = GatewayMetrics(registry)
    admission = Admission(settings.max_concurrency, figures.rejections)
    taker = _taker(settings)
    blob_redis = redis if settings.blob_redis_url is None else bus.connect(settings.blob_redis_url)
    # New with every process, so that no answer to a predecessor's requests is read as ours.
    address = f"{settings.name}.{secrets.token_hex(4)}"
    route = Route(address, settings.shards, settings.retain_s, settings.submit_timeout_s)
    blobs = Blobs(blob_redis, keys, settings.blob_ttl_s, settings.blob_budget_bytes)
    backlog = Backlog(redis, keys, settings.max_queue, figures.rejections)
    pipeline = Pipeline(route, redis, keys, backlog, blobs)
    rules = DeskRules(settings.keep_alive_s, settings.watch_s, settings.max_pending_bytes)
    desk = Desk(rules, pipeline, figures, time.time)
    answerer = Answerer(_fingerprint(Path(settings.model)), settings.hold_headers_s)
    completions = ChatCompletions(
        admission=admission,
        taker=taker,
        desk=desk,
        answerer=answerer,
        max_body_bytes=settings.max_body_bytes,
        body_timeout_s=settings.body_timeout_s,
        request_timeout_s=settings.request_timeout_s,
    )
    models = Models(settings.model_names(), int(time.time()), settings.max_model_len)
    returns = Returns(admission, pipeline, desk, answerer)
    app = routes(completions, returns, models, partial(readiness, redis, keys, admission))
    app.router.routes += console.routes(console.Console(redis, keys, settings.shards, blob_redis))
    return Gateway(
        own_clients=[] if blob_redis is redis else [blob_redis],
        admission=admission,
        desk=desk,
        inbox=Inbox(redis, keys, address, desk),
        server=Server(Edge(app, settings.api_keys, [*paths(app), *console.PATHS], figures, tracing), listener),
        metrics=figures,
        tick_s=tick_s,
        watch_s=tick_s,
    )


def _taker(settings: GatewaySettings) -> OrderTaker:
    directory = Path(settings.model)
    tokenizer = Tokenizer.load(directory)
    defaults = load_generation_defaults(directory)
    warn_each(logger(__name__), (*tokenizer.warnings, *defaults.warnings))
    return OrderTaker(
        chat=ChatFormat(Template.load(directory, settings.max_prompt_chars), tokenizer),
        tokenizer=tokenizer,
        defaults=defaults,
        rules=MediaRules(settings.media_limits(), settings.max_media_bytes),
        names=settings.model_names(),
        max_n=settings.max_n,
        max_model_len=settings.max_model_len,
        force_include_usage=settings.force_include_usage,
    )


def _fingerprint(directory: Path) -> str:
    """Changes with the checkpoint's configuration and with our version: what an answer to the same seed depends on."""
    try:
        content = (directory / "config.json").read_bytes()
    except OSError as error:
        raise CheckpointError(f"config.json: {error.strerror or error}") from error
    return f"fp_{hashlib.sha256(content + version('millrace').encode()).hexdigest()[:12]}"


def main() -> int:
    """Returns the process's exit status."""
    return service.launch(SERVICE, GatewaySettings, build, os.environ, uvloop.new_event_loop)


if __name__ == "__main__":
    sys.exit(main())
