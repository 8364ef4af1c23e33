"""Pods of the tests' own beside a release: the one that brings the model, and those that make load."""

import io
import json
import tarfile
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from cluster_forward import forwarded
from cluster_questions import DTYPE
from cluster_release import RELEASE, Release, component, until
from cluster_settings import CLAIM, ClusterSettings
from kubernetes import client
from kubernetes.client.exceptions import ApiException

from cli.demo import write_demo

HERE = Path(__file__).parent
PORT = 8000
ASKERS = 8
CLAIM_SIZE = "1Gi"
NEVER_READY = (ConnectionError, urllib.error.URLError, TimeoutError)


def image(settings: ClusterSettings, default_tag: str) -> str:
    """The gateway's, which has Python."""
    told = settings.values["image"]
    registry = f"{told['registry'].rstrip('/')}/" if told["registry"] else ""
    return f"{registry}{RELEASE}-{component('gateway')}:{told['tag'] or default_tag}"


def manifest(
    name: str, image: str, script: str, arguments: list[str], settings: ClusterSettings, volume: str | None = None
) -> dict[str, Any]:
    """A pod that runs a Python script, allowed as little as those of the chart. A `volume` is a claim, at /model."""
    told = settings.values["image"]
    in_release = {f"app.kubernetes.io/{key}": value for key, value in _labels(name).items()} if volume is None else {}
    spec: dict[str, Any] = {
        "restartPolicy": "Never",
        "automountServiceAccountToken": False,
        "enableServiceLinks": False,
        "terminationGracePeriodSeconds": 0,
        "securityContext": {
            "runAsNonRoot": True,
            "runAsUser": 10001,
            "runAsGroup": 10001,
            "fsGroup": 10001,
            "seccompProfile": {"type": "RuntimeDefault"},
        },
        "imagePullSecrets": told.get("pullSecrets", []),
        "containers": [
            {
                "name": "python",
                "image": image,
                "imagePullPolicy": told.get("pullPolicy", "IfNotPresent"),
                "command": ["python", "-c", script, *arguments],
                "env": [{"name": "MILLRACE_API_KEYS", "value": json.dumps(settings.api_keys)}],
                "securityContext": {
                    "allowPrivilegeEscalation": False,
                    "readOnlyRootFilesystem": True,
                    "capabilities": {"drop": ["ALL"]},
                },
                "resources": {"requests": {"cpu": "50m", "memory": "64Mi"}, "limits": {"memory": "256Mi"}},
            }
        ],
    }
    if volume is not None:
        spec["volumes"] = [{"name": "model", "persistentVolumeClaim": {"claimName": volume}}]
        spec["containers"][0]["volumeMounts"] = [{"name": "model", "mountPath": "/model"}]
    return {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": name, "labels": in_release}, "spec": spec}


def _labels(name: str) -> dict[str, str]:
    """Of the pod of `helm test`: policies let it reach the gateway and nothing else."""
    return {"name": "millrace", "instance": RELEASE, "component": "test"}


@contextmanager
def running(release: Release, pod: dict[str, Any]) -> Iterator[str]:
    """The pod, once its script answers; the URL at which it does. It is gone afterwards."""
    core = client.CoreV1Api(release.api)
    name = pod["metadata"]["name"]
    core.create_namespaced_pod(release.namespace, client.V1Pod.model_validate(pod))
    try:
        until(lambda: _phase(core, release, name) != "Pending", release.patience_s, lambda: f"{name} does not start")
        with forwarded(release.api.configuration, release.namespace, name, PORT) as url:
            until(lambda: _answers(url), release.patience_s, lambda: f"{name}: {_phase(core, release, name)}")
            yield url
    finally:
        core.delete_namespaced_pod(name, release.namespace, grace_period_seconds=0)
        until(lambda: _phase(core, release, name) is None, release.patience_s, lambda: f"{name} does not go")


def _phase(core: client.CoreV1Api, release: Release, name: str) -> str | None:
    try:
        status = core.read_namespaced_pod(name, release.namespace).status
    except ApiException as error:
        if error.status == 404:
            return None
        raise
    return status.phase if status else "Pending"


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=10):
            return True
    except NEVER_READY:
        return False


# ------------------------------------------------------------------------------------------------------------- model


