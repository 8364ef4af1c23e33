"""The engine's composition root: `python -m services.engine`, configured by MILLRACE_* variables."""

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from redis.asyncio import Redis

from services.engine.assembly import runner_for
from services.engine.kernels.gpu.ops import gpu_ops
from services.engine.kernels.ops import Ops
from services.engine.metrics import EngineMetrics
from services.engine.model.weights import load_model
from services.engine.runner import Runner
from services.engine.sequence import EngineFacts
from services.engine.service import SERVICE, EngineService
from services.engine.settings import EngineSettings, check
from shared.errors import CheckpointError, ConfigError
from shared.foreign_checkpoints import refuse_foreign
from shared.log import logger, warn_each
from shared.model_config import ModelConfig, Quantization, load_model_config
from shared.service import launch
from shared.tokenizer import Tokenizer
from shared.tracing import OFF, Tracing
from shared.vocabulary import check_vocabulary

THINK_CLOSE = "</think>"


def build(settings: EngineSettings, redis: Redis, *, tracing: Tracing = OFF) -> EngineService:
    """Put the service together; it loads the weights when it starts.

    Raises:
        ConfigError: a setting is out of range, contradicts the model, or asks for what this machine has not.
        CheckpointError: the model directory is not what it should be.
    """
    check(settings)
    directory = Path(settings.model)
    refuse_foreign(directory)
    model = load_model_config(directory)
    warn_each(logger(__name__), model.warnings)
    warn_each(logger(__name__), contradictions(settings, model))
    if settings.max_model_len > model.max_position_embeddings:
        raise ConfigError(
            f"max_model_len is {settings.max_model_len}; the model's positions end at {model.max_position_embeddings}"
        )
    tokenizer = Tokenizer.load(directory)
    warn_each(logger(__name__), check_vocabulary(directory, model, tokenizer))
    think_close_id = tokenizer.token_id(THINK_CLOSE)
    if think_close_id is None:
        raise CheckpointError(f"the tokenizer of {directory} has no {THINK_CLOSE}")
    where = device(settings)
    facts = EngineFacts(model, settings.max_model_len, think_close_id)
    return EngineService(settings, redis, facts, lambda: load(settings, model, where), EngineMetrics(), tracing)


def load(settings: EngineSettings, config: ModelConfig, where: str) -> tuple[Runner, int]:
    """The model on its device, its cache and its sampler; and the cache's number of blocks.

    Raises:
        ConfigError: the cache could not hold max_model_len.
        CheckpointError: the weights are not what the configuration says.
    """
    ops = gpu_ops() if where == "cuda" else Ops()
    model = load_model(Path(settings.model), config, where, quantization(settings, config), ops)
    return runner_for(model, config, settings)


def quantization(settings: EngineSettings, config: ModelConfig) -> Quantization | None:
    """Choose the quantisation that was set, else the one that config.json asks for."""
    if settings.quantization is None:
        return config.quantization
    return None if settings.quantization == "none" else settings.quantization


def contradictions(settings: EngineSettings, config: ModelConfig) -> Iterator[str]:
    """Describe what config.json asks for and a setting overrules."""
    asked, chosen = config.quantization, settings.quantization
    if asked is not None and chosen not in (None, asked):
        yield f"config.json asks for quantization {asked} and the setting for {chosen}; the setting wins"


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
    return launch(SERVICE, EngineSettings, build, os.environ)


if __name__ == "__main__":
    status = main()
    sys.stdout.flush()
    sys.stderr.flush()
    # Not sys.exit: the model's thread may still be loading, or letting go of the model, and an interpreter that is torn
    # down under a thread inside C++ aborts.
    os._exit(status)
