"""The interpreter runs what the compiler refuses: a variable that changes its type in a loop, say."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

SCRIPT = Path(__file__).parent / "compile_for_hopper.py"
ROOT = Path(__file__).parents[3]


@pytest.mark.skipif(torch.cuda.is_available(), reason="compiled by the tests of each kernel")
def test_kernels_compile_for_hopper() -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, SCRIPT], cwd=ROOT, env={**environment, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    sampling = {"_tally_kernel", "_threshold_kernel", "_slices_kernel", "_find_kernel", "_mask_kernel"}
    decode = {"_qkv_kernel", "_decode_kernel", "_merge_kernel", "_unsplit_kernel", "_linear_kernel", "_rotate_kernel"}
    block = {
        "_rotary_tables_kernel",
        "_add_norm_kernel",
        "_add_norm_scores_kernel",
        "_choose_gate_up_kernel",
        "_silu_mul_kernel",
        "_combine_kernel",
    }
    routing = {"_choose_kernel", "_router_kernel", "_sort_kernel"}
    sorting = {"_count_kernel", "_offsets_kernel", "_place_kernel", "_gather_kernel"}
    experts = {"_gate_up_kernel", "_down_kernel", "_quantized_gate_up_kernel", "_quantized_down_kernel"}
    prefill = {"_dequantize_kernel", "_quantize_kernel", "_prefill_kernel"}
    assert set(done.stdout.split()) == sampling | decode | block | routing | sorting | experts | prefill
