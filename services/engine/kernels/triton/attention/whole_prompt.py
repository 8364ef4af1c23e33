"""Attention of a long prompt to itself, by the vendor library, which knows no pages: keys and values are copied out.

The library plans a kernel for every length it meets, which takes it longer than a step. So prompts are padded to a few
lengths: what is behind a query is not seen by it, and what becomes of the padding is dropped.
"""

from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from services.engine.kernels.triton.common.sizes import ceil_div, ceil_pow2

LEAST = 2048  # tokens of a prompt; the launches for a shorter one cost more than its attention gains
STEPS = 8  # lengths from one power of two to the next
BACKENDS = [
    SDPBackend.CUDNN_ATTENTION,
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.MATH,
]


def whole(length: tuple[int, int]) -> bool:
    """Whether a sequence of so many new tokens, and tokens in all, is for `whole_prompt`."""
    new, context = length
    return new == context >= LEAST


def suits(query: Tensor) -> bool:
    """Whether the library is fast with such queries: [N, heads, D]."""
    half = query.dtype in (torch.bfloat16, torch.float16)
    return half and query.shape[-1] % 8 == 0 and query.is_cuda and _able(query.device)


@cache
def _able(device: torch.device) -> bool:
    """Whether it has a kernel made for this device: before Hopper ours is as fast."""
    return torch.backends.cudnn.is_available() and torch.cuda.get_device_capability(device) >= (9, 0)


def planned_length(length: int) -> int:
    """The next of the lengths to which prompts are padded."""
    step: int = max(1, ceil_pow2(length) // (2 * STEPS))
    return ceil_div(length, step) * step


def whole_prompt(query: Tensor, keys: Tensor, values: Tensor, table: Tensor, scale: float) -> Tensor:
    """
    Args:
        query: [L, heads, D]: all tokens of a sequence.
        keys, values: [blocks, block_size, kv_heads, D].
        table: [B] int32, the sequence's blocks.

    Returns:
        [L, heads, D], contiguous.
    """
    length = len(query)
    planned = planned_length(length)
    missing = ceil_div(planned, keys.shape[1]) - len(table)
    # Block 0 stands in for those that the sequence has not: any block does.
    blocks = F.pad(table, (0, missing)) if missing > 0 else table[: len(table) + missing]
    key, value = (cache.index_select(0, blocks).flatten(0, 1)[:planned] for cache in (keys, values))
    if planned > length:
        query = F.pad(query, (0, 0, 0, 0, 0, planned - length))
    q, k, v = (rows.transpose(0, 1).unsqueeze(0) for rows in (query, key, value))
    with sdpa_kernel(BACKENDS, set_priority=True):
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=True)
    return out[0].transpose(0, 1)[:length].contiguous()
