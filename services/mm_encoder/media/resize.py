"""Target size of an image or a video's frames: FastDeploy's smart resize.

transformers differs for sides of 14 pixels or less, and refuses aspect ratios over 200, which FastDeploy clips; this is
FastDeploy's.
"""

import math

MAX_RATIO = 200


def smart_resize(height: int, width: int, *, factor: int, min_pixels: int, max_pixels: int) -> tuple[int, int]:
    """Return (height, width) near the given one, both multiples of `factor`, with an area within the limits.

    Rounding is Python's, half to even. Swapping height and width swaps the result.

    Raises:
        ValueError: no such size exists, possible only where the limits are close to each other.
    """
    if max(height, width) / min(height, width) > MAX_RATIO:
        height, width = _clip_ratio(height, width, factor)
    tall, wide = max(factor, _round(height, factor)), max(factor, _round(width, factor))
    if tall * wide > max_pixels:
        beta = math.sqrt(height * width / max_pixels)
        tall, wide = math.floor(height / beta / factor) * factor, math.floor(width / beta / factor) * factor
    elif tall * wide < min_pixels:
        beta = math.sqrt(min_pixels / (height * width))
        tall, wide = math.ceil(height * beta / factor) * factor, math.ceil(width * beta / factor) * factor
    if not min_pixels <= tall * wide <= max_pixels:
        raise ValueError(
            f"{width} x {height} pixels cannot be resized to multiples of {factor} with an area between "
            f"{min_pixels} and {max_pixels} pixels"
        )
    return tall, wide


def _clip_ratio(height: int, width: int, factor: int) -> tuple[int, int]:
    """Round the short side, and cut the long side to `MAX_RATIO` times it."""
    short = max(factor, _round(min(height, width), factor))
    long = short * MAX_RATIO // factor * factor
    return (long, short) if height > width else (short, long)


def _round(length: int, factor: int) -> int:
    return round(length / factor) * factor
