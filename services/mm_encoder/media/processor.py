"""Bytes of one image or video to patches, in two steps: `plan` reads headers and counts the tokens, `fill` decodes.

A request that cannot fit is refused between the two, before any pixel is decoded. `read_image` does both at once, of
small images that fit in any case.
"""

import hashlib
import io
from collections.abc import Callable
from functools import partial

import msgspec
import numpy as np
from av.video.reformatter import VideoReformatter
from numpy.typing import NDArray
from PIL import Image, ImageFont

from services.mm_encoder.media import frames as sampling
from services.mm_encoder.media import timestamps
from services.mm_encoder.media.bands import fill_in_bands
from services.mm_encoder.media.image import decoding_work, open_image, resized, rgb_pixels
from services.mm_encoder.media.orientation import SIDEWAYS, upright
from services.mm_encoder.media.patches import Grid, fill_rows
from services.mm_encoder.media.processor_settings import ProcessorSettings
from services.mm_encoder.media.refusal import refuse
from services.mm_encoder.media.resize import smart_resize
from services.mm_encoder.media.turns import Turns
from services.mm_encoder.media.video import VideoFacts, VideoLimits, decode, probe
from shared.messages import Media, VideoOptions
from shared.model.config import VisionConfig

# Part of the cache key. Raise it when the same bytes give other patches than before.
REVISION = 5


class Plan(msgspec.Struct, frozen=True):
    """Size of an image or video after processing, from its headers."""

    tokens: int
    rows: tuple[int, int]  # shape of its patches
    work: int  # pixels to decode, those of every scan and frame


class ImagePlan(Plan, frozen=True, tag=True):
    """Image whose header has been read."""

    pixels: tuple[int, int]  # the fewest and the most that the model sees


class VideoPlan(Plan, frozen=True, tag=True):
    """Video whose packets have been counted."""

    facts: VideoFacts
    indices: list[int]  # even in number: the last is repeated if need be
    size: tuple[int, int]  # height and width after resizing, before the frames are turned


