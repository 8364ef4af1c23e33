"""The images, built from the unchanged Containerfiles and run as the chart's pods.

IMAGES names what to build ("gateway postproc", or all); the other services run as processes, and so does Valkey, with
the chart's configuration. IMAGES_BUILD_OPTIONS are more words for `buildah build`, such as a volume that holds wheels.
Needs buildah, podman and runc, and root; `base.sh` makes the base where no registry of images can be reached. Layers
are kept in IMAGES_ROOT between runs.
"""

import json
import os
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from chart_autoscaler import wake_and_sleep
from chart_pods import ROOT, Pod, helm_test, running
from helm_chart import SERVICES
from machine import PATIENCE_S
from openai import OpenAI

from shared.version import MILLRACE_VERSION

AUTOSCALER = "autoscaler"
HOME = {AUTOSCALER: "gateway"}  # in whose Containerfile it is
BUILT = os.environ.get("IMAGES", "").split()
STORE = Path(os.environ.get("IMAGES_ROOT", "/var/tmp/millrace-images"))
STORAGE = ["--root", str(STORE / "graph"), "--runroot", str(STORE / "run")]
LARGEST = {"gateway": 250_000_000, "postproc": 250_000_000}
CLI_FILES = [*(f"cli/{each}" for each in ("__init__.py", "autoscaler", "connection.py")), "shared"]
BUILD_S = 3600
# What the machine trusts and where it finds packages is lent to the build, not put into the image.
LENT = [path for path in ("/etc/ssl/certs", "/etc/pip.conf") if Path(path).exists()]

pytestmark = pytest.mark.skipif(not BUILT, reason="IMAGES is not set; see make test-images")


def words(*command: str, timeout: float = BUILD_S) -> str:
    """Run a command; its standard output."""
    environ = {**os.environ, "CONTAINERS_CONF": str(STORE / "containers.conf")}
    done = subprocess.run(command, env=environ, capture_output=True, text=True, check=False, timeout=timeout)
    assert done.returncode == 0, f"{shlex.join(command)}\n{done.stdout[-4000:]}\n{done.stderr[-4000:]}"
    return done.stdout


def podman(*arguments: str) -> str:
    return words("podman", *STORAGE, *arguments)


def tag(service: str) -> str:
    return f"localhost/millrace-{service.replace('_', '-')}:test"


class Container(Pod):
    """A pod's container, with the rights and the file system that the chart gives it."""

    def see(self, model: Path) -> str:
        return "/model"

    def start(self, model: Path) -> None:
        self.name = f"millrace-test-{self.service}-{os.getpid()}"
        security = self.spec["securityContext"]
        assert security["readOnlyRootFilesystem"]
        assert not security["allowPrivilegeEscalation"]
        rights = ["--read-only", "--tmpfs", "/tmp", "--security-opt", "no-new-privileges"]
        rights += [word for each in security["capabilities"]["drop"] for word in ("--cap-drop", each.lower())]
        environ = [word for name, value in self.environ.items() for word in ("--env", f"{name}={value}")]
        mounts = ["--volume", f"{model}:/model:ro"]
        podman(
            *("run", "--detach", "--name", self.name, "--network", "host", "--user", "10001:10001"),
            *(*rights, *environ, *mounts, tag(self.service)),
        )

    def run(self, command: list[str]) -> int:
        full = ["podman", *STORAGE, "exec", self.name, *command]
        environ = {**os.environ, "CONTAINERS_CONF": str(STORE / "containers.conf")}
        return subprocess.run(full, env=environ, capture_output=True, check=False).returncode

    def ended(self) -> bool:
        running = self.state()["Running"]
        if not running:
            self.log.write_text(podman("logs", self.name))
        return not running

    def stop(self) -> int:
        podman("stop", "--time", str(int(PATIENCE_S)), self.name)
        self.ended()
        return int(self.state()["ExitCode"])

    def kill(self) -> None:
        podman("rm", "--force", "--time", "0", self.name)

    def state(self) -> dict[str, Any]:
        [inspected] = json.loads(podman("inspect", self.name))
        state: dict[str, Any] = inspected["State"]
        return state


