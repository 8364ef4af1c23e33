"""Choice of the frames of a video that the model sees: FastDeploy's sampling, as functions of numbers."""

import math
from itertools import pairwise
from typing import Literal

import msgspec
import numpy as np

from shared.messages import VideoOptions

FramesSample = Literal["leading", "middle", "rand"]


class FrameSampling(msgspec.Struct, frozen=True):
    """Number of frames, and the one taken from each stretch. Exactly one of `fps` and `target_frames` is positive."""

    fps: float
    min_frames: int
    max_frames: int
    target_frames: int
    frames_sample: FramesSample


def override(server: FrameSampling, item: VideoOptions) -> FrameSampling:
    """One item's sampling. Whichever of fps and target_frames the item asks for replaces the server's choice of mode.

    Raises:
        ValueError: the options contradict each other.
    """
    fps = server.fps if item.fps is None else float(item.fps)
    target = server.target_frames if item.target_frames is None else item.target_frames
    if item.target_frames is not None and item.target_frames > 0 and item.fps is None:
        fps = -1
    if item.fps is not None and item.fps > 0 and item.target_frames is None:
        target = -1
    merged = FrameSampling(
        fps=fps,
        min_frames=server.min_frames if item.min_frames is None else item.min_frames,
        max_frames=server.max_frames if item.max_frames is None else item.max_frames,
        target_frames=target,
        frames_sample=server.frames_sample if item.frames_sample is None else item.frames_sample,
    )
    check(merged)
    return merged


def check(sampling: FrameSampling) -> None:
    """
    Raises:
        ValueError: the numbers contradict each other; the rules and words are FastDeploy's.
    """
    low, high, target = sampling.min_frames, sampling.max_frames, sampling.target_frames
    if not math.isfinite(sampling.fps):
        raise ValueError("fps must be a finite number")
    if target <= 0 and sampling.fps <= 0:
        raise ValueError("either fps or target_frames must be positive")
    if target > 0 and sampling.fps >= 0:
        raise ValueError("fps must be negative if target_frames is given")
    if 0 < high < low:
        raise ValueError("min_frames must not be larger than max_frames")
    if target > 0 and low > 0 and target < low:
        raise ValueError("target_frames must not be smaller than min_frames")
    if target > 0 and high > 0 and target > high:
        raise ValueError("target_frames must not be larger than max_frames")


def frame_indices(total: int, source_fps: float, sampling: FrameSampling, *, seed: int, most: int) -> list[int]:
    """Indices, ascending, perhaps repeated, of the frames to show out of `total` at `source_fps`.

    "rand" draws from `seed`, so that a video's frames are a function of its bytes and options.

    Raises:
        ValueError: more than `most` frames, which takes a client's own fps without max_frames.
    """
    draw = np.random.default_rng(seed)
    target = _target(total / source_fps, sampling)
    if target > 0:
        return _by_count(total, min(target, total), sampling.frames_sample, draw)
    if total / source_fps * sampling.fps > most:
        raise ValueError(f"fps would show more than {most} frames")
    return _by_time(total, source_fps, sampling.fps, sampling.frames_sample, draw)


def _target(seconds: float, sampling: FrameSampling) -> int:
    """The number of frames where it is fixed, else -1: asked for, or the bound that the rate alone would break."""
    if sampling.target_frames > 0:
        return sampling.target_frames
    by_rate = int(seconds * sampling.fps)
    if sampling.min_frames > 0 and by_rate < sampling.min_frames:
        return sampling.min_frames
    if sampling.max_frames > 0 and by_rate > sampling.max_frames:
        return sampling.max_frames
    return -1


def _by_count(total: int, count: int, sample: FramesSample, draw: np.random.Generator) -> list[int]:
    edges = np.linspace(0, total, count + 1).astype(int).tolist()
    stretches = list(pairwise(edges))
    if sample == "leading":
        return [left for left, _ in stretches]
    if sample == "middle":
        return [(left + right - 1) // 2 for left, right in stretches]
    return [int(draw.integers(left, right)) for left, right in stretches]


def _by_time(total: int, source_fps: float, fps: float, sample: FramesSample, draw: np.random.Generator) -> list[int]:
    seconds, step = total / source_fps, 1 / fps
    first = 0 if sample == "leading" else step / 2
    at = np.arange(first, seconds + first, step)
    if sample == "rand":
        at = at + (draw.random(at.shape) - 0.5) * step
    return [index for index in np.around(at * source_fps).astype(int).tolist() if index < total]
