"""Engine and encoder as they are composed find each other on one GPU, and nowhere else."""

import errno
import json
import os
import shutil
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from prometheus_client import CollectorRegistry

from benchmarks.shared_card import CONSTANTS, Sharing, steady
from cli.bench.load import Answer, Part
from services.engine import __main__ as engine
from services.engine.settings import EngineSettings
from services.mm_encoder import __main__ as mm_encoder
from services.mm_encoder.metrics import Metrics
from services.mm_encoder.settings import MmEncoderSettings
from services.mm_encoder.vision.pace import Mark, Pace, SharedPace
from shared import config
from shared.errors import ConfigError
from shared.segments import Segments
from shared.watchdog import Watchdog

ROOT = Path(__file__).resolve().parents[2]
MANY = [1e12] * 50  # parts of a pass
CUDA = {"device": "cuda"}


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two of them, which nobody computes on."""
    monkeypatch.setattr(engine, "device", lambda settings: settings.device)
    monkeypatch.setattr(mm_encoder, "SharedPace", partial(SharedPace, mark=Nowhere))
    ids = {"cuda": "first", "cuda:0": "first", "cuda:1": "second"}
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda which: SimpleNamespace(uuid=ids[str(which)]))


class Nowhere(Mark):
    def wait(self) -> None:
        return

    def seconds_since(self, earlier: Mark) -> float:
        return 1.0


def engine_settings(directory: Path, **more: Any) -> EngineSettings:
    return EngineSettings(redis_url="unix:///x", model="m", name="e", segments_dir=str(directory), **more)


def encoder_pace(directory: Path | str, device: str = "cuda", **more: Any) -> Pace | None:
    settings = MmEncoderSettings(redis_url="unix:///x", model="m", segments_dir=str(directory), **more)
    return mm_encoder.pace(settings, device, Metrics(CollectorRegistry()))


def is_cut(pace: Pace | None) -> bool:
    assert pace is not None
    pace.begin()
    return len(pace.cut(MANY)) > 1


@pytest.mark.usefixtures("gpus")
def test_passes_are_cut_while_an_engine_of_the_same_gpu_lives(tmp_path: Path) -> None:
    pace, other_gpu = encoder_pace(tmp_path / "s"), encoder_pace(tmp_path / "s", "cuda:1")
    elsewhere = encoder_pace(tmp_path / "other")
    assert not is_cut(pace), "no engine"
    page = engine.card_page(engine_settings(tmp_path / "s", **CUDA), Segments(tmp_path / "s"))
    assert page is not None
    with page:
        assert is_cut(pace)
        assert not is_cut(other_gpu)
        assert not is_cut(elsewhere), "nor one of another host"
    assert not is_cut(pace), "it has ended"


@pytest.mark.usefixtures("gpus")
@pytest.mark.parametrize(
    ("device", "settings"), [("cpu", {}), ("cuda", {"shared_card_ms": 0.0}), ("cuda", {"segments_dir": ""})]
)
def test_passes_are_whole_without_a_gpu_or_if_told(device: str, settings: dict[str, Any], tmp_path: Path) -> None:
    directory = settings.get("segments_dir", tmp_path / "s")
    more = {name: value for name, value in settings.items() if name != "segments_dir"}
    assert encoder_pace(directory, device, **more) is None


@pytest.mark.usefixtures("gpus")
@pytest.mark.parametrize("wrong", ["gone", "full", "cut"])
def test_a_page_that_cannot_be_does_not_end_the_engine(
    wrong: str, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The directory is gone, the file system full, or the file shorter than what was written."""

    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    segments = Segments(tmp_path / "s")
    if wrong == "gone":
        shutil.rmtree(tmp_path / "s")
    else:
        monkeypatch.setattr(os, "pwrite", full if wrong == "full" else lambda *_: 0)
    assert engine.card_page(engine_settings(tmp_path / "s", **CUDA), segments) is None
    assert [record.levelname for record in caplog.records] == ["WARNING"]


@pytest.mark.usefixtures("gpus")
def test_a_directory_that_goes_later_ends_neither(tmp_path: Path) -> None:
    pace = encoder_pace(tmp_path / "s")
    own = engine.card_page(engine_settings(tmp_path / "s", **CUDA), Segments(tmp_path / "s"))
    assert own is not None
    with own:
        assert is_cut(pace)
        shutil.rmtree(tmp_path / "s")
        own.page.begin_step(True)
        assert own.page.step()
        assert not is_cut(pace)


