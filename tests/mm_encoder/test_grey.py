"""Grey pictures of more than 8 bits keep their shades."""

import io
import struct
from typing import Any

import av
import numpy as np
import pytest
from media_files import image_bytes
from PIL import Image, TiffImagePlugin

from services.mm_encoder.image import open_image, rgb_pixels

RAMP = np.arange(0, 65536, 16, dtype=np.uint16).reshape(64, 64)
TAGS = {"bits": 258, "photometric": 262, "sample_format": 339}


def greys(data: bytes) -> np.ndarray:
    """What is shown, which must be grey."""
    pixels = np.asarray(rgb_pixels(open_image(data, 10**6)))
    assert (pixels == pixels[..., :1]).all()
    return pixels[..., 0]


def ffmpegs_png(values: np.ndarray) -> bytes:
    frame = av.VideoFrame.from_ndarray(values, format="gray16le").reformat(format="gray16be")
    codec = av.CodecContext.create("png", "w")
    codec.width, codec.height, codec.pix_fmt, codec.time_base = *values.shape[::-1], "gray16be", 1
    return b"".join(bytes(packet) for packet in [*codec.encode(frame), *codec.encode(None)])


def ffmpegs_greys(data: bytes) -> np.ndarray:
    with av.open(io.BytesIO(data)) as file:
        return next(file.decode(video=0)).reformat(format="gray").to_ndarray()


def tiff(values: np.ndarray, **changes: int) -> bytes:
    """A TIFF of libtiff's own layout, some of whose tags say something else than Pillow wrote."""
    tags = TiffImagePlugin.ImageFileDirectory_v2()
    for name, value in changes.items():
        tags[TAGS[name]] = value
    return image_bytes(Image.fromarray(values), "TIFF", tiffinfo=tags)


def handmade_tiff(data: bytes, width: int, height: int, **fields: int) -> bytes:
    """One strip of uncompressed grey, in little-endian order."""
    tags = {256: width, 257: height, 258: 16, 259: 1, 262: 1, 273: 8, 277: 1, 278: height, 279: len(data), 339: 1}
    tags |= {TAGS[name]: value for name, value in fields.items()}
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in sorted(tags.items()))
    head = b"II*\0" + struct.pack("<I", 8 + len(data))
    return head + data + struct.pack("<H", len(tags)) + entries + b"\0\0\0\0"


def packed_12_bits(values: np.ndarray) -> bytes:
    pairs = values.reshape(-1, 2).astype(int)
    return bytes(byte for a, b in pairs.tolist() for byte in (a >> 4, (a & 15) << 4 | b >> 8, b & 255))


def test_a_quarter_and_half_of_full_scale_are_a_quarter_and_half_grey() -> None:
    halves = np.repeat(np.array([[16383, 32767]], np.uint16), 20, axis=1).repeat(40, axis=0)
    assert np.unique(greys(image_bytes(Image.fromarray(halves)))).tolist() == [64, 127]


def test_sixteen_bits_are_scaled_as_ffmpeg_scales_its_own_png() -> None:
    data = ffmpegs_png(RAMP)
    shown = greys(data)
    assert np.array_equal(shown, np.rint(RAMP / 257))
    assert np.abs(shown.astype(int) - ffmpegs_greys(data)).max() <= 1


FULL = np.rint(RAMP / 257)
SIXTEENTH = np.rint((RAMP >> 4) * (255 / 4095))
DEEP: dict[str, tuple[bytes, np.ndarray]] = {
    "16 bits": (tiff(RAMP), FULL),
    "16 bits, the high byte first": (tiff(RAMP.astype(">u2")), FULL),
    "16 bits, 0 is white": (handmade_tiff(RAMP.tobytes(), 64, 64, photometric=0), 255 - FULL),
    "12 bits": (handmade_tiff(packed_12_bits(RAMP >> 4), 64, 64, bits=12), SIXTEENTH),
    "16 bits with a sign": (
        handmade_tiff((RAMP.astype(int) - 32768).astype("<i2").tobytes(), 64, 64, sample_format=2),
        np.rint(RAMP * (255 / RAMP.max())),
    ),
    "32 bits": (
        handmade_tiff((RAMP.astype("<u4") << 16).tobytes(), 64, 64, bits=32),
        np.rint(RAMP * (255 / RAMP.max())),
    ),
    "32 bits, of which 16 are used": (tiff(RAMP.astype(np.int32)), FULL),
    "32 bits, of which 8 are used": (tiff((RAMP >> 8).astype(np.int32)), RAMP >> 8),
    "floats to 1": (tiff((RAMP / 65535).astype(np.float32)), FULL),
    "floats to 255": (tiff((RAMP >> 8).astype(np.float32)), RAMP >> 8),
    "floats of any range": (tiff(RAMP.astype(np.float32) * 3 - 9000), np.rint(RAMP * (255 / RAMP.max()))),
    "the largest floats": (
        tiff(((RAMP / 65520 - 0.5) * 6.8e38).astype(np.float32)),
        np.rint(RAMP * (255 / RAMP.max())),
    ),
    "one float": (tiff(np.full((64, 64), -7, np.float32)), np.zeros((64, 64))),
}


@pytest.mark.parametrize("kind", DEEP)
def test_deep_grey_is_scaled_by_its_range(kind: str) -> None:
    data, expected = DEEP[kind]
    assert np.array_equal(greys(data), expected)


def test_what_is_no_number_is_black_and_the_rest_keeps_its_range() -> None:
    values = (RAMP / 65520).astype(np.float32)
    values[0, :3] = np.nan, np.inf, -np.inf
    shown = greys(tiff(values))
    assert shown[0, :3].tolist() == [0, 255, 0]
    assert np.array_equal(shown[1:], np.rint(RAMP[1:] * (255 / 65520)))
    assert not greys(tiff(np.full((64, 64), np.nan, np.float32))).any()


def test_a_transparent_grey_is_white() -> None:
    shown = greys(image_bytes(Image.fromarray(RAMP), transparency=RAMP[2, 3].item()))
    expected = FULL.copy()
    expected[2, 3] = 255
    assert np.array_equal(shown, expected)


@pytest.mark.parametrize("values", [RAMP, RAMP.astype(np.int32), (RAMP / 65535).astype(np.float32)])
def test_deep_grey_is_turned_by_its_orientation(values: np.ndarray) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    options: dict[str, Any] = {"exif": exif}
    assert np.array_equal(greys(image_bytes(Image.fromarray(values), "TIFF", **options)), np.rot90(FULL, -1))
