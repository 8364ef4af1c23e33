"""Compiles kernels for an H200 as their wrappers launch them; prints their names. Needs no GPU.

A program of its own: Triton is told once a process whether it compiles or interprets.
"""

from typing import Any

import torch
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from services.engine.kernels.experts import ExpertPool
from services.engine.kernels.gpu import dequantize, grouped, paged_attention, pick, sort, threshold
from services.engine.kernels.quantize import quantize


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
    for module in (dequantize, grouped, paged_attention, pick, sort, threshold):
        module.overlapped = lambda tensor: {"PDL": True, "launch_pdl": True}  # type: ignore[attr-defined]
    sampling()
    prefill()


def sampling() -> None:
    probs, zeros = torch.zeros(2, 103424), torch.zeros(2)
    threshold.threshold(probs, zeros, zeros.long(), zeros.double())
    pick.pick(probs, zeros, zeros.double())


def prefill() -> None:
    """The kernels that the copy engine feeds, at the model's widths."""

    def room(*shape: int) -> Tensor:
        return torch.zeros(*shape, dtype=torch.bfloat16)

    rows, hidden = 256, 2560
    pools = [
        ExpertPool(quantize(room(2, 2 * width, hidden), 4), quantize(room(2, hidden, width), 4))
        for width in (1536, 512)
    ]
    grouped.grouped_experts(room(rows, hidden), torch.zeros(rows, 6, dtype=torch.int32), *pools)
    pages, lengths = room(4, 64, 4, 128), torch.tensor([0, rows], dtype=torch.int32)
    tables = torch.zeros(1, 4, dtype=torch.int32)
    paged_attention.paged_attention(
        room(rows, 20, 128), pages, pages, tables, lengths, lengths[1:], rows, rows, 128**-0.5
    )  # fmt: skip


if __name__ == "__main__":
    main()