@pytest.fixture(scope="session")
def images() -> None:
    STORE.mkdir(parents=True, exist_ok=True)
    # Limits within what this process may give, and what works on hosts with old and new control groups.
    (STORE / "containers.conf").write_text(
        '[containers]\ndefault_ulimits = ["nofile=1024:1024", "nproc=1024:1024"]\n'
        '[engine]\ncgroup_manager = "cgroupfs"\nruntime = "runc"\n'
    )
    words(str(Path(__file__).with_name("base.sh")), *STORAGE)
    volumes = [word for path in LENT for word in ("--volume", f"{path}:{path}:ro")]
    options = ["--isolation", "chroot", "--network", "host", "--pull=never", "--layers", *volumes]
    options += shlex.split(os.environ.get("IMAGES_BUILD_OPTIONS", ""))
    for name in BUILT:
        target = ["--target", name] if name == AUTOSCALER else []
        file = ROOT / "helm" / "images" / f"{HOME.get(name, name).replace('_', '-')}.Containerfile"
        words("buildah", *STORAGE, "build", *options, *target, "--file", str(file), "--tag", tag(name), str(ROOT))


def open_to_all(directory: Path) -> Path:
    """Containers read what is in it as another user."""
    for parent in (directory, *directory.parents[:2]):
        parent.chmod(0o755)
    return directory


@pytest.fixture(scope="module")
def system(images: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Pod]]:
    directory = open_to_all(tmp_path_factory.mktemp("containers"))
    kinds = {service: Container if service in BUILT else Pod for service in SERVICES}
    with running(directory, kinds) as pods:
        yield pods


@pytest.mark.parametrize("name", BUILT)
def test_the_image_is_small_and_holds_its_own_service_only(images: None, name: str) -> None:
    size = int(json.loads(podman("image", "inspect", tag(name)))[0]["Size"])
    print(f"{name}: {size / 1e6:.0f} MB", file=sys.stderr)
    assert size < LARGEST.get(name, sys.maxsize)
    inside = ["run", "--rm", "--network", "host", "--entrypoint", "sh", tag(name), "-c"]
    held = podman(*inside, "cd /opt/service && ls -d services/* cli/* shared 2>/dev/null || true").split()
    held = [path for path in held if "__pycache__" not in path]
    assert held == (CLI_FILES if name == AUTOSCALER else [f"services/{name}", "shared"])
    version = 'python -c "from shared.version import MILLRACE_VERSION; print(MILLRACE_VERSION)"'
    assert podman(*inside, version).strip() == MILLRACE_VERSION
    assert podman(*inside, "id -u").strip() == "10001"
    assert podman(*inside, "command -v gcc cc c++ ld make || true").strip() == ""


def test_they_answer_the_openai_client(system: dict[str, Pod]) -> None:
    with OpenAI(base_url=f"{system['gateway'].url}/v1", api_key="sk-one") as client:
        stream = client.chat.completions.create(
            model="demo", stream=True, max_tokens=20, messages=[{"role": "user", "content": "Hello?"}]
        )
        chunks = list(stream)
    assert chunks[-1].choices[0].finish_reason in ("stop", "length")


def test_helm_test_passes(system: dict[str, Pod]) -> None:
    done = helm_test(system["gateway"].url)
    assert done.returncode == 0, done.stderr


@pytest.mark.skipif(AUTOSCALER not in BUILT, reason="IMAGES does not name it")
async def test_the_autoscaler_scales(images: None, tmp_path_factory: pytest.TempPathFactory) -> None:
    await wake_and_sleep(open_to_all(tmp_path_factory.mktemp("autoscaler")), Container)


def test_the_health_command_answers_inside(system: dict[str, Pod]) -> None:
    for service, pod in system.items():
        if service != "gateway":
            assert pod.probe("readiness"), service
        assert pod.run(["python", "-m", "shared.health", service, "ready"]) == 0


def test_they_end_when_told(system: dict[str, Pod]) -> None:
    """Last in this file: SIGTERM reaches the service itself, which has the first process id."""
    for pod in system.values():
        assert pod.stop() == 0, pod.log.read_text()
