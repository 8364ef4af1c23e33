"""Experts' weights dequantised before they are multiplied, on a stream of their own, beside other products.

Dequantising waits for memory and the grouped products wait for arithmetic. The programs of a product leave room on each
multiprocessor for a few of those that dequantise, so both run at once if the product's were there first: a device that
is free is filled by what dequantises. The library's products and attention leave no room.

The weights of a step are taken in the order in which they are multiplied. When one is taken, the next AHEAD are begun.
"""

from collections import deque
from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor

from services.engine.kernels.experts import ExpertPool
from services.engine.kernels.gpu.dequantize import dequantize
from services.engine.kernels.quantize import Quantized, Weight

AHEAD = 1  # each more takes the memory of a whole block

Pair = tuple[Weight, Weight]  # of the text pool and of the vision pool


class Prefetch:
    """The weights of blocks of experts as plain tensors, in order: gate_up of the first block, its down, and so on.

    Memory is allocated and freed by the stream that takes the weights. It waits for the side stream before it reads
    them, and the side stream waits for it before it overwrites what it may still be reading.
    """

    def __init__(self, blocks: Sequence[tuple[ExpertPool, ExpertPool]], used: Tensor) -> None:
        """
        Args:
            blocks: the text and the vision pool of each, all blocks of the same shapes. Weights that are not quantised
                are taken as they are.
            used: [2, E] int32 on the weights' device: 0 for experts of either pool that get no row in any block. Their
                weights are not dequantised, and hold anything.
        """
        pairs = [pair for text, vision in blocks for pair in ((text.gate_up, vision.gate_up), (text.down, vision.down))]
        self._coming = deque(pairs)
        self._used = used
        self._device = used.device
        self._ready: deque[tuple[list[Tensor], torch.cuda.Event | None]] = deque()
        # Used in turn: what is begun overwrites what was taken AHEAD before, which has the same shape.
        self._rooms = deque(
            [_room(weight) for weight in pair if isinstance(weight, Quantized)] for pair in pairs[: 2 * AHEAD]
        )
        for _ in range(AHEAD):
            self._start()

    def take(self) -> list[Tensor]:
        """The next weight of the text pool and that of the vision pool, [E, out, in] each.

        For launches on the current stream, before AHEAD more are taken.

        Raises:
            IndexError: all were taken.
        """
        weights, dequantised = self._ready.popleft()
        if dequantised is not None:
            torch.cuda.current_stream(self._device).wait_event(dequantised)
        self._start()
        return weights

    def _start(self) -> None:
        """Begin with the next weights, if there are any."""
        if not self._coming:
            return
        pair = self._coming.popleft()
        quantised = [weight for weight in pair if isinstance(weight, Quantized)]
        if not quantised:  # streams cost the host time
            self._ready.append(([weight for weight in pair if isinstance(weight, Tensor)], None))
            return
        side = _side_stream(self._device)
        if side is not None:
            side.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(side):
            self._rooms.rotate(-1)
            # Most steps use no vision expert, and that launch gives the product's programs time to take their places.
            rooms = self._rooms[-1]
            vision, text = (dequantize(quantised[nth], self._used[nth], rooms[nth]) for nth in (1, 0))
        self._ready.append(([text, vision], None if side is None else side.record_event()))


@cache
def _side_stream(device: torch.device) -> torch.cuda.Stream | None:
    """None in the interpreter, where everything is done at once."""
    return torch.cuda.Stream(device) if device.type == "cuda" else None


def _room(weight: Quantized) -> Tensor:
    shape = *weight.scale.shape, weight.in_features
    return torch.empty(shape, dtype=weight.scale.dtype, device=weight.scale.device)
