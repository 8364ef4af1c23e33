"""Videos that are turned or mirrored by a display matrix are shown as players show them."""

import io
import struct
from pathlib import Path

import av
import numpy as np
import pytest
from av.video.reformatter import VideoReformatter
from media_files import image_bytes, noise, video_bytes
from PIL import Image, ImageOps
from test_video import LIMITS, SMALL, process

from services.mm_encoder.media.orientation import transposition, upright
from services.mm_encoder.media.video import decode, probe

MADE = Path(__file__).parent / "turned"  # by FFmpeg, with what it shows of each: see its README
SHOWN = {
    "mirrored.mp4": [[220, 80], [160, 40]],
    "quarter.mkv": [[80, 220], [40, 160]],
    "in_the_codec.mp4": [[40, 160], [80, 220]],
    "tag_alone.mkv": [[40, 80], [160, 220]],
}
LINEAR = [(1, 0, 0, 1), (0, 1, -1, 0), (-1, 0, 0, -1), (0, -1, 1, 0)]  # a, b, c, d of quarter turns, and
LINEAR += [(-1, 0, 0, 1), (1, 0, 0, -1), (0, 1, 1, 0), (0, -1, -1, 0)]  # of mirrors
Linear = tuple[float, float, float, float]


def with_matrix(data: bytes, linear: Linear) -> bytes:
    """Return the MP4 with this display matrix in its track header (ISO 14496-12, 8.3.2)."""
    place = data.index(b"tkhd") + 4 + 40
    a, b, c, d = (round(value * 65536) for value in linear)
    matrix = struct.pack(">9i", a, b, 0, c, d, 0, 0, 0, 1 << 30)
    return data[:place] + matrix + data[place + len(matrix) :]


def shown_as(frame: np.ndarray, linear: Linear) -> np.ndarray:
    """Put every pixel (x, y) where the standard puts it: at (ax + cy, bx + dy), moved into the picture."""
    a, b, c, d = (int(value) for value in linear)
    height, width = frame.shape[:2]
    y, x = np.mgrid[:height, :width]
    across, down = a * x + c * y, b * x + d * y
    out = np.empty((height, width, 3) if a else (width, height, 3), np.uint8)
    out[down - down.min(), across - across.min()] = frame
    return out


def lossless(frames: list[np.ndarray]) -> bytes:
    return video_bytes(frames, pixels="yuv444p", options={"movflags": "faststart"}, codec_options={"qp": "0"})


def first_frame(data: bytes) -> Image.Image:
    with av.open(io.BytesIO(data)) as file:
        frame = next(file.decode(video=0))
        return upright(frame, transposition(frame, None), VideoReformatter())


