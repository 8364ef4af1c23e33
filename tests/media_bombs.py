"""Small files that take long or much to decode, within every limit on bytes and on the pixels of a picture."""

import io
import struct

from PIL import Image


def scans_jpeg(side: int, more: int) -> bytes:
    """Return a progressive JPEG whose last scan, of little more than its marker's bytes, is there `more` times more."""
    out = io.BytesIO()
    Image.new("L", (side, side), 128).save(out, "JPEG", progressive=True)
    data = out.getvalue()
    last = data.rindex(b"\xff\xda")
    return data[:-2] + data[last:-2] * more + data[-2:]


def canvas_gif(side: int, frames: int) -> bytes:
    """Return a GIF with a large canvas and frames of one pixel: 23 bytes for a picture each."""
    head = b"GIF89a" + struct.pack("<HHBBB", side, side, 0x80, 0, 0) + b"\0\0\0\xff\xff\xff"
    frame = b"\x21\xf9\x04\x04" + struct.pack("<H", 10) + b"\0\0" + b"\x2c" + struct.pack("<HHHHB", 0, 0, 1, 1, 0)
    return head + (frame + b"\x02\x02\x44\x01\x00") * frames + b";"


def wide_png(side: int) -> bytes:
    """Return a picture of one bit a pixel, a few bytes a row."""
    out = io.BytesIO()
    Image.new("1", (side, side)).save(out, "PNG")
    return out.getvalue()
