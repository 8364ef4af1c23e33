"""Compiles kernels for an H200 as their wrappers launch them; prints their names.

Needs no GPU. A program of its own: Triton is told once a process whether it compiles or interprets.
"""

import re
from typing import Any

import torch
from no_driver import NoDriver
from torch import Tensor
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from services.engine.kernels.peer_memory import PeerMemory
from services.engine.kernels.quantize import Bits, Quantized, foreign, quantize
from services.engine.kernels.reference.experts import ExpertPool
from services.engine.kernels.reference.mlp import SwiGLU
from services.engine.kernels.reference.moe import MoE
from services.engine.kernels.reference.paged_attention import PagedSequences
from services.engine.kernels.triton.attention import paged_attention, qkv, rotary_tables
from services.engine.kernels.triton.dense import dequantize, linear, rms_norm, silu_mul
from services.engine.kernels.triton.dense import quantize as gpu_quantize
from services.engine.kernels.triton.exchange import push
from services.engine.kernels.triton.exchange.add_norm import exchange_add_norm
from services.engine.kernels.triton.invariant.ops import invariant_ops
from services.engine.kernels.triton.moe import (
    add_norm_scores,
    experts,
    grouped,
    grouped_plain,
    grouped_quantized,
    moe,
    router,
    sort,
    tiles,
)
from services.engine.kernels.triton.sampling import mask_logits, pick, threshold

AFTER_WGMMA = "wgmma.wait_group.sync.aligned 0; mov"
SEQUENCES, HIDDEN, HEADS, KV_HEADS, DIM = 20, 2560, 20, 4, 128


def main() -> None:
    launch = JITFunction.run

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        kernel = launch(self, *args, grid=grid, warmup=True, **options)
        assert "cubin" in kernel.asm
        assert not overwrites_operands(kernel.asm), f"{self.__name__} unpacks to registers that are still read"
        assert not moves_single_inputs(self.__name__, kernel.asm["ptx"]), "rows are copied two bytes at a time"
        print(self.__name__)
        return kernel

    JITFunction.run = compile_only
    driver.set_active(NoDriver(90))
    attention, sampled = (paged_attention, qkv, rms_norm, rotary_tables), (pick, threshold)
    products = (experts, grouped, grouped_plain, grouped_quantized, linear)
    for module in (*attention, *products, add_norm_scores, push, router, silu_mul, sort, *sampled):
        module.pdl_options = lambda tensor: {"PDL": True, "launch_pdl": True}  # type: ignore[attr-defined]
    sampling()
    decode(1)
    decode(4)
    decode(SEQUENCES)
    prefill()
    invariant()
    foreign_pools(4)
    foreign_pools(8)
    exchange()


def overwrites_operands(asm: dict[str, Any]) -> bool:
    """Return True if large matrix instructions that take an operand from registers may still run when a loop writes
    these registers again: see services.engine.kernels.triton.dense.matmul.after_wgmma."""
    from_registers = re.search(r"warp_group_dot %.*: tensor<", asm["ttgir"])
    runs_on = re.search(r"warp_group_dot_wait .*pendings = [1-9]", asm["ttgir"])
    return bool(from_registers and runs_on) and AFTER_WGMMA not in asm["ptx"]


def moves_single_inputs(name: str, ptx: str) -> bool:
    """Return True if a kernel that only copies does so by the element: with eight times the instructions."""
    return name == "_scatter_kernel" and bool(re.search(r"(ld|st)\.global(\.\w+)*\.b16", ptx))


def sampling() -> None:
    probs, zeros = torch.zeros(2, 103424), torch.zeros(2)
    threshold.threshold(probs, zeros, zeros.long(), zeros.double())
    pick.pick(probs, zeros, zeros.double())
    mask_logits.mask_logits(probs, zeros.long(), torch.zeros(2, 12928, dtype=torch.uint8))


