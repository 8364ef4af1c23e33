"""Composition root of the mm_encoder: `python -m services.mm_encoder`, configured by MILLRACE_* variables."""

from shared.termination import end_when_terminated

if __name__ == "__main__":
    end_when_terminated()  # before the other imports, which take seconds

import math
import os
import sys
from collections.abc import Mapping, MutableMapping
from functools import partial
from pathlib import Path

import torch
from prometheus_client import REGISTRY, CollectorRegistry
from redis.asyncio import Redis

from services.mm_encoder.decoding.decoders import Decoders, TimeLimit
from services.mm_encoder.decoding.messages import Setup
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
from services.mm_encoder.store.cache import Embeds, SingleFlight
from services.mm_encoder.store.locks import EncodeLocks
from services.mm_encoder.store.segments import SegmentStore
from services.mm_encoder.vision.batcher import Batcher
from services.mm_encoder.vision.encoder import Encoder
from services.mm_encoder.vision.pace import Pace, SharedPace
from services.mm_encoder.vision.weights import load_weights
from shared import config, log
from shared.bus.blobs import Blobs
from shared.bus.client import connect_blobs
from shared.bus.keys import ENCODE, Keys
from shared.bus.leases import live
from shared.bus.records import Records
from shared.bus.work_stream import WorkStream
from shared.card_page import CardPages
from shared.cpu_share import compute_threads, torch_threads, usable_cores
from shared.errors import ConfigError
from shared.launch import launch
from shared.model.checkpoint import Checkpoint
from shared.model.config import load_model_config
from shared.model.drawn_weights import DrawnWeights
from shared.model.foreign_checkpoints import refuse_foreign
from shared.open_files import raise_file_limit
from shared.reproducible import fix_order_of_sums
from shared.segments import Segments
from shared.tracing import OFF, Tracing
from shared.watchdog import FirstUse, Watchdog
from shared.workers.process import worker_environ

FRAME_THREADS = 4  # of a decoder process, at most
MPS_VARIABLE = "CUDA_MPS_ACTIVE_THREAD_PERCENTAGE"  # CUDA's
HELD_REQUESTS = 8  # at most, as large as one may be; bodies of links beyond their bytes are refused
CLAIMS_PER_LEASE = 10  # claims of abandoned entries in the time of a lease
# Libraries choose their kernels at the first use of a size; a CPU may be far too slow for the tower, and is not hung.
GPU_FIRST_USE = FirstUse(60.0, 0.0, compiles=True)
CPU_FIRST_USE = FirstUse(0.0, 0.02, compiles=False)


def build(
    settings: MmEncoderSettings, redis: Redis, registry: CollectorRegistry = REGISTRY, *, tracing: Tracing = OFF
) -> MmEncoder:
    """Build the service, with its weights loaded.

    Raises:
        ConfigError: a setting contradicts the model or the machine.
        CheckpointError: the model directory is not what it should be.
    """
    fix_order_of_sums(os.environ)
    directory = Path(settings.model)
    refuse_foreign(directory)
    model = load_model_config(directory)
    settings.mm_processor_kwargs.check_model(model.vision)
    limit_multiprocessors(settings, os.environ)
    device = _device(settings.device)
    torch.set_num_threads(torch_threads(settings.torch_threads, torch.get_num_threads()))
    # Drawn on the CPU, where a tower's weights are hashed.
    drawn = settings.load_format == "dummy"
    source = DrawnWeights(torch.device("cpu")) if drawn else Checkpoint(directory)
    weights = load_weights(source, model, device)
    normal = load_normalisation(directory)
    font, own = timestamps.font_file(directory)
    if not own:
        log.logger(__name__).info(
            "the model directory has no font for video timestamps; using the one of the package font-roboto",
            extra={"font": timestamps.FONT},
        )
    keys = Keys(settings.namespace)
    metrics = Metrics(registry)
    blob_redis = connect_blobs(settings, redis)
    blobs = Blobs(blob_redis, keys, settings.blob_ttl_s, settings.blob_budget_bytes)
    embeds = Embeds(blobs, _segments(settings, redis, keys))
    limits = VideoLimits(
        max_pixels=settings.media_max_pixels,
        max_seconds=settings.video_max_seconds,
        max_frames=settings.video_max_frames,
    )
    setup = Setup(
        settings.mm_processor_kwargs,
        limits,
        model.vision,
        font,
        settings.video_own_times,
        settings.decoder_memory_bytes,
        min(FRAME_THREADS, compute_threads(usable_cores(), 2 * settings.preprocess_threads)),
    )
    watchdog = None
    if settings.step_timeout_s > 0:
        first_use = CPU_FIRST_USE if device == "cpu" else GPU_FIRST_USE
        watchdog = Watchdog(settings.step_timeout_s, first_use, metrics.step_age.set)
    encoder = Encoder(
        weights,
        model,
        device,
        settings.tower_max_patches,
        normal.image_mean,
        normal.image_std,
        pace=pace(settings, device, metrics, watchdog),
    )
    preparer = Preparer(
        processor=Processor(
            settings.mm_processor_kwargs, limits, model.vision, font, own_times=settings.video_own_times
        ),
        decoders=Decoders(
            setup,
            _decoders_environ(os.environ),
            processes=settings.preprocess_threads,
            limits={
                "image": TimeLimit("image_decode_s", math.ceil(settings.image_decode_s)),
                "video": TimeLimit("video_decode_s", math.ceil(settings.video_decode_s)),
            },
            metrics=metrics,
        ),
        fetcher=Fetcher(
            max_bytes=settings.media_max_bytes,
            max_redirects=settings.media_max_redirects,
            timeout_s=settings.media_timeout_s,
            networks=settings.networks(),
        ),
        blobs=blobs,
        embeds=embeds,
        identity=weights.identity + normal.identity,
        metrics=metrics,
        max_bytes=settings.media_max_bytes,
        max_request_bytes=settings.media_request_max_bytes,
        max_held_bytes=min(settings.concurrency, HELD_REQUESTS) * settings.media_request_max_bytes,
        max_model_len=settings.max_model_len,
    )
    encode_locks = EncodeLocks(redis, keys, SERVICE, settings.name, settings.lease_ms / 3000)
    batcher = Batcher(encoder, settings.tower_max_patches, metrics, watchdog)
    claim_every_s = settings.lease_ms / 1000 / CLAIMS_PER_LEASE
    handler = EncodeHandler(
        redis=redis,
        keys=keys,
        stream=WorkStream(redis, keys, ENCODE, SERVICE, settings.name, settings.max_deliveries),
        encode_locks=encode_locks,
        records=Records(redis, keys),
        blobs=blobs,
        preparer=preparer,
        embeds=embeds,
        batcher=batcher,
        metrics=metrics,
        patch_id=model.image_patch_id,
        max_patches=settings.tower_max_patches,
        capacity=settings.concurrency,
        claim_every_s=claim_every_s,
        tracing=tracing,
    )
    return MmEncoder(
        handler=handler,
        encode_locks=encode_locks,
        preparer=preparer,
        batcher=batcher,
        metrics=metrics,
        embeds=embeds,
        capacity=settings.concurrency,
        sweep_every_s=claim_every_s,
        own_clients=() if blob_redis is redis else (blob_redis,),
    )


