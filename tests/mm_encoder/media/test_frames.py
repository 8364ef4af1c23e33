"""Which frames are shown: FastDeploy's rules, by hand and by properties."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from oracle import Model  # noqa: F401 - makes transformers importable
from transformers.models.ernie4_5_vl_moe.video_processing_ernie4_5_vl_moe import Ernie4_5_VLMoeVideoProcessor
from transformers.video_utils import VideoMetadata

from services.mm_encoder.media.frames import FrameSampling, FramesSample, frame_indices, override
from services.mm_encoder.media.processor_settings import ProcessorSettings
from shared.messages import VideoOptions

SERVER = ProcessorSettings().frame_sampling


def indices(total: int, fps: float, sampling: FrameSampling = SERVER, seed: int = 0) -> list[int]:
    return frame_indices(total, fps, sampling, seed=seed, most=1000)


def sampling(**changes: object) -> FrameSampling:
    return override(SERVER, VideoOptions(**changes))  # type: ignore[arg-type]


def test_a_short_video_shows_the_least_number_of_frames() -> None:
    """100 frames at 25 a second are 8 frames at 2 a second: fewer than 16, so 16 equal stretches."""
    assert indices(100, 25.0) == [0, 6, 12, 18, 25, 31, 37, 43, 50, 56, 62, 68, 75, 81, 87, 93]


def test_a_long_video_shows_the_greatest_number_of_frames() -> None:
    shown = indices(30 * 600, 30.0)
    assert len(shown) == 180
    assert shown == [100 * i for i in range(180)]


def test_in_between_the_rate_decides() -> None:
    assert indices(30 * 20, 30.0) == [15 * i for i in range(40)]
    assert indices(999, 29.97, sampling(fps=2.5))[:4] == [round(i * 0.4 * 29.97) for i in range(4)]


def test_fewer_frames_than_wanted_are_all_shown() -> None:
    assert indices(5, 10.0) == [0, 1, 2, 3, 4]


@pytest.mark.parametrize(("total", "fps"), [(100, 25), (48, 24), (640, 32), (400, 10), (3600, 10)])
def test_leading_equals_transformers_where_stretches_are_whole(total: int, fps: int) -> None:
    judge = Ernie4_5_VLMoeVideoProcessor()
    expected = judge.sample_frames(VideoMetadata(total_num_frames=total, fps=fps), fps=2)
    assert indices(total, float(fps)) == torch.as_tensor(expected).tolist()


@pytest.mark.parametrize(("sample", "expected"), [("leading", [0, 25, 50, 75]), ("middle", [12, 37, 62, 87])])
def test_a_number_of_frames(sample: FramesSample, expected: list[int]) -> None:
    asked = sampling(target_frames=4, min_frames=1, frames_sample=sample)
    assert indices(100, 25.0, asked) == expected


def test_middle_by_rate_is_half_a_step_later() -> None:
    assert indices(300, 10.0, sampling(frames_sample="middle"))[:3] == [
        2,
        8,
        12,
    ]  # around(2.5, 7.5, 12.5), half to even


@given(
    st.integers(1, 2000),
    st.floats(1, 60),
    st.floats(0.1, 10),
    st.integers(0, 2**63),
    st.sampled_from(["rand", "middle"]),
)
def test_what_is_drawn_lies_in_its_stretch_and_is_repeatable(
    total: int, source: float, fps: float, seed: int, sample: FramesSample
) -> None:
    asked = sampling(fps=fps, frames_sample=sample)
    shown = indices(total, source, asked, seed)
    assert shown == indices(total, source, asked, seed)
    assert shown == sorted(shown)
    assert all(0 <= index < total for index in shown)
    assert len(shown) <= 180


def test_another_seed_draws_other_frames() -> None:
    asked = sampling(frames_sample="rand")
    assert indices(3000, 30.0, asked, 1) != indices(3000, 30.0, asked, 2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"fps": 1.0, "target_frames": 20}, "fps must be negative"),
        ({"target_frames": 3}, "smaller than min_frames"),
        ({"target_frames": 181}, "larger than max_frames"),
        ({"min_frames": 200}, "larger than max_frames"),
        ({"fps": -1.0}, "must be positive"),
        ({"fps": 0.0}, "must be positive"),
        ({"fps": float("nan")}, "finite"),
        ({"fps": float("inf")}, "finite"),
    ],
)
def test_contradictions_are_errors(options: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        override(SERVER, VideoOptions(**options))  # type: ignore[arg-type]


def test_a_rate_without_a_bound_is_bounded() -> None:
    with pytest.raises(ValueError, match="more than 1000"):
        indices(1000, 10.0, sampling(fps=1e9, max_frames=-1))


def test_the_item_chooses_the_mode() -> None:
    by_count = ProcessorSettings(video_target_frames=20).frame_sampling
    assert (by_count.fps, by_count.target_frames) == (-1, 20)
    assert override(by_count, VideoOptions(fps=3.0)).target_frames == -1
    assert override(SERVER, VideoOptions(target_frames=32)).fps == -1
    assert np.isclose(override(SERVER, VideoOptions(fps=3.0)).fps, 3.0)
