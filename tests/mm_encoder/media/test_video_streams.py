"""Streams that lost packets or were cut: those that are made for it are shown as far as they go."""

import io

import av
import pytest
from media_files import noise, video_bytes

from services.mm_encoder.media import video
from services.mm_encoder.media.video import VideoLimits
from shared.errors import RequestError

LIMITS = VideoLimits(64_000_000, 3600, 216_000)
PACKET, VIDEO_PID = 188, 0x100


def made(container: str, codec: str, **options: str) -> bytes:
    """Return a video of frames of more than one packet each."""
    return video_bytes([noise(96, 128, seed=i) for i in range(30)], container, codec, fps=25, options=options)


def shown(data: bytes) -> tuple[int, list[int]]:
    """Return the number of frames, and those that are shown where every one is wanted."""
    facts = video.probe(data, LIMITS)
    return facts.frames, sorted(index for index, _ in video.decode(data, facts, range(facts.frames), LIMITS))


@pytest.mark.parametrize("codec", ["libx264", "mpeg2video"])
@pytest.mark.parametrize("harm", ["lost", "marked"])
def test_a_packet_that_was_lost_costs_no_more_than_its_frame(codec: str, harm: str) -> None:
    """A packet that never came, or one that the receiver marked as broken."""
    data = bytearray(made("mpegts", codec))
    inside = [
        place
        for place in range(0, len(data), PACKET)
        if int.from_bytes(data[place + 1 : place + 3], "big") == VIDEO_PID  # and no frame starts in it
    ]
    place = inside[len(inside) // 2]
    if harm == "lost":
        del data[place : place + PACKET]
    else:
        data[place + 1] |= 0x80
    with av.open(io.BytesIO(bytes(data))) as file:
        assert any(packet.is_corrupt for packet in file.demux(video=0)), "nothing is damaged"
    assert shown(bytes(data)) == (30, list(range(30)))


@pytest.mark.parametrize(
    ("container", "codec", "options"),
    [
        ("mpegts", "mpeg2video", {}),
        ("mpeg", "mpeg1video", {}),
        ("mpeg", "mpeg2video", {}),
        ("matroska", "libx264", {"live": "1"}),
    ],
)
def test_a_stream_is_shown_as_far_as_it_goes(container: str, codec: str, options: dict[str, str]) -> None:
    """Wherever it was cut; some of the cuts leave a packet that FFmpeg marks as damaged."""
    whole = made(container, codec, **options)
    cut = [shown(whole[: len(whole) * part // 20]) for part in range(6, 20)]
    assert all(indices == list(range(frames)) for frames, indices in cut)
    assert 0 < cut[0][0] < cut[-1][0] <= 30
    assert cut == sorted(cut)


@pytest.mark.parametrize(
    ("container", "options"), [("flv", {}), ("mp4", {"movflags": "frag_keyframe+empty_moov", "frag_size": "20000"})]
)
def test_another_format_that_ends_inside_a_frame_is_refused(container: str, options: dict[str, str]) -> None:
    whole = made(container, "libx264", **options)
    for part in range(6, 20):
        with pytest.raises(RequestError, match="truncated"):
            video.probe(whole[: len(whole) * part // 20], LIMITS)