class Processor:
    """FastDeploy's preprocessing for one model and one set of settings.

    If `own_times`, the frames of a video of variable rate show their own times; else the reference's, by the average.
    `threads` resize frames of a video, or bands of a large image.
    """

    def __init__(
        self,
        settings: ProcessorSettings,
        limits: VideoLimits,
        vision: VisionConfig,
        font: bytes,
        *,
        own_times: bool = True,
        threads: int = 1,
    ) -> None:
        self._turns = Turns(threads)
        self._settings = settings
        self._limits = limits
        self._patch = vision.patch_size
        self._channels = vision.in_channels
        self._merge = vision.spatial_merge_size
        self._temporal = vision.temporal_merge_size
        self._font = font
        self._own_times = own_times
        self._font_hash = hashlib.sha256(font).hexdigest()

    def signature(self, media: Media) -> bytes:
        """Return everything besides the bytes that decides the patches of `media`: part of the cache key.

        Raises:
            RequestError: its options contradict each other or the server's.
        """
        pixels = self._pixels(media)
        if media.kind == "image":
            return _canonical(REVISION, "image", *pixels)
        frames = self._sampling(media.video)
        return _canonical(REVISION, "video", *pixels, frames, self._own_times, self._font_hash)

    def plan(self, media: Media, data: bytes) -> ImagePlan | VideoPlan:
        """Read the headers of `media`.

        Raises:
            RequestError: the media cannot be used, or is over a limit.
        """
        return self._open_image(media, data)[1] if media.kind == "image" else self._plan_video(media, data)

    def tokens_of(self, size: int) -> int:
        """Return the most tokens of an image whose patches are `size` bytes."""
        return size // (self._channels * (self._patch * self._merge) ** 2)

    def fill(self, plan: ImagePlan | VideoPlan, data: bytes, rows: NDArray[np.uint8]) -> Grid:
        """Decode the media of `plan` into `rows`, which have the plan's shape; return the grid of patches.

        Raises:
            RequestError: the media is truncated or broken.
        """
        if isinstance(plan, ImagePlan):
            return self._fill_opened(plan, open_image(data, self._limits.max_pixels), rows)
        return self._fill_video(plan, data, rows)

    def read_image(
        self, media: Media, data: bytes, rows_for: Callable[[ImagePlan], NDArray[np.uint8] | None]
    ) -> tuple[ImagePlan, Grid | None]:
        """Read the header of an image, and decode it into the rows that `rows_for` returns, if any, as `fill` does.

        Raises:
            RequestError: the image cannot be used, is over a limit, or is truncated or broken.
        """
        image, plan = self._open_image(media, data)
        rows = rows_for(plan)
        return plan, None if rows is None else self._fill_opened(plan, image, rows)

    def _open_image(self, media: Media, data: bytes) -> tuple[Image.Image, ImagePlan]:
        image = open_image(data, self._limits.max_pixels)
        # EXIF may swap the sides; the number of tokens stays.
        pixels = self._pixels(media)
        size = self._resize(image.height, image.width, *pixels)
        work = decoding_work(image, data)
        return image, ImagePlan(self._tokens(1, *size), self._shape(1, *size), work, pixels)

    def _fill_opened(self, plan: ImagePlan, opened: Image.Image, rows: NDArray[np.uint8]) -> Grid:
        image = rgb_pixels(opened)
        height, width = self._resize(image.height, image.width, *plan.pixels)
        if not fill_in_bands(rows, image, height, width, self._patch, self._merge, self._turns):
            fill_rows(rows, resized(image, height, width), self._patch, self._merge)
        return 1, height // self._patch, width // self._patch

    def _plan_video(self, media: Media, data: bytes) -> VideoPlan:
        frames = self._sampling(media.video)
        facts = probe(data, self._limits)
        if min(facts.width, facts.height) < timestamps.MIN_SIDE:
            raise refuse(f"A video's frames must be at least {timestamps.MIN_SIDE} pixels on each side.")
        seed = int.from_bytes(hashlib.sha256(data).digest()[:8], "big")
        try:
            most = self._limits.max_frames
            indices = sampling.frame_indices(facts.frames, facts.fps, frames, seed=seed, most=most)
        except ValueError as error:
            raise refuse(f"The video's frames cannot be sampled: {error}.") from error
        if not indices:
            raise refuse("The video is too short: no frame would be shown.")
        indices += indices[-1:] * (-len(indices) % self._temporal)
        size = self._resize(facts.height, facts.width, *self._pixels(media))
        tokens, shape = self._tokens(len(indices), *size), self._shape(len(indices), *size)
        work = (max(indices) + 1) * facts.width * facts.height
        return VideoPlan(tokens, shape, work, facts, indices, size)

    def _fill_video(self, plan: VideoPlan, data: bytes, rows: NDArray[np.uint8]) -> Grid:
        size: tuple[int, int] | None = None
        convert = VideoReformatter()
        by_frame = rows.reshape(len(plan.indices), -1, rows.shape[1])
        times = plan.facts.frame_times(self._own_times)
        with self._turns.all_done() as in_turn:
            for wanted, decoded in decode(data, plan.facts, set(plan.indices), self._limits):
                if size is None:  # the first frame decides for all; the number of tokens stays
                    size = plan.size[::-1] if decoded.turn in SIDEWAYS else plan.size
                image = upright(decoded.frame, decoded.turn, convert)
                font = ImageFont.truetype(io.BytesIO(self._font), timestamps.font_size(image.width, image.height))
                timestamps.paint(image, times[decoded.index], font)
                places = [place for place, shown in enumerate(plan.indices) if shown == wanted]
                in_turn(partial(self._fill_frame, by_frame, places, image, size))
        assert size is not None, "decode yields every wanted frame or raises"
        return len(plan.indices), size[0] // self._patch, size[1] // self._patch

    def _fill_frame(
        self, by_frame: NDArray[np.uint8], places: list[int], image: Image.Image, size: tuple[int, int]
    ) -> None:
        """Fill the rows of a frame at all places where it is shown."""
        first, *others = places
        fill_rows(by_frame[first], resized(image, *size), self._patch, self._merge)
        by_frame[others] = by_frame[first]

    def _sampling(self, options: VideoOptions) -> sampling.FrameSampling:
        try:
            return sampling.override(self._settings.frame_sampling, options)
        except ValueError as error:
            raise refuse(f"The video's options are invalid: {error}.") from error

    def _pixels(self, media: Media) -> tuple[int, int]:
        """Return the fewest and the most pixels of an image or frame: the request's, within the server's.

        If it asks for a most alone, below the server's fewest, nothing is enlarged.
        """
        settings, kind = self._settings, media.kind
        if kind == "image":
            fewest, most = settings.image_min_pixels, settings.image_max_pixels
        else:
            fewest, most = settings.video_min_pixels, settings.video_max_pixels
        high = most if media.max_pixels is None else media.max_pixels
        if media.wished_max_pixels is not None:
            high = max(min(high, media.wished_max_pixels), media.min_pixels or 0)
        if media.min_pixels is None and high < fewest:
            fewest = (self._patch * self._merge) ** 2
        low = fewest if media.min_pixels is None else media.min_pixels
        if not fewest <= low <= high <= most:
            stated = {"min_pixels": media.min_pixels, "max_pixels": media.max_pixels}
            asked = " and ".join(f"{name} = {value}" for name, value in stated.items() if value is not None)
            text = f"The request asks for {asked} of {kind}s; this server has them from {fewest} to {most}"
            raise refuse(f"{text}, the first at most the second.")
        return low, high

    def _resize(self, height: int, width: int, low: int, high: int) -> tuple[int, int]:
        try:
            return smart_resize(height, width, factor=self._patch * self._merge, min_pixels=low, max_pixels=high)
        except ValueError as error:
            raise refuse(f"{error}.") from error

    def _shape(self, frames: int, height: int, width: int) -> tuple[int, int]:
        patches = frames * (height // self._patch) * (width // self._patch)
        return patches, self._channels * self._patch**2

    def _tokens(self, frames: int, height: int, width: int) -> int:
        step = self._patch * self._merge
        return -(-frames // self._temporal) * (height // step) * (width // step)


def _canonical(*parts: object) -> bytes:
    return msgspec.json.encode(parts, order="deterministic")
