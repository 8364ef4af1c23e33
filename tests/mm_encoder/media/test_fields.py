"""H.264 coded by fields, in the packets that muxers make of it: as many frames, and the times, that FFmpeg decodes.

x264 codes whole frames only, so the streams are written here, of macroblocks that are stored and not compressed.
"""

import io
import random
from collections.abc import Iterator, Sequence
from fractions import Fraction

import av
import pytest
from h264_fields import parameter_sets, picture
from media_files import video_bytes, video_frames

from services.mm_encoder.media import video
from services.mm_encoder.media.fields import FieldPairs
from services.mm_encoder.media.video import VideoLimits

LIMITS = VideoLimits(64_000_000, 3600, 216_000)
FPS = 25
FLV_HEADER = 13  # bytes before the first tag
# What a muxer is given: a frame's fields in a packet each, or in one.
APART, TOGETHER = True, False


def stream_of(frames: list[list[int | None]], *, lasting: bool = True, slices: int = 1) -> list[list[bytes]]:
    """Return the pictures of frames, each a list of them: [None], [0, 1] or [1, 0].

    Those after the first are references if `lasting`.
    """
    return [
        [
            parameter_sets() * (number == place == 0) + picture(number, part, kept=lasting or not number, slices=slices)
            for place, part in enumerate(parts)
        ]
        for number, parts in enumerate(frames)
    ]


def muxed(
    container: str,
    stream: list[list[bytes]],
    apart: bool,
    times: Sequence[int] | None = None,
    sets: bytes = b"",
) -> bytes:
    """Return a video of frames, each a list of its pictures.

    `times`: theirs, in fields. `sets`: the parameter sets that are left to the container alone.
    """
    out = io.BytesIO()
    with (
        av.open(io.BytesIO(b"".join(b"".join(parts) for parts in stream)), format="h264") as plain,
        av.open(out, "w", format=container) as file,
    ):
        track = file.add_stream_from_template(plain.streams.video[0])
        for number, parts in enumerate(stream):
            pieces = parts if apart else [b"".join(parts)]
            for place, piece in enumerate(pieces):
                packet = av.Packet(piece.removeprefix(sets))
                packet.stream, packet.time_base = track, Fraction(1, 2 * FPS)
                packet.pts = packet.dts = (2 * number if times is None else times[number]) + place
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
    data = muxed(container, stream_of(frames), apart)
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
    data = muxed("mpegts", stream_of([[0] if number in (5, 6, 11) else [0, 1] for number in range(20)]), APART)
    facts = video.probe(data, LIMITS)
    assert (facts.frames, facts.fps) == (20, FPS)
    assert facts.times is not None
    assert set(judged(data)) < set(facts.times)
    assert sorted(index for index, _ in video.decode(data, facts, range(20), LIMITS)) == list(range(20))


def test_a_field_that_lost_its_first_slice_is_joined() -> None:
    stream = stream_of([[0, 1]] * 20, slices=4)
    for number, place in ((4, 0), (9, 1)):
        slices = stream[number][place].split(b"\0\0\0\1")
        stream[number][place] = b"\0\0\0\1".join([slices[0], *slices[2:]])
    data = muxed("mpegts", stream, APART)
    facts = video.probe(data, LIMITS)
    assert facts.times == tuple(judged(data))
    assert (facts.frames, facts.fps) == (20, FPS)


