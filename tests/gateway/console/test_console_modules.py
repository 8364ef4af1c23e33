"""The console's modules that need no browser, by the test runner of Node.js."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest
from machine import PATIENCE_S

HERE = Path(__file__).parent


@pytest.mark.system
@pytest.mark.skipif(shutil.which("node") is None, reason="needs Node.js on PATH")
def test_the_modules_that_need_no_page() -> None:
    done = subprocess.run(
        ["node", "--test", "--test-reporter=tap", HERE / "modules.test.mjs"],
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    passed = re.search(r"^# pass (\d+)$", done.stdout, re.MULTILINE)
    assert passed is not None
    assert int(passed[1]) > 0
