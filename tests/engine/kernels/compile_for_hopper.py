"""Compiles the sampling kernels for an H200 as their wrappers launch them; prints their names. Needs no GPU.

A program of its own: Triton is told once a process whether it compiles or interprets.
"""

from typing import Any

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from services.engine.kernels.gpu import pick, threshold


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
    for module in (pick, threshold):
        module.overlapped = lambda tensor: {"PDL": True, "launch_pdl": True}  # type: ignore[attr-defined]
    probs, zeros = torch.zeros(2, 103424), torch.zeros(2)
    threshold.threshold(probs, zeros, zeros.long(), zeros.double())
    pick.pick(probs, zeros, zeros.double())


if __name__ == "__main__":
    main()
