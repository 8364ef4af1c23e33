"""Choice between Pillow's two readers of TIFF, its own and libtiff: each makes noise of something that the other reads.

Its own takes separate planes of 16 bits for 8, and fails at planes of alpha or other extra samples: they are libtiff's.
All else that is not compressed is left to its own, which needs no sizes of strips and reads every order of bytes.
"""

import io

from PIL import TiffImagePlugin
from PIL.ImageFile import _Tile as Tile
from PIL.TiffImagePlugin import TiffImageFile

_BITS, _PLANES, _EXTRA_SAMPLES = 258, 284, 338  # tags
_SEPARATE = 2

# Separate planes of these come out of both readers as white or in false colours.
_NOT_IN_PLANES = ("LA", "La", "PA", "LAB")
# libtiff brings samples into the machine's order, and with these raw modes Pillow swaps their bytes again: noise.
_SWAPPED = {"F;32BF": "F;32NF", "I;16BS": "I;16NS", "I;32BS": "I;32NS"}
# A fourth plane that no tag explains is plain alpha, as with interleaved samples. Pillow would divide colours by it,
# as if they were premultiplied, but not in a mode without alpha, of which image.py makes one with it.
_UNDIVIDED = {"RGBA": "RGBX", "RGBA;16N": "RGBX;16N"}

TiffImagePlugin.READ_LIBTIFF = True  # for what is not compressed, too


def mended(image: TiffImageFile, data: bytes) -> TiffImageFile:
    """Return an opened TIFF, or the same opened otherwise, so that its pixels are read as they are stored.

    Raises:
        SyntaxError: neither reader can.
    """
    tags = image.tag_v2
    separate = tags.get(_PLANES) == _SEPARATE
    if separate and image.mode in _NOT_IN_PLANES:
        raise SyntaxError(f"{image.mode} in separate planes")
    deep_or_more = max(tags.get(_BITS, (1,))) > 8 or _EXTRA_SAMPLES in tags
    if image.info["compression"] == "raw" and not (separate and deep_or_more):
        return _opened_by_pillow(data)
    raw_modes = _SWAPPED
    if separate and image.mode == "RGBA" and _EXTRA_SAMPLES not in tags:
        image._mode, raw_modes = "RGBX", _UNDIVIDED
    image.tile = [_with_raw_mode(tile, raw_modes) for tile in image.tile]
    return image


def _opened_by_pillow(data: bytes) -> TiffImageFile:
    """Open a file again, for Pillow's own reader. The switch is a global one; a decoder opens one file at a time."""
    TiffImagePlugin.READ_LIBTIFF = False
    try:
        return TiffImageFile(io.BytesIO(data))
    finally:
        TiffImagePlugin.READ_LIBTIFF = True


def _with_raw_mode(tile: Tile, raw_modes: dict[str, str]) -> Tile:
    assert isinstance(tile.args, tuple)
    raw_mode, *rest = tile.args
    return tile._replace(args=(raw_modes.get(raw_mode, raw_mode), *rest))
