"""Bytes of one image or video to patches, in two steps: `plan` reads headers and counts the tokens, `patches` decodes.

A request that cannot fit is refused between the two, before any pixel is decoded.
"""

import hashlib
import io
from dataclasses import dataclass, field

import msgspec
import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFont

from services.mm_encoder.media import frames as sampling
from services.mm_encoder.media import timestamps
from services.mm_encoder.media.image import open_image, resized, rgb_pixels
from services.mm_encoder.media.orientation import SIDEWAYS, upright
from services.mm_encoder.media.patches import Patches, patch_rows
from services.mm_encoder.media.refusal import refuse
from services.mm_encoder.media.resize import smart_resize
from services.mm_encoder.media.video import VideoFacts, VideoLimits, decode, probe
from services.mm_encoder.settings import ProcessorSettings
from shared.messages import Media, VideoOptions
from shared.model.config import VisionConfig

# Part of the cache key. Raise it when the same bytes give other patches than before.
REVISION = 3


@dataclass(frozen=True, slots=True)
class ImagePlan:
    """An image whose header has been read."""

    image: Image.Image
    tokens: int


@dataclass(frozen=True, slots=True)
class VideoPlan:
    """A video whose packets have been counted."""

    data: bytes = field(repr=False)
    facts: VideoFacts
    indices: list[int]  # even in number: the last is repeated if need be
    size: tuple[int, int]  # height and width after resizing, before the frames are turned
    tokens: int


Plan = ImagePlan | VideoPlan


class Processor:
    """FastDeploy's preprocessing for one model and one set of settings. Thread-safe."""

    def __init__(self, settings: ProcessorSettings, limits: VideoLimits, vision: VisionConfig, font: bytes) -> None:
        self._settings = settings
        self._limits = limits
        self._patch = vision.patch_size
        self._merge = vision.spatial_merge_size
        self._temporal = vision.temporal_merge_size
        self._font = font
        self._font_hash = hashlib.sha256(font).hexdigest()

    def signature(self, media: Media) -> bytes:
        """Return everything besides the bytes that decides the patches of `media`: part of the cache key.

        Raises:
            RequestError: the video's options contradict each other or the server's.
        """
        settings = self._settings
        if media.kind == "image":
            return _canonical(REVISION, "image", settings.image_min_pixels, settings.image_max_pixels)
        frames = self._sampling(media.video)
        pixels = settings.video_min_pixels, settings.video_max_pixels
        return _canonical(REVISION, "video", *pixels, frames, self._font_hash)

    def plan(self, media: Media, data: bytes) -> Plan:
        """Read the headers of `media`.

        Raises:
            RequestError: the media cannot be used, or is over a limit.
        """
        return self._plan_image(media, data) if media.kind == "image" else self._plan_video(media, data)

    def patches(self, plan: Plan) -> Patches:
        """Decode the media of `plan`.

        Raises:
            RequestError: the media is truncated or broken.
        """
        return self._image(plan) if isinstance(plan, ImagePlan) else self._video(plan)

    def _plan_image(self, media: Media, data: bytes) -> ImagePlan:
        image = open_image(data, self._limits.max_pixels)
        # EXIF may swap the sides; the number of tokens stays.
        height, width = self._image_size(image.height, image.width)
        return ImagePlan(image, self._tokens(1, height, width))

    def _image(self, plan: ImagePlan) -> Patches:
        image = rgb_pixels(plan.image)
        height, width = self._image_size(image.height, image.width)
        rows = patch_rows(resized(image, height, width), self._patch, self._merge)
        return Patches(rows, (1, height // self._patch, width // self._patch))

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
        size = self._video_size(facts.height, facts.width)
        return VideoPlan(data, facts, indices, size, self._tokens(len(indices), *size))

    def _video(self, plan: VideoPlan) -> Patches:
        height, width = plan.size
        rows: NDArray[np.uint8] | None = None
        for wanted, decoded in decode(plan.data, plan.facts, set(plan.indices), self._limits):
            if rows is None and decoded.turn in SIDEWAYS:
                height, width = width, height  # the number of tokens stays
            image = upright(decoded.frame, decoded.turn)
            size = timestamps.font_size(image.width, image.height)
            seconds = decoded.index * plan.facts.seconds / plan.facts.frames
            timestamps.paint(image, seconds, ImageFont.truetype(io.BytesIO(self._font), size))
            one = patch_rows(resized(image, height, width), self._patch, self._merge)
            if rows is None:
                rows = np.empty((len(plan.indices), *one.shape), np.uint8)
            rows[[place for place, shown in enumerate(plan.indices) if shown == wanted]] = one
        assert rows is not None, "decode yields every wanted frame or raises"
        grid = (len(plan.indices), height // self._patch, width // self._patch)
        return Patches(rows.reshape(-1, rows.shape[2]), grid)

    def _sampling(self, options: VideoOptions) -> sampling.FrameSampling:
        try:
            return sampling.override(self._settings.frame_sampling, options)
        except ValueError as error:
            raise refuse(f"The video's options are invalid: {error}.") from error

    def _image_size(self, height: int, width: int) -> tuple[int, int]:
        return self._resize(height, width, self._settings.image_min_pixels, self._settings.image_max_pixels)

    def _video_size(self, height: int, width: int) -> tuple[int, int]:
        return self._resize(height, width, self._settings.video_min_pixels, self._settings.video_max_pixels)

    def _resize(self, height: int, width: int, low: int, high: int) -> tuple[int, int]:
        try:
            return smart_resize(height, width, factor=self._patch * self._merge, min_pixels=low, max_pixels=high)
        except ValueError as error:
            raise refuse(f"{error}.") from error

    def _tokens(self, frames: int, height: int, width: int) -> int:
        step = self._patch * self._merge
        return -(-frames // self._temporal) * (height // step) * (width // step)


def _canonical(*parts: object) -> bytes:
    return msgspec.json.encode(parts, order="deterministic")
