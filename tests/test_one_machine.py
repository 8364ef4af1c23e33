"""docs/one-machine.md and its files: what they say is what the services and commands accept."""

import re
import shlex
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from machine import PATIENCE_S

from cli.environment import SETTINGS
from cli.flags import parse
from shared import config
from shared.version import MILLRACE_VERSION

ROOT = Path(__file__).resolve().parent.parent
PAGE = (ROOT / "docs" / "one-machine.md").read_text()
FILES = ROOT / "docs" / "one-machine"
COMPOSE: dict[str, Any] = yaml.safe_load((FILES / "compose.yaml").read_text())
UNIT = (FILES / "millrace.service").read_text()


@pytest.mark.parametrize("service", SETTINGS)
def test_each_container_is_told_settings_that_its_service_has(service: str) -> None:
    container = COMPOSE["services"][service]
    told = config.load(SETTINGS[service], container["environment"])
    assert (told.redis_url, told.model, told.max_model_len) == ("redis://redis:6379/0", "/model", 32768)
    image = f"${{REGISTRY:-localhost}}/millrace-{service.replace('_', '-')}:${{VERSION:-{MILLRACE_VERSION}}}"
    assert container["image"] == image
    assert [volume.endswith(":/model:ro") for volume in container["volumes"]] == [True]
    assert ("deploy" in container) == (service in ("mm_encoder", "engine"))
    assert int(container["stop_grace_period"].removesuffix("s")) > told.drain_s + 10


def test_the_containers_are_the_four_and_the_charts_valkey() -> None:
    assert set(COMPOSE["services"]) == {*SETTINGS, "redis"}
    chart = yaml.safe_load((ROOT / "helm" / "values.yaml").read_text())
    assert COMPOSE["services"]["redis"]["image"] == chart["redis"]["image"]
    (port,) = COMPOSE["services"]["gateway"]["ports"]
    assert port.startswith("127.0.0.1:"), "without a key it is for this machine alone"


def commands(text: str) -> list[list[str]]:
    joined = text.replace("\\\n", " ")
    return [shlex.split(line) for line in joined.splitlines() if re.match(r"(    |ExecStart=)\S*millrace serve", line)]


def test_the_commands_that_start_it_are_accepted(tmp_path: Path) -> None:
    found = [*commands(PAGE), *commands(UNIT)]
    assert len(found) == 4
    for words in found:
        flags = words[words.index("serve") + 1 :]
        flags[flags.index("--model") + 1] = str(tmp_path)
        assert parse(flags, {}).settings["max_model_len"] in (32768, 131072)


@pytest.mark.system
@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd is not installed")
def test_systemd_understands_the_unit(tmp_path: Path) -> None:
    unit = tmp_path / "millrace.service"
    unit.write_text(UNIT.replace("/opt/millrace/bin/millrace", "/bin/true"))
    done = subprocess.run(
        ["systemd-analyze", "verify", str(unit)], capture_output=True, text=True, check=False, timeout=PATIENCE_S
    )
    assert (done.returncode, done.stderr) == (0, "")
