"""Settings of the mm_encoder, among them the limits on untrusted media."""

import ipaddress
from typing import Annotated

import msgspec
from msgspec import Meta
from PIL import Image

from services.mm_encoder.media import frames as sampling
from services.mm_encoder.media.frames import FrameSampling, FramesSample
from shared.config import CommonSettings, Count, Positive, variable
from shared.errors import ConfigError
from shared.model.config import VisionConfig

Seconds = Annotated[float, Meta(gt=0)]
Network = ipaddress.IPv4Network | ipaddress.IPv6Network


class ProcessorSettings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`--mm-processor-kwargs`: FastDeploy's keys, types and defaults.

    A key that FastDeploy does not have, or a value of another type, is an error here; FastDeploy ignores all of them
    then.
    """

    spatial_conv_size: int = 2  # patches merged into one, each way; the model fixes it
    temporal_conv_size: int = 2  # frames merged into one; the model fixes it
    image_min_pixels: int = 4 * 28 * 28  # an image with fewer is enlarged
    image_max_pixels: int = 6177 * 28 * 28  # an image with more is reduced
    video_min_pixels: int = 299 * 28 * 28  # a frame with fewer is enlarged
    video_max_pixels: int = 1196 * 28 * 28  # a frame with more is reduced
    video_target_frames: int = -1  # frames of every video; -1: by video_fps
    video_max_frames: int = 180  # the most that video_fps may give
    video_min_frames: int = 16  # the fewest that video_fps may give
    video_fps: int | msgspec.UnsetType = (
        msgspec.UNSET
    )  # frames taken from a second; unset: 2, or none with video_target_frames
    video_frames_sample: FramesSample = "leading"  # which frame of each stretch: its first, middle or a random one

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
        """Frame sampling of a video without options of its own."""
        default_fps = -1 if self.video_target_frames > 0 else 2
        return FrameSampling(
            fps=float(default_fps if self.video_fps is msgspec.UNSET else self.video_fps),
            min_frames=self.video_min_frames,
            max_frames=self.video_max_frames,
            target_frames=self.video_target_frames,
            frames_sample=self.video_frames_sample,
        )

    def check_model(self, vision: VisionConfig) -> None:
        """Check the sizes that the model's weights fix.

        Raises:
            ConfigError: a size contradicts the model's.
        """
        for key, ours, model in (
            ("spatial_conv_size", self.spatial_conv_size, vision.spatial_merge_size),
            ("temporal_conv_size", self.temporal_conv_size, vision.temporal_merge_size),
        ):
            if ours != model:
                raise ConfigError(f"mm_processor_kwargs: {key} is {ours}, but the model's is {model}")


class MmEncoderSettings(CommonSettings, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Settings of this service. The error for a request beyond a limit names the limit.

    Raises:
        ConfigError: a limit is above Pillow's own, or a network is malformed; the message names the setting.
    """

    mm_processor_kwargs: ProcessorSettings = ProcessorSettings()  # sizes of images, and frames of videos; see below
    device: str = "auto"  # torch's name of a device; auto: the first GPU, or the CPU where there is none
    tower_max_patches: Positive = 32768  # the most in one pass of the vision tower; a larger image has its own
    concurrency: Positive = 8  # requests in flight
    preprocess_threads: Positive = 2  # threads that decode and resize
    torch_threads: Count = 0  # threads of torch on a CPU; 0: one for each core we may use
    step_timeout_s: Annotated[float, Meta(ge=0)] = 20.0  # seconds after which a batch is taken to hang; 0: no bound
    media_max_bytes: Positive = 256 << 20  # the largest image or video
    media_request_max_bytes: Positive = 512 << 20  # all media of one request together
    media_max_pixels: Positive = 64_000_000  # the largest image or video frame, by its header
    media_timeout_s: Seconds = 30.0  # the longest fetch, with all its redirects
    media_max_redirects: Count = 5  # the most that one fetch follows
    media_allow_networks: tuple[str, ...] = ()  # CIDRs that media may be fetched from although they are not global
    video_max_seconds: Seconds = 3600.0  # the longest video, by its playing time
    video_max_frames: Positive = 216_000  # the most in a file; mm_processor_kwargs says how many the model sees
    video_decode_s: Seconds = 120.0  # the longest that decoding one video may take

    def largest_pass(self, vision: VisionConfig) -> int:
        """Return the number of patches in the largest pass of the vision tower."""
        image = self.mm_processor_kwargs.image_max_pixels // vision.patch_size**2
        return max(self.tower_max_patches, image)

    def __post_init__(self) -> None:
        if Image.MAX_IMAGE_PIXELS is not None and self.media_max_pixels > Image.MAX_IMAGE_PIXELS:
            limit = f"{Image.MAX_IMAGE_PIXELS}, which is Pillow's own limit"
            raise ConfigError(f"{variable('media_max_pixels')}: {self.media_max_pixels} is more than {limit}")
        self.networks()

    def networks(self) -> tuple[Network, ...]:
        """Parse `media_allow_networks`."""
        try:
            return tuple(ipaddress.ip_network(text) for text in self.media_allow_networks)
        except ValueError as error:
            raise ConfigError(f"{variable('media_allow_networks')}: {error}") from error
