"""Memory of the paged cache: the number of blocks it gets, and a check that they are enough."""

import gc
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from services.engine.model.inputs import AttentionPart, KVCache, StepInput
from services.engine.run.graphs import captured_bytes
from services.engine.run.pieces import pieces_bytes, rows_to_capture
from services.engine.run.step import Model
from services.engine.settings import EngineSettings
from shared.errors import ConfigError
from shared.model.config import ModelConfig

CONTEXT_BYTES = 512 << 20  # of a device, that CUDA and its libraries hold for this process, about

Rehearse = Callable[[Tensor], None]  # allocates as much as sampling from these logits does


def allocate_cache(
    model: Model,
    config: ModelConfig,
    settings: EngineSettings,
    rehearse: Rehearse,
    spare: int,
    agree: Callable[[int], int],
) -> KVCache:
    """Allocate the cache for a loaded model.

    Args:
        spare: blocks besides those that sequences are given.
        agree: returns the number of blocks of all ranks, given that of this one.

    Raises:
        ConfigError: it could not hold one sequence of max_model_len; the message has the numbers.
    """
    dtype, device = model.dtype, model.device
    blocks = agree(num_blocks(model, config, settings, rehearse)) + spare
    return KVCache.allocate(
        config.num_layers, blocks, settings.block_size, config.num_kv_heads, config.head_dim, dtype, str(device)
    )


def num_blocks(model: Model, config: ModelConfig, settings: EngineSettings, rehearse: Rehearse) -> int:
    """Return the blocks by num_gpu_blocks_override; else by gpu_memory_utilization on a GPU and by kv_cache_bytes on a
    CPU.

    Raises:
        ConfigError: as `allocate_cache`.
    """
    size = block_bytes(config, settings.block_size, model.dtype)
    if settings.num_gpu_blocks_override is not None:
        blocks, source = settings.num_gpu_blocks_override, "num_gpu_blocks_override"
    elif model.device.type == "cuda":
        cache_bytes = _cuda_cache_bytes(model, config, settings, rehearse)
        blocks = max(cache_bytes, 0) // size
        source = f"gpu_memory_utilization {settings.gpu_memory_utilization}"
    else:
        contexts = settings.max_num_seqs * blocks_for(settings.max_model_len, settings.block_size)
        blocks, source = min(settings.kv_cache_bytes // size, contexts), f"kv_cache_bytes {settings.kv_cache_bytes}"
    check_holds(blocks, size, settings.block_size, settings.max_model_len, source)
    return blocks


def check_holds(blocks: int, size: int, block_size: int, max_model_len: int, source: str) -> None:
    """Check that the cache can hold one sequence of max_model_len.

    Raises:
        ConfigError: `blocks` blocks cannot hold one sequence of max_model_len.
    """
    needed = blocks_for(max_model_len, block_size)
    if blocks < needed:
        raise ConfigError(
            f"max_model_len {max_model_len} needs {needed} cache blocks of {block_size} tokens "
            f"({needed * size / 2**20:.1f} MiB); {source} leaves {blocks} ({blocks * size / 2**20:.1f} MiB, "
            f"{blocks * block_size} tokens). Shorten the context or give the cache more memory."
        )


def blocks_for(tokens: int, block_size: int) -> int:
    return -(-tokens // block_size)


def block_bytes(config: ModelConfig, block_size: int, dtype: torch.dtype) -> int:
    """Return the bytes of keys and values of one block in all layers."""
    return 2 * config.num_layers * config.num_kv_heads * config.head_dim * block_size * dtype.itemsize


@dataclass(frozen=True, slots=True)
class DeviceMemory:
    """Memory of a device as this process finds it after its largest step, in bytes."""

    total: int  # of the device, or of the part that this process is limited to
    others: int  # in use and not torch's: other processes, and CUDA contexts
    peak: int  # of torch's live tensors, weights included
    unreleasable: int  # cached by torch beside live tensors, in segments that it cannot release

    def cache_bytes(self, share: float, foreign: int, graphs: int) -> int:
        """Return the bytes left for the cache, below 0 if none are.

        Args:
            share: of the memory that may be used at all.
            foreign: what other processes will hold when all have started, or hold already.
            graphs: what the captured steps will keep.
        """
        others = max(self.others, foreign + CONTEXT_BYTES)
        return int(self.total * share) - others - self.peak - self.unreleasable - graphs


def _cuda_cache_bytes(model: Model, config: ModelConfig, settings: EngineSettings, rehearse: Rehearse) -> int:
    """Measure the bytes left for the cache of those this process may use, after the largest step's peak."""
    device = model.device
    gc.collect()
    torch.cuda.empty_cache()
    kept = torch.cuda.memory_allocated(device)
    unreleasable = torch.cuda.memory_reserved(device) - kept
    torch.cuda.reset_peak_memory_stats(device)
    rehearse(_largest_step(model, config, settings))
    torch.cuda.synchronize(device)
    free, total = torch.cuda.mem_get_info(device)
    memory = DeviceMemory(
        total=int(total * torch.cuda.get_per_process_memory_fraction(device)),
        others=total - free - torch.cuda.memory_reserved(device),
        peak=torch.cuda.max_memory_allocated(device),
        unreleasable=unreleasable,
    )
    torch.cuda.empty_cache()
    graphs = captured_bytes(settings.max_num_seqs, config.vocab_size)
    rows, row_bytes = settings.max_num_batched_tokens, model.hidden_size * model.dtype.itemsize
    captured = rows_to_capture(device, rows)
    graphs += pieces_bytes(captured, rows, memory.peak - kept, row_bytes, config.num_layers)
    return memory.cache_bytes(settings.gpu_memory_utilization, settings.foreign_bytes, graphs)


def _largest_step(model: Model, config: ModelConfig, settings: EngineSettings) -> Tensor:
    """Run max_num_batched_tokens of max_num_seqs sequences, half of them vision; return [R, vocabulary] logits."""
    tokens, device = settings.max_num_batched_tokens, model.device
    sequences = min(settings.max_num_seqs, tokens)
    length = blocks_for(tokens, sequences)
    query_start = torch.arange(sequences + 1, device=device).mul(length).clamp(max=tokens)
    blocks = blocks_for(length, settings.block_size)
    cache = KVCache.allocate(
        config.num_layers,
        blocks,
        settings.block_size,
        config.num_kv_heads,
        config.head_dim,
        model.dtype,
        str(device),
    )
    at = torch.arange(tokens, device=device) % length
    media = tokens // 2
    return model.forward(
        StepInput(
            token_ids=torch.zeros(tokens, dtype=torch.int64, device=device),
            positions=at.expand(3, -1).contiguous(),
            vision=torch.arange(tokens, device=device) < media,
            embed_rows=torch.arange(media, device=device),
            embeds=torch.zeros(media, config.hidden_size, dtype=model.dtype, device=device),
            slots=at,
            attention=(
                AttentionPart(
                    rows=slice(0, tokens),
                    block_tables=torch.arange(blocks, dtype=torch.int32, device=device)
                    .expand(sequences, -1)
                    .contiguous(),
                    query_start=query_start.to(torch.int32),
                    context_lens=query_start.diff().to(torch.int32),
                    max_query_len=length,
                    max_context_len=length,
                ),
            ),
            logit_rows=query_start[1:] - 1,
        ),
        cache,
    )
