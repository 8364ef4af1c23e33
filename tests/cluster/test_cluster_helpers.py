"""What the cluster's tests rest on, tried without a cluster: what they are told and install, when they think a release
is at rest, what they call left over, and the pods and port-forwards they use, against a stand-in and a running system.
"""

import ssl
import urllib.request
from collections.abc import Iterator
from http.client import HTTPException
from pathlib import Path
from typing import Any

import certificates
import cluster_forward
import pytest
import yaml
from chart_autoscaler import kubeconfig as kubeconfig_text
from chart_pods import Pod
from chart_pods import running as system_running
from cluster_forward import forwarded
from cluster_pods import bring_model, complaints, demo_tar, image, load, manifest, take_model
from cluster_questions import questions
from cluster_release import RELEASE, SELECTOR, Release, component, ready, rolled_out, until
from cluster_settings import CLAIM, UNVERIFIED, ClusterSettings, read
from cluster_stand_in import NAMESPACE, StandIn, standing_in
from helm_chart import CHART, SERVICES, find, objects, pods
from helm_chart import complaints as lint_complaints
from helm_python import Config
from kubernetes import client
from machine import PATIENCE_S, free_port
from system import file_server
from test_chart_render import validator

OURS = {"app.kubernetes.io/name": "millrace", "app.kubernetes.io/instance": "millrace"}
CORE = f"/api/v1/namespaces/{NAMESPACE}"
APPS = f"/apis/apps/v1/namespaces/{NAMESPACE}"


def told(**environ: str) -> ClusterSettings:
    return read({"KUBECONFIG": "/nowhere", **environ})


@pytest.fixture
def stand_in() -> Iterator[StandIn]:
    with standing_in() as made:
        yield made


@pytest.fixture
def release(stand_in: StandIn) -> Iterator[Release]:
    api = client.ApiClient(client.Configuration(host=stand_in.url))
    yield Release(api, "/nowhere", NAMESPACE, PATIENCE_S)
    api.close()  # type: ignore[no-untyped-call]


# -------------------------------------------------------------------------------------------------------- settings


def test_what_is_installed_unless_told_otherwise_is_a_whole_small_system() -> None:
    settings = told()
    made = objects(settings.values)
    assert lint_complaints(settings.values) == []
    assert {component for component in pods(made)} >= {"gateway", "mm-encoder", "engine", "postproc", "redis"}
    assert find(made, "Deployment", "millrace-autoscaler")
    assert (settings.brings_model, settings.model, settings.exact, settings.api_keys) == (True, "demo", True, [])
    gpus = [spec for _, spec in pods(made).values() if "nvidia.com/gpu" in str(spec["containers"])]
    assert gpus == []


def test_images_and_values_are_the_environments(tmp_path: Path) -> None:
    file = tmp_path / "values.yaml"
    file.write_text(
        yaml.safe_dump(
            {
                "model": {"hostPath": "/models", "name": "ernie"},
                "engine": {"gpus": 1},
                "apiKeys": ["sk-one"],
                "image": {"tag": "other", "pullPolicy": "Always"},
            }
        )
    )
    settings = told(MILLRACE_TEST_VALUES=str(file), MILLRACE_TEST_REGISTRY="registry:5000/", MILLRACE_TEST_TAG="1")
    assert not settings.brings_model
    assert not settings.exact
    assert (settings.model, settings.api_keys) == ("ernie", ["sk-one"])
    made = pods(objects(settings.values))
    assert made["engine"][1]["containers"][0]["image"] == "registry:5000/millrace-engine:1"
    assert made["engine"][1]["containers"][0]["imagePullPolicy"] == "Always"
    assert image(settings, "0") == made["gateway"][1]["containers"][0]["image"]
    assert image(told(), "0.1.0") == pods(objects(told().values))["gateway"][1]["containers"][0]["image"]


