"""What mm_encoder is told, and the limits on what strangers may make it do."""

import ipaddress
from typing import Annotated

import msgspec
from msgspec import Meta
from PIL import Image

from services.mm_encoder.media import frames as sampling
from services.mm_encoder.media.frames import FrameSampling, FramesSample
from shared.config import CommonSettings, Positive, variable
from shared.errors import ConfigError
from shared.model.config import VisionConfig

Seconds = Annotated[float, Meta(gt=0)]
Network = ipaddress.IPv4Network | ipaddress.IPv6Network


class ProcessorSettings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`--mm-processor-kwargs`: FastDeploy's keys, types and defaults. A key it does not have, or a value of another
    type, is an error here; FastDeploy ignores the lot then.
    """

    spatial_conv_size: int = 2
    temporal_conv_size: int = 2
    image_min_pixels: int = 4 * 28 * 28
    image_max_pixels: int = 6177 * 28 * 28
    video_min_pixels: int = 299 * 28 * 28
    video_max_pixels: int = 1196 * 28 * 28
    video_target_frames: int = -1
    video_max_frames: int = 180
    video_min_frames: int = 16
    video_fps: int | msgspec.UnsetType = msgspec.UNSET  # 2, or none where video_target_frames is given
    video_frames_sample: FramesSample = "leading"

    def __post_init__(self) -> None:
        for kind, low, high in (
            ("image", self.image_min_pixels, self.image_max_pixels),
            ("video", self.video_min_pixels, self.video_max_pixels),
        ):
            if not 0 < low <= high:
                raise ValueError(f"{kind}_min_pixels must be positive and at most {kind}_max_pixels: {low}, {high}")
        sampling.check(self.frame_sampling)

    @property
    def frame_sampling(self) -> FrameSampling:
        """The frame sampling of a video that has no options of its own."""
        default_fps = -1 if self.video_target_frames > 0 else 2
        return FrameSampling(
            fps=float(default_fps if self.video_fps is msgspec.UNSET else self.video_fps),
            min_frames=self.video_min_frames,
            max_frames=self.video_max_frames,
            target_frames=self.video_target_frames,
            frames_sample=self.video_frames_sample,
        )

    def check_model(self, vision: VisionConfig) -> None:
        """
        Raises:
            ConfigError: a size contradicts the model's, whose weights fix it.
        """
        for key, ours, model in (
            ("spatial_conv_size", self.spatial_conv_size, vision.spatial_merge_size),
            ("temporal_conv_size", self.temporal_conv_size, vision.temporal_merge_size),
        ):
            if ours != model:
                raise ConfigError(f"mm_processor_kwargs: {key} is {ours}, but the model's is {model}")


class MmEncoderSettings(CommonSettings, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Settings of this service. Limits are named in the error a client gets for passing them."""

    mm_processor_kwargs: ProcessorSettings = ProcessorSettings()
    device: str = "auto"  # torch's name of one, or auto: the first GPU, or the CPU where there is none
    tower_max_patches: Positive = 32768  # in one pass of the vision tower; a larger image is a pass of its own
    concurrency: Positive = 8  # requests in hand at once
    preprocess_threads: Positive = 2  # decoding and resizing
    media_max_bytes: Positive = 256 << 20  # of one image or video
    media_request_max_bytes: Positive = 512 << 20  # of all media of one request
    media_max_pixels: Positive = 64_000_000  # of one image or video frame, by its header
    media_timeout_s: Seconds = 30.0  # for one fetch with all its redirects
    media_max_redirects: Annotated[int, Meta(ge=0)] = 5
    media_allow_networks: tuple[str, ...] = ()  # CIDRs that may be fetched from though they are not global
    step_timeout_s: Annotated[float, Meta(ge=0)] = 20.0  # a longer batch hangs (shared/watchdog.py); 0: no bound
    video_max_seconds: Seconds = 3600.0
    video_max_frames: Positive = 216_000  # in the file; how many are shown is mm_processor_kwargs' affair
    video_decode_s: Seconds = 120.0  # for decoding one video

    def largest_pass(self, vision: VisionConfig) -> int:
        """Patches."""
        image = self.mm_processor_kwargs.image_max_pixels // vision.patch_size**2
        return max(self.tower_max_patches, image)

    def __post_init__(self) -> None:
        if Image.MAX_IMAGE_PIXELS is not None and self.media_max_pixels > Image.MAX_IMAGE_PIXELS:
            limit = f"{Image.MAX_IMAGE_PIXELS}, which is Pillow's own limit"
            raise ConfigError(f"{variable('media_max_pixels')}: {self.media_max_pixels} is more than {limit}")
        self.networks()

    def networks(self) -> tuple[Network, ...]:
        """`media_allow_networks`, parsed."""
        try:
            return tuple(ipaddress.ip_network(text) for text in self.media_allow_networks)
        except ValueError as error:
            raise ConfigError(f"{variable('media_allow_networks')}: {error}") from error
