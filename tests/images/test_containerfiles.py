"""What the four Containerfiles say, without building them."""

import os
import re
import subprocess
import tomllib
from pathlib import Path

import pytest
from machine import PATIENCE_S

ROOT = Path(__file__).resolve().parents[2]
IMAGES = ROOT / "helm" / "images"
SERVICES = ("gateway", "mm_encoder", "engine", "postproc")
AUTOSCALER = r"FROM \S+ AS autoscaler\b"
BASE = "docker.io/library/python:3.11-slim-bookworm"


def text(service: str) -> str:
    return (IMAGES / f"{service.replace('_', '-')}.Containerfile").read_text()


def own(service: str) -> str:
    """A service's Containerfile without what is built only for --target autoscaler."""
    stages = re.split(r"^(?=FROM )", text(service), flags=re.MULTILINE)
    return "".join(stage for stage in stages if not re.match(AUTOSCALER, stage))


def final(service: str) -> str:
    """The stage that becomes the image."""
    return text(service)[text(service).rindex("\nFROM ") :]


def test_there_is_one_for_each_service_and_none_other() -> None:
    assert {path.stem.replace("-", "_") for path in IMAGES.glob("*.Containerfile")} == set(SERVICES)


@pytest.mark.parametrize("service", SERVICES)
def test_an_image_holds_its_own_service_and_shared(service: str) -> None:
    copied = re.findall(r"^COPY (?!--from)(.*)$", own(service), re.MULTILINE)
    code = {words.split()[0] for words in copied if words.startswith(("shared", "services", "cli"))}
    assert code == {"shared", "shared/version.py", f"services/{service}"}
    assert f'ENTRYPOINT ["python", "-m", "services.{service}"]' in final(service)
    assert f"import services.{service}.__main__" in final(service)


def test_the_autoscalers_image_holds_what_it_imports_and_no_service() -> None:
    stages = re.findall(rf"^{AUTOSCALER}.*?(?=^FROM |\Z)", text("gateway"), re.MULTILINE | re.DOTALL)
    assert len(stages) == 3
    copied = re.findall(r"^COPY (?!--from)(.*)$", "".join(stages), re.MULTILINE)
    held = {word for words in copied for word in words.split()[:-1] if word.startswith(("shared", "services", "cli"))}
    assert held == {"shared", "shared/version.py", "cli/autoscaler", "cli/__init__.py", "cli/connection.py"}
    assert "'.[autoscaler]'" in stages[0]
    assert "USER 10001:10001" in stages[-1]
    assert 'ENTRYPOINT ["python", "-m", "cli.autoscaler"]' in stages[-1]
    assert "autoscaler" not in final("gateway")


@pytest.mark.parametrize("service", SERVICES)
def test_the_last_stage_builds_nothing_and_is_nobody(service: str) -> None:
    assert "USER 10001:10001" in final(service)
    assert not re.search(r"\b(gcc|apt-get|pip|build-essential)\b", final(service))
    assert set(re.findall(r"^FROM (\S+)", own(service), re.MULTILINE)) <= {BASE, "dependencies"}


@pytest.mark.parametrize("service", SERVICES)
def test_versions_are_those_of_the_tests(service: str) -> None:
    """By constraints.txt, with the service's own extra, under the name that every pip understands."""
    (extra,) = re.findall(r"install --constraint constraints.txt '\.\[([a-z-]+)\]'", own(service))
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert extra.replace("-", "_") == service
    assert service in extras


def test_a_diff_between_two_is_the_difference_between_two_services() -> None:
    def skeleton(service: str) -> list[str]:
        name = service.replace("_", "-")
        return [re.sub(f"{service}|{name}", "SERVICE", line) for line in text(service).splitlines()[1:]]

    common = [line for line in skeleton("postproc") if line and not line.startswith("EXPOSE")]
    for service in SERVICES:
        lines = iter(skeleton(service))
        assert [line for line in common if not any(line == other for other in lines)] == [], service


@pytest.mark.parametrize("service", SERVICES)
@pytest.mark.skipif("CHART_TOOLS" not in os.environ, reason="CHART_TOOLS is not set; see make test-chart")
def test_hadolint_finds_nothing(service: str) -> None:
    hadolint = Path(os.environ["CHART_TOOLS"]).absolute() / "python/bin/hadolint"
    done = subprocess.run(
        [str(hadolint), "-"], input=text(service), capture_output=True, text=True, check=False, timeout=PATIENCE_S
    )
    assert (done.returncode, done.stdout) == (0, "")
