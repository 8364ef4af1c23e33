"""Video bytes to frames: facts from the container, then one sequential decode that keeps only wanted frames.

The number of frames and their order come from the packets, not from the header. A wanted frame that cannot be decoded
is replaced by the nearest one that can, at most `TOLERANCE` frames away, earlier ones first. So is one that the decoder
says has parts made up, unless all around it have. A video of which most frames have, as an encrypted one, is refused.
"""

import gc
import io
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import median_low

import av
import msgspec
from av.container import InputContainer
from av.video.frame import VideoFrame
from av.video.stream import VideoStream
from PIL.Image import Transpose

from services.mm_encoder.media.fields import FieldPairs
from services.mm_encoder.media.orientation import transposition
from services.mm_encoder.media.refusal import over_limit, refuse

TOLERANCE = 10

# FFmpeg guesses the format from the bytes, and with some formats would open other files or addresses.
_OPTIONS = {
    "format_whitelist": "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,gif,mpegts,mpeg,flv,asf,ogg",
    "protocol_whitelist": "none",
}
# Looking at a frame's side data makes a cycle with the frame, so its pixels stay until the collector comes by, which
# goes by the number of objects and not by their size.
_COLLECT_EVERY = 16
# Codecs people send; FFmpeg has hundreds more that nobody tests against hostile input.
CODECS = frozenset(
    ("h264", "hevc", "vp8", "vp9", "av1", "mpeg4", "mpeg1video", "mpeg2video", "h263", "flv1", "theora", "mjpeg", "gif")
)
# Formats made to lose packets on the way. FFmpeg may mark the frame before the damaged one in its place, so what is
# shown is left to the decoder. In other formats a marked packet is where the file was cut off.
_LOSSY = ("mpegts", "mpeg")
# A step between packets' times that is as many times the usual one is a jump, not frames that were lost.
_JUMP = 10


class VideoLimits(msgspec.Struct, frozen=True):
    """Limits of a video; see `MmEncoderSettings`."""

    max_pixels: int
    max_seconds: float
    max_frames: int


class VideoFacts(msgspec.Struct, frozen=True):
    """Facts from one pass over the packets."""

    width: int
    height: int
    frames: int
    fps: float  # average
    times: tuple[int, ...] | None  # presentation timestamps, ascending; None: frames come in order, uncounted gaps
    tick_s: float  # the unit of `times`

    @property
    def seconds(self) -> float:
        return self.frames / self.fps

    def frame_times(self, own: bool) -> Sequence[float]:
        """Return each frame's time in seconds from the first frame's: its number over the average rate.

        If `own`, a video of variable rate has its frames' own times. A rate is constant if they differ from the formula
        by at most half a frame, which they do by rounding.
        """
        formula = [index * self.seconds / self.frames for index in range(self.frames)]
        if not own or self.times is None:
            return formula
        stored = [(time - self.times[0]) * self.tick_s for time in self.times]
        variable = any(abs(one - other) > 0.5 / self.fps for one, other in zip(stored, formula, strict=True))
        return stored if variable else formula


@dataclass(frozen=True, slots=True)
class DecodedFrame:
    """Frame as it is stored, and the transposition that turns it upright."""

    index: int
    frame: VideoFrame
    turn: Transpose | None

    @property
    def damaged(self) -> bool:
        """True if the decoder says that parts of it are missing, and made up."""
        return bool(self.frame.is_corrupt)


def probe(data: bytes, limits: VideoLimits) -> VideoFacts:
    """Read the container without decoding.

    Raises:
        RequestError: the bytes are not a video, or it has no frames or duration, is truncated, or is over a limit.
    """
    if data[8:12] == b"WEBP":
        raise refuse("Animated WebP is not read as a video; GIF and the video formats are.")
    if _cut_matroska(data):
        raise refuse("The video is truncated.")
    try:
        with _open(data) as container:
            return _facts(container, _stream(container), limits)
    except MemoryError:
        raise
    except av.FFmpegError as error:
        raise refuse("This is not a video that can be read.") from error


