"""Steps with prefill as captured pieces: a step is a few graphs, with each layer's attention launched between two.

Launching such a step kernel by kernel takes the host 20 ms and more, whatever its size. All of a step but attention
depends on the number of its rows alone. So steps are padded to some numbers of rows, and for each of these, what stands
between two attentions is captured. Attention is launched with the step's own shapes, a kernel or two a layer.

All pieces share one pool of memory and are replayed in the order in which they were captured, one number of rows at a
time, so they use it over and over. Padding writes to a block that belongs to no sequence, and nobody reads its results.
"""

from collections.abc import Callable
from typing import Protocol, TypeVar

import torch
from torch import Tensor

from services.engine.kernels.memory_budget import has_spare_memory
from services.engine.model.inputs import KVCache, Stream
from services.engine.run.step import HostStep, Model, fill_in_flight

# Launching a step whole was seen to take a host 26 to 66 ms: 66 for 2,048 rows, which the device computes in 31, and 40
# to 54 for 2,703, the prompt of a picture of 1080p. By these, so many rows take the device about 60 ms.
CAPTURED_ROWS = 4096
# Sizes are multiples of the second number up to the first one. Steps that were not captured are padded to multiples of
# ALIGNMENT, since kernels are compiled once more for numbers of rows that are not.
SPACING = ((128, 16), (256, 32), (512, 64), (1280, 128), (CAPTURED_ROWS, 256))
ALIGNMENT = 16
GRAPH_BYTES = 200 << 10  # of the device, that the driver keeps for a piece

Replay = Callable[[], object]
Made = TypeVar("Made", bound=tuple[Tensor, ...])


class Recorder(Protocol):
    """Makes something of device work that does it again."""

    def record(self, compute: Callable[[], Made]) -> tuple[Made, Replay]:
        """Return what `compute` has made, and what makes it again, in the same memory."""


def captured_sizes(max_rows: int) -> tuple[int, ...]:
    """Return the numbers of rows to capture, for steps of up to `max_rows`."""
    sizes, size = [], 0
    for last, spacing in SPACING:
        while size < min(last, max_rows):
            size += spacing
            sizes.append(size)
    return tuple(sizes)


