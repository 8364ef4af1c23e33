"""Settings of the mm_encoder, among them the limits on untrusted media."""

import ipaddress
from typing import Annotated

import msgspec
from msgspec import Meta
from PIL import Image

from services.mm_encoder.media.processor_settings import ProcessorSettings
from shared.config import CommonSettings, Count, LoadFormat, Positive, variable
from shared.errors import ConfigError
from shared.model.config import VisionConfig

Seconds = Annotated[float, Meta(gt=0)]


class MmEncoderSettings(CommonSettings, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Settings of this service. The error for a request beyond a limit names the limit.

    Raises:
        ConfigError: a limit is above Pillow's own, or a network is malformed; the message names the setting.
    """

    load_format: LoadFormat = "auto"  # auto: weights as the checkpoint has them; dummy: drawn at random
    mm_processor_kwargs: ProcessorSettings = ProcessorSettings()  # sizes of images, and frames of videos; see below
    device: str = "auto"  # torch's name of a device; auto: the first GPU, or the CPU where there is none
    # A directory in memory, as /dev/shm/millrace, in which this host's engines have embeddings from us without Redis;
    # empty: all go through Redis. `millrace serve` makes one. We make it for us alone; one that is there
    # must be ours, and nobody else may write in it.
    segments_dir: str = ""
    segments_bytes: Positive = 2 << 30  # the most there, and half of its file system; the rest goes through Redis
    # The most in one pass of the vision tower; a larger image has its own. Items are encoded together up to 8,192
    # (ENOUGH in vision/batcher.py), if that is less.
    tower_max_patches: Positive = 32768
    # Milliseconds of a pass sent to the GPU at once if an engine of our `segments_dir` uses it as well, so that
    # steps which tokens wait for are not held up; 0: passes whole. The engine's steps beside it fit 2 ms and one
    # encoder a GPU. See docs/operations.md on sharing a GPU.
    shared_card_ms: Annotated[float, Meta(ge=0)] = 2.0
    shared_card_decode_pieces: Count = 0  # the most during a decode step: with 1 tokens come first; 0: any number
    # share of the multiprocessors, in percent, under CUDA MPS, which `millrace serve` starts; 0: all
    mps_percent: Annotated[int, Meta(ge=0, le=100)] = 0
    # Requests in flight, besides up to 64 that wait for links to other servers. 16 pictures of 448 x 448 are two of the
    # tower's batches: one is computed while the other is decoded.
    concurrency: Positive = 16
    preprocess_threads: Positive = 2  # files decoded at once, each in a process; as many again of those that take long
    torch_threads: Count = 0  # threads of torch on a CPU; 0: one for each core we may use
    # Seconds after which a batch is taken to hang, besides those in which it waited for an engine; 0: no bound.
    step_timeout_s: Annotated[float, Meta(ge=0)] = 20.0
    media_max_bytes: Positive = 256 << 20  # the largest image or video
    media_request_max_bytes: Positive = 512 << 20  # all media of one request together
    media_max_pixels: Positive = 64_000_000  # the largest image or video frame, by its header
    media_timeout_s: Seconds = 30.0  # the longest fetch, with all its redirects, and its wait while 256 run
    media_max_redirects: Count = 5  # the most that one fetch follows
    media_allow_networks: tuple[str, ...] = ()  # CIDRs that media may be fetched from although they are not global
    video_max_seconds: Seconds = 3600.0  # the longest video, by its playing time
    video_max_frames: Positive = 216_000  # the most in a file; mm_processor_kwargs says how many the model sees
    image_decode_s: Seconds = 20.0  # the longest that decoding one image may compute
    video_decode_s: Seconds = 120.0  # the longest that decoding one video may compute, over all its threads
    video_own_times: bool = True  # frames of a variable rate show their own times; false: as FastDeploy, by the average
    decoder_memory_bytes: Positive = 2 << 30  # the most memory of a process that decodes, besides the result

    def largest_pass(self, vision: VisionConfig) -> int:
        """Return the number of patches in the largest pass of the vision tower."""
        image = self.mm_processor_kwargs.image_max_pixels // vision.patch_size**2
        return max(self.tower_max_patches, image)

    def facts(self) -> dict[str, str]:
        kwargs = msgspec.json.encode(self.mm_processor_kwargs).decode()
        return {"mm_processor_kwargs": kwargs, "load_format": self.load_format}

    def __post_init__(self) -> None:
        if Image.MAX_IMAGE_PIXELS is not None and self.media_max_pixels > Image.MAX_IMAGE_PIXELS:
            limit = f"{Image.MAX_IMAGE_PIXELS}, which is Pillow's own limit"
            raise ConfigError(f"{variable('media_max_pixels')}: {self.media_max_pixels} is more than {limit}")
        self.networks()

    def networks(self) -> tuple[ipaddress.IPv4Network | ipaddress.IPv6Network, ...]:
        """Parse `media_allow_networks`."""
        try:
            return tuple(ipaddress.ip_network(text) for text in self.media_allow_networks)
        except ValueError as error:
            raise ConfigError(f"{variable('media_allow_networks')}: {error}") from error
