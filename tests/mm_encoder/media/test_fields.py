"""H.264 coded by fields, in the packets that muxers make of it: as many frames, and the times, that FFmpeg decodes.

x264 codes whole frames only, so the streams are written here, of macroblocks that are stored and not compressed.
"""

import io
import random
from collections.abc import Iterator
from fractions import Fraction

import av
import pytest
from media_files import video_bytes, video_frames

from services.mm_encoder.media import video
from services.mm_encoder.media.fields import FieldPairs
from services.mm_encoder.media.video import VideoLimits

LIMITS = VideoLimits(64_000_000, 3600, 216_000)
WIDTH, HEIGHT = 2, 2  # macroblocks of a field
FPS = 25
# What a muxer is given: a frame's fields in a packet each, or in one.
APART, TOGETHER = True, False


class Bits:
    """A NAL unit's payload, from its beginning."""

    def __init__(self) -> None:
        self.text = ""

    def fixed(self, width: int, *values: int) -> "Bits":
        self.text += "".join(format(value, f"0{width}b") for value in values)
        return self

    def golomb(self, *values: int) -> "Bits":
        for value in values:
            digits = format(value + 1, "b")
            self.text += "0" * (len(digits) - 1) + digits
        return self

    def stored(self, grey: int) -> "Bits":
        """Add a macroblock of one grey, as its samples."""
        self.golomb(25)
        self.text += "0" * (-len(self.text) % 8)
        return self.fixed(8, *[grey] * 256, *[128] * 128)

    def unit(self, header: int) -> bytes:
        text = self.text + "1"
        text += "0" * (-len(text) % 8)
        payload = bytearray()
        for byte in int(text, 2).to_bytes(len(text) // 8, "big"):
            if byte <= 3 and payload[-2:] == b"\0\0":
                payload.append(3)
            payload.append(byte)
        return b"\0\0\0\1" + bytes([header]) + payload


def parameter_sets() -> bytes:
    sequence = Bits().fixed(8, 77, 0, 30).golomb(1, 0, 0, 4, 1).fixed(1, 0).golomb(WIDTH - 1, HEIGHT - 1)
    sequence.fixed(1, 0, 0, 1, 0, 0)  # not of frames only
    picture = (
        Bits().golomb(2, 1).fixed(1, 0, 0).golomb(0, 0, 0).fixed(1, 0).fixed(2, 0).golomb(0, 0, 0).fixed(1, 0, 0, 0)
    )
    return sequence.unit(0x67) + picture.unit(0x68)


def picture(number: int, field: int | None, *, kept: bool = True) -> bytes:
    """Return frame `number`, or its field 0 or 1, of intra macroblocks; `kept` as a reference."""
    first = number == 0 and field != 1
    bits = Bits().golomb(0, 7, 2).fixed(4, number % 16).fixed(1, *([0] if field is None else [1, field]))
    if first:
        bits.golomb(0)
    bits.fixed(8, (2 * number + (field or 0)) % 256)
    if kept:
        bits.fixed(1, *([0, 0] if first else [0]))
    bits.golomb(0)
    for _ in range(WIDTH * HEIGHT * (2 if field is None else 1)):
        bits.stored(10 + number)
    return bits.unit(0x65 if first else 0x61 if kept else 0x01)


def muxed(container: str, frames: list[list[int | None]], apart: bool) -> bytes:
    """Return a video of frames, each a list of its pictures: [None], [0, 1] or [1, 0]."""
    stream = [
        [parameter_sets() * (number == 0) + picture(number, part) for part in parts]
        for number, parts in enumerate(frames)
    ]
    out = io.BytesIO()
    with (
        av.open(io.BytesIO(b"".join(b"".join(parts) for parts in stream)), format="h264") as plain,
        av.open(out, "w", format=container) as file,
    ):
        track = file.add_stream_from_template(plain.streams.video[0])
        for number, parts in enumerate(stream):
            pieces = parts if apart else [b"".join(parts)]
            for place, piece in enumerate(pieces):
                packet = av.Packet(piece)
                packet.stream, packet.time_base = track, Fraction(1, 2 * FPS)
                packet.pts = packet.dts = 2 * number + place
                packet.duration = 2 // len(pieces)
                packet.is_keyframe = number == place == 0
                file.mux(packet)
    return out.getvalue()


def judged(data: bytes) -> list[int | None]:
    """Return the times of the frames that FFmpeg decodes."""
    with av.open(io.BytesIO(data)) as file:
        return [frame.pts for frame in file.decode(video=0)]


def structures() -> Iterator[list[list[int | None]]]:
    """Yield fields alone, of either order, and fields and whole frames in turn."""
    yield [[0, 1]] * 20
    yield [[0, 1]] + [[1, 0]] * 19
    draw = random.Random(1)
    yield [draw.choice([[None], [0, 1]]) for _ in range(20)]


@pytest.mark.parametrize("frames", list(structures()), ids=["top", "bottom", "mixed"])
@pytest.mark.parametrize("container", ["mp4", "mpegts", "matroska", "flv"])
@pytest.mark.parametrize("apart", [APART, TOGETHER], ids=["apart", "together"])
def test_a_frame_of_two_fields_is_one_frame(container: str, frames: list[list[int | None]], apart: bool) -> None:
    data = muxed(container, frames, apart)
    times = judged(data)
    assert len(times) == 20
    facts = video.probe(data, LIMITS)
    assert facts.times == tuple(times)
    assert facts.fps == FPS
    assert facts.seconds == pytest.approx(0.8)
    shown = dict(video.decode(data, facts, range(20), LIMITS))
    assert [shown[index].frame.to_ndarray()[0, 0] for index in range(20)] == [10 + index for index in range(20)]


def test_a_field_whose_other_was_lost_is_a_frame() -> None:
    """FFmpeg shows some of them, and frames around take the place of the others."""
    data = muxed("mpegts", [[0] if number in (5, 6, 11) else [0, 1] for number in range(20)], APART)
    facts = video.probe(data, LIMITS)
    assert (facts.frames, facts.fps) == (20, FPS)
    assert facts.times is not None
    assert set(judged(data)) < set(facts.times)
    assert sorted(index for index, _ in video.decode(data, facts, range(20), LIMITS)) == list(range(20))


@pytest.mark.parametrize("header", [0x01, 0x65])
def test_fields_of_frames_that_share_a_number_are_joined(header: int) -> None:
    """Those of frames that are no reference, and those that are all said to begin anew, which FFmpeg joins as well."""
    pairs = FieldPairs(parameter_sets())
    stream = [picture(7, field, kept=False) for field in (0, 1, 0, 1, 1, 0)]
    begun = [pairs.begins_frame(packet[:4] + bytes([header]) + packet[5:]) for packet in stream]
    assert begun == [True, False] * 3


@pytest.mark.parametrize("options", [{"cqm": "jvt"}, {"profile": "high444"}, {"bframes": "3", "b-pyramid": "normal"}])
@pytest.mark.parametrize("container", ["mp4", "mpegts"])
def test_interlaced_frames_that_are_coded_whole_stay_frames(container: str, options: dict[str, str]) -> None:
    """Fields within macroblocks, with the parameter sets that x264 writes: scaling lists, planes of full size."""
    pixels = "yuv444p" if "profile" in options else "yuv420p"
    options = {"x264-params": ":".join(f"{name}={value}" for name, value in {"interlaced": "1", **options}.items())}
    data = video_bytes(video_frames(20), container, pixels=pixels, fps=FPS, codec_options=options)
    with av.open(io.BytesIO(data)) as file:
        track = file.streams.video[0]
        assert FieldPairs(track.codec_context.extradata).possible
        assert next(file.decode(track)).interlaced_frame
    facts = video.probe(data, LIMITS)
    assert facts.times == tuple(judged(data))
    assert (facts.frames, facts.fps) == (20, FPS)


def test_frames_alone_are_not_looked_at() -> None:
    with av.open(io.BytesIO(video_bytes(video_frames(5)))) as file:
        assert not FieldPairs(file.streams.video[0].codec_context.extradata).possible


def test_damaged_headers_begin_frames() -> None:
    """Whatever is flipped or cut off, every packet is a frame or a second field, and nothing is raised."""
    sound = parameter_sets()
    fields = [picture(number, field)[:64] for number in range(4) for field in (0, 1)]
    assert FieldPairs(None).begins_frame(fields[1]), "nothing is known"
    draw = random.Random(2)
    for _ in range(500):
        extradata = bytearray(draw.choice([sound, b"\1M\0\x1e\xff\xe1\0\x08" + sound[4:]]))
        for _ in range(draw.randrange(4)):
            extradata[draw.randrange(len(extradata))] = draw.randrange(256)
        pairs = FieldPairs(bytes(extradata[: draw.randrange(len(extradata) + 1)]))
        for packet in fields:
            damaged = bytearray(packet)
            damaged[draw.randrange(len(damaged))] = draw.randrange(256)
            assert pairs.begins_frame(bytes(damaged[: draw.randrange(len(damaged))])) in (True, False)
        assert pairs.begins_frame(b"") is True
