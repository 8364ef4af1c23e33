"""Patch rows and pixels, bit by bit, against transformers' image processor."""

import io
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from media_bombs import scans_jpeg
from media_files import image_bytes, noise, patches_of
from oracle import Model  # noqa: F401 - makes transformers importable
from PIL import Image
from transformers.image_utils import load_image
from transformers.models.ernie4_5_vl_moe.image_processing_pil_ernie4_5_vl_moe import Ernie4_5_VLMoeImageProcessorPil

from services.mm_encoder.media.image import open_image, rgb_pixels
from services.mm_encoder.media.jpeg import count_scans
from services.mm_encoder.media.patches import CLIP_MEAN, CLIP_STD, Patches, fill_rows, patch_rows
from services.mm_encoder.media.processor import Processor
from services.mm_encoder.media.processor_settings import ProcessorSettings
from services.mm_encoder.media.timestamps import font_file
from services.mm_encoder.media.video import VideoLimits
from services.mm_encoder.vision.normalise import normalise
from shared.errors import RequestError
from shared.messages import Media
from shared.model.config import VisionConfig

VISION = VisionConfig(2, 32, 2, 128, 14, 3, 2, 2, 1e-6, 1e4)
LIMITS = VideoLimits(64_000_000, 3600, 216_000)
MEAN, STD = torch.tensor(CLIP_MEAN), torch.tensor(CLIP_STD)


def processor(tmp_path: Path, **settings: int) -> Processor:
    return Processor(ProcessorSettings(**settings), LIMITS, VISION, font_file(tmp_path)[0])


def process(tmp_path: Path, data: bytes, **settings: int) -> Patches:
    ours = processor(tmp_path, **settings)
    plan = ours.plan(Media("image", "p"), data)
    patches = patches_of(ours, plan, data)
    assert len(patches.rows) == 4 * plan.tokens
    return patches


def judged(image: Image.Image, max_pixels: int = 6177 * 784) -> tuple[np.ndarray, tuple[int, ...]]:
    """transformers' normalised rows and grid."""
    judge = Ernie4_5_VLMoeImageProcessorPil(size={"shortest_edge": 3136, "longest_edge": max_pixels})
    out = judge(images=[image], return_tensors="np")
    return out["pixel_values"], tuple(out["image_grid_thw"][0].tolist())


def as_uint8(rows: np.ndarray) -> np.ndarray:
    """Return the pixels that were normalised, exactly."""
    flat = rows.reshape(len(rows), 3, -1) * np.array(CLIP_STD)[:, None] + np.array(CLIP_MEAN)[:, None]
    return np.rint(flat * 255).astype(np.uint8).reshape(len(rows), -1)


@pytest.mark.parametrize(
    "size", [(100, 150), (224, 224), (480, 640), (61, 333), (15, 29), (700, 90), (28, 56), (1000, 1400)]
)
def test_rows_equal_transformers(tmp_path: Path, size: tuple[int, int]) -> None:
    image = Image.fromarray(noise(*size))
    patches = process(tmp_path, image_bytes(image))
    rows, grid = judged(image)
    assert patches.grid == grid
    assert np.array_equal(patches.rows, as_uint8(rows))
    ours = normalise(torch.from_numpy(patches.rows), MEAN, STD, torch.float32)
    assert torch.allclose(ours, torch.from_numpy(rows), atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    ("blocks", "patch", "merge"),
    [((1, 1), 14, 2), ((3, 5), 14, 2), ((10, 40), 14, 2), ((2, 200), 14, 2), ((5, 3), 8, 1), ((4, 3), 7, 3)],
)
def test_bands_of_an_image_are_cut_as_its_pixels(blocks: tuple[int, int], patch: int, merge: int) -> None:
    pixels = noise(blocks[0] * patch * merge, blocks[1] * patch * merge)
    expected = patch_rows(pixels, patch, merge)
    rows = np.full_like(expected, 7)
    fill_rows(rows, Image.fromarray(pixels), patch, merge)
    assert np.array_equal(rows, expected)


def test_max_pixels_is_honoured(tmp_path: Path) -> None:
    image = Image.fromarray(noise(300, 500))
    patches = process(tmp_path, image_bytes(image), image_max_pixels=784 * 20)
    rows, grid = judged(image, 784 * 20)
    assert patches.grid == grid
    assert np.array_equal(patches.rows, as_uint8(rows))


