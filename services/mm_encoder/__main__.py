"""Runs one mm_encoder: the composition root."""

import os
import sys
from pathlib import Path

import torch
from prometheus_client import REGISTRY, CollectorRegistry
from redis.asyncio import Redis

from services.mm_encoder.handler import SERVICE, EncodeHandler
from services.mm_encoder.media import timestamps
from services.mm_encoder.media.fetch import Fetcher
from services.mm_encoder.media.normalisation import load_normalisation
from services.mm_encoder.media.processor import Processor
from services.mm_encoder.media.video import VideoLimits
from services.mm_encoder.metrics import Metrics
from services.mm_encoder.prepare import Preparer
from services.mm_encoder.service import MmEncoder
from services.mm_encoder.settings import MmEncoderSettings
from services.mm_encoder.store.cache import Embeds
from services.mm_encoder.store.locks import EncodeLocks
from services.mm_encoder.vision.batcher import Batcher
from services.mm_encoder.vision.encoder import Encoder
from services.mm_encoder.vision.weights import load_weights
from shared import config, log, service
from shared.bus.blobs import Blobs
from shared.bus.client import connect
from shared.bus.keys import ENCODE, Keys
from shared.bus.ownership import EntryOwnership
from shared.bus.records import Records
from shared.bus.streams import WorkStream
from shared.errors import ConfigError
from shared.model.checkpoint import Checkpoint
from shared.model.config import load_model_config
from shared.model.foreign_checkpoints import refuse_foreign
from shared.reproducible import fix_order_of_sums
from shared.tracing import OFF, Tracing
from shared.watchdog import FirstUse, Watchdog

# Libraries choose their kernels at the first use of a size; a CPU may be far too slow for the tower, and is not hung.
GPU_FIRST_USE = FirstUse(60.0, 0.0, compiles=True)
CPU_FIRST_USE = FirstUse(0.0, 0.02, compiles=False)
CLAIMS = 10  # looks for abandoned entries in the time of a lease


def build(
    settings: MmEncoderSettings, redis: Redis, registry: CollectorRegistry = REGISTRY, *, tracing: Tracing = OFF
) -> MmEncoder:
    """The service, with its weights loaded.

    Raises:
        ConfigError: a setting contradicts the model or the machine.
        CheckpointError: the model directory is not what it should be.
    """
    fix_order_of_sums(os.environ)
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
    blob_redis = redis if settings.blob_redis_url is None else connect(settings.blob_redis_url)
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
    encode_locks = EncodeLocks(redis, keys, SERVICE, settings.name, settings.lease_ms / 3000)
    watchdog = None
    if settings.step_timeout_s > 0:
        first_use = CPU_FIRST_USE if device == "cpu" else GPU_FIRST_USE
        watchdog = Watchdog(settings.step_timeout_s, first_use, figures.step_age.set)
    batcher = Batcher(encoder, settings.tower_max_patches, figures, watchdog)
    claim_every_s = settings.lease_ms / 1000 / CLAIMS
    handler = EncodeHandler(
        redis=redis,
        keys=keys,
        stream=WorkStream(redis, keys, ENCODE, SERVICE, settings.name, settings.max_deliveries),
        ownership=EntryOwnership(redis, keys, ENCODE, SERVICE, settings.name),
        encode_locks=encode_locks,
        records=Records(redis, keys),
        blobs=blobs,
        preparer=preparer,
        embeds=embeds,
        batcher=batcher,
        metrics=figures,
        patch_id=model.image_patch_id,
        capacity=settings.concurrency,
        claim_every_s=claim_every_s,
        tracing=tracing,
    )
    return MmEncoder(
        handler=handler,
        encode_locks=encode_locks,
        preparer=preparer,
        batcher=batcher,
        metrics=figures,
        capacity=settings.concurrency,
        sweep_every_s=claim_every_s,
        own_clients=() if blob_redis is redis else (blob_redis,),
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
