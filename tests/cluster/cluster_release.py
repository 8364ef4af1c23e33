"""A release of the chart on a real cluster: installed, changed, watched and taken away again."""

import time
from collections.abc import Callable
from typing import Any

from cluster_settings import Values, merged
from helm_chart import CHART
from helm_python import Config
from kubernetes import client
from kubernetes.client.exceptions import ApiException

RELEASE = "millrace"
STAGES = ("gateway", "mm_encoder", "engine", "postproc")
POLL_S = 1.0
SELECTOR = f"app.kubernetes.io/instance={RELEASE}"
# What the core API has that a chart can make, by the names of the client's methods.
CORE = (
    *("pod", "service", "secret", "config_map", "persistent_volume_claim", "service_account"),
    *("replication_controller", "resource_quota", "limit_range"),
)
# Answers that only say that a kind cannot be listed, or that the server behind it is not there.
UNLISTABLE = {403, 404, 405, 503}


def component(stage: str) -> str:
    """A stage's name in labels and in the names of objects."""
    return stage.replace("_", "-")


def until(done: Callable[[], Any], patience_s: float, what: Callable[[], object]) -> Any:
    """The first result of `done` that is not false.

    Raises:
        AssertionError: there was none in time; it says `what`.
    """
    deadline = time.monotonic() + patience_s
    while not (result := done()):
        assert time.monotonic() < deadline, what()
        time.sleep(POLL_S)
    return result


def rolled_out(workload: client.V1Deployment | client.V1StatefulSet) -> bool:
    """Whether all the replicas asked for are of the newest kind and ready, and no others are left."""
    spec, status, metadata = workload.spec, workload.status, workload.metadata
    assert spec is not None
    assert metadata is not None
    if status is None or (status.observed_generation or 0) < (metadata.generation or 0):
        return False
    wanted = 1 if spec.replicas is None else spec.replicas
    seen = (status.replicas, status.updated_replicas, status.ready_replicas)
    return all((number or 0) == wanted for number in seen)


def ready(pod: client.V1Pod) -> bool:
    """Whether a pod is ready and not on its way out."""
    assert pod.metadata is not None
    conditions = (pod.status and pod.status.conditions) or []
    is_ready = any(each.type == "Ready" and each.status == "True" for each in conditions)
    return is_ready and pod.metadata.deletion_timestamp is None


