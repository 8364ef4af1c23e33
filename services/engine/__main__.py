"""The engine's composition root: `python -m services.engine`, configured by MILLRACE_* variables."""

import os
import sys
from pathlib import Path

import torch
from redis.asyncio import Redis

from services.engine.kernels.ops import Ops
from services.engine.metrics import EngineMetrics
from services.engine.model.weights import load_model
from services.engine.run.assembly import runner_for
from services.engine.run.runner import Runner
from services.engine.schedule.sequence import EngineFacts
from services.engine.service import SERVICE, EngineService
from services.engine.settings import EngineSettings, check
from shared.errors import CheckpointError, ConfigError
from shared.model.config import ModelConfig, load_model_config
from shared.model.tokenizer import Tokenizer
from shared.service import launch
from shared.tracing import OFF, Tracing

THINK_CLOSE = "</think>"


def build(settings: EngineSettings, redis: Redis, *, tracing: Tracing = OFF) -> EngineService:
    """Put the service together; it loads the weights when it starts.

    Raises:
        ConfigError: a setting is out of range, contradicts the model, or asks for what this machine has not.
        CheckpointError: the model directory is not what it should be.
    """
    check(settings)
    directory = Path(settings.model)
    model = load_model_config(directory)
    if settings.max_model_len > model.max_position_embeddings:
        raise ConfigError(
            f"max_model_len is {settings.max_model_len}; the model's positions end at {model.max_position_embeddings}"
        )
    think_close_id = Tokenizer.load(directory).token_id(THINK_CLOSE)
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
    quantization = None if settings.quantization == "none" else settings.quantization
    model = load_model(Path(settings.model), config, where, quantization, operations(where))
    return runner_for(model, config, settings)


def operations(where: str) -> Ops:
    """The model's operations on a device."""
    if where != "cuda":
        return Ops()
    from services.engine.kernels.triton.ops import gpu_ops  # Triton exists for Linux only, and the CPU needs none

    return gpu_ops()


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