@pytest.mark.usefixtures("gpus")
def test_a_batch_may_take_longer_by_what_it_waits(tmp_path: Path) -> None:
    """Else the watchdog would take a long video beside a busy engine to hang."""
    registry, expired = CollectorRegistry(), []
    now = 0.0
    watchdog = Watchdog(
        10.0, mm_encoder.CPU_FIRST_USE, lambda age: None, lambda step, age: expired.append(age), lambda: now
    )
    settings = MmEncoderSettings(redis_url="unix:///x", model="m", segments_dir=str(tmp_path / "s"))
    pace = mm_encoder.pace(settings, "cuda", Metrics(registry), watchdog)
    assert isinstance(pace, SharedPace)
    with watchdog.watch("encode", 1):
        for _ in range(100):
            pace._count_piece(0.1)
        for _ in range(99):
            now += 0.2
            watchdog.look()
        assert expired == []
        for _ in range(10):
            now += 0.2
            watchdog.look()
        assert expired
    watchdog.stop()
    assert registry.get_sample_value("millrace_mm_pieces_total") == 100
    assert registry.get_sample_value("millrace_mm_piece_wait_seconds_total") == pytest.approx(10.0)


def test_an_engine_without_a_gpu_or_a_directory_has_no_page(tmp_path: Path) -> None:
    assert engine.card_page(engine_settings(tmp_path / "s", device="cpu"), Segments(tmp_path / "s")) is None
    assert engine.card_page(engine_settings(tmp_path / "s", device="cpu"), None) is None


def test_the_part_of_the_gpu_under_mps_is_cudas_own_setting() -> None:
    def told(percent: int, environ: dict[str, str]) -> dict[str, str]:
        settings = MmEncoderSettings(redis_url="unix:///x", model="m", mps_percent=percent)
        mm_encoder.limit_multiprocessors(settings, environ)
        return environ

    assert told(0, {}) == {}
    assert told(60, {}) == {"CUDA_MPS_ACTIVE_THREAD_PERCENTAGE": "60"}
    own = {"CUDA_MPS_ACTIVE_THREAD_PERCENTAGE": "30"}
    assert told(60, dict(own)) == own


def test_the_benchmark_takes_the_settings_that_its_results_name() -> None:
    rows = json.loads((ROOT / "benchmarks/results/shared-card-h200.json").read_text(encoding="utf-8"))
    [second] = [value for name, value in rows.items() if name.startswith("second run")]
    named = {key for row in second for key in row} - {"case", "text", "pictures", "counters", "note"}
    assert named == {*Sharing._fields, "engine_share", "prefill_pieces"}
    assert named <= {*Sharing._fields, *CONSTANTS}
    told = {"MILLRACE_MODEL": "m", "MILLRACE_REDIS_URL": "unix:///x"}
    asked = Sharing(3.0, 1, 60)
    for way, found in (("mps", (3.0, 1, 60)), ("pieces", (3.0, 1, 0)), ("whole", (0.0, 0, 0))):
        made = config.load(MmEncoderSettings, told | asked.of(way).environment())
        assert (made.shared_card_ms, made.shared_card_decode_pieces, made.mps_percent) == found


def test_the_benchmarks_figures_are_of_what_came_after_the_start() -> None:
    """By hand: two seconds from 10 on, in which 4 events of 2 tokens were read to an end, and 2 of an open answer."""
    answers = [
        Answer(1, sent=7.0, events=[8.0, 9.0], tokens=4, ended=9.0),  # over before
        Answer(1, sent=8.0, events=[9.0, 9.5, 10.5, 11.0], tokens=8, ended=11.0),  # its first token came before
        Answer(1, sent=9.0, events=[10.25, 10.75], tokens=4, ended=10.75),
        Answer(1, sent=11.0, events=[11.5, 11.75]),  # given up
        Answer(1, sent=11.9),
    ]
    found = steady("x", [Part(answers[:2], 0.1), Part(answers[2:], 0.2)], 10.0, 2.0)
    assert (found["answered"], found["open"], found["failed"]) == (2, 2, 0)
    assert found["requests_s"] == 1.0
    assert found["output_tok_s"] == (4 + 4 + 2 * 2) / 2.0
    assert found["ttft_p50"] == pytest.approx((1250 + 500) / 2)
    assert found["gap_p50"] == pytest.approx(500)
    assert found["client_cpu"] == 0.2


@pytest.mark.parametrize(("name", "value"), [("MPS_PERCENT", "101"), ("SHARED_CARD_MS", "-1")])
def test_what_is_out_of_range_is_refused(name: str, value: str) -> None:
    environ = {"MILLRACE_MODEL": "m", "MILLRACE_REDIS_URL": "unix:///x", f"MILLRACE_{name}": value}
    with pytest.raises(ConfigError, match=name):
        config.load(MmEncoderSettings, environ)
