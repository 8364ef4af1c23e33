"""Who says how many replicas there are: Helm itself installs and upgrades on an API server that knows field ownership,
while others scale."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from api_server import ApiServer, Object, api_server
from chart_autoscaler import kubeconfig
from helm_chart import CHART, CLAIM, SERVICES, Values, container, find, parse, render
from helm_python import Config
from helm_python.errors import HelmError
from machine import PATIENCE_S
from test_chart_render import validator

SCRIPT = CHART / "files" / "set_replicas.py"
# What tells the two apart is the field's owners; all else is left out, so that a test takes a second.
SMALL: Values = {**CLAIM, "networkPolicy": {"enabled": False}, "redis": {"external": {"url": "redis://r"}}}
ENGINE = "millrace-engine"


pytestmark = pytest.mark.system


@pytest.fixture
def api(tmp_path: Path) -> Iterator[ApiServer]:
    with api_server() as made:
        made.run_job = lambda job: run(made, job, tmp_path)
        yield made


@pytest.fixture
def helm(api: ApiServer, tmp_path: Path) -> Iterator[Config]:
    (tmp_path / "kubeconfig").write_text(kubeconfig(api.url))
    with Config(
        kubeconfig_path=str(tmp_path / "kubeconfig"), namespace="models", storage_driver="memory", qps=1000.0
    ) as made:
        yield made


def run(api: ApiServer, job: Object, directory: Path) -> bool:
    """Run a Job's pod as a process, as the account that it is, and return whether it succeeds."""
    (directory / "namespace").write_text("models")
    (directory / "token").write_text("t")
    spec = container(job["spec"]["template"]["spec"])
    assert spec["command"] == ["python", "/etc/millrace/set_replicas.py"]
    script = api.objects["/api/v1/namespaces/models/configmaps/millrace-replicas"]["data"]["set_replicas.py"]
    done = subprocess.run(
        [sys.executable, "-I", "-c", script, *spec["args"]],
        env={
            "PATH": os.environ["PATH"],
            "SERVICE_ACCOUNT": str(directory),
            "KUBERNETES_SERVICE_HOST": "127.0.0.1",
            "KUBERNETES_SERVICE_PORT": "443",
            "KUBERNETES_SERVER": api.url,
        },
        capture_output=True,
        text=True,
        check=False,
        timeout=PATIENCE_S,
    )
    return done.returncode == 0


def values(**engine: object) -> Values:
    return {**SMALL, "engine": engine}


def upgrade(helm: Config, told: Values) -> None:
    helm.upgrade(CHART, "millrace", told, timeout=60)


def test_the_server_refuses_what_kubernetes_refuses(api: ApiServer, helm: Config) -> None:
    """The planted violation: a chart that names a number of its own while somebody else owns it."""
    helm.install(CHART, "millrace", values(replicas=2), timeout=60)
    api.scale(ENGINE, 3)
    api.deployment(ENGINE)["metadata"]["managedFields"] = []  # what the chart looks at
    with pytest.raises(HelmError, match=r"conflict with \"kubectl\": \.spec\.replicas"):
        upgrade(helm, values(replicas=2))


def test_the_values_count_while_nobody_else_scales(api: ApiServer, helm: Config) -> None:
    helm.install(CHART, "millrace", values(replicas=2), timeout=60)
    assert api.replicas(ENGINE) == 2
    upgrade(helm, values(replicas=4))
    assert api.replicas(ENGINE) == 4
    assert "millrace-replicas" not in api.names("Role")


def test_an_upgrade_leaves_what_kubectl_scaled(api: ApiServer, helm: Config) -> None:
    """The documented change of shards, too: all four scaled to zero, an upgrade, and all four up again."""
    helm.install(CHART, "millrace", values(replicas=2), timeout=60)
    for service in SERVICES:
        api.scale(f"millrace-{service.replace('_', '-')}", 0)
    for shards in (8, 6):
        upgrade(helm, {**values(replicas=2), "settings": {"shards": shards}})
        assert {api.replicas(f"millrace-{service.replace('_', '-')}") for service in SERVICES} == {0}
    api.scale(ENGINE, 3)
    upgrade(helm, {**values(replicas=2), "settings": {"shards": 6}})
    assert api.replicas(ENGINE) == 3


def test_a_number_that_changes_in_the_values_counts_over_kubectls(api: ApiServer, helm: Config) -> None:
    helm.install(CHART, "millrace", values(replicas=2), timeout=60)
    api.scale(ENGINE, 3)
    upgrade(helm, values(replicas=1))
    assert api.replicas(ENGINE) == 1
    upgrade(helm, values(replicas=1))
    api.scale(ENGINE, 5)
    upgrade(helm, values(replicas=1))
    assert api.replicas(ENGINE) == 5, "the same number again is not a new one"
    upgrade(helm, values(replicas=5))
    upgrade(helm, values(replicas=6))
    assert api.replicas(ENGINE) == 6
    assert not {"millrace-replicas"} & {*api.names("Role"), *api.names("Job"), *api.names("ServiceAccount")}


