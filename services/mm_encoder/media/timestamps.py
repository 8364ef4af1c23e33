"""Timestamps are painted into a video's frames: the model reads the time from the pixels, not from the text.

Painted at the frame's original resolution, before resizing: black Roboto in a white outline at the upper left corner,
a tenth of the shorter side high.
"""

import io
from importlib import resources
from pathlib import Path

from PIL import ImageDraw, ImageFont
from PIL.Image import Image

from shared.errors import CheckpointError

FONT = "Roboto-Regular.ttf"
MIN_SIDE = 10  # below this the font would be zero pixels high


def font_file(model: Path) -> tuple[bytes, bool]:
    """Return the font's bytes, and True if they are the checkpoint's own (False: font-roboto's).

    Raises:
        CheckpointError: the checkpoint's own font cannot be read.
    """
    own = model / FONT
    if own.is_file():
        try:
            content = own.read_bytes()
            ImageFont.truetype(io.BytesIO(content), MIN_SIDE)
        except OSError as error:
            raise CheckpointError(f"{own} is no font that can be read: {error}") from error
        return content, True
    return resources.files("font_roboto").joinpath("files", FONT).read_bytes(), False


def time_text(seconds: float) -> str:
    """`time: HH:MM:SS.ss`. The seconds are rounded alone, so 59.999 is `00:00:60.00`: the model was trained on that."""
    hours, rest = divmod(seconds, 3600)
    minutes, rest = divmod(rest, 60)
    return f"time: {int(hours):02d}:{int(minutes):02d}:{rest:05.02f}"


def font_size(width: int, height: int) -> int:
    return int(min(width, height) * 0.1)


def paint(frame: Image, seconds: float, font: ImageFont.FreeTypeFont) -> None:
    """Draw the time onto an RGB frame, in place; `font` has `font_size` of the frame's size."""
    ImageDraw.Draw(frame).text(
        (0, 0),
        time_text(seconds),
        font=font,
        fill=(0, 0, 0),
        stroke_width=int(font.size * 0.1),
        stroke_fill=(255, 255, 255),
    )
