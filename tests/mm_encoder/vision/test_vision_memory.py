"""What the vision model takes, by arithmetic, against what a pass at the published size holds: on torch's meta device,
where tensors have sizes and no contents."""

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks.engine import CONFIG
from services.mm_encoder.media.patches import Grid
from services.mm_encoder.vision import weights
from services.mm_encoder.vision.encoder import Encoder
from services.mm_encoder.vision.memory import CONTEXT_BYTES, device_bytes, pass_bytes, weight_bytes


class Held(TorchDispatchMode):
    """Counts the bytes of live tensors that are made while it is on."""

    def __init__(self, known: list[Tensor]) -> None:
        super().__init__()
        self._known = {tensor.untyped_storage()._cdata for tensor in known}
        self._now = self.most = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = function(*args, **(kwargs or {}))
        for made in tree_leaves(out):
            if isinstance(made, Tensor):
                self._note(made.untyped_storage())
        return out

    def _note(self, storage: Any) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key not in self._known:
            self._known.add(key)
            self._now += size
            self.most = max(self.most, self._now)
            weakref.finalize(storage, self._forget, key, size)

    def _forget(self, key: int, size: int) -> None:
        self._known.discard(key)
        self._now -= size


class OnMeta(weights._Reader):
    def tensor(self, name: str, *shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.bfloat16, device="meta")


def tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, tuple):
        for each in value:
            yield from tensors(each)
    else:
        for name in getattr(value, "__slots__", ()):
            yield from tensors(getattr(value, name))


@pytest.fixture(scope="module")
def vision() -> weights.VisionWeights:
    reader = OnMeta(None, torch.bfloat16, "meta")  # type: ignore[arg-type]
    return weights.VisionWeights(weights._tower(reader, CONFIG), weights._resampler(reader, CONFIG), b"")


@contextmanager
def flash_attention() -> Iterator[None]:
    """The device's kernel makes nothing but its result; what stands for it on meta would make all scores."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(F, "scaled_dot_product_attention", lambda q, k, v: torch.empty_like(q))
        yield


def test_weights(vision: weights.VisionWeights) -> None:
    assert weight_bytes(CONFIG) == sum(tensor.nbytes for tensor in tensors(vision))


@pytest.mark.parametrize("grids", [[(1, 240, 272)], [(1, 158, 156)], [(1, 32, 32)] * 32, [(16, 46, 44)]])
def test_a_pass_holds_what_is_said_and_no_more(vision: weights.VisionWeights, grids: list[Grid]) -> None:
    patches = sum(t * h * w for t, h, w in grids)
    encoder = Encoder(vision, CONFIG, "meta", patches, (0.5,) * 3, (0.5,) * 3)
    rows = torch.empty(patches, 588, dtype=torch.uint8, device="meta")
    with torch.inference_mode(), flash_attention(), Held([rows, *tensors(vision)]) as held:
        encoder._run(rows, grids)
    assert 0.99 * pass_bytes(CONFIG, patches) <= held.most <= 1.01 * pass_bytes(CONFIG, patches)


def test_a_device_holds_the_weights_a_pass_and_the_context() -> None:
    parts = weight_bytes(CONFIG) + pass_bytes(CONFIG, 65280) + CONTEXT_BYTES
    assert device_bytes(CONFIG, 65280) == parts < 2.7 * 2**30, "what docs/operations.md says"
