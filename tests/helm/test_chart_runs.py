"""The rendered pods run: each container's process with exactly the environment the chart gives it, against the chart's
Valkey and its users. Only what one machine cannot have is replaced: addresses, ports, and the model's directory."""

import contextlib
import os
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
from chart_valkey import free_port, valkey
from helm_chart import CHART, SERVICES, Object, Values, container, environment, objects, pods

from cli.demo import write_demo

ROOT = CHART.parent
READY_S = 120.0  # on a machine with two slow cores
STOP_S = 60.0
POLL_S = 0.2
VALUES: Values = {
    "model": {"existingClaim": "checkpoint", "name": "demo"},
    "settings": {"shards": 2, "max_model_len": 2048},
    "apiKeys": ["sk-one"],
    "redis": {"maxMemoryMb": 256},
    "mm_encoder": {"gpus": 0},
    "engine": {"gpus": 0, "settings": {"max_num_seqs": 4, "kv_cache_bytes": 16777216}},
}


class Pod:
    """One service's container as a process of this machine."""

    def __init__(self, items: list[Object], service: str, secret: dict[str, str], model: Path, log: Path) -> None:
        self.spec = container(pods(items)[service.replace("_", "-")][1])
        self.environ = {"PATH": os.environ["PATH"], "OMP_NUM_THREADS": "1"}
        for name, value in environment(items, service).items():
            if isinstance(value, str):
                self.environ[name] = value
            elif "fieldRef" in value:
                self.environ[name] = f"millrace-{service}-0"
            else:
                self.environ[name] = secret[value["secretKeyRef"]["key"]]
        self.environ |= {"MILLRACE_MODEL": str(model), "MILLRACE_METRICS_PORT": str(free_port())}
        if service == "gateway":
            self.environ["MILLRACE_PORT"] = str(free_port())
        self.log = log
        with log.open("wb") as output:
            self.process = subprocess.Popen(
                [sys.executable, "-m", f"services.{service}"], cwd=ROOT, env=self.environ, stdout=output, stderr=output
            )

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.environ['MILLRACE_PORT']}"

    def probe(self, kind: str) -> bool:
        """Whether the pod's own probe is content."""
        probe = self.spec[f"{kind}Probe"]
        if "exec" in probe:
            command = [sys.executable, *probe["exec"]["command"][1:]]
            return subprocess.run(command, cwd=ROOT, env=self.environ, capture_output=True, check=False).returncode == 0
        try:
            with urllib.request.urlopen(self.url + probe["httpGet"]["path"], timeout=5) as reply:
                return int(reply.status) == 200
        except OSError:
            return False

    def wait_until_started(self) -> None:
        deadline = time.monotonic() + READY_S
        while not self.probe("startup"):
            assert self.process.poll() is None, self.log.read_text()
            assert time.monotonic() < deadline, self.log.read_text()
            time.sleep(POLL_S)

    def stop(self) -> int:
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(STOP_S)


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Pod]]:
    items, directory = objects(VALUES), tmp_path_factory.mktemp("pods")
    write_demo(directory / "model")
    with contextlib.ExitStack() as stack:
        secret = stack.enter_context(valkey(items, directory, free_port()))
        secret |= {"keys": '["sk-one"]'}
        made = {}
        for service in SERVICES:
            made[service] = Pod(items, service, secret, directory / "model", directory / f"{service}.log")
            stack.callback(made[service].process.wait)
            stack.callback(made[service].process.kill)
        for pod in made.values():
            pod.wait_until_started()
        yield made


def test_every_probe_is_content(running: dict[str, Pod]) -> None:
    for service, pod in running.items():
        assert pod.probe("readiness"), service
        assert pod.probe("liveness"), service


def test_helm_test_passes(running: dict[str, Pod]) -> None:
    done = subprocess.run(
        [sys.executable, str(CHART / "files" / "chat.py"), running["gateway"].url, "demo"],
        env={"MILLRACE_API_KEYS": '["sk-one"]'},
        capture_output=True,
        text=True,
        check=False,
        timeout=READY_S,
    )
    assert done.returncode == 0, done.stderr
    assert "streamed: " in done.stdout


def test_metrics_are_where_the_podmonitor_looks(running: dict[str, Pod]) -> None:
    for service, pod in running.items():
        url = f"http://127.0.0.1:{pod.environ['MILLRACE_METRICS_PORT']}/metrics"
        with urllib.request.urlopen(url, timeout=5) as reply:
            assert b"millrace_" in reply.read(), service


def test_they_end_when_told_and_are_not_ready_then(running: dict[str, Pod]) -> None:
    """Last in this file: in the order in which a release is taken down."""
    for service, pod in running.items():
        assert pod.stop() == 0, pod.log.read_text()
        if service != "gateway":
            assert not pod.probe("readiness")
