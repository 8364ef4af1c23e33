"""Packages that people call the API by, each in an environment of its own, against the trained demo.

`make test-clients` makes the environments and names their folder in CLIENT_PACKAGES; without it, all is skipped.
The tests of a package are in packages/, where nothing of ours can be imported.
"""

import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from machine import PATIENCE_S
from system import System, running

PACKAGES = Path(__file__).parent / "packages"
CHECKPOINT = Path(__file__).parents[2] / "cli" / "demo_checkpoint"
ENVIRONMENTS = Path(os.environ["CLIENT_PACKAGES"]) if "CLIENT_PACKAGES" in os.environ else None
# environment: the packages that are tried in it
IN_PYTHON = {
    "openai3": ("openai", "responses", "langchain", "pydantic_ai", "agents", "litellm"),
    "anthropic": ("anthropic",),
    "openai2": ("openai", "responses", "instructor", "llama_index"),
    "benchmarks": ("benchmarks",),
    "lm_eval": ("lm_eval",),
}
IN_NODE = ("openai", "ai_sdk", "ai_sdk_own")
TIMEOUT_S = 2 * PATIENCE_S

pytestmark = pytest.mark.skipif(ENVIRONMENTS is None, reason="make test-clients makes the packages' environments")


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Iterator[System]:
    with running(
        ["--model", str(CHECKPOINT), "--served-model-name", "demo"], tmp_path_factory.mktemp("demo")
    ) as system:
        yield system


def run(command: list[str], demo: System, environments: Path, directory: Path) -> None:
    """Run a package's tests; what they say is shown where they fail."""
    told = {name: value for name, value in os.environ.items() if name in ("PATH", "HOME", "LANG")}
    done = subprocess.run(
        command,
        env={**told, "BASE_URL": demo.base_url, "BENCHMARKS": str(environments / "benchmarks" / "files")},
        cwd=directory,
        timeout=TIMEOUT_S,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    assert done.returncode == 0, done.stdout[-20_000:]


@pytest.mark.parametrize(
    ("environment", "package"), [(env, package) for env, packages in IN_PYTHON.items() for package in packages]
)
def test_a_python_package(demo: System, tmp_path: Path, environment: str, package: str) -> None:
    assert ENVIRONMENTS is not None
    python = str(ENVIRONMENTS / environment / "bin" / "python")
    options = ["-c", str(PACKAGES / "pytest.ini"), "--rootdir", str(PACKAGES), "--confcutdir", str(PACKAGES)]
    script = str(PACKAGES / f"client_{package}.py")
    run([python, "-B", "-m", "pytest", *options, script], demo, ENVIRONMENTS, tmp_path)


@pytest.mark.parametrize("package", IN_NODE)
def test_a_node_package(demo: System, package: str) -> None:
    assert ENVIRONMENTS is not None
    directory = ENVIRONMENTS / "node"
    for script in (PACKAGES / "node").glob("*.mjs"):
        shutil.copy(script, directory)  # beside node_modules, where Node looks for them
    run(["node", "--test", f"{package}.test.mjs"], demo, ENVIRONMENTS, directory)
