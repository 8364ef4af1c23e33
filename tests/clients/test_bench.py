"""`millrace bench serve` against a running system: every token that the engine says it made was counted."""

import json
import re
import urllib.request
from pathlib import Path

from system import System

from cli.main import main

GENERATED = re.compile(r"^millrace_generation_tokens_total\S* ([\d.e+]+)$", re.MULTILINE)


def generated(system: System) -> float:
    with urllib.request.urlopen(f"http://127.0.0.1:{system.metrics_port}/metrics") as response:
        return sum(map(float, GENERATED.findall(response.read().decode())))


def test_its_tokens_are_the_engines(system: System, tmp_path: Path) -> None:
    before, report = generated(system), tmp_path / "report.json"
    flags = ["--url", f"{system.base_url}/v1", "--model", "demo", "--ids", "300-900", "--input", "20-60"]
    flags += ["--output", "16", "--clients", "4", "--requests", "8", "--json", str(report)]
    assert main(["bench", "serve", *flags]) == 0
    (load,) = json.loads(report.read_text())["loads"]
    assert (load["answered"], load["open"], load["failed"]) == (8, 0, 0)
    assert round(load["output_tok_s"] * load["seconds"]) == 8 * 16 == generated(system) - before
    assert 0 < load["ttft_p50"] <= load["ttft_p99"]
    assert 0 < load["gap_p99"] <= load["gap_p999"]
