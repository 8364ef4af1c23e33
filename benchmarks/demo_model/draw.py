"""Drawing: coloured shapes, text and bars on small canvases."""

import io
import math
import random
from functools import lru_cache
from importlib import resources

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from benchmarks.demo_model.sample import Pixels
from services.mm_encoder.media.resize import smart_resize

Size = tuple[int, int]  # width, height

# All are multiples of 28 with at most 18 blocks, so that the encoder shows the pixels as they were drawn.
CANVASES: tuple[Size, ...] = ((112, 112), (112, 112), (112, 112), (140, 84), (84, 140), (112, 84), (84, 112), (168, 84))

SHOWN_PIXELS = 14112  # the most that the encoder shows of a picture: 18 blocks
BLOCK = 28
LETTERS, LETTERS_SHARE = 90, 0.4  # the tallest: in pixels on a doubled canvas, as a share of larger pictures' sides

COLOURS = {
    "red": (220, 30, 35),
    "green": (30, 150, 60),
    "blue": (35, 70, 215),
    "yellow": (245, 215, 30),
    "orange": (245, 135, 20),
    "purple": (130, 45, 170),
    "pink": (250, 130, 185),
    "brown": (120, 75, 35),
    "black": (15, 15, 15),
    "grey": (130, 130, 130),
}
LIGHT = ((255, 255, 255), (255, 255, 255), (240, 240, 232), (232, 240, 250), (250, 240, 228), (232, 248, 234))
DARK = ((20, 25, 40), (45, 25, 30), (20, 45, 35), (40, 40, 45))
SHAPES = ("circle", "square", "triangle", "star", "cross", "diamond", "ring", "heart")
FACES = ("Regular", "Bold", "Medium", "Black", "Light", "Italic", "BoldItalic")


def background(rng: random.Random, *, dark: float = 0.0) -> tuple[int, int, int]:
    """A light colour, or a dark one in `dark` of the cases, a little varied."""
    base = rng.choice(DARK if rng.random() < dark else LIGHT)
    shift = rng.randint(-6, 0)
    return (max(0, base[0] + shift), max(0, base[1] + shift), max(0, base[2] + shift))


def shade(rng: random.Random, colour: str) -> tuple[int, int, int]:
    """The colour, a little varied."""
    red, green, blue = COLOURS[colour]
    return (_near(rng, red), _near(rng, green), _near(rng, blue))


def _near(rng: random.Random, value: int) -> int:
    return min(255, max(0, value + rng.randint(-14, 14)))


def canvas(size: Size, fill: tuple[int, int, int]) -> Image.Image:
    """An empty picture at twice the size; `pixels` halves it, which smooths the edges."""
    return Image.new("RGB", (2 * size[0], 2 * size[1]), fill)


def pixels(image: Image.Image) -> Pixels:
    """The picture at its size."""
    return np.asarray(image.reduce(2), dtype=np.uint8)


def own_size(rng: random.Random, size: Size) -> Size:
    """A size that a picture may have elsewhere and that the encoder shows as `size`, a little distorted."""
    while True:
        if rng.random() < 0.3:  # as large as it is, to whole blocks
            wide, tall = (float(side + rng.randint(-BLOCK // 2, BLOCK // 2)) for side in size)
        else:  # the pixels that are shown before its sides are cut to whole blocks, or up to nine times as many
            low = max(size[0], SHOWN_PIXELS / (size[1] + BLOCK))
            times = rng.uniform(1, 3)
            wide = rng.uniform(low, min(size[0] + BLOCK, SHOWN_PIXELS / size[1]))
            wide, tall = times * wide, times * SHOWN_PIXELS / wide
        own = (round(wide), round(tall))
        if shown_size(own) == size:
            return own


def shown_size(own: Size) -> Size:
    """The size in which the encoder shows a picture."""
    tall, wide = smart_resize(own[1], own[0], factor=BLOCK, min_pixels=3136, max_pixels=SHOWN_PIXELS)
    return wide, tall


def jpeg(picture: Pixels, quality: int) -> bytes:
    """A JPEG file."""
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, "JPEG", quality=quality)
    return buffer.getvalue()


def shape(pen: ImageDraw.ImageDraw, kind: str, x: float, y: float, r: float, fill: tuple[int, int, int]) -> None:
    """Draw a shape of radius `r` around (x, y), in the doubled coordinates."""
    if kind == "circle":
        pen.ellipse((x - r, y - r, x + r, y + r), fill=fill)
    elif kind == "ring":
        pen.ellipse((x - r, y - r, x + r, y + r), outline=fill, width=max(3, int(r * 0.38)))
    elif kind == "square":
        pen.rectangle((x - 0.86 * r, y - 0.86 * r, x + 0.86 * r, y + 0.86 * r), fill=fill)
    elif kind == "cross":
        arm = 0.36 * r
        pen.rectangle((x - r, y - arm, x + r, y + arm), fill=fill)
        pen.rectangle((x - arm, y - r, x + arm, y + r), fill=fill)
    elif kind == "heart":
        pen.ellipse((x - r, y - 0.9 * r, x, y + 0.15 * r), fill=fill)
        pen.ellipse((x, y - 0.9 * r, x + r, y + 0.15 * r), fill=fill)
        pen.polygon([(x - 0.93 * r, y - 0.1 * r), (x + 0.93 * r, y - 0.1 * r), (x, y + r)], fill=fill)
    else:
        pen.polygon([(x + dx * r, y + dy * r) for dx, dy in _outline(kind)], fill=fill)


@lru_cache
def _outline(kind: str) -> tuple[tuple[float, float], ...]:
    if kind == "triangle":
        return ((0, -1), (0.95, 0.8), (-0.95, 0.8))
    if kind == "diamond":
        return ((0, -1), (0.72, 0), (0, 1), (-0.72, 0))
    assert kind == "star"
    points = []
    for i in range(10):
        radius = 1.0 if i % 2 == 0 else 0.42
        angle = math.pi * (i / 5 - 0.5)
        points.append((radius * math.cos(angle), radius * math.sin(angle)))
    return tuple(points)


@lru_cache(maxsize=512)
def font(face: str, size: int) -> ImageFont.FreeTypeFont:
    """A face of the Roboto package, or Pillow's own font for "Aileron"."""
    if face == "Aileron":
        own = ImageFont.load_default(size)
        assert isinstance(own, ImageFont.FreeTypeFont)
        return own
    return ImageFont.truetype(str(resources.files("font_roboto").joinpath("files", f"Roboto-{face}.ttf")), size)


def write(
    pen: ImageDraw.ImageDraw, rng: random.Random, text: str, box: tuple[int, int, int, int], fill: tuple[int, int, int]
) -> None:
    """Write `text` in a random face, as large as `box` allows or somewhat smaller, somewhere inside it."""
    face = rng.choice((*FACES, "Aileron"))
    width, height = box[2] - box[0], box[3] - box[1]
    probe = font(face, 40).getbbox(text)
    largest = 40 * min(width / (probe[2] - probe[0]), height / (probe[3] - probe[1]))
    size = max(10, int(largest * rng.uniform(0.62, 0.97)))
    chosen = font(face, min(size, max(LETTERS, int(LETTERS_SHARE * math.sqrt(width * height)))))
    left, top, right, bottom = chosen.getbbox(text)
    x = box[0] + rng.uniform(0, max(0, width - (right - left))) - left
    y = box[1] + rng.uniform(0, max(0, height - (bottom - top))) - top
    pen.text((x, y), text, font=chosen, fill=fill)
