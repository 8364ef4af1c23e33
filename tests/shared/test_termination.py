"""SIGTERM while a process still imports, as that of a pod that is deleted just after it was made."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from machine import PATIENCE_S

# Stands for a library that takes long to import.
SLOW = "import time\nprint('importing', flush=True)\nwhile True:\n    time.sleep(1)\n"

pytestmark = pytest.mark.system


@pytest.mark.parametrize(
    "module", ["services.gateway", "services.mm_encoder", "services.engine", "services.postproc", "cli.autoscaler"]
)
def test_a_process_that_imports_ends_when_it_is_told_to(module: str, tmp_path: Path) -> None:
    for name in ("torch.py", "redis.py"):
        (tmp_path / name).write_text(SLOW)
    environ = {**os.environ, "PYTHONPATH": str(tmp_path)}
    command = [sys.executable, "-P", "-m", module]
    with subprocess.Popen(command, env=environ, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == b"importing\n"
            process.terminate()
            assert process.communicate(timeout=PATIENCE_S) == (b"", b"")
        finally:
            process.kill()
    assert process.returncode == 0, "not of the signal, which the kernel drops for the first process of a container"
