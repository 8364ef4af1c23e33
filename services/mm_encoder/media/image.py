"""Image bytes to RGB pixels.

FastDeploy is the reference: transparency is composited on white (transformers drops it), EXIF orientation is applied,
everything else is Pillow's conversion to RGB. An animation is its first frame. Two differences: grey of more than 8
bits is scaled (grey.py), where both references clip it to white; a transparent palette is composited on white, where
FastDeploy drops the transparency.
"""

import io

import pi_heif
from PIL import Image, ImageOps, TiffImagePlugin

from services.mm_encoder.media import grey, tiff
from services.mm_encoder.media.jpeg import count_scans
from services.mm_encoder.media.refusal import over_limit, refuse

# Formats people send. Pillow reads more, some through external programs or rarely used parsers.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "HEIF")

pi_heif.register_heif_opener()  # which applies the file's own turns and leaves EXIF nothing to turn

_SIGNATURES = {
    b"\xff\xd8\xff": "JPEG",
    b"\x89PNG\r\n\x1a\n": "PNG",
    b"GIF8": "GIF",
    b"BM": "BMP",
    b"II*\0": "TIFF",
    b"MM\0*": "TIFF",
    b"II+\0": "TIFF",
    b"MM\0+": "TIFF",
}
_STRAIGHT = {"RGBa": "RGBA", "La": "LA", "PA": "RGBA"}  # modes with alpha in another form


def open_image(data: bytes, max_pixels: int) -> Image.Image:
    """Open an image by reading its header only.

    Raises:
        RequestError: the bytes are not an image, it is truncated, or it has more pixels than `max_pixels`.
    """
    try:
        image: Image.Image = Image.open(io.BytesIO(data), formats=FORMATS)
        if isinstance(image, TiffImagePlugin.TiffImageFile):
            image = tiff.mended(image, data)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise over_limit("The image's number of pixels", "media_max_pixels", max_pixels) from error
    except MemoryError:
        raise
    except Exception as error:  # Pillow's parsers raise anything on hostile bytes
        raise refuse(_why_not(data)) from error
    if image.format in ("HEIF", "AVIF") and _is_cut(data):
        raise refuse("The image is truncated.")
    if image.width * image.height > max_pixels:
        what = f"The image's {image.width} x {image.height} pixels"
        raise over_limit(what, "media_max_pixels", max_pixels)
    return image


def decoding_work(image: Image.Image, data: bytes) -> int:
    """Return the pixels that decoding an opened image goes through: each scan of a JPEG goes through all of them.

    Raises:
        RequestError: a JPEG has more scans than any encoder writes.
    """
    return image.width * image.height * (count_scans(data) if image.format == "JPEG" else 1)


def rgb_pixels(image: Image.Image) -> Image.Image:
    """Decode an opened image to upright RGB.

    Raises:
        RequestError: the data is truncated or broken.
    """
    try:
        image.load()
        _turn_upright(image)
        if image.mode in grey.MODES:
            image = grey.eight_bits(image, getattr(image, "tag_v2", {}))
        opaque = _on_white(image)
        return opaque if opaque.mode == "RGB" else opaque.convert("RGB")
    except MemoryError:
        raise
    except Exception as error:  # as above
        what = "The image's data is truncated or broken, or stored in a way that is not supported."
        raise refuse(what) from error


def resized(image: Image.Image, height: int, width: int) -> Image.Image:
    """Resize with Pillow's bicubic filter. An image of that size is returned itself; Pillow would copy it."""
    return image if image.size == (width, height) else image.resize((width, height), Image.Resampling.BICUBIC)


def _why_not(data: bytes) -> str:
    """Return why bytes could not be opened, in terms of the format that they claim to have."""
    for signature, name in _SIGNATURES.items():
        if data.startswith(signature):
            return f"The header of this {name} image is broken, or says that it is of a kind that is not supported."
    return f"This is not an image in one of the formats {', '.join(FORMATS)}."


def _is_cut(data: bytes) -> bool:
    """Return True for a HEIF file that ends within its pixels: libheif shows the tiles that are not there green."""
    place, kind = 0, b""
    while place + 16 <= len(data):
        size, kind = int.from_bytes(data[place : place + 4], "big"), data[place + 4 : place + 8]
        if size == 1:
            size = int.from_bytes(data[place + 8 : place + 16], "big")
        if size < 8:  # up to the end, or no box
            return False
        place += size
    return kind == b"mdat" and place > len(data)


def _turn_upright(image: Image.Image) -> None:
    """Turn a decoded image as its EXIF data says. Data that cannot be read turn nothing, as in viewers."""
    try:
        ImageOps.exif_transpose(image, in_place=True)
    except MemoryError:
        raise
    except Exception:  # as above
        pass


def _on_white(image: Image.Image) -> Image.Image:
    if "transparency" in image.info:
        image = image.convert("RGBA")
    elif image.mode == "RGBX":  # of tiff.py
        image = Image.merge("RGBA", image.split())
    elif image.mode in _STRAIGHT:
        image = image.convert(_STRAIGHT[image.mode])
    if image.mode not in ("RGBA", "LA"):
        return image
    if image.getchannel("A").getextrema() == (255, 255):
        return image
    white = Image.new("RGB", image.size, (255, 255, 255))
    white.paste(image, (0, 0), image)
    return white
