"""The interpreter runs what the compiler refuses, and what takes more shared memory than a card has."""

import json
from pathlib import Path

import pytest
import torch
from compiled_kernels import compiled

SCRIPT = Path(__file__).parent / "compile_vision_kernels.py"
# Of a program, by capability: the least that a card has, and Hopper, which has a way of its own.
SHARED_BYTES = {89: 99 << 10, 90: 227 << 10}
KERNELS = {"_attention_kernel", "_rotate_kernel", "_add_norm_kernel", "_quick_gelu_kernel"}


@pytest.mark.system
@pytest.mark.skipif(torch.cuda.is_available(), reason="compiled by the tests of each kernel")
@pytest.mark.parametrize("capability", SHARED_BYTES)
def test_kernels_compile_for_a_card(capability: int, tmp_path: Path) -> None:
    kernels = [json.loads(line) for line in compiled(SCRIPT, capability, cache=tmp_path)]
    assert {name for name, *_ in kernels} == KERNELS
    programs = 2 if capability == 90 else 1  # that share a multiprocessor, in attention
    assert all(programs * shared <= SHARED_BYTES[capability] for _, shared, *_ in kernels)
    assert [hopper for name, _, hopper, _ in kernels if name == "_attention_kernel"] == [capability == 90]
    assert not any(runs_on for *_, runs_on in kernels), "its operand's registers may be written meanwhile"
