"""The rendered pods' containers, run on this machine with exactly the environment the chart gives them. Only what one
machine cannot have is replaced: addresses, ports, and the model's directory."""

import contextlib
import os
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

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
        self.service = service
        self.log = log
        self.environ = {"OMP_NUM_THREADS": "1"}
        for name, value in environment(items, service).items():
            if isinstance(value, str):
                self.environ[name] = value
            elif "fieldRef" in value:
                self.environ[name] = f"millrace-{service}-0"
            else:
                self.environ[name] = secret[value["secretKeyRef"]["key"]]
        self.environ |= {"MILLRACE_MODEL": self.see(model), "MILLRACE_METRICS_PORT": str(free_port())}
        if service == "gateway":
            self.environ["MILLRACE_PORT"] = str(free_port())
        self.start(model)

    def see(self, model: Path) -> str:
        """Where the container sees the model."""
        return str(model)

    def start(self, model: Path) -> None:
        with self.log.open("wb") as output:
            self.process = subprocess.Popen(
                [sys.executable, "-m", f"services.{self.service}"],
                cwd=ROOT,
                env={"PATH": os.environ["PATH"], **self.environ},
                stdout=output,
                stderr=output,
            )

    def run(self, command: list[str]) -> int:
        """A command in the container; returns its exit status."""
        environ = {"PATH": os.environ["PATH"], **self.environ}
        command = [sys.executable, *command[1:]]
        return subprocess.run(command, cwd=ROOT, env=environ, capture_output=True, check=False).returncode

    def ended(self) -> bool:
        return self.process.poll() is not None

    def stop(self) -> int:
        """End it as the kubelet does; returns the exit status."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(STOP_S)

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.environ['MILLRACE_PORT']}"

    def probe(self, kind: str) -> bool:
        """Whether the pod's own probe is content."""
        probe = self.spec[f"{kind}Probe"]
        if "exec" in probe:
            return self.run(probe["exec"]["command"]) == 0
        try:
            with urllib.request.urlopen(self.url + probe["httpGet"]["path"], timeout=5) as reply:
                return int(reply.status) == 200
        except OSError:
            return False

    def wait_until_started(self) -> None:
        deadline = time.monotonic() + READY_S
        while not self.probe("startup"):
            assert not self.ended(), self.log.read_text()
            assert time.monotonic() < deadline, self.log.read_text()
            time.sleep(POLL_S)


@contextlib.contextmanager
def running(directory: Path, kinds: dict[str, type[Pod]]) -> Iterator[dict[str, Pod]]:
    """All four, started, against the chart's Valkey; `kinds` says of each service what runs it."""
    items = objects(VALUES)
    write_demo(directory / "model")
    with contextlib.ExitStack() as stack:
        secret = stack.enter_context(valkey(items, directory, free_port())) | {"keys": '["sk-one"]'}
        made = {}
        for service in SERVICES:
            made[service] = kinds[service](items, service, secret, directory / "model", directory / f"{service}.log")
            stack.callback(made[service].kill)
        for pod in made.values():
            pod.wait_until_started()
        yield made


def helm_test(url: str) -> "subprocess.CompletedProcess[str]":
    """What `helm test` runs."""
    return subprocess.run(
        [sys.executable, str(CHART / "files" / "chat.py"), url, "demo"],
        env={"MILLRACE_API_KEYS": '["sk-one"]'},
        capture_output=True,
        text=True,
        check=False,
        timeout=READY_S,
    )
