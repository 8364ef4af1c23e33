"""Errors of the weight formats by the distribution of the weights; prints a table for docs/engine-performance.md.

    python -m benchmarks.quantization_errors

Of the weights: |W' - W| / |W| of a matrix of the model's widths. Of an expert: the same of its output, for normal
inputs and with gate, up and down quantised. Four bits with one scale a row are here for comparison. On a CPU it takes a
minute; asserts nothing.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from services.engine.kernels.quantize import dequantize, quantize
from services.engine.kernels.reference.mlp import SwiGLU, swiglu

HIDDEN, INNER, ROWS, STD = 2560, 1536, 64, 0.02


def gaussian(*shape: int) -> Tensor:
    return torch.randn(*shape)


def student(*shape: int) -> Tensor:
    return torch.randn(*shape) / (torch.randn(5, *shape).square().mean(0)).sqrt()


def outliers(*shape: int) -> Tensor:
    weight = torch.randn(*shape)
    return torch.where(torch.rand(*shape) < 1 / 2000, weight * 10, weight)


def columns(*shape: int) -> Tensor:
    weight = torch.randn(*shape)
    weight[:, torch.randperm(shape[1])[: shape[1] // 100]] *= 8
    return weight


def one_scale_a_row(weight: Tensor) -> Tensor:
    scale = weight.abs().amax(-1, keepdim=True) / 7
    return (weight / scale).round() * scale


def four_bits(weight: Tensor) -> Tensor:
    return dequantize(quantize(weight.bfloat16(), 4)).float()


def eight_bits(weight: Tensor) -> Tensor:
    return dequantize(quantize(weight.bfloat16(), 8)).float()


WEIGHTS = {"normal": gaussian, "Student t, 5": student, "1 in 2,000 x 10": outliers, "1 % of columns x 8": columns}
FORMATS: dict[str, Callable[[Tensor], Tensor]] = {
    "4 bits, a scale a row": one_scale_a_row,
    "wint4": four_bits,
    "wint8": eight_bits,
}


def error(actual: Tensor, exact: Tensor) -> float:
    return 100 * float((actual - exact).norm() / exact.norm())


def errors(gate_up: Tensor, down: Tensor, restore: Callable[[Tensor], Tensor]) -> tuple[float, float]:
    """Return the relative errors of the weights and of the expert's output, in per cent."""
    x = torch.randn(ROWS, HIDDEN)
    restored = restore(gate_up)
    outputs = swiglu(x, SwiGLU(restored, restore(down)))
    return error(restored, gate_up), error(outputs, swiglu(x, SwiGLU(gate_up, down)))


def main() -> None:
    torch.manual_seed(0)
    print("| weights / experts' outputs, % | " + " | ".join(FORMATS) + " |")
    print("|---" + "|--:" * len(FORMATS) + "|")
    for name, draw in WEIGHTS.items():
        gate_up, down = draw(2 * INNER, HIDDEN) * STD, draw(HIDDEN, INNER) * STD
        cells = [errors(gate_up, down, restore) for restore in FORMATS.values()]
        print(f"| {name} | " + " | ".join(f"{weight:.1f} / {output:.1f}" for weight, output in cells) + " |")


if __name__ == "__main__":
    main()
