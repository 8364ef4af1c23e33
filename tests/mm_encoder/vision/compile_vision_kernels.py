"""Compiles the vision tower's kernels for a card as their wrappers launch them at the published size.

    PYTHONPATH=.:tests python tests/mm_encoder/vision/compile_vision_kernels.py CAPABILITY

Prints a line of JSON for each: [name, bytes of shared memory, whether it uses Hopper's matrix instructions, whether one
of these may still run when what follows it begins]. Needs no GPU, and no memory: tensors have no values. A program of
its own: Triton is told once a process whether it compiles or interprets.
"""

import json
import re
import sys
from typing import Any

import torch
from no_driver import NoDriver
from triton.backends.nvidia.compiler import CUDABackend
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from services.mm_encoder.vision.kernels import attention, rowwise
from services.mm_encoder.vision.tables import Tables
from services.mm_encoder.vision.weights import Linear

ROWS, HEADS, WIDTH, INNER = 1024, 16, 1280, 5120


def main() -> None:
    capability = int(sys.argv[1])
    driver.set_active(NoDriver(capability))
    CUDABackend.make_cubin = lambda *_: b""  # the assembler's part, which takes as long as all others
    attention.launch_for = lambda device: attention.launch(divmod(capability, 10))  # type: ignore[assignment]
    run = JITFunction.run

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        kernel = run(self, *args, grid=grid, warmup=True, **options)
        hopper = "wgmma.mma_async" in kernel.asm["ptx"]
        runs_on = re.search(r"pendings = [1-9]", kernel.asm["ttgir"]) is not None
        print(json.dumps([self.__name__, kernel.metadata.shared, hopper, runs_on]))
        return kernel

    JITFunction.run = compile_only
    with torch.device("meta"), torch.inference_mode():
        tower()


def tower() -> None:
    def room(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype)

    angle = room(ROWS, WIDTH // HEADS // 2, dtype=torch.float32)
    tables = Tables((), room(8, 3, dtype=torch.int32), angle, angle, room(ROWS // 4, 2, dtype=torch.int64))
    rowwise.rotate(room(ROWS, 3 * WIDTH), HEADS, tables)
    attention.attend(room(ROWS, 3 * WIDTH), HEADS, tables)
    norm = Linear(room(WIDTH), room(WIDTH))
    rowwise.add_norm(room(ROWS, WIDTH), None, norm, 1e-6)
    rowwise.add_norm(room(ROWS, WIDTH), room(ROWS, WIDTH), norm, 1e-6)
    rowwise.quick_gelu(room(ROWS, INNER))


if __name__ == "__main__":
    main()
