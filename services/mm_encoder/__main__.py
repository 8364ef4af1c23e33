"""Runs one mm_encoder: the composition root."""

import os
import sys
from pathlib import Path

import torch
from prometheus_client import REGISTRY, CollectorRegistry
from redis.asyncio import Redis

from services.mm_encoder import timestamps
from services.mm_encoder.batcher import Batcher
from services.mm_encoder.cache import Embeds
from services.mm_encoder.encoder import Encoder
from services.mm_encoder.fetch import Fetcher
from services.mm_encoder.metrics import Metrics
from services.mm_encoder.normalisation import load_normalisation
from services.mm_encoder.prepare import Preparer
from services.mm_encoder.processor import Processor
from services.mm_encoder.service import SERVICE, MmEncoder
from services.mm_encoder.settings import MmEncoderSettings
from services.mm_encoder.turns import Turns
from services.mm_encoder.video import VideoLimits
from services.mm_encoder.weights import load_weights
from shared import bus, config, log, service
from shared.blobs import Blobs
from shared.checkpoint import Checkpoint
from shared.custody import Custody
from shared.errors import ConfigError
from shared.foreign_checkpoints import refuse_foreign
from shared.keys import ENCODE, Keys
from shared.model_config import load_model_config
from shared.records import Records
from shared.streams import WorkStream
from shared.tracing import OFF, Tracing

LOOKS = 10  # in the time of a lease: how much later than its end a dead replica's requests go on


def build(
    settings: MmEncoderSettings, redis: Redis, registry: CollectorRegistry = REGISTRY, *, tracing: Tracing = OFF
) -> MmEncoder:
    """The service, with its weights loaded.

    Raises:
        ConfigError: a setting contradicts the model or the machine.
        CheckpointError: the model directory is not what it should be.
    """
    directory = Path(settings.model)
    refuse_foreign(directory)
    model = load_model_config(directory)
    settings.mm_processor_kwargs.check_model(model.vision)
    device = _device(settings.device)
    weights = load_weights(Checkpoint(directory), model, device)
    normal = load_normalisation(directory)
    font, own = timestamps.font_file(directory)
    if not own:
        log.logger(__name__).warning(
            "no font in the model directory; using font-roboto's", extra={"font": timestamps.FONT}
        )
    keys = Keys(settings.namespace)
    figures = Metrics(registry)
    blob_redis = redis if settings.blob_redis_url is None else bus.connect(settings.blob_redis_url)
    blobs = Blobs(blob_redis, keys, settings.blob_ttl_s, settings.blob_budget_bytes)
    embeds = Embeds(blobs)
    limits = VideoLimits(
        max_pixels=settings.media_max_pixels,
        max_seconds=settings.video_max_seconds,
        max_frames=settings.video_max_frames,
        decode_s=settings.video_decode_s,
    )
    encoder = Encoder(weights, model, device, settings.tower_max_patches, normal.image_mean, normal.image_std)
    preparer = Preparer(
        processor=Processor(settings.mm_processor_kwargs, limits, model.vision, font),
        fetcher=Fetcher(
            max_bytes=settings.media_max_bytes,
            max_redirects=settings.media_max_redirects,
            timeout_s=settings.media_timeout_s,
            networks=settings.networks(),
        ),
        blobs=blobs,
        embeds=embeds,
        identity=weights.identity + normal.identity,
        metrics=figures,
        threads=settings.preprocess_threads,
        max_bytes=settings.media_max_bytes,
        max_request_bytes=settings.media_request_max_bytes,
        max_model_len=settings.max_model_len,
    )
    return MmEncoder(
        redis=redis,
        own_clients=() if blob_redis is redis else (blob_redis,),
        keys=keys,
        stream=WorkStream(redis, keys, ENCODE, SERVICE, settings.name, settings.max_deliveries),
        custody=Custody(redis, keys, ENCODE, SERVICE, settings.name),
        turns=Turns(redis, keys, SERVICE, settings.name, settings.lease_ms / 3000),
        records=Records(redis, keys),
        blobs=blobs,
        preparer=preparer,
        embeds=embeds,
        batcher=Batcher(encoder, settings.tower_max_patches, figures),
        metrics=figures,
        patch_id=model.image_patch_id,
        concurrency=settings.concurrency,
        look_s=settings.lease_ms / 1000 / LOOKS,
        tracing=tracing,
    )


def _device(wanted: str) -> str:
    """
    Raises:
        ConfigError: it is not there.
    """
    if wanted == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=wanted)
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(f"{config.variable('device')}: {wanted!r} cannot be used: {error}") from error
    return wanted


def main() -> int:
    """Returns the process's exit status."""
    return service.launch(SERVICE, MmEncoderSettings, build, os.environ)


if __name__ == "__main__":
    sys.exit(main())
