"""Orientation of a video's frames, by the display matrix of the container or the codec.

Phones record in the sensor's orientation and store the matrix that turns the picture upright; players apply it. Angles
between quarter turns are rounded to the nearest one. As in FFmpeg since 5.0, a `rotate` tag without a matrix is
ignored. FFmpeg gives a container's matrix with every frame, and a codec's with the one frame that it is stored with,
often the first alone; it holds until another comes (H.264's display_orientation_repetition_period).
"""

import struct

from av.sidedata.sidedata import SideData, Type
from av.video.frame import VideoFrame
from av.video.reformatter import VideoReformatter
from PIL import Image
from PIL.Image import Transpose

SIDEWAYS = frozenset((Transpose.ROTATE_90, Transpose.ROTATE_270, Transpose.TRANSPOSE, Transpose.TRANSVERSE))


def _unnamed_kind(cls: type[Type], value: object) -> Type:
    """Return a kind of side data that FFmpeg has and PyAV does not name, such as the views of a spatial video.

    PyAV raises an error on a frame with such data, whichever kind it is asked for.
    """
    kind: Type = object.__new__(cls)
    kind._name_, kind._value_ = f"UNNAMED_{value}", value  # type: ignore[assignment]
    return kind


Type._missing_ = classmethod(_unnamed_kind)  # type: ignore[method-assign, assignment]

_MATRIX = struct.Struct("=9i")  # a b u, c d v, x y w: the pixel at (p, q) is shown at (ap + cq, bp + dq)


def transposition(frame: VideoFrame, before: Transpose | None) -> Transpose | None:
    """Return what turns a decoded frame upright, None if it is. `before` is what turned the previous frame."""
    matrix = frame.side_data.get("DISPLAYMATRIX")
    return _transposition(*_MATRIX.unpack(bytes(matrix))) if isinstance(matrix, SideData) else before


def upright(frame: VideoFrame, turn: Transpose | None, convert: VideoReformatter) -> Image.Image:
    """Return a frame's RGB pixels, turned. `convert` is the video's: one a frame would start threads for each."""
    image: Image.Image = convert.reformat(frame, format="rgb24", threads=1).to_image()  # type: ignore[no-untyped-call]
    return image if turn is None else image.transpose(turn)


def _transposition(a: int, b: int, _u: int, c: int, d: int, *_: int) -> Transpose | None:
    if abs(b) + abs(c) > abs(a) + abs(d):
        if b < 0:
            return Transpose.ROTATE_90 if c > 0 else Transpose.TRANSVERSE
        return Transpose.TRANSPOSE if c > 0 else Transpose.ROTATE_270
    if a < 0:
        return Transpose.ROTATE_180 if d < 0 else Transpose.FLIP_LEFT_RIGHT
    return Transpose.FLIP_TOP_BOTTOM if d < 0 else None
