"""The interpreter runs what the compiler refuses: a variable that changes its type in a loop, say, or what takes more
shared memory than a card has."""

import json
import os
from pathlib import Path

import pytest
import torch
from compiled_kernels import compiled

from services.engine.kernels.triton.common import launch
from services.engine.kernels.triton.common.launch import fitting_stages
from services.engine.kernels.triton.moe import tiles

SCRIPT = Path(__file__).parent / "compile_for_hopper.py"
CARDS = Path(__file__).parent / "compile_for_cards.py"
SHARED_BYTES = {80: 163 << 10, 86: 99 << 10, 89: 99 << 10, 90: 227 << 10, 120: 99 << 10}  # of a program, by capability
# Each size of shared memory, with the formats that take most of it (an 86 has as much as an 89); `make test-cards`
# compiles all for each card, in four times as long.
USUAL = [(80, 16), (89, 4), (120, 8), (120, 16)]
ALL = [(card, bits) for card in SHARED_BYTES for bits in (4, 8, 16, 432, 4128, 832)]
OF_EVERY_FORMAT = {
    *("_rotary_tables_kernel", "_qkv_kernel", "_rotate_kernel", "_decode_kernel", "_merge_kernel", "_prefill_kernel"),
    *("_linear_kernel", "_unsplit_kernel", "_add_norm_kernel", "_router_kernel", "_choose_kernel", "_combine_kernel"),
    *("_choose_gate_up_kernel", "_gate_up_kernel", "_down_kernel", "_sort_kernel", "_scatter_kernel"),
    *("_threshold_kernel", "_tally_kernel", "_mask_kernel"),
}


@pytest.mark.skipif(torch.cuda.is_available(), reason="compiled by the tests of each kernel")
def test_kernels_compile_for_hopper() -> None:
    names = compiled(SCRIPT)
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
    sorting = {"_count_kernel", "_offsets_kernel", "_place_kernel", "_scatter_kernel"}
    experts = {"_gate_up_kernel", "_down_kernel", "_quantized_gate_up_kernel", "_quantized_down_kernel"}
    prefill = {"_dequantize_kernel", "_quantize_kernel", "_prefill_kernel"}
    exchange = {"_push_kernel", "_sum_experts_kernel", "_exchange_add_norm_kernel"}
    assert set(names) == sampling | decode | block | routing | sorting | experts | prefill | exchange


@pytest.mark.skipif(torch.cuda.is_available(), reason="compiled by the tests of each kernel")
@pytest.mark.parametrize(("card", "bits"), ALL if os.environ.get("CARDS") == "all" else USUAL)
def test_kernels_have_the_shared_memory_that_they_take(card: int, bits: int, tmp_path: Path) -> None:
    kernels = [json.loads(line) for line in compiled(CARDS, card, SHARED_BYTES[card], bits, cache=tmp_path)]
    assert [kernel for kernel in kernels if kernel[1] > SHARED_BYTES[card]] == []
    grouped = {"_quantized_gate_up_kernel", "_quantized_down_kernel"} if bits != 16 else set()
    unsplit = {"_qkv_kernel", "_unsplit_kernel"} if bits > 16 else set()  # have a scale an output, or none
    assert {name for name, *_ in kernels} >= OF_EVERY_FORMAT - unsplit | grouped


@pytest.mark.parametrize(("card", "decode", "experts"), [(80, 4, 3), (89, 3, 2), (90, 4, 3), (120, 3, 2)])
def test_a_pipeline_is_as_long_as_a_card_has_room_for(
    card: int, decode: int, experts: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of decoding with many sequences, and of the widest tiles of experts that are not quantised."""
    monkeypatch.setattr(launch, "shared_memory_bytes", lambda: SHARED_BYTES[card])
    assert fitting_stages(4, 2 * 64 * 128 * 2, 6144) == decode
    assert fitting_stages(3, 128 * (256 + 32) * 2) == experts
    assert fitting_stages(4, 1 << 20) == 1


@pytest.mark.parametrize(("card", "rows"), [(80, 32), (89, 32), (90, 64), (120, 32)])
def test_tiles_are_wide_where_their_pipeline_has_room(card: int, rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of experts of four bits, with 512 rows."""
    monkeypatch.setattr(launch, "shared_memory_bytes", lambda: SHARED_BYTES[card])
    assert tiles._plan4(512 * 6, 24).rows == rows
    assert tiles._plan4(256 * 6, 12).rows == 32
