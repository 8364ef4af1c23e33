"""Settings: strict, and named in what they refuse."""

import json
from pathlib import Path

import pytest

from services.mm_encoder.media.normalisation import Normalisation, load_normalisation
from services.mm_encoder.media.patches import CLIP_MEAN, CLIP_STD
from services.mm_encoder.media.processor_settings import ProcessorSettings
from services.mm_encoder.media.timestamps import FONT, font_file
from services.mm_encoder.settings import MmEncoderSettings
from services.mm_encoder.vision.batcher import ENOUGH
from shared.config import load
from shared.errors import CheckpointError, ConfigError
from shared.model.config import VisionConfig

REQUIRED = {"MILLRACE_REDIS_URL": "redis://x", "MILLRACE_MODEL": "/m", "MILLRACE_NAME": "a"}
KWARGS = "MILLRACE_MM_PROCESSOR_KWARGS"


def settings(**variables: str) -> MmEncoderSettings:
    return load(MmEncoderSettings, REQUIRED | variables)


def test_processor_kwargs_are_fastdeploys() -> None:
    text = json.dumps({"image_max_pixels": 12845056, "video_fps": 1, "video_frames_sample": "middle"})
    kwargs = settings(**{KWARGS: text}).mm_processor_kwargs
    assert kwargs.image_max_pixels == 12845056
    assert kwargs.image_min_pixels == 3136
    assert (kwargs.video_min_pixels, kwargs.video_max_pixels) == (234416, 937664)
    assert (kwargs.frame_sampling.fps, kwargs.frame_sampling.frames_sample) == (1, "middle")


def test_small_pictures_fill_a_batch_while_another_is_encoded() -> None:
    patches = (448 // 14) ** 2
    assert settings().concurrency >= 2 * ENOUGH // patches


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ('{"image_max_pixel": 1}', "image_max_pixel`"),
        ('{"image_max_pixels": "4"}', r"image_max_pixels"),
        ('{"image_max_pixels": 4.5}', r"image_max_pixels"),
        ('{"image_max_pixels": true}', r"image_max_pixels"),
        ('{"image_max_pixels": 100}', r"image_min_pixels must be positive and at most image_max_pixels"),
        ('{"video_min_pixels": 0}', r"video_min_pixels must be positive"),
        ('{"video_frames_sample": "first"}', r"video_frames_sample"),
        ('{"video_fps": 2.5}', r"video_fps"),
        ('{"video_fps": 3, "video_target_frames": 20}', "fps must be negative"),
        ('{"video_min_frames": 200}', "min_frames must not be larger than max_frames"),
        ("[]", "array"),
        ("x", "not JSON"),
    ],
)
def test_wrong_processor_kwargs_are_errors(kwargs: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        settings(**{KWARGS: kwargs})
    assert KWARGS in str(caught.value)


def test_sizes_that_the_weights_fix_cannot_be_changed() -> None:
    vision = VisionConfig(2, 32, 2, 128, 14, 3, 2, 2, 1e-6, 1e4)
    ProcessorSettings(spatial_conv_size=2, temporal_conv_size=2).check_model(vision)
    with pytest.raises(ConfigError, match="spatial_conv_size is 4, but the model's is 2"):
        ProcessorSettings(spatial_conv_size=4).check_model(vision)
    with pytest.raises(ConfigError, match="temporal_conv_size is 1"):
        ProcessorSettings(temporal_conv_size=1).check_model(vision)


def test_networks() -> None:
    told = settings(MILLRACE_MEDIA_ALLOW_NETWORKS='["10.0.0.0/8", "fd00::/8"]')
    assert [str(network) for network in told.networks()] == ["10.0.0.0/8", "fd00::/8"]
    assert settings().networks() == ()
    with pytest.raises(ConfigError, match=r"MILLRACE_MEDIA_ALLOW_NETWORKS: .*10\.0\.0\.1/8"):
        settings(MILLRACE_MEDIA_ALLOW_NETWORKS='["10.0.0.1/8"]')


@pytest.mark.parametrize(
    ("name", "value"),
    [("MILLRACE_MEDIA_MAX_PIXELS", "90000000"), ("MILLRACE_CONCURRENCY", "0"), ("MILLRACE_MEDIA_TIMEOUT_S", "0")],
)
def test_values_out_of_range_are_named(name: str, value: str) -> None:
    with pytest.raises(ConfigError, match=name):
        settings(**{name: value})


def test_normalisation_is_the_checkpoints(tmp_path: Path) -> None:
    assert load_normalisation(tmp_path) == Normalisation(CLIP_MEAN, CLIP_STD)
    file = tmp_path / "preprocessor_config.json"
    file.write_text('{"image_mean": [0.5, 0.5, 0.5], "max_pixels": 1}')
    found = load_normalisation(tmp_path)
    assert (found.image_mean, found.image_std) == ((0.5, 0.5, 0.5), CLIP_STD)
    assert found.identity != Normalisation().identity


@pytest.mark.parametrize("text", ['{"image_mean": [0.5]}', '{"image_std": [0.5, 0.5, 0]}', '{"image_mean": "x"}', "{"])
def test_broken_normalisation_is_an_error(tmp_path: Path, text: str) -> None:
    (tmp_path / "preprocessor_config.json").write_text(text)
    with pytest.raises(CheckpointError, match="preprocessor_config"):
        load_normalisation(tmp_path)


def test_the_checkpoints_font_comes_first(tmp_path: Path) -> None:
    packaged, own = font_file(tmp_path)
    assert not own
    assert packaged[:4] == b"\0\1\0\0"
    (tmp_path / FONT).write_bytes(packaged + b"own")
    assert font_file(tmp_path) == (packaged + b"own", True)


@pytest.mark.parametrize("content", [b"", b"own", b"version https://git-lfs.github.com/spec/v1\n"])
def test_a_checkpoints_font_that_is_none_is_refused(tmp_path: Path, content: bytes) -> None:
    """Else every video would fail."""
    (tmp_path / FONT).write_bytes(content)
    with pytest.raises(CheckpointError, match=f"{FONT} is no font that can be read"):
        font_file(tmp_path)