def test_helm_takes_the_chart_and_the_values_as_they_are_given(release: Release, tmp_path: Path) -> None:
    kubeconfig = tmp_path / "kubeconfig"
    kubeconfig.write_text(kubeconfig_text(release.api.configuration.host))
    with Config(kubeconfig_path=str(kubeconfig), namespace=NAMESPACE) as helm:
        made = helm.install(CHART, RELEASE, told().values, dry_run="client", timeout=60)
    names = {item["metadata"]["name"] for item in yaml.safe_load_all(made["manifest"]) if item}
    assert {f"{RELEASE}-{component(stage)}" for stage in SERVICES} <= names


# ---------------------------------------------------------------------------------------------------------- at rest


def deployment(**changes: Any) -> client.V1Deployment:
    metadata = {"name": "millrace-engine", "generation": changes.pop("generation", 3), "labels": OURS}
    wanted = changes.pop("wanted", 2)
    status = {"observedGeneration": 3, "replicas": 2, "updatedReplicas": 2, "readyReplicas": 2, **changes}
    selector = {"matchLabels": OURS}
    spec = {"replicas": wanted, "selector": selector, "template": {"metadata": {"labels": OURS}}}
    made = client.V1Deployment.model_validate({"metadata": metadata, "spec": spec, "status": status})
    return made


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, True),
        ({"generation": 4}, False),  # not looked at yet
        ({"updatedReplicas": 1}, False),
        ({"replicas": 3}, False),  # an old one is still there
        ({"readyReplicas": 1}, False),
        ({"wanted": 0, "replicas": None, "updatedReplicas": None, "readyReplicas": None}, True),
        ({"wanted": 0}, False),  # they are still going
        ({"wanted": None, "replicas": 1, "updatedReplicas": 1, "readyReplicas": 1}, True),
    ],
)
def test_when_a_workload_is_rolled_out(changes: dict[str, Any], expected: bool) -> None:
    assert rolled_out(deployment(**changes)) is expected


def pod(name: str, component: str, condition: str = "True", leaves: bool = False) -> dict[str, Any]:
    metadata: dict[str, Any] = {"name": name, "labels": {**OURS, "app.kubernetes.io/component": component}}
    if leaves:
        metadata["deletionTimestamp"] = "2026-01-02T03:04:05Z"
    conditions = [{"type": "PodScheduled", "status": "True"}, {"type": "Ready", "status": condition}]
    return {"metadata": metadata, "spec": {"containers": []}, "status": {"phase": "Running", "conditions": conditions}}


def test_a_pod_that_leaves_is_not_ready() -> None:
    states = [("True", False), ("False", False), ("True", True)]
    made = [client.V1Pod.model_validate(pod("a", "engine", *state)) for state in states]
    assert [ready(each) for each in made] == [True, False, False]


def test_what_is_ready_and_what_is_not_at_rest(stand_in: StandIn, release: Release) -> None:
    stand_in.objects = {
        f"{CORE}/pods": [
            pod("one", "engine"),
            pod("two", "engine", "False"),
            pod("three", "engine", leaves=True),
            pod("four", "mm-encoder"),
            {"metadata": {"name": "other"}, "spec": {"containers": []}},
        ],
        f"{APPS}/deployments": [deployment(readyReplicas=1).to_dict()],
        f"{APPS}/statefulsets": [],
    }
    assert release.pods("engine") == ["one"]
    assert release.pods("mm_encoder") == ["four"]
    assert release.unsettled() == ["millrace-engine", "three"]
    assert release.kill("engine") == "one"
    assert stand_in.changes == [("DELETE", f"{CORE}/pods/one", {"gracePeriodSeconds": "0"}, None)]


def test_scaling_waits_for_the_pods(stand_in: StandIn, release: Release) -> None:
    scale = {"metadata": {"name": "scale"}, "spec": {"replicas": 3}}
    stand_in.objects = {f"{CORE}/pods": [], f"{APPS}/deployments/millrace-engine": [scale]}
    assert release.replicas("engine") == 3
    release.scale("engine", 0)
    path = f"{APPS}/deployments/millrace-engine/scale"
    assert stand_in.changes == [("PATCH", path, {}, {"spec": {"replicas": 0}})]