def test_normalisation_rounds_once_to_the_model_dtype() -> None:
    rows = torch.arange(588, dtype=torch.int64).remainder(256).to(torch.uint8)[None]
    exact = normalise(rows, MEAN, STD, torch.float32)
    assert torch.equal(normalise(rows, MEAN, STD, torch.bfloat16), exact.to(torch.bfloat16))


def modes() -> dict[str, Image.Image]:
    rgb = Image.fromarray(noise(70, 90))
    return {
        "grey": rgb.convert("L"),
        "palette": rgb.convert("P", palette=Image.Palette.ADAPTIVE),
        "cmyk": rgb.convert("CMYK"),
        "bilevel": rgb.convert("1"),
        "opaque alpha": rgb.convert("RGBA"),
    }


@pytest.mark.parametrize("mode", modes())
def test_every_mode_becomes_rgb_as_transformers_has_it(tmp_path: Path, mode: str) -> None:
    data = image_bytes(modes()[mode], "TIFF" if mode == "cmyk" else "PNG")
    rows, grid = judged(load_image(Image.open(io.BytesIO(data))))
    patches = process(tmp_path, data)
    assert patches.grid == grid
    assert np.array_equal(patches.rows, as_uint8(rows))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(tmp_path: Path, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = image_bytes(Image.fromarray(noise(60, 150)), "JPEG", exif=exif)
    rows, grid = judged(load_image(Image.open(io.BytesIO(data))))
    patches = process(tmp_path, data)
    assert patches.grid == grid
    assert np.array_equal(patches.rows, as_uint8(rows))


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_transparency_is_laid_on_white(tmp_path: Path, mode: str) -> None:
    """FastDeploy's choice; transformers drops the alpha channel, and what was under it shows."""
    image = Image.new("RGBA", (56, 56), (0, 0, 0, 0))
    image.paste((0, 0, 0, 255), (0, 0, 28, 56))
    data = image_bytes(image.convert(mode) if mode != "P" else image.quantize(4))
    rows = process(tmp_path, data).rows
    assert rows.shape == (16, 588)
    assert set(rows[[0, 1, 2, 3]].flatten().tolist()) <= set(range(40))  # the left block, but for the filter's ringing
    assert min(rows[4:8, -20:].flatten().tolist()) > 215


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF"])
def test_formats(tmp_path: Path, kind: str) -> None:
    data = image_bytes(Image.fromarray(noise(56, 84)), kind)
    rows, _ = judged(load_image(Image.open(io.BytesIO(data))))
    assert np.array_equal(process(tmp_path, data).rows, as_uint8(rows))


def test_heic_is_read_and_turned_once() -> None:
    """Red, green / blue, grey; turned clockwise, blue is on top of grey's left."""
    shown = {}
    for name in ("quadrants", "turned"):
        image = rgb_pixels(open_image((Path(__file__).parent / "heif" / f"{name}.heic").read_bytes(), 10**6))
        corners = [(8, 8), (image.width - 8, 8), (8, image.height - 8), (image.width - 8, image.height - 8)]
        shown[name] = [image.getpixel(corner) for corner in corners]
    red, green, blue, grey = (200, 30, 30), (30, 200, 30), (30, 30, 200), (220, 220, 220)
    assert np.abs(np.subtract(shown["quadrants"], [red, green, blue, grey])).max() <= 2
    assert np.abs(np.subtract(shown["turned"], [blue, red, grey, green])).max() <= 2


@pytest.mark.parametrize("missing", [1, 5000])
def test_heic_that_ends_within_its_pixels_is_refused(missing: int) -> None:
    """Of a photo in tiles, as phones take them, libheif shows those green that are not there."""
    whole = (Path(__file__).parent / "heif" / "quadrants.heic").read_bytes()
    place = whole.index(b"mdat") - 4
    size = int.from_bytes(whole[place : place + 4], "big")
    assert place + size == len(whole), "its last box"
    open_image(whole, 10**6)
    with pytest.raises(RequestError, match="truncated"):
        open_image(whole[:place] + (size + missing).to_bytes(4, "big") + whole[place + 4 :], 10**6)


def test_avif(tmp_path: Path) -> None:
    data = image_bytes(Image.fromarray(noise(56, 84)), "AVIF")
    rows, _ = judged(load_image(Image.open(io.BytesIO(data))))
    assert np.array_equal(process(tmp_path, data).rows, as_uint8(rows))


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG"])
def test_an_animation_is_its_first_picture(tmp_path: Path, kind: str) -> None:
    frames = [Image.new("RGB", (56, 84), (level, level, level)) for level in (40, 120, 200)]
    data = image_bytes(frames[0], kind, save_all=True, append_images=frames[1:], lossless=True)
    assert np.abs(process(tmp_path, data).rows.astype(int) - 40).max() <= 1


def test_cmyk_jpeg_is_pillows(tmp_path: Path) -> None:
    data = image_bytes(Image.fromarray(noise(56, 84)).convert("CMYK"), "JPEG")
    rows, _ = judged(load_image(Image.open(io.BytesIO(data))))
    assert np.array_equal(process(tmp_path, data).rows, as_uint8(rows))


@pytest.mark.parametrize("more", [101, 2000])
def test_a_jpeg_of_too_many_scans_is_refused_by_its_markers(more: int) -> None:
    with pytest.raises(RequestError, match="more than 100 scans"):
        count_scans(scans_jpeg(32, more))


@pytest.mark.parametrize("progressive", [False, True])
def test_scans_are_counted(progressive: bool) -> None:
    """Ten is what libjpeg writes for a picture in colour. Others are in a comment, and behind the end."""
    comment = b"\xff\xda\xff\xd9" * 200
    data = image_bytes(Image.fromarray(noise(90, 90)), "JPEG", progressive=progressive, comment=comment)
    assert count_scans(data + b"\xff\xda\0\0" * 200) == (10 if progressive else 1)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("part", [0.9, 0.5, 0.02])
def test_truncated_images_are_refused(tmp_path: Path, kind: str, part: float) -> None:
    data = image_bytes(Image.fromarray(noise(200, 200)), kind)
    with pytest.raises(RequestError, match=r"truncated|not an image|is broken") as caught:
        process(tmp_path, data[: int(len(data) * part)])
    assert caught.value.failure.status == 400


@pytest.mark.parametrize("data", [b"", b"hello", b"%!PS-Adobe-3.0 EPSF-3.0\n"])
def test_what_is_no_image_is_refused(tmp_path: Path, data: bytes) -> None:
    with pytest.raises(RequestError, match="not an image"):
        process(tmp_path, data)


@pytest.mark.parametrize("side", [30_000, 12_000, 9_000])
def test_a_huge_image_is_refused_by_its_header(side: int) -> None:
    """900 M pixels make Pillow raise, 144 M make it warn, 81 M are its business no more."""
    header = image_bytes(Image.new("1", (1, 1)))
    huge = bytearray(header)
    huge[16:24] = side.to_bytes(4, "big") * 2
    huge[29:33] = zlib.crc32(bytes(huge[12:29])).to_bytes(4, "big")
    with pytest.raises(RequestError, match=r"media_max_pixels = 6\.4e") as caught:
        open_image(bytes(huge), 64_000_000)
    assert caught.value.failure.code == "media_limit_exceeded"


@pytest.mark.parametrize("mode", ["RGBa", "La", "PA"])
def test_alpha_in_another_form_is_laid_on_white(mode: str) -> None:
    """Premultiplied, as TIFF may have it, or beside a palette."""
    image = Image.new("RGBA", (2, 1), (0, 0, 0, 0))
    image.putpixel((1, 0), (90, 90, 90, 255))
    shown = rgb_pixels(image.convert("LA" if mode == "La" else "RGBA").convert(mode))
    assert [shown.getpixel((x, 0)) for x in (0, 1)] == [(255, 255, 255), (90, 90, 90)]


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_exif_data_that_cannot_be_read_turn_nothing(tmp_path: Path, kind: str) -> None:
    image = Image.fromarray(noise(28, 56))
    plain = process(tmp_path, image_bytes(image, kind, lossless=True))
    broken = process(tmp_path, image_bytes(image, kind, lossless=True, exif=b"Exif\0\0no TIFF header"))
    assert np.array_equal(broken.rows, plain.rows)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"\xff\xd8\xff\xe0\0\x10JFIF", "JPEG image is broken"),
        (b"BM" + bytes(60), "BMP image is broken"),
        (b"\x89PNG\r\n\x1a\n" + bytes(64), "PNG image is broken"),
        (b"%PDF-1.7", "not an image in one of the formats JPEG"),
    ],
)
def test_a_refusal_says_what_the_file_says_it_is(tmp_path: Path, data: bytes, message: str) -> None:
    with pytest.raises(RequestError, match=message):
        process(tmp_path, data)
