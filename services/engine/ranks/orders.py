"""Orders of rank 0 to the other ranks, in a fixed layout: a head, the arrays' lengths, and the arrays.

The fields of each kind of order and their types are a table here, on both sides the same: nothing in an order says how
it is to be read, and nothing is executed or unpickled.
"""

import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec
import numpy as np
import torch
from numpy.typing import NDArray

from services.engine.ranks.ring import Buffer, Reader, Writer
from services.engine.run.sampling_plan import SamplingPlan
from services.engine.run.step import HostStep

SET_UP, STEP, SAMPLE, END = range(4)
_HEAD = struct.Struct("<qqqq")  # kind, tokens' steps checked, their checksum, longest query of a step
_ALIGNMENT = 16

_STEP: dict[str, Any] = {
    "token_ids": np.int64,
    "sources": np.int64,
    "positions": np.int64,
    "vision": np.bool_,
    "embed_rows": np.int64,
    "slots": np.int64,
    "query_start": np.int32,
    "context_lens": np.int32,
    "logit_rows": np.int64,
}
_BLOCKS: dict[str, Any] = {"block_bytes": np.int64, "blocks": np.uint8, "embeds": np.uint8}
# Reports are rank 0's: they change no token.
_OWN = ("wanted", "logprobs")
_SAMPLING: dict[str, Any] = {
    name: getattr(SamplingPlan(), name).dtype for name in SamplingPlan.__struct_fields__ if name not in _OWN
}


@dataclass(frozen=True, slots=True)
class Checked:
    """Tokens of the steps that rank 0 has read so far: the number of these steps, and a checksum of all tokens."""

    steps: int = 0
    checksum: int = 0


@dataclass(frozen=True, slots=True)
class Order:
    """An order, as it was read."""

    kind: int
    checked: Checked
    content: HostStep | SamplingPlan | bytes | None


class OrderWriter:
    """Sender of orders."""

    def __init__(self, writer: Writer) -> None:
        self._writer = writer
        self.checked = Checked()
        self.sent = 0

    def set_up(self, content: bytes) -> None:
        """Send the first order: the settings, as JSON."""
        self._send(SET_UP, [np.frombuffer(content, np.uint8)])

    def step(self, step: HostStep) -> None:
        """Let the ranks compute a step."""
        arrays = [getattr(step, name) for name in _STEP]
        block_bytes = np.array([len(blocks) for blocks in step.blocks], np.int64)
        blocks = np.frombuffer(b"".join(step.blocks), np.uint8)
        embeds = step.embeds.contiguous().view(torch.uint8).numpy()
        self._send(STEP, [*arrays, block_bytes, blocks, embeds], step.max_query_len)

    def sample(self, plan: SamplingPlan) -> None:
        """Let the ranks draw tokens from the logits of the step before."""
        self._send(SAMPLE, [getattr(plan, name) for name in _SAMPLING])

    def end(self) -> None:
        self._send(END, [])

    def _send(self, kind: int, arrays: Sequence[NDArray[Any]], longest: int = 0) -> None:
        lengths = np.array([array.nbytes for array in arrays], np.int64)
        head = _HEAD.pack(kind, self.checked.steps, self.checked.checksum, longest)
        self._writer.write([head, lengths.tobytes(), *_padded(len(head) + lengths.nbytes, arrays)])
        self.sent += 1


def _padded(start: int, arrays: Sequence[NDArray[Any]]) -> Iterator[Buffer]:
    """Yield the arrays' bytes, each from a multiple of the alignment on."""
    for array in arrays:
        yield bytes(-start % _ALIGNMENT)
        start += -start % _ALIGNMENT + array.nbytes
        yield np.ascontiguousarray(array).reshape(-1).view(np.uint8).data


class OrderReader:
    """Receiver of orders, for a model of this dtype and width."""

    def __init__(self, reader: Reader) -> None:
        self._reader = reader

    def read(self, dtype: torch.dtype = torch.float32, hidden_size: int = 1) -> Order:
        """Return the next order; an END when rank 0 has ended.

        Args:
            dtype, hidden_size: of the embeddings of media in a step.
        """
        message = self._reader.read()
        if message is None:
            return Order(END, Checked(), None)
        kind, steps, checksum, longest = _HEAD.unpack_from(message)
        arrays = _Arrays(message, _HEAD.size)
        content: HostStep | SamplingPlan | bytes | None = None
        if kind == SET_UP:
            content = arrays.read({"content": np.uint8})["content"].tobytes()
        elif kind == STEP:
            content = _step(arrays.read(_STEP | _BLOCKS), longest, dtype, hidden_size)
        elif kind == SAMPLE:
            content = _plan(arrays.read(_SAMPLING))
        return Order(kind, Checked(steps, checksum), content)


class _Arrays:
    """Arrays of a message, which they share."""

    def __init__(self, message: bytearray, start: int) -> None:
        self._message = message
        self._start = start

    def read(self, fields: dict[str, Any]) -> dict[str, NDArray[Any]]:
        lengths = np.frombuffer(self._message, np.int64, len(fields), self._start).tolist()
        at, found = self._start + 8 * len(fields), {}
        for (name, dtype), length in zip(fields.items(), lengths, strict=True):
            at += -at % _ALIGNMENT
            found[name] = np.frombuffer(self._message, dtype, length // np.dtype(dtype).itemsize, at)
            at += length
        assert at == len(self._message), "the message has another layout"
        return found


def _step(arrays: dict[str, NDArray[Any]], longest: int, dtype: torch.dtype, hidden_size: int) -> HostStep:
    ends = np.cumsum(arrays.pop("block_bytes")).tolist()
    blocks, embeds = arrays.pop("blocks").tobytes(), arrays.pop("embeds")
    rows = torch.from_numpy(embeds).view(dtype) if len(embeds) else torch.empty(0, dtype=dtype)
    positions = arrays.pop("positions").reshape(3, -1)
    return HostStep(
        **arrays,
        positions=positions,
        blocks=[blocks[start:end] for start, end in zip([0, *ends], ends, strict=False)],
        embeds=rows.view(-1, hidden_size),
        max_query_len=longest,
    )


def _plan(arrays: dict[str, NDArray[Any]]) -> SamplingPlan:
    rows = len(arrays["masked_rows"])
    masks = arrays.pop("masks")
    return msgspec.structs.replace(SamplingPlan(**arrays), masks=masks.reshape(rows, -1 if rows else 0))