def test_waiting_ends_and_says_for_what() -> None:
    with pytest.raises(AssertionError, match="for the moon"):
        until(lambda: False, 0.0, lambda: "for the moon")


def test_what_is_left_is_found_whatever_its_kind(stand_in: StandIn, release: Release) -> None:
    stand_in.groups = {
        ("apps", "v1"): [
            {"name": name, "singularName": "", "namespaced": True, "kind": "K", "verbs": ["list"]}
            for name in ("deployments", "deployments/scale")
        ],
        ("storage.k8s.io", "v1"): [
            {"name": "storageclasses", "singularName": "", "namespaced": False, "kind": "K", "verbs": ["list"]}
        ],
        ("metrics.k8s.io", "v1"): [],
        ("keda.sh", "v1"): [
            {"name": "scaledobjects", "singularName": "", "namespaced": True, "kind": "K", "verbs": ["list"]}
        ],
    }
    stand_in.denied = {"/apis/metrics.k8s.io/v1": 503}
    assert release.leftovers() == []
    labelled = {"metadata": {"name": "x", "labels": OURS}}
    stand_in.objects = {
        f"{CORE}/persistentvolumeclaims": [{**labelled, "spec": {}}, {"metadata": {"name": "not-ours"}, "spec": {}}],
        f"{APPS}/deployments": [labelled],
        f"/apis/keda.sh/v1/namespaces/{NAMESPACE}/scaledobjects": [labelled],
    }
    assert release.leftovers() == ["persistent_volume_claim/x", "deployments/x", "scaledobjects/x"]
    assert SELECTOR == "app.kubernetes.io/instance=millrace"


# ------------------------------------------------------------------------------------------------------ pods of ours


@pytest.mark.parametrize("volume", [None, CLAIM])
def test_our_pods_are_valid_and_as_unprivileged_as_the_charts(volume: str | None) -> None:
    made = manifest("one", "image", "pass", ["a"], told(), volume)
    assert list(validator("1.37", "Pod", "v1").iter_errors(made)) == []
    theirs = pods(objects(told().values))["gateway"][1]
    assert made["spec"]["containers"][0]["securityContext"] == theirs["containers"][0]["securityContext"]
    wanted = {key: value for key, value in theirs["securityContext"].items() if key != "fsGroupChangePolicy"}
    assert made["spec"]["securityContext"] == wanted
    if volume is None:
        metadata, _ = pods(objects(told().values))["test"]
        assert made["metadata"]["labels"].items() <= metadata["labels"].items()


def test_a_model_is_brought_over_a_port_forward(stand_in: StandIn, release: Release, tmp_path: Path) -> None:
    target, port = tmp_path / "volume", free_port()
    target.mkdir()
    stand_in.replaced = {"/model": str(target), "8000": str(port)}
    stand_in.ports = {"millrace-test-receive:8000": port}
    bring_model(release, told(), "image", tmp_path / "model")
    brought = {path.name: path.read_bytes() for path in target.iterdir()}
    assert brought == {path.name: path.read_bytes() for path in (tmp_path / "model").iterdir()}
    (claim,) = stand_in.objects[f"{CORE}/persistentvolumeclaims"]
    assert claim["metadata"]["name"] == CLAIM
    assert stand_in.objects[f"{CORE}/pods"] == []
    for _ in range(2):
        take_model(release)
        assert stand_in.objects[f"{CORE}/persistentvolumeclaims"] == []


def test_a_port_forward_carries_much_both_ways_and_survives_a_broken_one(
    stand_in: StandIn, release: Release, tmp_path: Path
) -> None:
    data = demo_tar(tmp_path / "model")
    with (
        file_server({"/file": ("application/x-tar", data)}) as url,
        forwarded(release.api.configuration, NAMESPACE, "one", 8000) as near,
    ):
        stand_in.ports["one:8000"] = free_port()  # where nobody listens
        with pytest.raises((OSError, HTTPException)):
            urllib.request.urlopen(f"{near}/file", timeout=PATIENCE_S)
        stand_in.ports["one:8000"] = int(url.rpartition(":")[2])
        for _ in range(3):
            with urllib.request.urlopen(f"{near}/file", timeout=PATIENCE_S) as response:
                assert response.read() == data


