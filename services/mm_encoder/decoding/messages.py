"""Messages between the encoder and a decoder process, and how they travel: msgpack over a Unix socket.

Bytes and pixels are not in them. Each task brings descriptors of memory that both processes see: the file to read, or
several behind each other, and, but for a `PlanTask`, the rows to fill.
"""

import msgspec

from services.mm_encoder.media.patches import Grid
from services.mm_encoder.media.processor import ImagePlan, VideoPlan
from services.mm_encoder.media.processor_settings import ProcessorSettings
from services.mm_encoder.media.video import VideoLimits
from shared.errors import Failure
from shared.messages import Media
from shared.model.config import VisionConfig


class Setup(msgspec.Struct, frozen=True, tag=True):
    """First message: all that a decoder needs to know. It answers `Ready`."""

    settings: ProcessorSettings
    limits: VideoLimits
    vision: VisionConfig
    font: bytes
    own_times: bool
    memory_bytes: int  # the most of its own
    threads: int = 1  # that resize frames, or bands of an image


class PlanTask(msgspec.Struct, frozen=True, tag=True):
    """Task to read the headers of a file of `size` bytes within `cpu_s` seconds; the answer is a plan."""

    size: int
    cpu_s: int
    media: Media


class FillTask(msgspec.Struct, frozen=True, tag=True):
    """Task to decode a file of `size` bytes into the rows of its plan; the answer is `Filled`."""

    size: int
    cpu_s: int
    plan: ImagePlan | VideoPlan


class SmallTask(msgspec.Struct, frozen=True, tag=True):
    """Task to read the headers of small images, and to decode those that have room and are quick.

    Of the memory for rows each image has `room` bytes. `cpu_s` is for all of them, and the answer is `Read`.
    """

    cpu_s: int
    files: list[tuple[int, Media]]  # with their sizes
    room: int
    most_work: int  # pixels to decode, of all together


class Ready(msgspec.Struct, frozen=True, tag=True):
    """First answer: everything is imported."""


class Filled(msgspec.Struct, frozen=True, tag=True):
    """Answer: the rows are there."""

    grid: Grid


class Refused(msgspec.Struct, frozen=True, tag=True):
    """Answer: the file cannot be used. `cause` is the traceback of an error that nobody foresaw."""

    failure: Failure
    cause: str | None = None


class Decoded(msgspec.Struct, frozen=True, tag=True):
    """Answer about one image: its rows are there."""

    plan: ImagePlan
    grid: Grid


class Read(msgspec.Struct, frozen=True, tag=True):
    """Answer: of each image its rows, or its plan alone, or that it is refused."""

    images: list[Decoded | ImagePlan | Refused]


Task = PlanTask | FillTask
Reply = Ready | ImagePlan | VideoPlan | Filled | Read | Refused

to_decoder = msgspec.msgpack.Encoder()
from_encoder = msgspec.msgpack.Decoder(Setup | PlanTask | FillTask | SmallTask)
to_encoder = msgspec.msgpack.Encoder()
from_decoder = msgspec.msgpack.Decoder(Reply)
