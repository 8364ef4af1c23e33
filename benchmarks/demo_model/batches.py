"""Samples as batches of tensors: one optimizer step is a few padded batches of samples of like length."""

import random
from bisect import bisect_left
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from benchmarks.demo_model import corpus, draw
from benchmarks.demo_model.prompt import MERGE, Encoded, Encoder

Batch = dict[str, Any]  # names and tensors, as `collate` makes them
PAD_TO = 16
LENGTHS = (128, 224)  # few batches a step keep the device busy, and lengths that are alike waste little of it


class Steps(Dataset[list[Batch]]):
    """Item i is everything of optimizer step i, a function of the seed and i alone."""

    def __init__(
        self, tokenizer: Path, seed: int, length: int, *, samples: int, tokens: int, held_out: bool, phase: int = 0
    ) -> None:
        """`samples` in a step, of the mix of a phase, at most `tokens` in one of its batches, padding included."""
        self._tokenizer, self._seed, self._length = tokenizer, seed, length
        self._samples, self._tokens, self._held_out = samples, tokens, held_out
        self._phase = phase
        self._encoder: Encoder | None = None

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> list[Batch]:
        self._encoder = self._encoder or Encoder.load(self._tokenizer)
        rng = random.Random(f"{self._seed} {index} {self._held_out}")
        # One canvas for the step, so that all pictures have as many patches.
        size = rng.choice(draw.CANVASES)
        made = [
            self._encoder.encode(corpus.sample(rng, size, held_out=self._held_out, phase=self._phase))
            for _ in range(self._samples)
        ]
        made.sort(key=lambda each: len(each.ids))
        return [collate(group, self._encoder.patch_id) for group in _groups(made, self._tokens)]


def _groups(made: list[Encoded], tokens: int) -> Iterator[list[Encoded]]:
    """Neighbours by length, as many as fit, of one class of lengths."""
    for _, class_ in groupby(made, key=lambda each: bisect_left(LENGTHS, len(each.ids))):
        group: list[Encoded] = []
        for each in class_:
            if group and (len(group) + 1) * _padded(len(each.ids)) > tokens:
                yield group
                group = []
            group.append(each)
        yield group


def _padded(length: int) -> int:
    return -(-length // PAD_TO) * PAD_TO


def collate(group: list[Encoded], patch_id: int) -> Batch:
    """One padded batch. Indexes are into its flattened tokens."""
    width = _padded(max(len(each.ids) for each in group))
    ids = np.zeros((len(group), width), np.int64)
    places = np.zeros((3, len(group), width), np.int64)
    real, predict, labels, owners = [], [], [], []
    for i, each in enumerate(group):
        n = len(each.ids)
        ids[i, :n], places[:, i, :n] = each.ids, each.positions
        real.append(i * width + np.arange(n))
        predict.append(i * width + np.arange(each.answer_at - 1, n - 1))
        labels.append(each.ids[each.answer_at :])
        owners.append(np.full(n - each.answer_at, i))
    tokens = np.concatenate(real)
    routed = ids.reshape(-1)[tokens] >= patch_id
    batch: Batch = {
        "ids": ids,
        "positions": places,
        "text": tokens[~routed],
        "vision": tokens[routed],
        "predict": np.concatenate(predict),
        "labels": np.concatenate(labels),
        "owners": np.concatenate(owners),
    }
    if any(each.media for each in group):
        batch |= _pictures(group)
        batch["places"] = np.flatnonzero(ids.reshape(-1) == patch_id)
    tensors: Batch = {name: torch.from_numpy(value) for name, value in batch.items()}
    return tensors | {"kinds": [each.kind for each in group]}


def _pictures(group: list[Encoded]) -> dict[str, NDArray[Any]]:
    """Patches of all frames, where each is in its frame, and which merged patches make a token of two frames."""
    rows, first, second, frames = [], [], [], 0
    grids = {(media.grid[1], media.grid[2]) for each in group for media in each.media}
    ((height, width),) = grids
    tokens = height * width // MERGE**2
    for each in group:
        for media in each.media:
            rows.append(media.rows)
            count = media.grid[0]
            step = 2 if count > 1 else 1
            for frame in range(frames, frames + count, step):
                first.append(frame * tokens + np.arange(tokens))
                second.append((frame + step - 1) * tokens + np.arange(tokens))
            frames += count
    place = np.stack(_frame_positions(height, width), -1)
    return {
        "pixels": np.concatenate(rows),
        "patches": np.tile(place, (frames, 1)),
        "frame": np.array([height * width]),
        "first": np.concatenate(first),
        "second": np.concatenate(second),
    }


def _frame_positions(height: int, width: int) -> tuple[NDArray[Any], NDArray[Any]]:
    """Row and column of each patch, in the order of patch_rows."""
    rows, columns = np.indices((height, width))
    shape = (height // MERGE, MERGE, width // MERGE, MERGE)
    return (
        rows.reshape(shape).transpose(0, 2, 1, 3).reshape(-1),
        columns.reshape(shape).transpose(0, 2, 1, 3).reshape(-1),
    )


def to_device(batch: Batch, device: torch.device) -> Batch:
    """The batch with its tensors on `device`; the size of a frame stays on the host."""
    return {
        name: value.to(device, non_blocking=True) if isinstance(value, Tensor) and name != "frame" else value
        for name, value in batch.items()
    }
