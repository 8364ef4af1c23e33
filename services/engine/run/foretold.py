"""Memory of an engine on a card that is not there: the arithmetic of its start, with shapes in place of tensors.

Weights, graphs, blocks and the share of the card are computed by what the engine itself uses. What it measures at its
start, the most that its largest step takes, is foretold here by what such a step holds at its widest place, and
`WORKSPACE_BYTES`, the rest of what was measured on the card (benchmarks/results/memory-24gb.json).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import get_args

import torch
from torch import Tensor

from services.engine.device_defaults import decide
from services.engine.kernels.memory_budget import SPARE_MEMORY_BYTES
from services.engine.model.ernie import Weights
from services.engine.model.split import Split
from services.engine.model.weights import dtype_of, load_weights
from services.engine.run.footprint import cache_bytes, decoder_shapes, weight_bytes
from services.engine.run.graphs import captured_bytes
from services.engine.run.memory import CONTEXT_BYTES, DeviceMemory, block_bytes, blocks_for
from services.engine.run.pieces import pieces_bytes
from services.engine.settings import EngineSettings
from shared.errors import CheckpointError, ConfigError
from shared.model.checkpoint import Checkpoint
from shared.model.config import ModelConfig
from shared.model.config_file import Quantization
from shared.model.division import divided

WORKSPACE_BYTES = 288 << 20  # of libraries, and what the allocator rounds up: measured, less the arithmetic
EXCHANGE_BYTES = 512 << 20  # of a rank that is not alone: NCCL's buffers and peer memory; an allowance
_WIDE = 4  # bytes of a logit, a cosine
SAMPLED_COPIES = 6  # of a step's logits, while the heaviest plan samples from them


@dataclass(frozen=True, slots=True)
class Foretold:
    """Bytes of one card, and the blocks that its cache gets."""

    card: int  # as CUDA counts them
    reserve: int  # of the card, beyond the share that may be used
    weights: int
    encoder: int  # an mm_encoder on this card: weights, its largest pass, its context
    activations: int  # of the largest step, workspaces included
    graphs: int  # captured steps, and what ranks exchange through
    context: int  # of CUDA, for the engine's process
    cache: int  # what is left for it; below 0 if nothing is
    block: int  # bytes of a block
    blocks: int
    block_size: int  # tokens

    @property
    def tokens(self) -> int:
        return self.blocks * self.block_size

    def sequences(self, length: int) -> int:
        """Return the sequences of a length that fit at once."""
        return self.blocks // blocks_for(length, self.block_size)


class Shapes:
    """Source of weights that have shapes alone, as a configuration says; a head that is tied is not there."""

    def get(self, name: str, shape: Sequence[int]) -> Tensor:
        return torch.empty(*shape, device="meta")

    def integers(self, name: str, shape: tuple[int, int], device: torch.device) -> None:
        """Return None: nothing is quantised."""

    def has(self, name: str) -> bool:
        return not name.startswith("lm_head")

    def check_all_used(self, prefixes: Sequence[str]) -> None:
        """Do nothing: no tensor exists before it is asked for."""


def foretell(
    config: ModelConfig, settings: EngineSettings, card: int, ranks: int = 1, checkpoint: Checkpoint | None = None
) -> Foretold:
    """Foretell the memory of each of `ranks` cards with `card` bytes.

    Args:
        checkpoint: weights that are quantised already, opened with headers_only. Of ours, which load to what
            quantising at a start makes, they say only whether ranks can share the groups.

    Raises:
        ConfigError: the ranks cannot share the model equally.
        CheckpointError: they cannot share the groups of quantised weights; or as `load_weights`.
    """
    own, settings = divided(config, ranks), decide(settings, card)
    asked = settings.quantization
    quantization: Quantization | None = None if asked is None or asked == "none" else asked
    spare = card >= SPARE_MEMORY_BYTES
    quantised = quantization is not None or checkpoint is not None
    both = quantised and spare
    ours = config.stored in get_args(Quantization)
    shapes = None
    if checkpoint is not None and (ranks > 1 or not ours):
        shapes = decoder_shapes(checkpoint, config, Split(0, ranks))
    if shapes is None or ours:
        shapes = _shapes(own)
    weights = weight_bytes(shapes, quantization, both=both)
    activations = step_bytes(own, settings, dequantizes=quantised and not both)
    rows, row_bytes = settings.max_num_batched_tokens, own.hidden_size * dtype_of(own).itemsize
    graphs = captured_bytes(settings.max_num_seqs, own.vocab_size) + (EXCHANGE_BYTES if ranks > 1 else 0)
    graphs += pieces_bytes(rows if spare else 0, rows, activations, row_bytes, own.num_layers)
    memory = DeviceMemory(card, CONTEXT_BYTES, weights + activations, unreleasable=0)
    left = memory.cache_bytes(settings.gpu_memory_utilization, settings.foreign_bytes, graphs)
    block = block_bytes(own, settings.block_size, dtype_of(own))
    return Foretold(
        card=card,
        reserve=card - int(card * settings.gpu_memory_utilization),
        weights=weights,
        encoder=settings.foreign_bytes,
        activations=activations,
        graphs=graphs,
        context=CONTEXT_BYTES,
        cache=left,
        block=block,
        blocks=max(0, left) // block,
        block_size=settings.block_size,
    )


@cache
def _shapes(config: ModelConfig) -> Weights:
    """Load weights without values. It takes a second, and a table of cards asks forty times for three of them."""
    return load_weights(Shapes(), config, dtype_of(config), torch.device("meta"), None)


def fewest_ranks(
    config: ModelConfig,
    settings: EngineSettings,
    card: int,
    possible: Sequence[int],
    checkpoint: Checkpoint | None = None,
) -> int | None:
    """Return the fewest of `possible` cards whose cache holds a sequence of max_model_len; None: not even the most.

    Numbers that cannot share the model are passed over.

    Raises:
        CheckpointError: one card cannot load it.
    """
    for ranks in possible:
        try:
            foretold = foretell(config, settings, card, ranks, checkpoint)
        except (ConfigError, CheckpointError):
            if ranks == 1:
                raise
            continue
        if foretold.sequences(settings.max_model_len):
            return ranks
    return None


def step_bytes(config: ModelConfig, settings: EngineSettings, dequantizes: bool) -> int:
    """Return the most bytes in use in the largest step, beside the weights.

    Args:
        dequantizes: products of many rows dequantise their weight first, since it is not kept in that form.
    """
    tokens, dtype = settings.max_num_batched_tokens, dtype_of(config).itemsize
    sequences = min(settings.max_num_seqs, tokens)
    hidden, chosen = config.hidden_size, config.experts_per_token
    dense = 3 * config.intermediate_size if config.dense_layers else 0
    # A token's choices: inner values and results of each, or copies of its row in place of the results.
    experts = chosen * (config.text_expert_size + hidden) + 3 * config.shared_expert_size
    # Its row, the residual, the half of tokens that are media once more; ids, places, and rotary tables.
    row = dtype * (2.5 * hidden + max(dense, experts)) + 48 + 2 * (config.head_dim // 2) * _WIDE
    widest = max(2 * config.intermediate_size if config.dense_layers else 0, 2 * config.shared_expert_size)
    plain = dtype * widest * hidden if dequantizes else 0
    keys = blocks_for(blocks_for(tokens, sequences), settings.block_size) * settings.block_size * cache_bytes(config)
    sampling = SAMPLED_COPIES * sequences * config.vocab_size * _WIDE
    return int(max(tokens * row + plain + keys, sampling)) + WORKSPACE_BYTES