def decode(
    data: bytes, facts: VideoFacts, wanted: Collection[int], limits: VideoLimits
) -> Iterator[tuple[int, DecodedFrame]]:
    """Yield, in no particular order, each wanted index once, with its frame or a neighbour.

    Raises:
        RequestError: neither a wanted frame nor a neighbour decodes, most frames are damaged, or a limit is exceeded.
    """
    sound: set[int] = set()
    damaged: set[int] = set()
    found: set[int] = set()
    last = max(wanted)
    for frame in _frames(data, facts, limits):
        if frame.damaged:
            damaged.add(frame.index)
            continue
        sound.add(frame.index)
        if frame.index in wanted and frame.index not in found:
            found.add(frame.index)
            yield frame.index, frame
        if frame.index >= last and len(found) == len(wanted):
            return
    sources = {index: _source(index, sound, damaged) for index in set(wanted) - found}
    if len(damaged) > len(sound):  # the decoder does not notice all
        raise refuse("Most of the video's frames are damaged: its data is broken or encrypted.")
    yield from _replaced(data, facts, sources, limits)


def _replaced(
    data: bytes, facts: VideoFacts, sources: dict[int, int], limits: VideoLimits
) -> Iterator[tuple[int, DecodedFrame]]:
    """Decode a second time for the neighbours of undecodable frames; only damaged videos pay for it."""
    if not sources:
        return
    for frame in _frames(data, facts, limits):
        for missing in [wanted for wanted, source in sources.items() if source == frame.index]:
            del sources[missing]
            yield missing, frame
    if sources:
        raise refuse("The video's frames cannot be decoded.")


def _source(index: int, sound: set[int], damaged: set[int]) -> int:
    """Return the frame to show for one that was not decoded whole: a whole one, else itself, else a damaged one."""
    for decoded in (sound, damaged):
        for distance in range(TOLERANCE + 1):
            for candidate in (index - distance, index + distance):
                if candidate in decoded:
                    return candidate
    raise refuse(f"The video's frame {index} and its {TOLERANCE} neighbours on either side cannot be decoded.")


def _cut_matroska(data: bytes) -> bool:
    """Return True for a Matroska or WebM file that is shorter than its header says; FFmpeg reads it without error."""
    position = 0
    for identifier in (b"\x1a\x45\xdf\xa3", b"\x18\x53\x80\x67"):  # the EBML header, the segment
        if not data.startswith(identifier, position) or len(data) < position + 12:
            return False
        first = data[position + 4]
        width = 9 - first.bit_length()
        size = int.from_bytes(data[position + 4 : position + 4 + width], "big") & ((1 << 7 * width) - 1)
        if size == (1 << 7 * width) - 1:  # unknown, as in a live recording
            return False
        position += 4 + width + size if identifier[0] == 0x1A else 0
    return position + 4 + width + size > len(data)


def _open(data: bytes) -> InputContainer:
    return av.open(io.BytesIO(data), mode="r", options=dict(_OPTIONS), metadata_errors="replace")


def _stream(container: InputContainer) -> VideoStream:
    if not container.streams.video:
        raise refuse("The video has no video track.")
    stream = container.streams.video[0]
    if stream.codec_context is None:
        raise refuse("The video's codec is not known.")
    if stream.codec_context.codec.canonical_name not in CODECS:
        raise refuse(f"Videos of the codec {stream.codec_context.codec.canonical_name} are not supported.")
    return stream