@pytest.mark.parametrize("apart", [APART, TOGETHER], ids=["apart", "together"])
def test_a_recording_may_begin_anywhere(apart: bool) -> None:
    """One that begins with a second field has that as a frame more than FFmpeg, which shows none for it."""
    stream = [[parameter_sets() + first, second] for first, second in stream_of([[0, 1]] * 20)]
    data = muxed("mpegts", stream, apart)
    more = set()
    for start in range(0, len(data) // 2, 7 * 188):
        facts = video.probe(data[start:], LIMITS)
        more.add(facts.frames - len(judged(data[start:])))
        assert facts.fps == pytest.approx(FPS, rel=0.06)
    assert more == ({0, 1} if apart else {0})


@pytest.mark.parametrize("slices", [1, 4])
@pytest.mark.parametrize("container", ["mp4", "mpegts", "matroska"])
@pytest.mark.parametrize("apart", [APART, TOGETHER], ids=["apart", "together"])
def test_fields_of_frames_that_are_no_reference_are_joined(container: str, apart: bool, slices: int) -> None:
    """They share a number, so that a second field looks like the first of the next frame of the other order."""
    data = muxed(container, stream_of([[0, 1]] + [[1, 0], [0, 1]] * 8, lasting=False, slices=slices), apart)
    facts = video.probe(data, LIMITS)
    assert len(judged(data)) == facts.frames == 17
    assert facts.times == tuple(judged(data))
    assert facts.fps == FPS


@pytest.mark.parametrize("frame", [[None], [0, 1]], ids=["whole", "fields"])
@pytest.mark.parametrize("apart", [APART, TOGETHER], ids=["apart", "together"])
@pytest.mark.parametrize("jumps", [1, 5])
def test_jumps_of_timestamps_are_not_the_duration(frame: list[int | None], apart: bool, jumps: int) -> None:
    """With many, FFmpeg names no rate."""
    times = [2 * number + 2 * FPS * 7200 * (number * (jumps + 1) // 60) for number in range(60)]
    facts = video.probe(muxed("mpegts", stream_of([frame] * 60), apart, times), LIMITS)
    assert (facts.frames, facts.fps, facts.seconds) == (60, FPS, 2.4)


@pytest.mark.parametrize("frame", [[None], [0, 1]], ids=["whole", "fields"])
@pytest.mark.parametrize("apart", [APART, TOGETHER], ids=["apart", "together"])
@pytest.mark.parametrize("later", [0, 1])
def test_timestamps_may_begin_again(frame: list[int | None], apart: bool, later: int) -> None:
    """As in two recordings that were joined, the second at the first's times or between them."""
    one, two = (
        muxed("mpegts", stream_of([frame] * 30), apart, [2 * number + start for number in range(30)])
        for start in (0, later)
    )
    facts = video.probe(one + two, LIMITS)
    assert (facts.frames, facts.fps, facts.seconds) == (60, FPS, 2.4)


def test_frames_that_last_two_or_three_fields_have_their_average_rate() -> None:
    """As those of cinema do in broadcasts."""
    times = [5 * (number // 2) + 2 * (number % 2) for number in range(41)]
    facts = video.probe(muxed("mpegts", stream_of([[0, 1]] * 41), APART, times), LIMITS)
    assert (facts.frames, facts.fps) == (41, pytest.approx(20))


def test_fields_may_follow_whole_frames_of_other_parameter_sets() -> None:
    """As where one programme ends and another begins; their parameter sets have the same id."""
    before = [[parameter_sets(fields=False) * (not number) + picture(number, None, only=True)] for number in range(5)]
    data = muxed("mpegts", before + stream_of([[0, 1]] * 20), APART)
    facts = video.probe(data, LIMITS)
    assert (facts.frames, facts.fps) == (25, FPS)
    assert facts.times == tuple(judged(data))


@pytest.mark.parametrize("fields_first", [False, True])
@pytest.mark.parametrize("apart", [APART, TOGETHER], ids=["apart", "together"])
def test_parameter_sets_may_change_beside_the_packets(apart: bool, fields_first: bool) -> None:
    """As in an FLV stream that is published anew: only the container has the sets, under the id of those before."""
    only, both = parameter_sets(fields=False), parameter_sets()
    whole = [[only * (not number) + picture(number, None, only=True)] for number in range(5)]
    parts = [(whole, only), (stream_of([[0, 1]] * 20), both)][:: -1 if fields_first else 1]
    data, at = b"", 0
    for stream, sets in parts:
        times = range(2 * at, 2 * (at + len(stream)), 2)
        file = muxed("flv", stream, apart, times, sets)
        assert file.count(stream[0][0].removeprefix(sets)[4:]) == 1
        data += file[FLV_HEADER:] if data else file
        at += len(stream)
    facts = video.probe(data, LIMITS)
    assert (facts.frames, facts.fps) == (25, FPS)
    assert facts.times == tuple(judged(data))
    assert len(dict(video.decode(data, facts, range(25), LIMITS))) == 25


def tags_of(data: bytes) -> Iterator[tuple[int, int]]:
    """Yield where each tag of an FLV video begins, and its size."""
    at = FLV_HEADER
    while at < len(data):
        size = 11 + int.from_bytes(data[at + 1 : at + 4], "big") + 4
        yield at, size
        at += size


def with_header(data: bytes, header: bytes, number: int) -> bytes:
    """Return an FLV video with one more sequence header before its tag of that number."""
    at = [at for at, _ in tags_of(data)][number]
    body = b"\x17\0\0\0\0" + header
    tag = b"\x09" + len(body).to_bytes(3, "big") + data[at + 4 : at + 8] + b"\0\0\0" + body
    return data[:at] + tag + len(tag).to_bytes(4, "big") + data[at:]


@pytest.mark.parametrize(
    "header",
    [
        b"\1",
        b"",
        b"\1\x42\0\x1e\xff",
        b"\0\0\0\1garbage",
        parameter_sets(),
        b"\1\x42\0\x1e\xfd\xe1\0\x09\x67",  # lengths of two bytes
    ],
    ids=["one byte", "empty", "short", "garbage", "start codes", "cut off"],
)
def test_a_broken_sequence_header_changes_no_lengths(header: bytes) -> None:
    data = with_header(muxed("flv", stream_of([[0, 1]] * 20), APART), header, 8)
    times = judged(data)
    assert len(times) == 20
    facts = video.probe(data, LIMITS)
    assert (facts.times, facts.fps) == (tuple(times), FPS)


def test_a_sequence_header_may_have_start_codes() -> None:
    """FFmpeg takes its parameter sets, and the packets go on with lengths."""
    only, both = parameter_sets(fields=False), parameter_sets()
    whole = [[only * (not number) + picture(number, None, only=True)] for number in range(5)]
    first = muxed("flv", whole, APART, sets=only)
    second = muxed("flv", stream_of([[0, 1]] * 20), APART, range(10, 50, 2), both)
    tags = [second[at : at + size] for at, size in tags_of(second)]
    begin = next(number for number, tag in enumerate(tags) if tag[0] == 9)
    data = with_header(first + b"".join(tags[begin + 1 :]), both, len(list(tags_of(first))))
    facts = video.probe(data, LIMITS)
    assert (facts.frames, facts.fps) == (25, FPS)
    assert facts.times == tuple(judged(data))


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
