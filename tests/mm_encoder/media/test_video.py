"""Real videos, decoded: the right frames, painted, within limits; and the broken ones refused."""

import io
import random
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from media_files import image_bytes, noise, patches_of, video_bytes, video_frames, wav_bytes
from oracle import Model  # noqa: F401 - makes transformers importable
from PIL import Image, ImageFont
from transformers.models.ernie4_5_vl_moe.video_processing_ernie4_5_vl_moe import Ernie4_5_VLMoeVideoProcessor
from transformers.video_utils import VideoMetadata

from services.mm_encoder.media import timestamps, video
from services.mm_encoder.media.patches import Patches, patch_rows
from services.mm_encoder.media.processor import Processor, VideoPlan
from services.mm_encoder.media.processor_settings import ProcessorSettings
from services.mm_encoder.media.video import VideoLimits
from shared.errors import RequestError
from shared.messages import Media, VideoOptions
from shared.model.config import VisionConfig

VISION = VisionConfig(2, 32, 2, 128, 14, 3, 2, 2, 1e-6, 1e4)
LIMITS = VideoLimits(64_000_000, 3600, 216_000)
FONT = timestamps.font_file(Path("absent"))[0]
SMALL = ProcessorSettings(video_min_pixels=3136, video_max_pixels=784 * 16)

CONTAINERS = [
    ("mp4", "libx264", "yuv420p"),
    ("mp4", "mpeg4", "yuv420p"),
    ("webm", "libvpx", "yuv420p"),
    ("webm", "libvpx-vp9", "yuv420p"),
    ("avi", "mpeg4", "yuv420p"),
    ("mov", "mjpeg", "yuvj420p"),
    ("gif", "gif", "rgb8"),
    ("mpegts", "mpeg2video", "yuv420p"),
]


def process(
    data: bytes, settings: ProcessorSettings = SMALL, limits: VideoLimits = LIMITS, **options: object
) -> tuple[VideoPlan, Patches]:
    processor = Processor(settings, limits, VISION, FONT)
    plan = processor.plan(Media("video", "p", video=VideoOptions(**options)), data)  # type: ignore[arg-type]
    assert isinstance(plan, VideoPlan)
    patches = patches_of(processor, plan, data)
    assert len(patches.rows) == 8 * plan.tokens
    return plan, patches


def levels(patches: Patches) -> list[float]:
    """Return the grey level of each shown frame, away from the timestamp."""
    t, h, w = patches.grid
    return [float(frame[-4:].mean()) for frame in patches.rows.reshape(t, h * w, -1)]


@pytest.mark.parametrize(("container", "codec", "pixels"), CONTAINERS)
def test_the_sampled_frames_are_shown_in_order(container: str, codec: str, pixels: str) -> None:
    data = video_bytes(video_frames(40), container, codec, pixels=pixels, fps=25 if codec == "mpeg2video" else 10)
    plan, patches = process(data)
    assert plan.facts.frames == 40
    assert plan.indices == [0, 2, 5, 7, 10, 12, 15, 17, 20, 22, 25, 27, 30, 32, 35, 37]
    assert patches.grid[0] == 16
    tolerance = 16 if container == "gif" else 4  # the GIF's palette is coarse
    assert np.allclose(levels(patches), [6 * index for index in plan.indices], atol=tolerance)


def test_an_odd_number_of_frames_repeats_the_last() -> None:
    plan, patches = process(video_bytes(video_frames(5)))
    assert plan.indices == [0, 1, 2, 3, 4, 4]
    t, h, w = patches.grid
    frames = patches.rows.reshape(t, h * w, -1)
    assert np.array_equal(frames[4], frames[5])
    assert not np.array_equal(frames[3], frames[4])


def test_one_frame_is_shown_twice() -> None:
    plan, patches = process(video_bytes(video_frames(1)))
    assert plan.indices == [0, 0]
    t, h, w = patches.grid
    frames = patches.rows.reshape(t, h * w, -1)
    assert t == 2
    assert np.array_equal(frames[0], frames[1])


def test_a_title_that_is_not_utf8_is_no_matter() -> None:
    data = video_bytes(video_frames(4), "webm", "libvpx")
    assert b"Lavf" in data
    assert process(data.replace(b"Lavf", b"L\xe9vf"))[0].facts.frames == 4


def test_options_of_one_video_override_the_server() -> None:
    plan, _ = process(video_bytes(video_frames(40)), target_frames=4, min_frames=1, frames_sample="middle")
    assert plan.indices == [4, 14, 24, 34]


