"""Assembly of a runner around a loaded model."""

from collections.abc import Callable
from dataclasses import replace

import torch

from services.engine.kernels.reference.threshold import threshold_by_search
from services.engine.kernels.sampling_ops import SamplingOps
from services.engine.model.ernie import ErnieModel
from services.engine.model.inputs import KVCache
from services.engine.run.decode_rows import DecodeRows
from services.engine.run.grammar_masks import GrammarMasks
from services.engine.run.graphs import DecodeGraphs
from services.engine.run.memory import allocate_cache, blocks_for
from services.engine.run.pieces import GraphRecorder, StepPieces, rows_to_capture
from services.engine.run.rehearsal import Rehearsal, compute_steps
from services.engine.run.runner import Followers, ModelRunner
from services.engine.run.sampler import Sampler
from services.engine.run.step import StepBuilder
from services.engine.settings import EngineSettings, SamplingClass
from shared.collector import keep_from_collector
from shared.cpu_share import usable_cores
from shared.errors import ConfigError
from shared.model.config import ModelConfig

MIN_BLOCK_SIZE = 16  # keys of a matrix instruction
# The most for grammars' masks, where these take long. Eight took longer than four in a virtual machine.
MASK_THREADS = 4


def runner_for(
    model: ErnieModel,
    config: ModelConfig,
    settings: EngineSettings,
    agree: Callable[[int], int] = int,
    followers: Followers | None = None,
) -> tuple[ModelRunner, int]:
    """Return a loaded model's runner, and its cache's number of blocks.

    Args:
        config: of the part of the model that this rank has.
        agree: see `allocate_cache`.

    Raises:
        ConfigError: the cache could not hold max_model_len, or its blocks are of a size that no kernel reads.
    """
    on_gpu = model.device.type == "cuda"
    if on_gpu and (settings.block_size < MIN_BLOCK_SIZE or settings.block_size & (settings.block_size - 1)):
        raise ConfigError(
            f"block_size is {settings.block_size}; on a GPU it must be a power of two, at least {MIN_BLOCK_SIZE}"
        )
    sampler = Sampler(config.eos_ids, sampling_ops(settings.sampling_class, on_gpu), model.device)
    cache = allocate_cache(model, config, settings, sampler.rehearse, int(on_gpu), agree)
    blocks = cache.num_blocks - int(on_gpu)
    graphs = pieces = times = None
    if on_gpu:
        rows = decode_rows(model, cache, config, settings, spare_block=blocks)
        pieces = StepPieces(
            model,
            cache,
            rows.last_tokens,
            blocks,
            agree(rows_to_capture(model.device, settings.max_num_batched_tokens)),
            config.image_patch_id,
            GraphRecorder(model.device),
        )
        graphs = DecodeGraphs(model, cache, rows, settings.max_num_seqs)
        sampler.rehearse_kinds(config.vocab_size)
        rehearsal = Rehearsal(model, cache, pieces, config, settings.max_num_seqs)
        times = rehearsal.run(settings.max_num_batched_tokens, settings.max_model_len)
        if settings.speculative_config is not None and settings.speculative_config.num_speculative_tokens:
            most = min(settings.max_num_seqs, settings.max_num_batched_tokens)
            times = replace(times, decode=rehearsal.measure_decodes(graphs, most, times.ms_per_cached_token))
        torch.cuda.empty_cache()
        keep_room_for_logits(model, settings.max_num_seqs)
        # Before the steps below, as a look at all objects takes from the core's caches what a step needs. When the
        # service is ready, the next look has little left to look at.
        keep_from_collector()
    builder = StepBuilder(model, settings.block_size, config.image_patch_id)
    grammar_masks = GrammarMasks(config.vocab_size, min(usable_cores(), MASK_THREADS))
    parts = model, cache, sampler, builder, grammar_masks, graphs, settings.max_num_seqs
    runner = ModelRunner(*parts, pieces, times, followers)
    compute_steps(runner, config, min(settings.max_num_batched_tokens, settings.max_model_len))
    if on_gpu:
        cache.clear()  # what is masked must be no NaN, and nobody knows what was computed
    return runner, blocks


def keep_room_for_logits(model: ErnieModel, rows: int) -> None:
    """Let the allocator keep what the logits of two steps need: an allocation from the device may wait for it."""
    x = torch.zeros(rows, model.hidden_size, dtype=model.dtype, device=model.device)
    logits = [model.project(x) for _ in range(2)]
    del logits


def decode_rows(
    model: ErnieModel, cache: KVCache, config: ModelConfig, settings: EngineSettings, spare_block: int
) -> DecodeRows:
    """Allocate the inputs of captured decode steps."""
    longest = blocks_for(settings.max_model_len, cache.block_size)
    return DecodeRows(model, settings.max_num_seqs, longest, cache.block_size, spare_block, config.image_patch_id)


def sampling_ops(wanted: SamplingClass, on_gpu: bool) -> SamplingOps:
    """Return the operations of a sampling class, on a device."""
    if not on_gpu:
        return SamplingOps() if wanted == "base" else SamplingOps(threshold=threshold_by_search)
    from services.engine.kernels.triton.ops import gpu_sampling_ops  # Triton exists for Linux only

    ops = gpu_sampling_ops()
    return ops if wanted == "rejection" else SamplingOps(argmax=ops.argmax, mask_logits=ops.mask_logits)