@pytest.mark.parametrize("kind", ["hpa", "external"])
def test_a_scaler_that_is_turned_on_finds_the_number_that_was_there(api: ApiServer, helm: Config, kind: str) -> None:
    scaled = {**values(replicas=2), "autoscaling": {"kind": kind}}
    helm.install(CHART, "millrace", values(replicas=2), timeout=60)
    for _ in range(2):
        upgrade(helm, scaled)
        assert api.replicas(ENGINE) == 2, "a field that nobody owns any more goes back to 1"
    api.scale(ENGINE, 4, "kube-controller-manager")
    upgrade(helm, scaled)
    assert api.replicas(ENGINE) == 4
    assert api.owners["/apis/apps/v1/namespaces/models/deployments/millrace-engine"] == {
        "kube-controller-manager": False
    }


def test_an_autoscaler_that_is_turned_off_leaves_the_values_number(api: ApiServer, helm: Config) -> None:
    helm.install(CHART, "millrace", {**values(replicas=2), "autoscaling": {"kind": "builtin"}}, timeout=60)
    api.scale(ENGINE, 4, "OpenAPI-Generator")
    upgrade(helm, values(replicas=2))
    assert api.replicas(ENGINE) == 2
    upgrade(helm, values(replicas=2))
    assert api.replicas(ENGINE) == 2


def test_the_hook_may_scale_what_it_scales_and_nothing_else(api: ApiServer, helm: Config) -> None:
    """Its objects as Kubernetes would take them; they are rendered in no other test."""
    seen: list[Object] = []

    def look(job: Object) -> bool:
        seen.extend([*(item for item in api.objects.values() if item["metadata"]["name"] == "millrace-replicas"), job])
        return True

    api.run_job = look
    helm.install(CHART, "millrace", values(replicas=2), timeout=60)
    api.scale(ENGINE, 3)
    upgrade(helm, {**values(replicas=1), "networkPolicy": {"enabled": True}})
    assert {item["kind"] for item in seen} == {
        *("ServiceAccount", "Role", "RoleBinding", "ConfigMap", "NetworkPolicy", "Job"),
    }
    for item in seen:
        bare = {key: value for key, value in item.items() if key != "status"}
        assert list(validator("1.37", item["kind"], item["apiVersion"]).iter_errors(bare)) == []
    (rule,) = find(seen, "Role")["rules"]
    assert rule == {
        "apiGroups": ["apps"],
        "resources": ["deployments/scale"],
        "resourceNames": [ENGINE],
        "verbs": ["patch"],
    }
    job = find(seen, "Job")["spec"]["template"]
    policy = find(seen, "NetworkPolicy")["spec"]
    assert policy["podSelector"]["matchLabels"].items() <= job["metadata"]["labels"].items()
    assert {port["port"] for rule in policy["egress"] for port in rule["ports"]} == {443, 6443, 8443, 16443}
    assert job["spec"]["automountServiceAccountToken"] is True
    assert json.loads(container(job["spec"])["args"][0]) == {ENGINE: 1}


def test_a_number_that_cannot_be_set_fails_the_upgrade(api: ApiServer, helm: Config) -> None:
    helm.install(CHART, "millrace", values(replicas=2), timeout=60)
    api.scale(ENGINE, 3)
    api.run_job = lambda job: False
    with pytest.raises(HelmError, match="post-upgrade"):
        upgrade(helm, values(replicas=1))


def test_a_download_that_was_given_up_begins_again_with_the_next_upgrade(api: ApiServer, helm: Config) -> None:
    api.run_job = lambda job: True
    fetched = {**SMALL, "model": {"download": {"repository": "baidu/ernie"}}}
    helm.install(CHART, "millrace", fetched, timeout=60)
    (first,) = api.names("Job")
    upgrade(helm, fetched)
    assert api.names("Job") == [first]
    job = api.objects[f"/apis/batch/v1/namespaces/models/jobs/{first}"]
    job["status"] = {"conditions": [{"type": "FailureTarget", "status": "True"}, {"type": "Failed", "status": "True"}]}
    upgrade(helm, fetched)
    assert api.names("Job") == [f"{first}-3"]


def test_without_a_cluster_the_values_are_rendered() -> None:
    made = parse(render(values(replicas=3)))
    assert find(made, "Deployment", ENGINE)["spec"]["replicas"] == 3
    assert find(made, "Deployment", ENGINE)["metadata"]["annotations"] == {"millrace/replicas": "3"}