@pytest.mark.parametrize("seconds", [0, 1.5, 59.999, 61.25, 3599.994, 3661.005, 86399.0, 0.1 + 0.2])
def test_the_time_reads_as_transformers_writes_it(seconds: float) -> None:
    assert timestamps.time_text(seconds) == Ernie4_5_VLMoeVideoProcessor()._convert_timestamp(seconds)


@pytest.mark.parametrize("size", [(120, 160), (360, 202), (25, 200), (1080, 1920)])
def test_painted_frames_equal_transformers(tmp_path: Path, size: tuple[int, int]) -> None:
    font = tmp_path / timestamps.FONT
    font.write_bytes(FONT)
    judge = Ernie4_5_VLMoeVideoProcessor(font=str(font))
    frames = np.stack([noise(*size, seed=i) for i in range(3)])
    metadata = VideoMetadata(total_num_frames=300, fps=10, frames_indices=[0, 7, 299])
    [painted] = judge._prepare_input_videos([frames.copy()], video_metadata=[metadata])
    for frame, index, expected in zip(frames, (0, 7, 299), painted, strict=False):
        image = Image.fromarray(frame)
        timestamps.paint(image, index / 10, ImageFont.truetype(font, timestamps.font_size(*image.size)))
        assert np.array_equal(np.asarray(image), expected.permute(1, 2, 0).numpy())
        assert not np.array_equal(np.asarray(image), frame)