def decode(sequences: int) -> None:
    """A layer's launches."""

    def zeros(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
        return torch.zeros(shape, dtype=dtype)

    def weight(outputs: int) -> Quantized:
        return Quantized(zeros(outputs, HIDDEN, dtype=torch.int8), zeros(outputs), 8, HIDDEN)

    x, angles, cache = zeros(sequences, HIDDEN), zeros(sequences, DIM // 2, dtype=torch.float32), zeros(2, 64, 4, DIM)
    slots, ints = zeros(sequences, dtype=torch.int64), zeros(sequences + 1, 40, dtype=torch.int32)
    axes = torch.zeros(DIM // 2, dtype=torch.int64)
    rotary_tables.rotary_tables(axes.expand(3, -1)[:, :sequences], angles[0], axes)
    query = qkv.qkv(x, weight((HEADS + 2 * KV_HEADS) * DIM), angles, angles, cache, cache, slots)
    paged = PagedSequences(ints[:-1], ints[:, 0], ints[:-1, 0], 1, 2560)
    paged_attention.paged_attention(query, cache, cache, paged, 0.1)
    shared = SwiGLU(weight(2 * HIDDEN), weight(HIDDEN))
    gate, bias = zeros(4, HIDDEN, dtype=torch.float32), zeros(4, dtype=torch.float32)
    norm, vision = zeros(HIDDEN), zeros(sequences, dtype=torch.bool)
    block = MoE(gate, bias, *pools(), shared)
    moe.linear_moe_add_norm(x, weight(HIDDEN), x, norm, block, vision, 6, norm, 1e-5)


def pools(bits: Bits = 4) -> tuple[ExpertPool, ExpertPool]:
    """Two experts of the text pool and two of the vision pool."""
    text, vision = (
        ExpertPool(
            quantize(torch.zeros(2, 2 * width, HIDDEN).bfloat16(), bits),
            quantize(torch.zeros(2, HIDDEN, width).bfloat16(), bits),
        )
        for width in (1536, 512)
    )
    return text, vision


def prefill() -> None:
    """The kernels that the copy engine feeds, at the model's widths."""

    def room(*shape: int) -> Tensor:
        return torch.zeros(*shape, dtype=torch.bfloat16)

    rows = 256
    ids = torch.zeros(rows, 6, dtype=torch.int32)
    every: list[Bits] = [4, 8]
    for bits in every:
        grouped.grouped_experts(room(rows, HIDDEN), ids, *pools(bits))
    plain = ExpertPool(room(2, 2 * 512, HIDDEN), room(2, HIDDEN, 512))
    grouped.grouped_experts(room(rows, HIDDEN), ids, plain, plain)
    for bits in every:
        dequantize.dequantize(quantize(room(2, 512, HIDDEN), bits))
    gpu_quantize.quantize(room(2, 512, HIDDEN), 4)
    pages, lengths = room(4, 64, 4, 128), torch.tensor([0, rows], dtype=torch.int32)
    tables = torch.zeros(1, 4, dtype=torch.int32)
    for longest in (rows, 10 * rows):
        paged = PagedSequences(tables, lengths, lengths[1:], longest, rows)
        paged_attention.paged_attention(room(rows, 20, 128), pages, pages, paged, 128**-0.5)
    decoding = PagedSequences(tables, lengths, lengths[1:], 1, rows, ((1, rows),), beside=True)
    paged_attention.paged_attention(room(1, 20, 128), pages, pages, decoding, 128**-0.5)


def invariant() -> None:
    """A block of experts of every format, with as few rows and with as many as a tile has at most."""
    ops = invariant_ops()
    for rows in (1, 5000):
        x, norm = torch.zeros(rows, HIDDEN).bfloat16(), torch.zeros(HIDDEN).bfloat16()
        gate, bias = torch.zeros(4, HIDDEN), torch.zeros(4)
        plain = torch.zeros(HIDDEN, HIDDEN).bfloat16()
        for weight in (plain, quantize(plain, 8), quantize(plain, 4)):
            text, vision = pools(weight.bits) if isinstance(weight, Quantized) else plain_pools()
            block = MoE(gate, bias, text, vision, SwiGLU(weight, weight))
            ops.linear_moe_add_norm(x, weight, x, norm, block, None, 6, norm, 1e-5)


def foreign_pools(bits: Bits) -> None:
    """Every product of what others have quantised, in the smallest groups, with tiles of each kind."""

    def weight(*shape: int) -> Quantized:
        scale = torch.zeros(*shape[:-1], shape[-1] // 32, dtype=torch.bfloat16)
        return foreign(torch.zeros(*shape, dtype=torch.int8), scale, scale.int(), 32, bits)

    text, vision = (ExpertPool(weight(2, 2 * width, HIDDEN), weight(2, HIDDEN, width)) for width in (1536, 512))
    for rows in (4, 16, 64, 256):
        x, ids = torch.zeros(rows, HIDDEN).bfloat16(), torch.zeros(rows, 6, dtype=torch.int32)
        experts.tiled_results(x, ids, text, vision, tiles.plan(6 * rows, 4, bits))
        linear.linear(x, weight(512, HIDDEN))
    grouped.grouped_experts(x, ids, text, vision)
    dequantize.dequantize(weight(512, HIDDEN))


def exchange() -> None:
    """The ends of a block on one rank of two."""
    ints, rows = torch.zeros(2, dtype=torch.int64), 8
    late = torch.zeros(1, dtype=torch.int32)
    peers = PeerMemory(0, 1 << 20, ints, ints, torch.zeros(256, dtype=torch.int64), late, ints)
    own, norm = torch.zeros(rows, HIDDEN).bfloat16(), torch.zeros(HIDDEN).bfloat16()
    push.push(own, own.new_zeros(2, rows, HIDDEN), peers)
    results = own.new_zeros(rows * 6, HIDDEN), torch.zeros(rows, 6), own.unsqueeze(0)
    moe.sum_experts(*results, own.dtype)
    exchange_add_norm(*results, own, norm, 1e-5, peers)
    for parts in range(2, linear.MOST_SPLITS + 1):
        exchange_add_norm(*results[:2], torch.zeros(parts, rows, HIDDEN), own, norm, 1e-5, peers)


def plain_pools() -> tuple[ExpertPool, ExpertPool]:
    """As `pools`, not quantised."""
    text, vision = (
        ExpertPool(torch.zeros(2, 2 * width, HIDDEN).bfloat16(), torch.zeros(2, HIDDEN, width).bfloat16())
        for width in (1536, 512)
    )
    return text, vision


if __name__ == "__main__":
    main()
