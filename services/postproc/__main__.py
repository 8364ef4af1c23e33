"""Run one postproc, `python -m services.postproc`, configured by MILLRACE_ variables: the composition root."""

from shared.termination import end_when_terminated

if __name__ == "__main__":
    end_when_terminated()  # before the other imports, which take seconds

import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

import uvloop
from prometheus_client import REGISTRY, CollectorRegistry
from redis.asyncio import Redis

from services.postproc.metrics import PostprocMetrics
from services.postproc.outbox import Outbox
from services.postproc.owned_shards import SERVICE, OwnedShards
from services.postproc.request_states import RequestStates
from services.postproc.settings import PostprocSettings
from services.postproc.text.detokenize import Vocabulary
from services.postproc.worker import Worker
from shared.bus.keys import Keys
from shared.bus.leases import Shards
from shared.bus.records import Records
from shared.bus.streams import LogReader
from shared.launch import launch
from shared.model.tokenizer import Tokenizer
from shared.tracing import OFF, Tracing


def build(
    settings: PostprocSettings, redis: Redis, registry: CollectorRegistry = REGISTRY, *, tracing: Tracing = OFF
) -> Worker:
    """Build the service as the process runs it.

    Raises:
        CheckpointError: the tokenizer cannot be read.
    """
    vocabulary = Vocabulary(Tokenizer.load(Path(settings.model)))
    return compose(settings, redis, vocabulary, registry, tracing=tracing)


def compose(
    settings: PostprocSettings,
    redis: Redis,
    vocabulary: Vocabulary,
    registry: CollectorRegistry,
    *,
    clock: Callable[[], float] = time.monotonic,
    tracing: Tracing = OFF,
    outbox: type[Outbox] = Outbox,
) -> Worker:
    """Build the service from its vocabulary, with its metrics in `registry` and its writes made by `outbox`."""
    keys = Keys(settings.namespace)
    records = Records(redis, keys)
    reader = LogReader(redis, {}, hop="tokens")
    states = RequestStates(vocabulary, settings.parsers(), settings.journal_every)
    shards = OwnedShards(
        redis=redis,
        keys=keys,
        name=settings.name,
        shards=Shards(redis, keys, SERVICE, settings.name, settings.shards),
        reader=reader,
        on_lost=states.drop_shard,
        lease_ms=settings.lease_ms,
        clock=clock,
    )
    return Worker(
        keys=keys,
        settings=settings,
        reader=reader,
        records=records,
        states=states,
        shards=shards,
        outbox=outbox(redis, keys, records, shards, settings.deltas_max_len),
        metrics=PostprocMetrics(registry),
        clock=clock,
        tracing=tracing,
    )


def main() -> int:
    """Serve until told to stop; return the exit status."""
    return launch(SERVICE, PostprocSettings, build, os.environ, uvloop.new_event_loop)


if __name__ == "__main__":
    sys.exit(main())
