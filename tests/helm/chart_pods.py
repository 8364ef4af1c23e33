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

from chart_valkey import valkey
from helm_chart import CHART, NAMESPACE, SERVICES, Object, Values, container, environment, find, objects, pods
from machine import PATIENCE_S, free_port

from cli.demo import write_demo

ROOT = CHART.parent
AUTOSCALER = "autoscaler"
POLL_S = 0.2
VALUES: Values = {
    "model": {"existingClaim": "checkpoint", "name": "demo"},
    "settings": {"shards": 2, "max_model_len": 2048},
    "apiKeys": ["sk-one"],
    "redis": {"maxMemoryMb": 256},
    "mm_encoder": {"gpus": 0},
    "engine": {"gpus": 0, "replicas": 0, "settings": {"max_num_seqs": 4, "kv_cache_bytes": 16777216}},
    "autoscaling": {"kind": "builtin", "cooldownSeconds": 1},
}


class Pod:
    """A container of the chart's as a process of this machine. `volume`: the model's directory or, for the autoscaler,
    one with a `kubeconfig` in place of the token that a cluster would mount."""

    def __init__(self, items: list[Object], service: str, secret: dict[str, str], volume: Path, log: Path) -> None:
        self.spec = container(pods(items)[service.replace("_", "-")][1])
        self.service = service
        self.log = log
        fields = {"metadata.name": f"millrace-{service}-0", "metadata.namespace": NAMESPACE}
        self.environ = {"OMP_NUM_THREADS": "1"}
        for name, value in environment(items, service).items():
            if isinstance(value, str):
                self.environ[name] = value
            elif "fieldRef" in value:
                self.environ[name] = fields[value["fieldRef"]["fieldPath"]]
            else:
                self.environ[name] = secret[value["secretKeyRef"]["key"]]
        self.environ["MILLRACE_METRICS_PORT"] = str(free_port())
        if service == AUTOSCALER:
            self.environ["KUBECONFIG"] = f"{self.see(volume)}/kubeconfig"
            self.environ["MILLRACE_INTERVAL_S"] = str(POLL_S)  # a test waits for several looks
        else:
            self.environ["MILLRACE_MODEL"] = self.see(volume)
        if service == "gateway":
            self.environ["MILLRACE_PORT"] = str(free_port())
        self.start(volume)

    def see(self, volume: Path) -> str:
        """Where the container sees its volume."""
        return str(volume)

    def start(self, volume: Path) -> None:
        module = "cli.autoscaler" if self.service == AUTOSCALER else f"services.{self.service}"
        with self.log.open("wb") as output:
            self.process = subprocess.Popen(
                [sys.executable, "-m", module],
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
        return self.process.wait(PATIENCE_S)

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
        port = self.environ[{"http": "MILLRACE_PORT", "metrics": "MILLRACE_METRICS_PORT"}[probe["httpGet"]["port"]]]
        try:
            url = f"http://127.0.0.1:{port}{probe['httpGet']['path']}"
            with urllib.request.urlopen(url, timeout=PATIENCE_S) as reply:
                return int(reply.status) == 200
        except OSError:
            return False

    def wait_until_started(self) -> None:
        deadline = time.monotonic() + PATIENCE_S
        while not self.probe("startup"):
            assert not self.ended(), self.log.read_text()
            assert time.monotonic() < deadline, self.log.read_text()
            time.sleep(POLL_S)


@contextlib.contextmanager
def running(directory: Path, kinds: dict[str, type[Pod]]) -> Iterator[dict[str, Pod]]:
    """All four, started, against the chart's Valkey; `kinds` says of each service what runs it."""
    items = objects(VALUES)
    write_demo(directory / "model", dtype="float32")  # what CPUs compute exactly enough for tests/cluster to compare
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
    """What `helm test` runs: the rendered pod's command with the rendered script, at this gateway's address."""
    items = objects(VALUES)
    spec = container(pods(items)["test"][1])
    (mount,) = spec["volumeMounts"]
    interpreter, path = spec["command"]
    service = find(items, "Service", "millrace-gateway")
    address, *others = spec["args"]
    assert interpreter == "python"
    assert address == f"http://{service['metadata']['name']}:{service['spec']['ports'][0]['port']}"
    script = find(items, "ConfigMap", "millrace-test")["data"][path.removeprefix(f"{mount['mountPath']}/")]
    assert [each["name"] for each in spec["env"]] == ["MILLRACE_API_KEYS"]
    return subprocess.run(
        [sys.executable, "-I", "-", url, *others],
        input=script,
        env={"MILLRACE_API_KEYS": '["sk-one"]'},
        capture_output=True,
        text=True,
        check=False,
        timeout=PATIENCE_S,
    )
