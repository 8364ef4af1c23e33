"""Compiles kernels for an H200 as their wrappers launch them, of sampling and of a decode step; prints their names.

Needs no GPU. A program of its own: Triton is told once a process whether it compiles or interprets.
"""

from typing import Any

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from services.engine.kernels.gpu import linear, mlp, paged_attention, pick, qkv, router, threshold
from services.engine.kernels.quantize import Quantized

SEQUENCES, HIDDEN, HEADS, KV_HEADS, DIM, EXPERTS = 1, 2560, 20, 4, 128, 64


class NoDriver:
    """What compiling asks of a driver."""

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


def main() -> None:
    launch = JITFunction.run

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        kernel = launch(self, *args, grid=grid, warmup=True, **options)
        assert "cubin" in kernel.asm
        print(self.__name__)
        return kernel

    JITFunction.run = compile_only
    driver.set_active(NoDriver())
    for module in (linear, paged_attention, pick, router, threshold):
        module.overlapped = lambda tensor: {"PDL": True, "launch_pdl": True}  # type: ignore[attr-defined]
    probs, zeros = torch.zeros(2, 103424), torch.zeros(2)
    threshold.threshold(probs, zeros, zeros.long(), zeros.double())
    pick.pick(probs, zeros, zeros.double())
    decode()


def decode() -> None:
    """A layer's launches for one sequence, but for its experts."""

    def zeros(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
        return torch.zeros(shape, dtype=dtype)

    def weight(outputs: int) -> Quantized:
        return Quantized(zeros(outputs, HIDDEN, dtype=torch.int8), zeros(outputs), 8, HIDDEN)

    x, angles, cache = zeros(SEQUENCES, HIDDEN), zeros(SEQUENCES, DIM // 2, dtype=torch.float32), zeros(2, 64, 4, DIM)
    slots, ints = zeros(SEQUENCES, dtype=torch.int64), zeros(SEQUENCES + 1, 40, dtype=torch.int32)
    query = qkv.qkv(x, weight((HEADS + 2 * KV_HEADS) * DIM), angles, angles, cache, cache, slots)
    paged_attention.paged_attention(query, cache, cache, ints[:-1], ints[:, 0], ints[:-1, 0], 1, 2560, 0.1)
    mlp.linear_add_norm(x, weight(HIDDEN), x, zeros(HIDDEN), 1e-5)
    gate, bias = zeros(2 * EXPERTS, HIDDEN, dtype=torch.float32), zeros(2 * EXPERTS, dtype=torch.float32)
    router.router(x, gate, bias, zeros(SEQUENCES, dtype=torch.bool), 6)


if __name__ == "__main__":
    main()