@UNVERIFIED
def test_a_port_forward_needs_no_verified_api_server(tmp_path: Path) -> None:
    """Warnings are errors in these tests, and a kubeconfig may do without."""
    certificates.make(tmp_path, ["DNS:elsewhere"])
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(tmp_path / "tls.crt", tmp_path / "tls.key")
    with standing_in(context) as made, file_server({"/file": ("text/plain", b"text")}) as url:
        settings = client.Configuration(host=made.url)
        settings.verify_ssl = False
        made.ports["one:8000"] = int(url.rpartition(":")[2])
        made.objects = {f"{CORE}/pods": []}
        api = client.ApiClient(settings)
        assert Release(api, "/nowhere", NAMESPACE, PATIENCE_S).pods("engine") == []
        api.close()  # type: ignore[no-untyped-call]
        with (
            forwarded(settings, NAMESPACE, "one", 8000) as near,
            urllib.request.urlopen(f"{near}/file", timeout=PATIENCE_S) as response,
        ):
            assert response.read() == b"text"


def test_a_tunnel_is_closed_when_its_socket_is_gone_and_not_before() -> None:
    """websocket-client says that it is not connected while it still has its close frame to send."""

    class Closing:
        connected = False
        looks = 0
        ended_after = 0

        @property
        def sock(self) -> object | None:
            self.looks += 1
            return self if self.looks < 4 else None

        def shutdown(self) -> None:
            self.ended_after = self.looks

    class Tunnel:
        connected = False
        websocket = Closing()

    cluster_forward._end(Tunnel())  # type: ignore[arg-type]
    assert Tunnel.websocket.ended_after == 4


@pytest.fixture(scope="module")
def system(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Pod]]:
    with system_running(tmp_path_factory.mktemp("pods"), dict.fromkeys(SERVICES, Pod)) as made:
        yield made


def test_the_load_is_answered_whole_and_alike(
    stand_in: StandIn, release: Release, system: dict[str, Pod], tmp_path: Path
) -> None:
    settings, port = told(), free_port()
    settings.values["apiKeys"] = ["sk-one"]
    stand_in.replaced = {"http://millrace-gateway:8180": system["gateway"].url, "8000": str(port)}
    stand_in.ports = {"millrace-test-load:8000": port}
    with load(release, settings, "image", questions(settings.exact, tmp_path)) as asked:
        asked.more(12)
        answers = asked.end()
    assert len(answers) >= 12
    assert complaints(answers, exact=True, may_repeat=False) == []
    assert {each["picture"] for each in answers} == {True, False}
    assert len({each["text"] for each in answers if not each["picture"]}) > 1


def good(**changes: Any) -> dict[str, Any]:
    answer = {"question": 0, "picture": False, "text": "a", "finish": "stop", "repeats": 0, "error": "", "began": 1.0}
    return {**answer, **changes}


@pytest.mark.parametrize(
    ("other", "said"),
    [
        (good(), None),
        (good(text="b", question=1), None),
        (good(text="b", picture=True), None),
        (good(text="b"), "question 0 has 2 answers"),
        (good(error="503 down", text=""), "503 down at 1"),
        (good(finish="error: x"), "ended with error: x"),
        (good(finish=None), "ended with None"),
        (good(repeats=1), "connection broke at 1"),
    ],
)
def test_what_is_wrong_with_answers(other: dict[str, Any], said: str | None) -> None:
    assert complaints([good(), other], exact=True, may_repeat=False) == ([said] if said else [])


def test_what_is_forgiven() -> None:
    assert complaints([good(), good(repeats=2)], exact=True, may_repeat=True) == []
    assert complaints([good(), good(text="b")], exact=False, may_repeat=False) == []
