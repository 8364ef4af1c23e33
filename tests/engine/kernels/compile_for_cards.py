"""Compiles the kernels of a decoder layer for a card as their wrappers launch them; prints what each takes.

    PYTHONPATH=.:tests python tests/engine/kernels/compile_for_cards.py CAPABILITY BYTES [BITS ...]

CAPABILITY is 80, 86, 89, 90 or 120, BYTES the shared memory that a program may have on such a card, BITS formats of the
weights: 4, 8, 16; or 432, 464, 4128, 832, ..: bits and groups of what others have quantised. A line of JSON for each
kernel that was compiled: [name, bytes of shared memory, stages, format, rows]. Needs no GPU, and no memory: tensors
have no values. A program of its own: Triton is told once a process whether it compiles or interprets.
"""

import json
import sys
from typing import Any

import torch
from no_driver import NoDriver
from torch import Tensor
from triton.backends.nvidia.compiler import CUDABackend
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from services.engine.kernels.ops import Ops
from services.engine.kernels.quantize import Bits, Weight, foreign, quantize
from services.engine.kernels.reference.experts import ExpertPool
from services.engine.kernels.reference.mlp import SwiGLU
from services.engine.kernels.reference.moe import MoE
from services.engine.kernels.reference.paged_attention import PagedSequences
from services.engine.kernels.triton.common import launch
from services.engine.kernels.triton.invariant.ops import invariant_ops
from services.engine.kernels.triton.moe import grouped
from services.engine.kernels.triton.ops import gpu_ops, gpu_sampling_ops

HIDDEN, HEADS, KV_HEADS, DIM, EXPERTS, TOP_K, PAGE, VOCABULARY = 2560, 20, 4, 128, 64, 6, 64, 103424
TEXT, VISION, SHARED = 1536, 512, 3072
# Rows of a step, on either side of what wrappers choose by: see linear.py, tiles.py, grouped.py.
DECODE, PREFILL = (1, 16, 32, 64, 128, 256), (64, 1024, 2048, 8192)
HOPPER = 90


class Compiler:
    """Stands for launches: each is compiled, and reported if its kernel is new."""

    def __init__(self) -> None:
        self.case: tuple[int, int] = (0, 0)  # bits and rows
        self._seen: set[str] = set()
        self._launch = JITFunction.run

    def __call__(self, function: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        kernel = self._launch(function, *args, grid=grid, warmup=True, **options)
        if kernel.hash not in self._seen:
            self._seen.add(kernel.hash)
            assert ".target sm_" in kernel.asm["ptx"]
            said = [function.__name__, kernel.metadata.shared, kernel.metadata.num_stages, *self.case]
            print(json.dumps(said), flush=True)
        return kernel


def main() -> None:
    capability, limit, *formats = map(int, sys.argv[1:])
    driver.set_active(NoDriver(capability))
    able = capability >= HOPPER
    launch._options = lambda device: {"PDL": able, "launch_pdl": able}  # type: ignore[assignment]
    launch.shared_memory_bytes = lambda: limit  # type: ignore[assignment]
    CUDABackend.make_cubin = lambda *_: b""  # the assembler's part, which takes as long as all others
    compiler = Compiler()
    JITFunction.run = lambda self, *args, **options: compiler(self, *args, **options)
    with torch.device("meta"):
        for bits in formats:
            layer = Layer(bits)
            for prefill, sizes in ((False, DECODE), (True, PREFILL)):
                for rows in sizes:
                    compiler.case = (bits, rows)
                    layer.run(gpu_ops(), rows, prefill)
            for rows in (1, 8192):
                compiler.case = (bits, rows)
                layer.run(invariant_ops(), rows, prefill=True)
        compiler.case = (0, 2)
        sampling()


def room(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.empty(shape, dtype=dtype)


def weight(bits: int, *shape: int) -> Weight:
    formats: dict[int, Bits] = {4: 4, 8: 8}
    if bits > 16:
        own, group = (4 if str(bits)[0] == "4" else 8), int(str(bits)[1:])
        groups = room(*shape[:-1], -(-shape[-1] // group))
        return foreign(room(*shape, dtype=torch.int8), groups, groups.to(torch.int32), group, formats[own])
    return quantize(room(*shape), formats[bits]) if bits in formats else room(*shape)


class Layer:
    """Weights of a layer of the published model, whose experts have the format `bits`."""

    def __init__(self, bits: int) -> None:
        dense = 8 if bits == 4 else bits
        self._qkv = weight(dense, (HEADS + 2 * KV_HEADS) * DIM, HIDDEN)
        self._out = weight(dense, HIDDEN, HEADS * DIM)
        text, vision = (
            ExpertPool(weight(bits, EXPERTS, 2 * width, HIDDEN), weight(bits, EXPERTS, HIDDEN, width))
            for width in (TEXT, VISION)
        )
        shared = SwiGLU(weight(dense, 2 * SHARED, HIDDEN), weight(dense, HIDDEN, SHARED))
        gate, bias = (room(*shape, dtype=torch.float32) for shape in ((2 * EXPERTS, HIDDEN), (2 * EXPERTS,)))
        self._moe = MoE(gate, bias, text, vision, shared)
        self._norm = room(HIDDEN)
        self._cache = room(64, PAGE, KV_HEADS, DIM)

    def run(self, ops: Ops, rows: int, prefill: bool) -> None:
        """Launch all of a step: of `rows` sequences that decode, or of one prompt."""
        x, angles, ids = room(rows, HIDDEN), room(rows, DIM // 2, dtype=torch.float32), room(rows, dtype=torch.int64)
        ops.rms_norm(x, self._norm, 1e-5)
        ops.rotary_tables(ids.expand(3, rows), room(DIM // 2, dtype=torch.float32), room(DIM // 2, dtype=torch.int64))
        query = ops.qkv(x, self._qkv, angles, angles, self._cache, self._cache, ids, None)
        sequences, longest = (1, rows) if prefill else (rows, 1)
        tables, starts = (room(*shape, dtype=torch.int32) for shape in ((sequences, 512), (sequences + 1,)))
        paged = PagedSequences(tables, starts, starts[1:], longest, 4096)
        out = ops.paged_attention(query, self._cache, self._cache, paged, 0.1, None, None)
        out, vision = out.view(rows, HEADS * DIM), room(rows, dtype=torch.bool)
        for spare in (True, False) if prefill else (True,):
            grouped.has_memory_for_copies = lambda device, spare=spare: spare  # type: ignore[misc]
            ops.linear_moe_add_norm(out, self._out, x, self._norm, self._moe, vision, TOP_K, self._norm, 1e-5)


def sampling() -> None:
    ops, probs, numbers = gpu_sampling_ops(), room(2, VOCABULARY, dtype=torch.float32), room(2, dtype=torch.float64)
    ops.threshold(probs, numbers.float(), numbers.long(), numbers)
    ops.pick(probs, numbers.float(), numbers)
    ops.mask_logits(probs, numbers.long(), room(2, VOCABULARY // 8, dtype=torch.uint8))


if __name__ == "__main__":
    main()
