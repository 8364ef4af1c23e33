"""Runs a postproc: `python -m services.postproc`, configured by MILLRACE_ variables."""

import os
import sys
from pathlib import Path

from prometheus_client import REGISTRY, CollectorRegistry
from redis.asyncio import Redis

from services.postproc.metrics import PostprocMetrics
from services.postproc.settings import PostprocSettings
from services.postproc.text.detokenize import Vocabulary
from services.postproc.worker import SERVICE, Worker
from shared import service
from shared.bus.keys import Keys
from shared.model.tokenizer import Tokenizer
from shared.tracing import OFF, Tracing


def build(
    settings: PostprocSettings, redis: Redis, registry: CollectorRegistry = REGISTRY, *, tracing: Tracing = OFF
) -> Worker:
    """
    Raises:
        CheckpointError: the tokenizer cannot be read.
    """
    vocabulary = Vocabulary(Tokenizer.load(Path(settings.model)))
    keys, metrics = Keys(settings.namespace), PostprocMetrics(registry)
    return Worker(redis, keys, settings, vocabulary, metrics, tracing=tracing)


def main() -> int:
    """Serve until told to stop; returns the exit status."""
    return service.launch(SERVICE, PostprocSettings, build, os.environ)


if __name__ == "__main__":
    sys.exit(main())
