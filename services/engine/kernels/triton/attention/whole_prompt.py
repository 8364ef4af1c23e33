"""Attention of a long prompt to itself by the vendor library, which cannot read pages: keys and values are copied out.

The library plans a kernel for every length it meets, which takes it longer than a step, so prompts are padded to a few
lengths. The mask is causal, so no query sees the padding behind it, and the padding's own results are dropped.
"""

from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from services.engine.kernels.first_use import note_first_use
from services.engine.kernels.reference.paged_attention import MIN_PROMPT
from services.engine.kernels.triton.common.sizes import ceil_div, ceil_pow2

STEPS = 8  # padded lengths from one power of two to the next
BACKENDS = [
    SDPBackend.CUDNN_ATTENTION,
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.MATH,
]


def is_whole_prompt(length: tuple[int, int]) -> bool:
    """Return True for a sequence of (new tokens, all tokens) that `whole_prompt` handles: nothing cached, and long
    enough that its attention gains more than its launches cost."""
    new, context = length
    return new == context >= MIN_PROMPT


def library_supports(query: Tensor) -> bool:
    """Return True if the library is fast with such queries: [N, heads, D]."""
    half = query.dtype in (torch.bfloat16, torch.float16)
    return half and query.shape[-1] % 8 == 0 and query.is_cuda and _has_hopper_kernel(query.device)


@cache
def _has_hopper_kernel(device: torch.device) -> bool:
    """Return True if the library has a kernel made for this device: before Hopper ours is as fast."""
    return torch.backends.cudnn.is_available() and torch.cuda.get_device_capability(device) >= (9, 0)


def planned_length(length: int) -> int:
    """Return the padded length of a prompt."""
    step: int = max(1, ceil_pow2(length) // (2 * STEPS))
    return ceil_div(length, step) * step


@cache
def _note_plan(length: int) -> None:
    """Note the first prompt of a padded length in this process."""
    note_first_use(f"library plan for {length} tokens")


def whole_prompt(query: Tensor, keys: Tensor, values: Tensor, table: Tensor, scale: float) -> Tensor:
    """Attend all tokens of one sequence to each other.

    Args:
        query: [L, heads, D]: all tokens of a sequence.
        keys, values: [blocks, block_size, kv_heads, D].
        table: [B] int32, the sequence's blocks.

    Returns:
        [L, heads, D], contiguous.
    """
    length = len(query)
    planned = planned_length(length)
    _note_plan(planned)
    missing = ceil_div(planned, keys.shape[1]) - len(table)
    # Block 0 fills in for blocks past the sequence's last: their content does not matter.
    blocks = F.pad(table, (0, missing)) if missing > 0 else table[: len(table) + missing]
    key, value = (cache.index_select(0, blocks).flatten(0, 1)[:planned] for cache in (keys, values))
    if planned > length:
        query = F.pad(query, (0, 0, 0, 0, 0, planned - length))
    q, k, v = (rows.transpose(0, 1).unsqueeze(0) for rows in (query, key, value))
    with sdpa_kernel(BACKENDS, set_priority=True):
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=True)
    return out[0].transpose(0, 1)[:length].contiguous()