def _facts(container: InputContainer, stream: VideoStream, limits: VideoLimits) -> VideoFacts:
    _check_pixels(stream.width, stream.height, limits)
    times: list[int | None] = []
    packets = second_fields = 0
    pairs = FieldPairs(stream.codec_context.extradata) if stream.codec_context.name == "h264" else None
    for packet in container.demux(stream):
        if not packet.size:  # the flush at the end
            continue
        if packet.is_corrupt and container.format.name not in _LOSSY:
            raise refuse("The video is truncated.")
        packets += 1
        if packets > limits.max_frames:
            raise over_limit("The video's number of frames", "video_max_frames", limits.max_frames)
        if pairs and packet.has_sidedata("new_extradata"):
            pairs.follow(bytes(packet.get_sidedata("new_extradata")))
        # A key frame may bring other parameter sets.
        if pairs and (pairs.possible or packet.is_keyframe) and not pairs.begins_frame(bytes(packet)):
            second_fields += 1
        elif not packet.is_discard:
            times.append(packet.pts)
    if not times or not stream.width or not stream.height:
        raise refuse("The video has no frames.")
    if "mov" in container.format.name and packets < stream.frames:
        raise refuse(f"The video is truncated: {packets} of {stream.frames} frames are there.")
    tick_s = float(stream.time_base or 0)
    # Broadcasters and cameras record at a constant rate.
    steady = second_fields > 0 or container.format.name in _LOSSY
    rate = _rate(stream, times, second_fields, steady=steady)
    facts = VideoFacts(stream.width, stream.height, len(times), rate, _ordered(times), tick_s)
    if facts.seconds > limits.max_seconds:
        raise over_limit("The video's duration in seconds", "video_max_seconds", limits.max_seconds)
    return facts


def _rate(stream: VideoStream, times: list[int | None], second_fields: int, *, steady: bool) -> float:
    """Return the average frames a second: the container's unless it counts fields, else that of `times`.

    `times`: in the order of the packets. If `steady`, the rate is constant, and what they jump is not the video's time.
    """
    if stream.average_rate and not second_fields:
        return float(stream.average_rate)
    known = [(place, time) for place, time in enumerate(times) if time is not None]
    runs = _without_jumps(known) if steady else [known] if known else []
    span = sum(max(time for _, time in run) - min(time for _, time in run) for run in runs) * (stream.time_base or 0)
    if span > 0:
        return float(sum(run[-1][0] - run[0][0] for run in runs) / span)
    if stream.average_rate:
        return float(stream.average_rate) * len(times) / (len(times) + second_fields)
    raise refuse("The video has no duration.")


def _without_jumps(times: list[tuple[int, int]]) -> list[list[tuple[int, int]]]:
    """Return the runs between jumps of times, each with its place; frames shown in another order are no jumps."""
    steps = [abs(later - time) for (_, time), (_, later) in pairwise(times)]
    longest = _JUMP * median_low([step for step in steps if step] or [0])
    jumps = [number for number, step in enumerate(steps, start=1) if step > longest]
    return [times[start:end] for start, end in pairwise([0, *jumps, len(times)]) if start < end]


def _ordered(times: list[int | None]) -> tuple[int, ...] | None:
    known = [time for time in times if time is not None]
    if len(known) < len(times) or len(set(known)) < len(known):
        return None
    return tuple(sorted(known))


def _frames(data: bytes, facts: VideoFacts, limits: VideoLimits) -> Iterator[DecodedFrame]:
    """Yield every frame that decodes."""
    turn: Transpose | None = None
    order = None if facts.times is None else {time: index for index, time in enumerate(facts.times)}
    try:
        with _open(data) as container:
            for position, frame in enumerate(_decoded(container, _stream(container))):
                _check_pixels(frame.width, frame.height, limits)
                turn = transposition(frame, turn)
                if position % _COLLECT_EVERY == 0:
                    gc.collect()
                index = position if order is None else order.get(frame.pts or 0)
                if index is not None:
                    yield DecodedFrame(index, frame, turn)
    except MemoryError:
        raise
    except av.FFmpegError as error:
        raise refuse("The video's data is broken and cannot be decoded.") from error


def _decoded(container: InputContainer, stream: VideoStream) -> Iterator[VideoFrame]:
    for packet in container.demux(stream):
        try:
            yield from packet.decode()
        except av.error.InvalidDataError:
            continue  # `decode` shows a neighbour instead


def _check_pixels(width: int, height: int, limits: VideoLimits) -> None:
    if width * height > limits.max_pixels:
        raise over_limit(f"A video frame's {width} x {height} pixels", "media_max_pixels", limits.max_pixels)
