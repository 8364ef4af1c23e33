"""Rotary embedding over three position axes, interleaved pairs."""

from torch import Tensor


def rotary_tables(positions: Tensor, frequencies: Tensor, axes: Tensor) -> tuple[Tensor, Tensor]:
    """Compute cosine and sine of every row's angles, once per step for all layers.

    Args:
        positions: [3, N] int64: t, h, w.
        frequencies: [D / 2] float32, radians per position.
        axes: [D / 2] int64, the position axis each frequency follows.

    Returns:
        cos, sin: [N, D / 2] float32, contiguous.
    """
    angles = positions[axes].T.contiguous().float() * frequencies
    return angles.cos(), angles.sin()


def rotary(x: Tensor, cos: Tensor, sin: Tensor) -> None:
    """Rotate the pairs (x[2i], x[2i + 1]) by angle i, in place, in float32.

    Args:
        x: [N, heads, D]: the query and key heads, which are neighbours in the fused projection. Rows may be strided.
        cos, sin: [N, D / 2] float32, contiguous.
    """
    even, odd = x[..., 0::2].float(), x[..., 1::2].float()
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    rotated_odd = odd * cos + even * sin
    x[..., 0::2] = even * cos - odd * sin
    x[..., 1::2] = rotated_odd
