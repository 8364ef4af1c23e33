"""Settings of the processor: sizes of images, and the frames of a video that the model sees."""

import msgspec

from services.mm_encoder.media.frames import FrameSampling, FramesSample, check
from shared.errors import ConfigError
from shared.model.config import VisionConfig


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
    # Frames taken from a second of a video; unset: 2, or none with video_target_frames.
    video_fps: int | msgspec.UnsetType = msgspec.UNSET
    video_frames_sample: FramesSample = "leading"  # which frame of each stretch: its first, middle or a random one

    def __post_init__(self) -> None:
        for kind, low, high in (
            ("image", self.image_min_pixels, self.image_max_pixels),
            ("video", self.video_min_pixels, self.video_max_pixels),
        ):
            if not 0 < low <= high:
                raise ValueError(f"{kind}_min_pixels must be positive and at most {kind}_max_pixels: {low}, {high}")
        check(self.frame_sampling)

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