def test_a_whole_video_equals_transformers(tmp_path: Path) -> None:
    """From the file on: frames, timestamps, size, order of rows. torchvision's bicubic filter rounds otherwise than
    Pillow's, which is the reference server's; so pixels may differ by one level there, and by none before."""
    font = tmp_path / timestamps.FONT
    font.write_bytes(FONT)
    data = video_bytes([noise(120, 160, seed=i) // 4 * 3 for i in range(12)])
    plan, patches = process(data)
    with av.open(io.BytesIO(data)) as file:
        frames = np.stack([frame.to_ndarray(format="rgb24") for frame in file.decode(video=0)])
    judge = Ernie4_5_VLMoeVideoProcessor(size={"shortest_edge": 3136, "longest_edge": 784 * 16}, font=str(font))
    metadata = VideoMetadata(total_num_frames=12, fps=10, frames_indices=list(range(12)))
    out = judge(
        videos=[frames], video_metadata=[metadata], do_sample_frames=False, do_normalize=False, return_tensors="pt"
    )
    assert tuple(out["video_grid_thw"][0].tolist()) == patches.grid
    expected = torch.round(out["pixel_values_videos"] * 255).to(torch.uint8).numpy()
    assert plan.indices == list(range(12))
    assert np.abs(expected.astype(int) - patches.rows).max() <= 1


def test_rows_are_those_of_pillow_resized_frames() -> None:
    data = video_bytes([noise(120, 160, seed=i) for i in range(2)])
    plan, patches = process(data)
    with av.open(io.BytesIO(data)) as file:
        images = [frame.to_image() for frame in file.decode(video=0)]
    font = ImageFont.truetype(io.BytesIO(FONT), 12)
    for index, image in enumerate(images):
        timestamps.paint(image, index / 10, font)
    height, width = plan.size
    expected = [
        patch_rows(np.asarray(image.resize((width, height), Image.Resampling.BICUBIC)), 14, 2) for image in images
    ]
    assert np.array_equal(patches.rows, np.concatenate(expected))


def shown_seconds(data: bytes, own: bool = True) -> list[float]:
    return list(video.probe(data, LIMITS).frame_times(own))


def variable_rate(ticks: list[int]) -> bytes:
    """Return a video of a frame at each of these tenths of a second, like a phone's or a screen recorder's."""
    out = io.BytesIO()
    with av.open(out, "w", format="matroska") as file:
        stream = file.add_stream("libx264", rate=10)
        stream.height, stream.width, stream.pix_fmt, stream.time_base = 120, 160, "yuv420p", Fraction(1, 10)
        for tick, pixels in zip(ticks, video_frames(len(ticks)), strict=True):
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            frame.pts, frame.time_base = tick, Fraction(1, 10)
            file.mux(stream.encode(frame))
        file.mux(stream.encode())
    return out.getvalue()


def test_a_variable_rate_shows_the_frames_own_times() -> None:
    """Ten frames in the first second, then one a second. The reference's formula is seconds off."""
    ticks = [*range(10), 20, 30, 40, 50]
    data = variable_rate([tick + 7 for tick in ticks])
    assert np.allclose(shown_seconds(data), [tick / 10 for tick in ticks])
    assert abs(shown_seconds(data, own=False)[10] - 2.0) > 0.5


@pytest.mark.parametrize(("container", "codec", "pixels"), CONTAINERS)
def test_a_constant_rate_shows_the_references_times(container: str, codec: str, pixels: str) -> None:
    data = video_bytes(video_frames(40), container, codec, pixels=pixels, fps=25)
    assert shown_seconds(data) == shown_seconds(data, own=False)


def test_the_painted_time_is_the_frames_own() -> None:
    """The same pictures at two rates: the frame in the middle differs by its time, and by it alone."""
    ticks = [0, 1, 2, 3, 4, 5, 6, 7, 8, 50]
    data = variable_rate(ticks)
    own = Processor(SMALL, LIMITS, VISION, FONT)
    reference = Processor(SMALL, LIMITS, VISION, FONT, own_times=False)
    plan = own.plan(Media("video", "p"), data)
    assert plan == reference.plan(Media("video", "p"), data)
    shown, formula = patches_of(own, plan, data), patches_of(reference, plan, data)
    frames, others = (each.rows.reshape(10, -1) for each in (shown, formula))
    assert np.array_equal(frames[0], others[0])
    assert not np.array_equal(frames[9], others[9])


def _damaged(frames: int, broken: range) -> bytes:
    """Return a video of key frames of which some are overwritten, found by their place in the file."""
    data = bytearray(video_bytes(video_frames(frames), "avi", "mjpeg", pixels="yuvj420p"))
    with av.open(io.BytesIO(bytes(data))) as file:
        places = [(packet.pos, packet.size) for packet in file.demux(video=0) if packet.size]
    for index in broken:
        start, size = places[index]
        data[start : start + size] = b"\0" * size
    return bytes(data)


def test_an_undecodable_frame_is_replaced_by_a_neighbour() -> None:
    plan, patches = process(_damaged(40, range(10, 12)))
    assert plan.indices[4:6] == [10, 12]
    shown = levels(patches)
    assert np.allclose(shown[:4], [0, 12, 30, 42], atol=4)
    assert abs(shown[4] - 54) <= 4, "frame 10 is broken, 9 is its neighbour"
    assert abs(shown[5] - 72) <= 4


def test_a_replaced_frame_shows_its_own_time() -> None:
    whole, damaged = (
        process(_damaged(40, range(0)), target_frames=4, min_frames=1),
        process(_damaged(40, range(10, 12)), target_frames=4, min_frames=1),
    )
    nine = process(_damaged(40, range(0)), target_frames=40)[1]
    t, h, w = damaged[1].grid
    assert np.array_equal(damaged[1].rows.reshape(t, h * w, -1)[1], nine.rows.reshape(40, h * w, -1)[9])
    assert not np.array_equal(damaged[1].rows, whole[1].rows)


def test_too_many_undecodable_frames_are_refused() -> None:
    with pytest.raises(RequestError, match="frame 20 and its 10 neighbours"):
        process(_damaged(40, range(8, 34)), target_frames=2, min_frames=1)


def _garbled(broken: range) -> bytes:
    """Return a video of which some frames are noise behind their headers: the decoder makes up what it cannot read."""
    y, x = np.mgrid[:96, :128]
    frames = [np.stack([x + 3 * i, 2 * y + i, x + y], axis=-1).astype(np.uint8) for i in range(30)]
    data = bytearray(video_bytes(frames, codec_options={"x264-params": "keyint=10:bframes=0"}))
    with av.open(io.BytesIO(bytes(data))) as file:
        places = [(packet.pos, packet.size) for packet in file.demux(video=0) if packet.size]
    draw = random.Random(1)
    for start, size in (places[index] for index in broken):
        data[start + 40 : start + size] = draw.randbytes(max(0, size - 40))
    return bytes(data)


def test_a_damaged_frame_is_replaced_by_a_whole_neighbour() -> None:
    data = _garbled(range(5, 6))
    with av.open(io.BytesIO(data)) as file:
        assert [frame.pts for frame in file.decode(video=0) if frame.is_corrupt], "nothing to replace"
    every = process(data, target_frames=30)[1]
    below_the_time = every.rows.reshape(30, -1, every.rows.shape[1])[:, -8:]
    assert np.array_equal(below_the_time[5], below_the_time[4])


def test_a_video_of_damaged_frames_is_refused() -> None:
    with pytest.raises(RequestError, match="damaged: its data is broken or encrypted"):
        process(_garbled(range(30)))


def _cut(part: float, container: str, codec: str, **options: str) -> bytes:
    data = video_bytes(video_frames(40), container, codec, options=options)
    return data[: int(len(data) * part)]


def animated_webp() -> bytes:
    frames = [Image.fromarray(pixels) for pixels in video_frames(4)]
    return image_bytes(frames[0], "WEBP", save_all=True, append_images=frames[1:])


def _without_fragments() -> bytes:
    """Return an MP4 with a video track and none of its frames."""
    data = video_bytes(video_frames(4), "mp4", "mpeg4", options={"movflags": "frag_keyframe+empty_moov"})
    return data[: data.index(b"moof") - 4]


PLAYLIST = b"#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\nfile:///etc/hostname\n#EXT-X-ENDLIST\n"

BROKEN: dict[str, tuple[Callable[[], bytes], str]] = {
    "empty": (lambda: b"", "can be read"),
    "text": (lambda: b"this is no video", "can be read"),
    "playlist": (lambda: PLAYLIST, "can be read"),
    "mp4 cut before its index": (lambda: _cut(0.5, "mp4", "libx264"), "can be read"),
    "mp4 cut behind its index": (lambda: _cut(0.75, "mp4", "mpeg4", movflags="faststart"), "truncated"),
    "webm cut": (lambda: _cut(0.75, "webm", "libvpx"), "truncated"),
    "avi cut": (lambda: _cut(0.75, "avi", "mpeg4"), "truncated"),
    "no frames": (_without_fragments, "no frames"),
    "animated WebP": (lambda: animated_webp(), "Animated WebP"),
    "sound only": (lambda: wav_bytes(), "can be read"),
    "narrow": (lambda: video_bytes(video_frames(4, 8, 160), "avi", "mpeg4"), "at least 10 pixels"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_videos_are_refused(name: str) -> None:
    make, message = BROKEN[name]
    with pytest.raises(RequestError, match=message) as caught:
        process(make())
    assert caught.value.failure.status == 400


@pytest.mark.parametrize(
    ("limits", "message"),
    [
        (VideoLimits(120 * 160 - 1, 3600, 1000), "media_max_pixels"),
        (VideoLimits(10**8, 3.9, 1000), "video_max_seconds = 3.9"),
        (VideoLimits(10**8, 3600, 39), "video_max_frames = 39"),
    ],
)
def test_limits_are_named(limits: VideoLimits, message: str) -> None:
    with pytest.raises(RequestError, match=message) as caught:
        process(video_bytes(video_frames(40)), limits=limits)
    assert caught.value.failure.code == "media_limit_exceeded"


def test_within_the_limits_it_passes() -> None:
    process(video_bytes(video_frames(40)), limits=VideoLimits(120 * 160, 4.0, 40))


def test_a_video_without_duration_is_refused() -> None:
    class Stream:
        average_rate = None
        time_base = None

    with pytest.raises(RequestError, match="no duration"):
        video._rate(Stream(), [0], 0, steady=False)  # type: ignore[arg-type]


def test_contradicting_options_are_refused() -> None:
    with pytest.raises(RequestError, match="options are invalid: fps must be negative"):
        process(video_bytes(video_frames(4)), fps=2.0, target_frames=20)


def test_signatures_tell_everything_that_changes_patches() -> None:
    processor = Processor(SMALL, LIMITS, VISION, FONT)
    image, plain = Media("image", "p"), Media("video", "p")
    different = [
        processor.signature(image),
        processor.signature(plain),
        processor.signature(Media("video", "p", video=VideoOptions(fps=3.0))),
        processor.signature(Media("video", "p", video=VideoOptions(frames_sample="rand"))),
        Processor(SMALL, LIMITS, VISION, FONT + b"\0").signature(plain),
        Processor(ProcessorSettings(), LIMITS, VISION, FONT).signature(plain),
        Processor(SMALL, LIMITS, VISION, FONT, own_times=False).signature(plain),
        Processor(ProcessorSettings(image_max_pixels=10**6), LIMITS, VISION, FONT).signature(image),
    ]
    assert len(set(different)) == len(different)
    same = Media("video", "q", url="http://x", video=VideoOptions(fps=2.0))
    assert processor.signature(same) == processor.signature(plain), "2 is the server's rate"


def test_threads_change_nothing() -> None:
    data, media = video_bytes(video_frames(40)), Media("video", "p")
    rows = []
    for threads in (1, 3):
        processor = Processor(SMALL, LIMITS, VISION, FONT, threads=threads)
        plan = processor.plan(media, data)
        rows.append(np.zeros(plan.rows, np.uint8))
        processor.fill(plan, data, rows[-1])
    assert np.array_equal(*rows)
