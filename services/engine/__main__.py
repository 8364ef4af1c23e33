"""The engine's composition root: `python -m services.engine`, configured by MILLRACE_* variables."""

import os
import sys
from pathlib import Path

import torch

from services.engine.kernels.ops import Ops
from services.engine.memory import allocate_cache
from services.engine.metrics import EngineMetrics
from services.engine.model.weights import load_model
from services.engine.runner import ModelRunner
from services.engine.sampler import Sampler
from services.engine.sequence import EngineFacts
from services.engine.service import SERVICE, EngineService
from services.engine.settings import EngineSettings, check
from shared import bus, config, log, metrics, service
from shared.errors import CheckpointError, ConfigError
from shared.model_config import load_model_config
from shared.tokenizer import Tokenizer

THINK_CLOSE = "</think>"


def compose(settings: EngineSettings, name: str) -> EngineService:
    """Load the model and put the service together.

    Raises:
        ConfigError: a setting is out of range, contradicts the model, or asks for what this machine has not.
        CheckpointError: the model directory is not what it should be.
    """
    check(settings)
    directory = Path(settings.model)
    model_config = load_model_config(directory)
    if settings.max_model_len > model_config.max_position_embeddings:
        raise ConfigError(
            f"max_model_len is {settings.max_model_len}; the model's positions end at "
            f"{model_config.max_position_embeddings}"
        )
    think_close_id = Tokenizer.load(directory).token_id(THINK_CLOSE)
    if think_close_id is None:
        raise CheckpointError(f"the tokenizer of {directory} has no {THINK_CLOSE}")
    quantization = None if settings.quantization == "none" else settings.quantization
    model = load_model(directory, model_config, device(settings), quantization, Ops())
    cache = allocate_cache(model, model_config, settings)
    sampler = Sampler(model_config.eos_ids, settings.sampling_class, model.device)
    return EngineService(
        settings,
        name,
        bus.connect(settings.redis_url),
        bus.connect(settings.blob_redis_url or settings.redis_url),
        EngineFacts(model_config, settings.max_model_len, think_close_id),
        ModelRunner(model, cache, sampler, model_config.image_patch_id, model_config.hidden_size),
        cache.num_blocks,
        EngineMetrics(),
    )


def device(settings: EngineSettings) -> str:
    """
    Raises:
        ConfigError: cuda was asked for and is not there.
    """
    available = torch.cuda.is_available()
    if settings.device == "cuda" and not available:
        raise ConfigError("device is cuda, and torch sees no CUDA device")
    if settings.device == "auto":
        return "cuda" if available else "cpu"
    return settings.device


def main() -> int:
    settings = config.load(EngineSettings, os.environ)
    log.setup(SERVICE, settings.name, settings.log_level)
    metrics.serve(settings.metrics_port)
    return service.run(compose(settings, settings.name))


if __name__ == "__main__":
    sys.exit(main())
