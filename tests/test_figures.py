"""Figures that docs/operations.md quotes are those of their sources."""

import json
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
OPERATIONS = (ROOT / "docs" / "operations.md").read_text()
PIPELINE = (ROOT / "docs" / "pipeline-performance.md").read_text()
ENGINE = (ROOT / "docs" / "engine-performance.md").read_text()
H200 = json.loads((ROOT / "benchmarks" / "results" / "engine-h200.json").read_text())
ENCODER = json.loads((ROOT / "benchmarks" / "results" / "encoder-h200.json").read_text())
GPU_VIRTUAL = json.loads((ROOT / "benchmarks" / "results" / "virtual-load-h200.json").read_text())
VIRTUAL = json.loads((ROOT / "benchmarks" / "results" / "virtual-load.json").read_text())
MIXED = json.loads((ROOT / "benchmarks" / "results" / "mixed-steps-h200.json").read_text())


def row(text: str, name: str, after: str = "") -> list[str]:
    """Return the cells behind the first one of a table's row."""
    found = re.search(rf"^\| {re.escape(name)} \|(.*)\|$", text[text.index(after) :], re.MULTILINE)
    assert found is not None, name
    return [cell.strip() for cell in found[1].split("|")]


def number(cell: str) -> float:
    return float(cell.replace(",", ""))


def test_tokens_a_second_are_sequences_over_the_measured_step() -> None:
    for name, key in (("`wint4`", "wint4"), ("`wint8`", "wint8"), ("bf16", "bf16")):
        *cells, prompts = row(OPERATIONS, name, "**Tokens a second of one engine**")
        measured = {int(batch): ms for batch, ms in H200["decode_ms"][key].items()}
        assert [number(cell) for cell in cells] == [int(batch * 100 / ms) * 10 for batch, ms in measured.items()], name
        low, high = map(number, prompts.split(" to "))
        speeds = H200["prefill_tok_s"][key].values()
        assert abs(low - min(speeds)) < 1000
        assert abs(high - max(speeds)) < 1000


def test_the_cost_of_a_token_is_what_was_measured() -> None:
    for name, measured in (("gateway", "gateway, us of CPU a token"), ("postproc", "postproc"), ("Redis", "Redis")):
        single, piled, carries = row(OPERATIONS, name, "**CPU of the token path**")
        assert [single, piled] == row(PIPELINE, measured)
        low, high = (number(text) for text in re.findall(r"[\d,]+", carries))
        for rate, cost in ((low, single), (high, piled)):
            assert 0.97 * 1e6 / number(cost) <= rate <= 1e6 / number(cost)
    first_token = re.search(r"p50 ([\d.]+) ms, p99 ([\d.]+) ms", PIPELINE)
    assert first_token is not None
    quoted = re.search(r"hops themselves cost ([\d.]+) ms \(p50; p99\s+([\d.]+) ms\)", OPERATIONS)
    assert quoted is not None
    assert quoted.groups() == first_token.groups()


def test_weights_and_start_up_are_what_was_measured() -> None:
    loaded = dict(
        zip(
            ("wint4", "wint8", "bf16"),
            row(ENGINE, "weights, GiB (2.2 of them dense projections in both forms)"),
            strict=True,
        )
    )
    for name, quoted in re.findall(r"([\d.]+) (?:GiB in |as )`?(bf16|wint8|wint4)`?", OPERATIONS):
        both_forms = 0.0 if quoted == "bf16" else 2.2
        assert abs(float(name) + both_forms - float(loaded[quoted])) < 0.06, quoted
    measured = re.search(r"rehearsal take (\d+) to (\d+) s with kernels to compile and ([\d.]+) s with", ENGINE)
    assert measured is not None
    assert float(measured[3]) == round(MIXED["startup_s"]["profile_and_capture"], 1)
    quoted = re.search(
        r"up to (\d+) s\s+for kernels, the first time, and profiling; later starts need (\d+) s", OPERATIONS
    )
    assert quoted is not None
    assert [int(text) for text in quoted.groups()] == [int(measured[2]), round(float(measured[3]))]


def test_the_vision_tower_takes_what_was_measured() -> None:
    for name, case in ENCODER["cases"].items():
        patches, ours, theirs, times = map(number, row(PIPELINE, name, "## The vision tower"))
        assert patches == case["patches"]
        assert [ours, theirs] == [round(case["ours_ms"], 1), round(case["transformers_ms"], 1)]
        assert times == round(case["ratio"], 2)


def test_gaps_in_virtual_time_are_what_the_simulation_found() -> None:
    for load, name in (("0.2/s", "0.2 prompts/s"), ("16", "16 clients")):
        cells = row(ENGINE, name, "### On a CPU")
        ways = [VIRTUAL[way][load] for way in ("full", "bound")]
        for cell, key, place in zip(cells[1:5], ("gap", "gap", "gap", "ttft"), (0, 1, 2, 0), strict=True):
            assert cell == " / ".join(f"{way[key][place]:,.0f}" for way in ways), (name, key, place)


def test_a_gpus_gaps_in_virtual_time_are_what_the_simulation_found() -> None:
    for way, bound in (("bound", "25"), ("bound to 60", "60"), ("full", "0")):
        cells, found = row(ENGINE, bound, "## As it is served"), GPU_VIRTUAL[way]["8/s"]
        assert cells[0] == " / ".join(f"{value:.1f}" for value in found["gap"][:3]), bound
        assert cells[1] == " / ".join(f"{value:.0f}" for value in found["ttft"]), bound
