"""Assembly of a runner around a loaded model."""

from services.engine.kernels.reference.threshold import threshold_by_search
from services.engine.kernels.sampling_ops import SamplingOps
from services.engine.model.ernie import ErnieModel
from services.engine.model.inputs import KVCache
from services.engine.run.decode_rows import DecodeRows
from services.engine.run.grammar_masks import GrammarMasks
from services.engine.run.graphs import DecodeGraphs
from services.engine.run.memory import allocate_cache, blocks_for
from services.engine.run.runner import ModelRunner, Runner
from services.engine.run.sampler import Sampler
from services.engine.run.step import StepBuilder
from services.engine.settings import EngineSettings, SamplingClass
from shared.cpu_share import usable_cores
from shared.errors import ConfigError
from shared.model.config import ModelConfig

MIN_BLOCK_SIZE = 16  # keys of a matrix instruction
# The most for grammars' masks, where these take long. Eight took longer than four in a virtual machine.
MASK_THREADS = 4


def runner_for(model: ErnieModel, config: ModelConfig, settings: EngineSettings) -> tuple[Runner, int]:
    """Return a loaded model's runner, and its cache's number of blocks.

    Raises:
        ConfigError: the cache could not hold max_model_len, or its blocks are of a size that no kernel reads.
    """
    on_gpu = model.device.type == "cuda"
    if on_gpu and (settings.block_size < MIN_BLOCK_SIZE or settings.block_size & (settings.block_size - 1)):
        raise ConfigError(
            f"block_size is {settings.block_size}; on a GPU it must be a power of two, at least {MIN_BLOCK_SIZE}"
        )
    sampler = Sampler(config.eos_ids, sampling_ops(settings.sampling_class, on_gpu), model.device)
    cache = allocate_cache(model, config, settings, sampler.rehearse, spare=int(on_gpu))
    blocks = cache.num_blocks - int(on_gpu)
    graphs = capture_decode(model, cache, config, settings, spare_block=blocks) if on_gpu else None
    builder = StepBuilder(model, settings.block_size, config.image_patch_id)
    grammar_masks = GrammarMasks(config.vocab_size, min(usable_cores(), MASK_THREADS))
    return ModelRunner(model, cache, sampler, builder, grammar_masks, graphs, settings.max_num_seqs), blocks


def capture_decode(
    model: ErnieModel, cache: KVCache, config: ModelConfig, settings: EngineSettings, spare_block: int
) -> DecodeGraphs:
    """Capture the decode steps of every size, with one block of the cache to themselves."""
    longest = blocks_for(settings.max_model_len, cache.block_size)
    rows = DecodeRows(model, settings.max_num_seqs, longest, cache.block_size, spare_block, config.image_patch_id)
    return DecodeGraphs(model, cache, rows, settings.max_num_seqs)


def sampling_ops(wanted: SamplingClass, on_gpu: bool) -> SamplingOps:
    """Return the operations of a sampling class, on a device."""
    if not on_gpu:
        return SamplingOps() if wanted == "base" else SamplingOps(threshold=threshold_by_search)
    from services.engine.kernels.triton.ops import gpu_sampling_ops  # Triton exists for Linux only

    ops = gpu_sampling_ops()
    return ops if wanted == "rejection" else SamplingOps(argmax=ops.argmax, mask_logits=ops.mask_logits)
