"""Grey pictures of more than 8 bits to 8, by their range: Pillow's own conversion clips, and most turn out white.

Unsigned 16 bits have a full scale. Other integers and floats do not say theirs: it is the first of 1 (floats only), 255
and 65535 that no value exceeds; where one does, or is negative, the picture's own least value is black and its greatest
is white.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

MODES = frozenset(("I;16", "I;16L", "I;16B", "I;16N", "I", "F"))

_BITS, _PHOTOMETRIC, _SAMPLE_FORMAT = 258, 262, 339  # tags of TIFF
_WHITE_IS_ZERO, _UNSIGNED = 0, 1
_AT_ONCE = 1 << 20


def eight_bits(image: Image.Image, tags: Mapping[int, Any]) -> Image.Image:
    """Return an image of mode L. `tags` are the file's, if it is a TIFF; a transparent grey becomes white."""
    values = np.asarray(image)
    if image.mode == "F":
        scaled = _stretched(values, (1.0, 255.0, 65535.0))
    elif image.mode == "I":
        unsigned = tags.get(_SAMPLE_FORMAT, (_UNSIGNED,))[0] == _UNSIGNED  # Pillow reads such 32 bits as signed
        scaled = _stretched(values.view(np.uint32) if unsigned else values, (255.0, 65535.0))
    else:
        scaled = _full_scale(tags.get(_BITS, (16,))[0])[values]
    if tags.get(_PHOTOMETRIC) == _WHITE_IS_ZERO:
        scaled = 255 - scaled
    if (transparent := image.info.get("transparency")) is not None:
        scaled[values == transparent] = 255
    return Image.fromarray(scaled)


def _full_scale(bits: int) -> NDArray[np.uint8]:
    """The grey of every 16-bit value, of which only `bits` are used."""
    return _rounded(np.arange(1 << 16) * (255 / ((1 << bits) - 1)))


def _stretched(values: NDArray[Any], full_scales: tuple[float, ...]) -> NDArray[np.uint8]:
    low, high = _extent(values)
    if low >= 0:
        low, high = next(((0.0, scale) for scale in full_scales if high <= scale), (low, high))
    factor = 255 / (high - low) if high > low else 0.0
    flat, grey = values.reshape(-1), np.empty(values.size, np.uint8)
    for start in range(0, len(flat), _AT_ONCE):  # in 64 bits, of which a whole picture would take half a gigabyte
        part = flat[start : start + _AT_ONCE].astype(np.float64)
        known = np.nan_to_num(part, nan=low, posinf=high, neginf=low)
        grey[start : start + _AT_ONCE] = _rounded((known - low) * factor)
    return grey.reshape(values.shape)


def _extent(values: NDArray[Any]) -> tuple[float, float]:
    """The least and the greatest number, but for infinities."""
    finite = np.isfinite(values)
    if not finite.any():
        return 0.0, 0.0
    widest = np.iinfo(values.dtype) if values.dtype.kind in "iu" else np.finfo(values.dtype)
    return (
        float(values.min(where=finite, initial=widest.max)),
        float(values.max(where=finite, initial=widest.min)),
    )


def _rounded(greys: NDArray[np.floating[Any]]) -> NDArray[np.uint8]:
    rounded: NDArray[np.uint8] = np.rint(greys).clip(0, 255).astype(np.uint8)
    return rounded
