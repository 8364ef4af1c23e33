"""The package as others meet it: one version everywhere, its licence, its Pythons, and what `make` says."""

import os
import re
import shutil
import subprocess
import sys
import tomllib
from importlib.metadata import PackageNotFoundError
from pathlib import Path

import pytest
import yaml
from machine import PATIENCE_S

import shared.version
from cli.main import main
from shared.version import millrace_version

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
CHART = yaml.safe_load((ROOT / "helm" / "Chart.yaml").read_text())
MAKEFILE = (ROOT / "Makefile").read_text()


def test_package_chart_and_command_have_one_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"millrace {PROJECT['version']}\n"
    assert millrace_version() == PROJECT["version"], "installed from an older pyproject.toml: run make check"
    assert (CHART["version"], CHART["appVersion"]) == (PROJECT["version"], PROJECT["version"])


def test_the_images_are_tagged_with_it_in_the_documentation() -> None:
    tags = re.findall(r"REGISTRY/millrace-\S+?:(\S+)", (ROOT / "docs" / "operations.md").read_text())
    assert set(tags) == {PROJECT["version"]}


def test_the_changelog_begins_with_it() -> None:
    first = re.search(r"^## (\d\S*)", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert first is not None
    assert first[1] == PROJECT["version"]


def test_the_licence_is_the_one_that_the_package_names() -> None:
    text = (ROOT / "LICENSE").read_text()
    assert (PROJECT["license"], PROJECT["license-files"]) == ("Apache-2.0", ["LICENSE"])
    assert "Apache License\n                           Version 2.0, January 2004" in text
    assert "END OF TERMS AND CONDITIONS" in text


def test_the_pythons_are_the_same_everywhere() -> None:
    classified = re.findall(r"Python :: (3\.\d+)", "\n".join(PROJECT["classifiers"]))
    made = re.search(r"^VERSIONS := (.*)$", MAKEFILE, re.MULTILINE)
    assert made is not None
    assert made[1].split() == classified
    first, last = (int(version.split(".")[1]) for version in (classified[0], classified[-1]))
    assert PROJECT["requires-python"] == f">=3.{first},<3.{last + 1}"
    assert f"(3, {first}) <= sys.version_info < (3, {last + 1})" in MAKEFILE
    assert f"3.{sys.version_info.minor}" in classified


def test_a_tree_that_is_not_installed_says_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def not_installed(name: str) -> str:
        raise PackageNotFoundError(name)

    monkeypatch.setattr(shared.version, "version", not_installed)
    for words in (["--version"], ["serve", "--demo"]):
        assert main(words) == 2
        assert "the package millrace is not installed" in capsys.readouterr().err


@pytest.mark.system
def test_the_module_is_the_command() -> None:
    done = subprocess.run([sys.executable, "-m", "cli.main", "--version"], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, f"millrace {PROJECT['version']}\n"), done.stderr


@pytest.mark.system
def test_the_engine_needs_no_triton_on_a_cpu() -> None:
    """As where there are no wheels of it, on macOS."""
    script = """if True:
        import sys
        sys.modules["triton"] = None
        import services.engine.__main__ as engine
        from services.engine.run.assembly import sampling_ops
        print(engine.operations("cpu") and sampling_ops("rejection", on_gpu=False) and "without")
    """
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=PATIENCE_S)
    assert (done.returncode, done.stdout) == (0, "without\n"), done.stderr


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A copy of what `make` reads."""
    for name in ("Makefile", "pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, tmp_path)
    return tmp_path


@pytest.mark.system
@pytest.mark.parametrize("named", [None, "/nowhere/python3.12", "false"])
def test_make_says_which_python_is_missing_and_what_to_do(tree: Path, named: str | None) -> None:
    for tool in ("make", "bash"):
        (tree / "bin").mkdir(exist_ok=True)
        (tree / "bin" / tool).symlink_to(str(shutil.which(tool)))
    command = [str(tree / "bin" / "make"), "serve", *([f"PYTHON={named}"] if named else [])]
    done = subprocess.run(
        command, cwd=tree, env={"PATH": str(tree / "bin")}, capture_output=True, text=True, timeout=PATIENCE_S
    )
    said = done.stderr.splitlines()
    assert done.returncode == 2
    assert said[0].startswith(
        f"make: {f'{named} is not' if named else 'there is no'} Python of 3.11 3.12 3.13: install one"
    )
    assert "make PYTHON=/path/to/python3" in said[0]
    assert not (tree / ".venv").exists()


@pytest.mark.system
def test_make_says_what_it_is_doing_while_pip_works(tree: Path) -> None:
    """With a pip that says what pip says, and ends as we wish."""
    python = tree / ".venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    said = ("Collecting redis", "  Downloading a/redis-8.whl (1.0 MB)", "Installing collected packages: redis")
    python.write_text("\n".join(["#!/bin/bash", *(f"echo '{line}'" for line in said), "exit 3\n"]))
    python.chmod(0o755)
    # As from a shell, not as a make within the one that runs these tests, whose variables it would take for its own.
    environ = {name: value for name, value in os.environ.items() if not name.startswith(("MAKE", "MFLAGS"))}
    done = subprocess.run(
        ["make", "serve"], cwd=tree, env=environ, capture_output=True, text=True, timeout=PATIENCE_S, check=False
    )
    assert done.returncode == 2
    assert "installing what `cli` needs into .venv" in done.stdout
    assert done.stdout.endswith("  collecting redis\n  fetching redis-8.whl (1.0 MB)\n  installing all of them\n")
    assert not (tree / ".venv" / ".installed-cli").exists()