def bring_model(release: Release, settings: ClusterSettings, image: str, scratch: Path) -> None:
    """Write the small model into a claim."""
    claim = {
        "apiVersion": "v1",
        "kind": "PersistentVolumeClaim",
        "metadata": {"name": CLAIM},
        "spec": {"accessModes": ["ReadWriteOnce"], "resources": {"requests": {"storage": CLAIM_SIZE}}},
    }
    core = client.CoreV1Api(release.api)
    core.create_namespaced_persistent_volume_claim(
        release.namespace, client.V1PersistentVolumeClaim.model_validate(claim)
    )
    script = (HERE / "cluster_receive.py").read_text(encoding="utf-8")
    pod = manifest("millrace-test-receive", image, script, [str(PORT), "/model"], settings, CLAIM)
    with running(release, pod) as url:
        request = urllib.request.Request(url, data=demo_tar(scratch), method="PUT")
        with urllib.request.urlopen(request, timeout=release.patience_s) as response:
            assert response.status == 204
        until(
            lambda: _phase(core, release, "millrace-test-receive") == "Succeeded",
            release.patience_s,
            lambda: "the model was not written",
        )


def take_model(release: Release) -> None:
    """Delete the claim that `bring_model` made, if it did."""
    try:
        client.CoreV1Api(release.api).delete_namespaced_persistent_volume_claim(CLAIM, release.namespace)
    except ApiException as error:
        if error.status != 404:
            raise


def demo_tar(scratch: Path) -> bytes:
    write_demo(scratch, dtype=DTYPE)
    data = io.BytesIO()
    with tarfile.open(fileobj=data, mode="w") as archive:
        for path in sorted(scratch.iterdir()):
            archive.add(path, path.name)
    return data.getvalue()


# -------------------------------------------------------------------------------------------------------------- load


class Load:
    """What is being asked in the cluster, seen from here."""

    def __init__(self, url: str, patience_s: float) -> None:
        self._url = url
        self._patience_s = patience_s

    def answers(self) -> list[dict[str, Any]]:
        return list(self._tell()["answers"])

    def more(self, number: int = ASKERS) -> None:
        """Wait for so many more answers."""
        wanted = len(self.answers()) + number
        until(lambda: len(self.answers()) >= wanted, self._patience_s, lambda: f"stuck after {self.answers()[-3:]}")

    def end(self) -> list[dict[str, Any]]:
        """Every answer, those included that were waited for."""
        self._tell(b"")
        until(lambda: self._tell()["asking"] == 0, self._patience_s, lambda: f"waits: {self._tell()['asking']}")
        return self.answers()

    def _tell(self, data: bytes | None = None) -> Any:
        with urllib.request.urlopen(self._url, data, timeout=60) as response:
            return json.load(response)


@contextmanager
def load(release: Release, settings: ClusterSettings, image: str, questions: list[str]) -> Iterator[Load]:
    """A pod that asks the questions without a pause, through the Service."""
    port = settings.values.get("service", {}).get("port", 8180)
    url = f"http://{RELEASE}-gateway:{port}"
    script = (HERE / "cluster_load.py").read_text(encoding="utf-8")
    arguments = [url, settings.model, str(PORT), str(ASKERS), json.dumps(questions)]
    with running(release, manifest("millrace-test-load", image, script, arguments, settings)) as told:
        yield Load(told, release.patience_s)


def complaints(answers: list[dict[str, Any]], exact: bool, may_repeat: bool) -> list[str]:
    """What is wrong with the answers. `exact`: the same question has the same answer, whatever happened meanwhile, as
    is true of those that cluster_questions.py finds."""
    found = [f"{each['error']} at {each['began']:.0f}" for each in answers if each["error"]]
    whole = [each for each in answers if not each["error"]]
    found += [f"ended with {each['finish']}" for each in whole if each["finish"] not in ("stop", "length")]
    if not may_repeat:
        found += [f"connection broke at {each['began']:.0f}" for each in whole if each["repeats"]]
    if exact:
        texts: dict[int, set[str]] = {}
        for each in whole:
            if not each["picture"]:
                texts.setdefault(each["question"], set()).add(each["text"])
        found += [f"question {number} has {len(said)} answers" for number, said in texts.items() if len(said) > 1]
    return found
