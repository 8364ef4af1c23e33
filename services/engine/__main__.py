"""The engine's composition root: `python -m services.engine`, configured by MILLRACE_* variables."""

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from redis.asyncio import Redis

from services.engine.kernels.ops import Ops
from services.engine.kernels.triton.ops import gpu_ops
from services.engine.metrics import EngineMetrics
from services.engine.model.weights import load_model
from services.engine.run.assembly import runner_for
from services.engine.run.rows import rows_depend_on_others
from services.engine.run.runner import Runner
from services.engine.schedule.sequence import EngineFacts
from services.engine.service import EngineService
from services.engine.settings import EngineSettings, check
from services.engine.transport.handler import SERVICE
from shared.cpu_share import usable_cores
from shared.errors import CheckpointError, ConfigError
from shared.log import logger, warn_each
from shared.model.config import ModelConfig, Quantization, load_model_config
from shared.model.foreign_checkpoints import refuse_foreign
from shared.model.tokenizer import Tokenizer
from shared.model.vocabulary import check_vocabulary
from shared.reproducible import fix_order_of_sums
from shared.service import launch
from shared.tracing import OFF, Tracing
from shared.watchdog import FirstUse, Watchdog

THINK_CLOSE = "</think>"
# Kernels are compiled at their first use; a CPU may be far too slow for the model, and is not hung then.
FIRST_USE = {"cuda": FirstUse(300.0, 0.0, compiles=True), "cpu": FirstUse(0.0, 0.1, compiles=False)}


def build(settings: EngineSettings, redis: Redis, *, tracing: Tracing = OFF) -> EngineService:
    """Put the service together; the weights are loaded when it starts.

    Raises:
        ConfigError: a setting is out of range, contradicts the model, or asks for a device that is not there.
        CheckpointError: the model directory is incomplete or malformed.
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
    metrics = EngineMetrics()
    watchdog = None
    if settings.step_timeout_s > 0:
        watchdog = Watchdog(settings.step_timeout_s, FIRST_USE[where], metrics.step_age.set)
    return EngineService(settings, redis, facts, lambda: load(settings, model, where), metrics, tracing, watchdog)


def load(settings: EngineSettings, config: ModelConfig, where: str) -> tuple[Runner, int]:
    """Return a runner around the model, its cache and its sampler, and the number of cache blocks.

    Raises:
        ConfigError: the cache could not hold max_model_len.
        CheckpointError: the weights do not match the configuration.
    """
    limit_threads(settings)
    fix_order_of_sums(os.environ)
    ops = gpu_ops() if where == "cuda" else Ops()
    model = load_model(Path(settings.model), config, where, quantization(settings, config), ops)
    if where == "cpu" and rows_depend_on_others(model.dtype):
        logger(__name__).warning(
            "this CPU rounds a row's sums by what is computed beside it, so that a seeded request may get another text "
            "in other company; see docs/guarantees.md"
        )
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


def limit_threads(settings: EngineSettings) -> None:
    """Set the number of threads with which torch computes on the CPU.

    By default one for each core this process may use, and never more than torch would start by itself: it counts
    physical cores, and OMP_NUM_THREADS.
    """
    torch.set_num_threads(settings.torch_threads or min(torch.get_num_threads(), usable_cores()))


def device(settings: EngineSettings) -> str:
    """Return the torch device of the settings: "cuda" or "cpu".

    Raises:
        ConfigError: cuda was asked for and is not there.
    """
    available = torch.cuda.is_available()
    if settings.device == "cuda" and not available:
        raise ConfigError("device is cuda, but torch sees no CUDA device; set it to auto or cpu")
    if settings.device == "auto":
        return "cuda" if available else "cpu"
    return settings.device


def main() -> int:
    return launch(SERVICE, EngineSettings, build, os.environ)


if __name__ == "__main__":
    status = main()
    sys.stdout.flush()
    sys.stderr.flush()
    # Not sys.exit: the model's thread may still be loading or releasing the model, and an interpreter that is torn down
    # under a thread inside C++ aborts.
    os._exit(status)