def check_quadrants(image: Image.Image, name: str) -> None:
    grey, (width, height) = image.convert("L"), image.size
    found = [[grey.getpixel((x, y)) for x in (width // 4, 3 * width // 4)] for y in (height // 4, 3 * height // 4)]
    assert np.abs(np.subtract(found, SHOWN[name])).max() <= 2
    assert (width, height) == ((64, 48) if name == "tag_alone.mkv" else (48, 64))


@pytest.mark.parametrize("name", SHOWN)
def test_frames_are_turned_as_ffmpeg_turns_them(name: str) -> None:
    check_quadrants(first_frame((MADE / name).read_bytes()), name)


@pytest.mark.parametrize("wanted", [{0, 1, 2, 3}, {1, 3}])
def test_a_matrix_of_the_codec_holds_for_the_frames_after_it(wanted: set[int]) -> None:
    """It is stored once, with the first frame, which need not be among those that are shown."""
    data = (MADE / "in_the_codec.mp4").read_bytes()
    with av.open(io.BytesIO(data)) as file:
        assert ["DISPLAYMATRIX" in frame.side_data for frame in file.decode(video=0)] == [True, False, False, False]
    shown = dict(decode(data, probe(data, LIMITS), wanted, LIMITS))
    assert set(shown) == wanted
    for each in shown.values():
        check_quadrants(upright(each.frame, each.turn, VideoReformatter()), "in_the_codec.mp4")


@pytest.mark.parametrize("linear", LINEAR)
def test_a_turned_video_is_the_video_that_was_recorded_upright(linear: Linear) -> None:
    """Size, frames, and the timestamp, which is upright in the upper left corner: every patch is the same."""
    recorded = [noise(120, 160, seed=i) for i in range(6)]
    plan, turned = process(with_matrix(lossless(recorded), linear))
    _, expected = process(lossless([shown_as(frame, linear) for frame in recorded]))
    assert turned.grid == expected.grid
    assert (turned.grid[1] > turned.grid[2]) is (linear[0] == 0)
    assert np.array_equal(turned.rows, expected.rows)
    assert plan.tokens == len(expected.rows) // 8


@pytest.mark.parametrize(
    ("linear", "nearest"),
    [
        ((0.866, -0.5, 0.5, 0.866), (1, 0, 0, 1)),  # 30 degrees
        ((0.5, -0.866, 0.866, 0.5), (0, -1, 1, 0)),  # 60 degrees
        ((0, 2, -2, 0), (0, 1, -1, 0)),  # and twice as large
        ((0, 0, 0, 0), (1, 0, 0, 1)),  # not a matrix anybody could follow
    ],
)
def test_other_matrices_are_the_nearest_quarter_turn(linear: Linear, nearest: Linear) -> None:
    data = lossless([noise(48, 64)])
    assert first_frame(with_matrix(data, linear)) == first_frame(with_matrix(data, nearest))


def test_the_turned_sides_count_where_they_differ() -> None:
    """A wide strip that is shown upright is clipped as a tall one."""
    recorded = [noise(12, 400, seed=i) for i in range(2)]
    linear = (0, 1, -1, 0)
    _, turned = process(with_matrix(lossless(recorded), linear))
    _, expected = process(lossless([shown_as(frame, linear) for frame in recorded]))
    assert turned.grid == expected.grid
    assert np.array_equal(turned.rows, expected.rows)
    assert turned.grid[1] * turned.grid[2] * 196 <= SMALL.video_max_pixels


def motion_jpeg(pictures: list[bytes]) -> bytes:
    """Return an AVI of JPEG files, as cameras write it."""
    out = io.BytesIO()
    with av.open(out, "w", format="avi") as file:
        stream = file.add_stream("mjpeg", rate=10)
        stream.width, stream.height = Image.open(io.BytesIO(pictures[0])).size
        stream.pix_fmt = "yuvj420p"
        for index, picture in enumerate(pictures):
            packet = av.Packet(picture)
            packet.stream, packet.pts, packet.dts = stream, index, index
            file.mux(packet)
    return out.getvalue()


@pytest.mark.parametrize("orientation", [1, 5, 6])
def test_frames_with_data_that_pyav_does_not_name_are_read(orientation: int) -> None:
    """FFmpeg keeps a frame's EXIF data beside it, its orientation as a matrix; and so a spatial video's views."""
    exif = Image.Exif()
    exif[0x0112], exif[0x010F] = orientation, "maker"
    picture = Image.fromarray(np.kron([[40, 80], [160, 220]], np.ones((24, 32))).astype(np.uint8)).convert("RGB")
    data = motion_jpeg([image_bytes(picture, "JPEG", exif=exif, quality=95)] * 2)
    with av.open(io.BytesIO(data)) as file:
        kinds = [each.type.name for each in next(file.decode(video=0)).side_data]
    assert any(name.startswith("UNNAMED") for name in kinds), "PyAV names it now: the hook in orientation.py can go"
    shown = dict(decode(data, probe(data, LIMITS), {0, 1}, LIMITS))
    expected = ImageOps.exif_transpose(Image.open(io.BytesIO(image_bytes(picture, "JPEG", exif=exif, quality=95))))
    for each in shown.values():
        image = upright(each.frame, each.turn, VideoReformatter())
        assert np.abs(np.asarray(image).astype(int) - np.asarray(expected)).max() <= 4
