"""Recipes of a release: the images, what is in them, the chart. Without an engine for containers."""

import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import yaml
from machine import PATIENCE_S

from shared.version import MILLRACE_VERSION

ROOT = Path(__file__).resolve().parent.parent
SBOM = ROOT / "helm" / "images" / "sbom.py"
IMAGES = ("gateway", "mm-encoder", "engine", "postproc", "autoscaler")
# Notes what it is asked, and runs what it would run in an image here.
FAKE_ENGINE = """#!/bin/bash
echo "$*" >> {said}
test "$1" = run || exit 0
until test "$1" = -; do shift; done
exec {python} "$@"
"""


def make(directory: Path, *words: str, **environ: str) -> subprocess.CompletedProcess[str]:
    """Run make in the repository, as from a shell, with what it builds in `directory`."""
    ours = {name: value for name, value in os.environ.items() if not name.startswith(("MAKE", "MFLAGS"))}
    for name in ("Makefile", "helm", "shared"):
        (directory / name).symlink_to(ROOT / name)
    return subprocess.run(
        ["make", *words], cwd=directory, env=ours | environ, capture_output=True, text=True, timeout=PATIENCE_S
    )


@pytest.fixture
def engine(tmp_path: Path) -> Path:
    """A docker that is first on PATH."""
    path = tmp_path / "bin" / "docker"
    path.parent.mkdir()
    path.write_text(FAKE_ENGINE.format(said=tmp_path / "said", python=sys.executable))
    path.chmod(0o755)
    return path


@pytest.mark.system
@pytest.mark.parametrize("registry", ["", "registry.example.com/team"])
def test_make_images_builds_lists_and_pushes_all_of_them(tmp_path: Path, engine: Path, registry: str) -> None:
    tag = f"{MILLRACE_VERSION}-rc1"
    done = make(
        tmp_path, "images", f"VERSION={tag}", f"REGISTRY={registry}", PATH=f"{engine.parent}:{os.environ['PATH']}"
    )
    assert done.returncode == 0, done.stderr
    said = (tmp_path / "said").read_text().splitlines()
    names = [f"{registry or 'localhost'}/millrace-{image}:{tag}" for image in IMAGES]
    for image, name in zip(IMAGES, names, strict=True):
        (built,) = [line for line in said if line.startswith("build") and f"--tag {name} " in line]
        (file,) = re.findall(r"--file (\S+)", built)
        assert (ROOT / file).is_file()
        assert f"org.opencontainers.image.version={tag}" in built
        assert re.search(r"org\.opencontainers\.image\.revision=\S+", built)
        assert ("--target autoscaler" in built) == (image == "autoscaler")
        listed = json.loads((tmp_path / "dist" / "sbom" / f"millrace-{image}-{tag}.cdx.json").read_text())
        assert listed["metadata"]["component"]["name"] == f"millrace-{image}"
    assert [line.split()[1] for line in said if line.startswith("push")] == (names if registry else [])


@pytest.mark.system
def test_make_images_refuses_a_version_that_is_not_the_codes(tmp_path: Path, engine: Path) -> None:
    done = make(tmp_path, "images", "VERSION=99.0.0", PATH=f"{engine.parent}:{os.environ['PATH']}")
    assert done.returncode == 2
    assert f"VERSION is 99.0.0, but shared/version.py says {MILLRACE_VERSION}" in done.stderr
    assert not (tmp_path / "said").exists()


@pytest.mark.system
def test_the_list_of_an_image_has_its_packages(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, str(SBOM), "millrace-x", "1.0"], capture_output=True, text=True, check=True, timeout=PATIENCE_S
    )
    bill = json.loads(done.stdout)
    assert (bill["bomFormat"], bill["specVersion"]) == ("CycloneDX", "1.5")
    found = {each["purl"]: each for each in bill["components"]}
    assert len(found) == len(bill["components"])
    assert found[f"pkg:pypi/msgspec@{version('msgspec')}"]["version"] == version("msgspec")
    if Path("/var/lib/dpkg/status").exists():
        assert any(purl.startswith("pkg:deb/debian/libc6@") for purl in found)


@pytest.mark.system
def test_the_charts_file_has_the_version_twice(tmp_path: Path) -> None:
    """By the recipe's own command."""
    (recipe,) = re.findall(r"bin/python -c '(import sys; from helm_python.*?)' \$\(VERSION\)", MAKEFILE, re.DOTALL)
    shutil.copytree(ROOT / "helm", tmp_path / "helm")
    (tmp_path / "dist").mkdir()
    script = recipe.replace("\\\n\t\t", "")
    subprocess.run([sys.executable, "-c", script, "9.8.7"], cwd=tmp_path, check=True, timeout=PATIENCE_S)
    with tarfile.open(tmp_path / "dist" / "millrace-9.8.7.tgz") as packed:
        names = packed.getnames()
        file = packed.extractfile("millrace/Chart.yaml")
        assert file is not None
        chart = yaml.safe_load(file.read())
    assert (chart["version"], chart["appVersion"]) == ("9.8.7", "9.8.7")
    assert "millrace/values.schema.json" in names
    assert not [name for name in names if "Containerfile" in name or name.endswith("values_schema.py")]


MAKEFILE = (ROOT / "Makefile").read_text()


def test_the_forges_workflow_makes_what_the_makefile_can() -> None:
    text = (ROOT / ".github" / "workflows" / "build.yaml").read_text()
    workflow: dict[str, Any] = yaml.safe_load(text)
    runs = [step["run"] for job in workflow["jobs"].values() for step in job["steps"] if "run" in step]
    targets = re.findall(r"^([a-z-]+):", MAKEFILE, re.MULTILINE)
    made = [words[1] for words in map(str.split, runs) if words[0] == "make"]
    assert set(made) <= set(targets)
    assert {"test", "images", "wheel", "chart"} <= set(made)
    assert workflow["jobs"]["release"]["if"] == "startsWith(github.ref, 'refs/tags/v')"
    assert not re.search(r"https?://|\b[\w-]+\.(com|io|org|net)\b", text), "hosts are the forge's variables"