def padded_rows(rows: int, captured_rows: int) -> int:
    """Return the number of rows that a step of so many is padded to.

    Args:
        captured_rows: of the largest step that was captured. Beyond, more padding than kernels ask for gains nothing.
    """
    spacing = next((spacing for last, spacing in SPACING if rows <= min(last, captured_rows)), ALIGNMENT)
    return -(-rows // spacing) * spacing


def rows_to_capture(device: torch.device, max_rows: int) -> int:
    """Return the rows of the largest step to capture: none where memory is short, and the cache needs all of it."""
    return max_rows if has_spare_memory(device) else 0


def pieces_bytes(captured_rows: int, max_rows: int, activations: int, row_bytes: int, num_layers: int) -> int:
    """Return the device memory that captured pieces keep, at most.

    Args:
        captured_rows: of the largest step to capture, as `rows_to_capture` returns them.
        activations: bytes that a step of `max_rows` rows needs at its peak.
        row_bytes: of a row between two layers.
    """
    sizes = captured_sizes(captured_rows)
    if not sizes:
        return 0
    # As many rows again pad the tiles of experts.
    pool = activations * min(2 * sizes[-1], max_rows) // max_rows
    return 4 * sizes[-1] * row_bytes + pool + len(sizes) * (num_layers + 1) * GRAPH_BYTES


class PieceInputs:
    """Inputs of the pieces of one number of rows, at addresses that never change."""

    def __init__(self, rows: int, device: torch.device) -> None:
        self._longs = torch.zeros(5, rows, dtype=torch.int64, device=device)
        self.token_ids, self.positions, self.slots = self._longs[0], self._longs[1:4], self._longs[4]
        self.vision = torch.zeros(rows, dtype=torch.bool, device=device)

    def upload(self, step: HostStep, last_tokens: Tensor, image_patch_id: int) -> None:
        """Upload a step of just as many rows."""
        host = torch.empty(self._longs.shape, dtype=torch.int64, pin_memory=self._longs.is_cuda)
        room = host.numpy()
        room[0], room[1:4], room[4] = step.token_ids, step.positions, step.slots
        self._longs.copy_(host, non_blocking=True)
        fill_in_flight(self.token_ids, step, last_tokens)
        torch.ge(self.token_ids, image_patch_id, out=self.vision)


class StepPieces:
    """Captured pieces of the steps of one model and cache."""

    def __init__(
        self,
        model: Model,
        cache: KVCache,
        last_tokens: Tensor,
        spare_block: int,
        max_rows: int,
        image_patch_id: int,
        recorder: Recorder,
    ) -> None:
        """Capture. Launches of every size are compiled on the way, so this takes a while.

        Args:
            last_tokens: sampled by the last step, at an address that never changes.
            spare_block: a block of the cache that no sequence is ever given.
            max_rows: of the largest step to capture; 0: all are launched whole.
        """
        self._model, self._cache, self._last_tokens = model, cache, last_tokens
        self._spare_block, self._image_patch_id = spare_block, image_patch_id
        self._recorder = recorder
        self._layers = tuple(zip(cache.keys.unbind(), cache.values.unbind(), strict=True))
        self.sizes = captured_sizes(max_rows)
        self._most = max(self.sizes, default=0)
        self._heads = model.attention_buffers(self._most)
        hidden = (self._most, model.hidden_size)
        self._residual, self._x = (torch.zeros(hidden, dtype=model.dtype, device=model.device) for _ in range(2))
        # The largest first: the smaller ones find enough memory in its pool.
        self._pieces = {size: self._capture(size) for size in reversed(self.sizes)}

    def captures(self, step: HostStep) -> bool:
        """Return True if the step's size was captured."""
        return len(step.token_ids) <= self._most

    def hidden(self, step: HostStep) -> Tensor:
        """Return [N, hidden] of the step's rows, valid until the next call. Returns while the device computes."""
        rows, device, block_size = len(step.token_ids), self._model.device, self._cache.block_size
        size = padded_rows(rows, self._most)
        padded = step.padded(size, self._spare_block, block_size)
        if not self.captures(step):
            moved = padded.to(device, block_size, self._last_tokens, self._image_patch_id)
            return self._model.hidden(moved, self._cache)[:rows]
        inputs, replays = self._pieces[size]
        inputs.upload(padded, self._last_tokens, self._image_patch_id)
        self._residual[:size].copy_(self._model.embed(inputs.token_ids, *padded.media(device)))
        calls = [(part, self._heads.of(part)) for part in step.attention(device, block_size)]
        replays[0]()
        for (keys, values), replay in zip(self._layers, replays[1:], strict=True):
            self._model.attend(calls, keys, values)
            replay()
        return self._x[:rows]

    def _capture(self, size: int) -> tuple[PieceInputs, list[Replay]]:
        model, cache, record = self._model, self._cache, self._recorder.record
        inputs, heads = PieceInputs(size, model.device), self._heads.first(size)

        def first() -> Stream:
            x, stream = model.begin(self._residual[:size], inputs.positions)
            model.project_qkv(0, x, stream, inputs.slots, cache, heads.query)
            return stream

        def between(nth: int, stream: Stream) -> Stream:
            x, stream = model.finish_layer(nth, heads.attended, stream, inputs.vision)
            model.project_qkv(nth + 1, x, stream, inputs.slots, cache, heads.query)
            return stream

        def last(stream: Stream) -> tuple[Tensor, ...]:
            x, _ = model.finish_layer(model.num_layers - 1, heads.attended, stream, inputs.vision)
            return (self._x[:size].copy_(x),)

        # Of what passes between two pieces no reference is kept: its memory is the pool's again behind the second one.
        stream, replay = record(first)
        replays = [replay]
        for nth in range(model.num_layers - 1):
            stream, replay = record(lambda nth=nth, stream=stream: between(nth, stream))  # type: ignore[misc]
            replays.append(replay)
        replays.append(record(lambda: last(stream))[1])
        return inputs, replays


class GraphRecorder:
    """Recorder of CUDA graphs with one pool of memory."""

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._pool = torch.cuda.graph_pool_handle()

    def record(self, compute: Callable[[], Made]) -> tuple[Made, Replay]:
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            # Run once before: a capture must not compile kernels or create the libraries' handles.
            compute()
            graph = torch.cuda.CUDAGraph()
            graph.capture_begin(self._pool, capture_error_mode="thread_local")  # other threads may call the driver
            try:
                made = compute()
            finally:
                graph.capture_end()
        torch.cuda.current_stream().wait_stream(self._stream)
        return made, graph.replay