def _segments(settings: MmEncoderSettings, redis: Redis, keys: Keys) -> SegmentStore | None:
    """
    Raises:
        ConfigError: the directory cannot be used.
    """

    async def names() -> list[str]:
        return [replica.name for replica in await live(redis, keys, "engine")]

    if not settings.segments_dir:
        return None
    asked: SingleFlight[list[str]] = SingleFlight()  # once for the pictures of a batch
    engines = partial(asked.join, "engine", names)
    return SegmentStore(Path(settings.segments_dir), settings.segments_bytes, settings.blob_ttl_s, engines)


def limit_multiprocessors(settings: MmEncoderSettings, environ: MutableMapping[str, str]) -> None:
    """Tell CUDA, which has not started yet, what part of the GPU is ours under MPS; a value of its own is kept."""
    if settings.mps_percent:
        environ.setdefault(MPS_VARIABLE, str(settings.mps_percent))


def pace(settings: MmEncoderSettings, device: str, metrics: Metrics, watchdog: Watchdog | None = None) -> Pace | None:
    """Return how passes are sent, where an engine may use the same GPU and share memory with us."""
    where = torch.device(device)
    if where.type != "cuda" or not settings.segments_dir or not settings.shared_card_ms:
        return None
    pages = CardPages(Segments(Path(settings.segments_dir)), str(torch.cuda.get_device_properties(where).uuid))
    piece_s, pieces = settings.shared_card_ms / 1e3, settings.shared_card_decode_pieces

    def count_piece(waited_s: float) -> None:
        metrics.count_piece(waited_s)
        if watchdog is not None and waited_s:
            watchdog.excuse(waited_s)

    return SharedPace(pages.refresh, piece_s, pieces, count_piece)


def _decoders_environ(environ: Mapping[str, str]) -> dict[str, str]:
    """Return the environment of decoder processes: that of workers, with one thread for numpy's products."""
    return {**worker_environ(environ), "OPENBLAS_NUM_THREADS": "1"}


def _device(wanted: str) -> str:
    """Return the torch device that `device` names; "auto" is the first GPU, or the CPU.

    Raises:
        ConfigError: torch cannot use the device.
    """
    if wanted == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=wanted)
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(f"{config.variable('device')}: {wanted!r} cannot be used: {error}") from error
    return wanted


def main() -> int:
    """Run the service until it is stopped; return the exit status."""
    raise_file_limit()  # pixels of a file that wait for the tower hold two open
    return launch(SERVICE, MmEncoderSettings, build, os.environ)


if __name__ == "__main__":
    sys.exit(main())
