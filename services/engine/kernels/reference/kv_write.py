"""Write of a step's keys and values to the paged cache."""

from torch import Tensor


def kv_write(key: Tensor, value: Tensor, keys: Tensor, values: Tensor, slots: Tensor) -> None:
    """Write row n to offset slots[n] % block_size of block slots[n] // block_size.

    Args:
        key, value: [N, kv_heads, D]. Rows may be strided.
        keys, values: one layer's cache, [blocks, block_size, kv_heads, D], contiguous; written.
        slots: [N] int64, distinct.
    """
    keys.view(-1, *keys.shape[2:])[slots] = key
    values.view(-1, *values.shape[2:])[slots] = value