class Release:
    """One release in one namespace."""

    def __init__(self, api: client.ApiClient, kubeconfig: str, namespace: str, patience_s: float) -> None:
        self.api = api
        self.namespace = namespace
        self.patience_s = patience_s
        self._kubeconfig = kubeconfig
        self._values: Values = {}
        self._apps = client.AppsV1Api(api)
        self._core = client.CoreV1Api(api)

    # ------------------------------------------------------------------------------------------------------- Helm

    def install(self, values: Values) -> None:
        self._values = values
        with self._helm() as helm:
            helm.install(CHART, RELEASE, values, timeout=int(self.patience_s))
        self.settle()

    def restart(self, stage: str, mark: str) -> None:
        """A rolling upgrade of one stage: its pods get another annotation, and those of the others keep theirs."""
        self._values = merged(self._values, {stage: {"annotations": {"millrace.test/mark": mark}}})
        self.upgrade({})

    def upgrade(self, values: Values) -> None:
        """Upgrade with other values besides those that there are, for this once."""
        with self._helm() as helm:
            helm.upgrade(CHART, RELEASE, merged(self._values, values), timeout=int(self.patience_s))
        self.settle()

    def helm_test(self) -> None:
        """Run the chart's own test.

        Raises:
            HelmReleaseError: it does not pass.
        """
        with self._helm() as helm:
            helm.test(RELEASE, timeout=int(self.patience_s))

    def uninstall(self) -> None:
        with self._helm() as helm:
            helm.uninstall(RELEASE, timeout=int(self.patience_s), ignore_not_found=True)

    def _helm(self) -> Config:
        return Config(kubeconfig_path=self._kubeconfig, namespace=self.namespace)

    # ------------------------------------------------------------------------------------------------- what there is

    def settle(self) -> None:
        """Wait until every workload is rolled out and nothing of an older one is left."""
        until(lambda: not self.unsettled(), self.patience_s, lambda: f"not settled: {self.unsettled()}")

    def unsettled(self) -> list[str]:
        """Workloads that are not rolled out, and pods on their way out."""
        found: list[client.V1Deployment | client.V1StatefulSet] = [
            *self._apps.list_namespaced_deployment(self.namespace, label_selector=SELECTOR).items,
            *self._apps.list_namespaced_stateful_set(self.namespace, label_selector=SELECTOR).items,
        ]
        names = [_name(each) for each in found if not rolled_out(each)]
        return names + [_name(pod) for pod in self._pods(SELECTOR) if pod.metadata and pod.metadata.deletion_timestamp]

    def pods(self, stage: str) -> list[str]:
        """Names of a stage's ready pods."""
        selector = f"{SELECTOR},app.kubernetes.io/component={component(stage)}"
        return [_name(pod) for pod in self._pods(selector) if ready(pod)]

    def pod(self, stage: str) -> str:
        """Any one ready pod of a stage, once there is one."""
        return str(until(lambda: self.pods(stage), self.patience_s, lambda: f"no pod of {stage} is ready")[0])

    def _pods(self, selector: str) -> list[client.V1Pod]:
        return list(self._core.list_namespaced_pod(self.namespace, label_selector=selector).items)

    def replicas(self, stage: str) -> int:
        """How many Kubernetes was asked for."""
        scale = self._apps.read_namespaced_deployment_scale(f"{RELEASE}-{component(stage)}", self.namespace)
        assert scale.spec is not None
        return scale.spec.replicas or 0

    # -------------------------------------------------------------------------------------------------- what is done

    def scale(self, stage: str, replicas: int) -> None:
        name = f"{RELEASE}-{component(stage)}"
        body = {"spec": {"replicas": replicas}}
        self._apps.patch_namespaced_deployment_scale(name, self.namespace, body)
        until(
            lambda: len(self.pods(stage)) == replicas and not self.unsettled(),
            self.patience_s,
            lambda: f"{stage}: {self.pods(stage)}, unsettled: {self.unsettled()}",
        )

    def kill(self, stage: str) -> str:
        """End one pod of a stage with no time to drain; its name."""
        name = self.pod(stage)
        self._core.delete_namespaced_pod(name, self.namespace, grace_period_seconds=0)
        return name

    # ------------------------------------------------------------------------------------------------- what is left

    def leftovers(self) -> list[str]:
        """Everything of every kind in the namespace that has the release's label, as KIND/NAME."""
        found = []
        for kind in CORE:
            items = getattr(self._core, f"list_namespaced_{kind}")(self.namespace, label_selector=SELECTOR).items
            found += [f"{kind}/{_name(item)}" for item in items]
        return found + [each for group, version in self._groups() for each in self._left_of(group, version)]

    def _groups(self) -> list[tuple[str, str]]:
        """Every other API group, and the version of it that the server likes best."""
        groups = client.ApisApi(self.api).get_api_versions().groups
        preferred = [(each.name, each.preferred_version) for each in groups]
        return [(name, version.version) for name, version in preferred if version is not None]

    def _left_of(self, group: str, version: str) -> list[str]:
        objects = client.CustomObjectsApi(self.api)
        try:
            kinds = objects.get_api_resources(group, version).resources
        except ApiException as error:
            if error.status in UNLISTABLE:
                return []
            raise
        found = []
        for kind in kinds:
            if kind.namespaced and "list" in kind.verbs and "/" not in kind.name:
                try:
                    listed: Any = objects.list_namespaced_custom_object(
                        group, version, self.namespace, kind.name, label_selector=SELECTOR
                    )
                except ApiException as error:
                    if error.status not in UNLISTABLE:
                        raise
                    continue
                found += [f"{kind.name}/{item['metadata']['name']}" for item in listed["items"]]
        return found


def _name(item: Any) -> str:
    return str(item.metadata.name)
