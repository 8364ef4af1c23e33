"""What the vision model takes, by arithmetic, against what a pass at the published size holds: on torch's meta device,
where tensors have sizes and no contents."""

import weakref
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks.engine import CONFIG
from services.mm_encoder.media.patches import Grid
from services.mm_encoder.vision import weights
from services.mm_encoder.vision.encoder import Encoder
from services.mm_encoder.vision.memory import CONTEXT_BYTES, GRAPH_PATCHES, device_bytes, pass_bytes, weight_bytes
from services.mm_encoder.vision.ops import Ops
from services.mm_encoder.vision.tables import host_tables, to_device


class Held(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the bytes of live tensors that are made while it is on."""

    def __init__(self, known: list[Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
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


CARD = Ops(  # a device's kernels make nothing but their results
    add_norm=lambda x, more, norm, eps: torch.empty_like(x),
    rotate=lambda qkv, heads, tables: None,
    attend=lambda qkv, heads, tables: qkv[:, : qkv.shape[1] // 3],
    quick_gelu=lambda x: None,
)


def test_weights(vision: weights.VisionWeights) -> None:
    assert weight_bytes(CONFIG) == sum(tensor.nbytes for tensor in tensors(vision))


@pytest.mark.parametrize("grids", [[(1, 240, 272)], [(1, 158, 156)], [(1, 32, 32)] * 32, [(16, 46, 44)]])
def test_a_pass_holds_what_is_said_and_no_more(vision: weights.VisionWeights, grids: list[Grid]) -> None:
    patches = sum(t * h * w for t, h, w in grids)
    encoder = Encoder(vision, CONFIG, "meta", patches, (0.5,) * 3, (0.5,) * 3, ops=CARD)
    with torch.inference_mode(), Held(list(tensors(vision))) as held:
        embedded = encoder._embed(torch.empty(patches, 588, dtype=torch.uint8, device="meta"))
        encoder._run(embedded, to_device(host_tables(grids, CONFIG.vision), CONFIG.vision, torch.device("meta")))
    assert 0.99 * pass_bytes(CONFIG, patches) <= held.most <= 1.01 * pass_bytes(CONFIG, patches)


def test_a_device_holds_the_weights_a_pass_and_the_context() -> None:
    parts = weight_bytes(CONFIG) + pass_bytes(CONFIG, 65280) + pass_bytes(CONFIG, GRAPH_PATCHES) + CONTEXT_BYTES
    assert device_bytes(CONFIG, 65280) == parts < 2.7 * 2**30, "what docs/operations.md says"
