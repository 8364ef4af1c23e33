"""CUDA's Multi-Process Service, started for a launch: NVIDIA's program is a script here that writes down its calls."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest
from system import System, running

from cli import mps
from shared.errors import ConfigError

pytestmark = pytest.mark.system

SCRIPT = """#!/bin/sh
echo "call $* at $CUDA_MPS_PIPE_DIRECTORY devices ${CUDA_VISIBLE_DEVICES-none}" >> "$CALLS"
if [ $# = 0 ]; then cat >> "$CALLS"; fi
exit ${STATUS-0}
"""


@pytest.fixture
def calls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[], list[str]]:
    """Return what the program was called with, and told."""
    (tmp_path / "bin").mkdir()
    program, written = tmp_path / "bin" / mps.CONTROL, tmp_path / "calls"
    program.write_text(SCRIPT)
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}:{os.environ['PATH']}")
    monkeypatch.setenv("CALLS", str(written))
    return lambda: written.read_text().splitlines() if written.exists() else []


def test_it_runs_as_long_as_it_is_needed(calls: Callable[[], list[str]], tmp_path: Path) -> None:
    directory = tmp_path / "mps"
    with mps.daemon(directory, dict(os.environ)) as told:
        assert calls() == [f"call -d at {directory} devices none"]
        assert told == {"CUDA_MPS_PIPE_DIRECTORY": str(directory), "CUDA_MPS_LOG_DIRECTORY": str(directory)}
        assert directory.stat().st_mode & 0o777 == 0o700
    assert calls()[1:] == [f"call  at {directory} devices none", "quit"]


@pytest.mark.parametrize(("ours", "clients"), [("1", "0"), ("3,5", "0,1"), ("GPU-ab", "0")])
def test_clients_count_the_gpus_that_the_daemon_sees(
    ours: str, clients: str, calls: Callable[[], list[str]], tmp_path: Path
) -> None:
    with mps.daemon(tmp_path / "mps", {**os.environ, "CUDA_VISIBLE_DEVICES": ours}) as told:
        assert told["CUDA_VISIBLE_DEVICES"] == clients
    assert [line.split("devices ")[1] for line in calls() if "devices" in line] == [ours, ours]


@pytest.mark.parametrize(
    ("encoder", "wanted"),
    [
        ({}, False),
        ({"MILLRACE_MPS_PERCENT": "0"}, False),
        ({"MILLRACE_MPS_PERCENT": "60"}, True),
        ({"MILLRACE_MPS_PERCENT": "60", "MILLRACE_DEVICE": "cpu"}, False),
        ({"MILLRACE_MPS_PERCENT": "60", "CUDA_MPS_PIPE_DIRECTORY": "/run/mps"}, False),
    ],
)
def test_it_is_started_where_it_is_asked_for_and_nobody_has_one(encoder: dict[str, str], wanted: bool) -> None:
    assert mps.is_wanted(encoder) is wanted


def test_without_the_driver_it_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with (
        pytest.raises(ConfigError, match=r"MILLRACE_MPS_PERCENT: nvidia-cuda-mps-control, .* is not installed"),
        mps.daemon(tmp_path / "mps", dict(os.environ)),
    ):
        pass


def test_one_that_does_not_start_is_told(calls: Callable[[], list[str]], tmp_path: Path) -> None:
    with (
        pytest.raises(ConfigError, match=r"does not start: .* exit status 3"),
        mps.daemon(tmp_path / "mps", {**os.environ, "STATUS": "3"}),
    ):
        pass
    assert len(calls()) == 1


def pipes_of(system: System, service: str) -> str | None:
    """Return where a service of a system looks for the daemon."""
    [pid] = [pid for pid, command in system._children() if command.strip().endswith(f"-m services.{service}")]
    told = (Path("/proc") / str(pid) / "environ").read_bytes().decode().split("\0")
    return dict(each.split("=", 1) for each in told if each).get(mps.PIPES)


def test_a_launch_that_asks_for_it_has_it_for_the_services_that_compute(
    calls: Callable[[], list[str]], tmp_path: Path
) -> None:
    told = {"MILLRACE_MPS_PERCENT": "60", "PATH": os.environ["PATH"], "CALLS": os.environ["CALLS"]}
    with running(["--demo"], tmp_path, told) as system:
        assert "millrace: CUDA MPS   ready" in system.log.read_text()
        pipes = {service: pipes_of(system, service) for service in ("gateway", "mm_encoder", "engine", "postproc")}
    directory = calls()[0].split()[3]
    assert pipes == {"gateway": None, "mm_encoder": directory, "engine": directory, "postproc": None}
    assert [line.split(" at ")[0] for line in calls()] == ["call -d", "call ", "quit"]
