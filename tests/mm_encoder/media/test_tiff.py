"""TIFF in every order of bytes and planes: the picture, or a refusal, and never noise."""

import struct
import zlib

import numpy as np
import pytest
from media_files import noise

from services.mm_encoder.media.image import open_image, rgb_pixels
from shared.errors import RequestError

BITS, COMPRESSION, PHOTOMETRIC, STRIPS, ROWS, SIZES, PLANES, EXTRA, FORMAT = 258, 259, 262, 273, 278, 279, 284, 338, 339
TAGS = {"COMPRESSION": COMPRESSION, "SIZES": SIZES, "PLANES": PLANES, "EXTRA": EXTRA, "FORMAT": FORMAT}
DEFLATE, GREY, RGB, CMYK, LAB, SEPARATE = 8, 1, 2, 5, 8, 2
RAMP = np.arange(0, 65536, 16, dtype=np.uint16).reshape(64, 64)
FULL = np.rint(RAMP / 257)
COLOUR = np.kron(noise(4, 6, seed=3), np.ones((7, 7, 1), np.uint8))


def tiff(samples: np.ndarray, photometric: int, order: str = "<", rows: int = 0, **tags: int) -> bytes:
    """Return a TIFF of (height, width, samples) in strips of `rows`, with other `tags`; SIZES=0 leaves these out."""
    named = {TAGS[name]: value for name, value in tags.items()}
    height, width, count = samples.shape
    rows = rows or height
    planes = np.split(samples, count, axis=2) if named.get(PLANES) == SEPARATE else [samples]
    parts = [plane[start : start + rows] for plane in planes for start in range(0, height, rows)]
    strips = [part.astype(samples.dtype.newbyteorder(order)).tobytes() for part in parts]
    if named.get(COMPRESSION) == DEFLATE:
        strips = [zlib.compress(strip) for strip in strips]
    starts = np.cumsum([8, *map(len, strips)]).tolist()
    values: dict[int, list[int]] = {
        256: [width],
        257: [height],
        BITS: [samples.itemsize * 8] * count,
        COMPRESSION: [1],
        PHOTOMETRIC: [photometric],
        STRIPS: starts[:-1],
        277: [count],
        ROWS: [rows],
        SIZES: [len(strip) for strip in strips],
    }
    values |= {tag: [value] for tag, value in named.items()}
    values = {tag: value for tag, value in values.items() if (tag, value) != (SIZES, [0])}
    behind = starts[-1] + 2 + 12 * len(values) + 4
    entries, lists = b"", b""
    for tag, numbers in sorted(values.items()):
        at = numbers[0] if len(numbers) == 1 else behind + len(lists)
        entries += struct.pack(order + "HHII", tag, 4, len(numbers), at)
        lists += struct.pack(f"{order}{len(numbers)}I", *numbers) if len(numbers) > 1 else b""
    head = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(order + "I", starts[-1])
    return head + b"".join(strips) + struct.pack(order + "H", len(values)) + entries + bytes(4) + lists


def shown(data: bytes) -> np.ndarray:
    return np.asarray(rgb_pixels(open_image(data, 10**6)))


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("compression", [1, DEFLATE])
@pytest.mark.parametrize(("dtype", "form"), [("u2", 1), ("i2", 2), ("i4", 2), ("f4", 3)])
def test_deep_grey_is_read_in_its_own_order_of_bytes(order: str, compression: int, dtype: str, form: int) -> None:
    """Of the signed 16 bits only the lower half is positive, so that they are scaled from their own least and most."""
    values = RAMP.astype(int) - 32768 if dtype == "i2" else RAMP
    samples = values.astype(dtype)[..., None]
    pixels = shown(tiff(samples, GREY, order, COMPRESSION=compression, FORMAT=form))
    expected = np.rint(RAMP * (255 / RAMP.max())) if dtype == "i2" else FULL
    assert np.array_equal(pixels, np.repeat(expected[..., None], 3, axis=2))


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("rows", [0, 5])
@pytest.mark.parametrize("deep", [False, True])
def test_separate_planes_are_the_picture(order: str, rows: int, deep: bool) -> None:
    """Of 8 bits and of 16, alone and with more samples: unspecified, premultiplied and plain alpha of an opaque one."""

    def file(samples: np.ndarray, photometric: int = RGB, **tags: int) -> bytes:
        deepened = samples.astype(np.uint16) * 257 if deep else samples
        return tiff(deepened, photometric, order, rows, PLANES=SEPARATE, **tags)

    assert np.array_equal(shown(file(COLOUR)), COLOUR)
    opaque = np.concatenate([COLOUR, np.full_like(COLOUR[..., :1], 255)], axis=2)
    for kind in (0, 1, 2):
        assert np.array_equal(shown(file(opaque, EXTRA=kind)), COLOUR), kind
    clear = opaque * np.array([1, 1, 1, 0], np.uint8)
    assert (shown(file(clear, EXTRA=2)) == 255).all()
    ink = np.concatenate([255 - COLOUR, np.zeros_like(COLOUR[..., :1])], axis=2)
    assert np.array_equal(shown(file(ink, CMYK)), COLOUR)


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("compression", [1, DEFLATE])
@pytest.mark.parametrize("deep", [False, True])
def test_a_fourth_sample_that_no_tag_explains_is_plain_alpha(order: str, compression: int, deep: bool) -> None:
    """In planes as interleaved, and as where the tag says so."""
    alpha = noise(4, 6, channels=1, seed=5)[..., None]
    samples = np.concatenate([COLOUR, np.kron(alpha, np.ones((7, 7, 1), np.uint8))], axis=2)
    samples = samples.astype(np.uint16) * 257 if deep else samples
    told = shown(tiff(samples, RGB, order, COMPRESSION=compression, EXTRA=2))
    weight = samples[..., 3:] / (65535 if deep else 255)
    assert np.abs(told - (COLOUR * weight + 255 * (1 - weight))).max() <= 1
    for planes in (1, SEPARATE):
        assert np.array_equal(shown(tiff(samples, RGB, order, COMPRESSION=compression, PLANES=planes)), told)


@pytest.mark.parametrize("compression", [1, DEFLATE])
@pytest.mark.parametrize(("samples", "tags"), [(2, {"EXTRA": 1}), (2, {"EXTRA": 2}), (3, {})])
def test_planes_that_no_reader_knows_are_refused(compression: int, samples: int, tags: dict[str, int]) -> None:
    """Grey and its alpha, and LAB: as interleaved samples they are shown."""
    file = COLOUR[..., :samples], GREY if samples == 2 else LAB
    shown(tiff(*file, COMPRESSION=compression, **tags))
    with pytest.raises(RequestError, match="TIFF image is broken, or says that it is of a kind"):
        shown(tiff(*file, COMPRESSION=compression, PLANES=SEPARATE, **tags))


def test_strips_need_not_tell_their_sizes() -> None:
    data = tiff(COLOUR, RGB, rows=5, SIZES=0)
    assert data.count(struct.pack("<HH", SIZES, 4)) == 0
    assert np.array_equal(shown(data), COLOUR)
