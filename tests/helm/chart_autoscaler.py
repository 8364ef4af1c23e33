"""The chart's autoscaler, run against the chart's Valkey and a stand-in for Kubernetes's API."""

import contextlib
import json
import time
from pathlib import Path
from typing import Any

from chart_pods import AUTOSCALER, POLL_S, VALUES, Pod
from chart_valkey import valkey
from helm_chart import Object, Values, find, objects
from kubernetes_api import KubernetesApi, serving
from machine import PATIENCE_S, free_port
from redis.asyncio import Redis

from shared.bus.client import connect
from shared.bus.keys import GENERATE, Keys
from shared.bus.work_stream import WorkStream
from shared.message_codec import to_entry
from shared.messages import Generate, Output, Request, Sampling

KEYS = Keys("models.millrace")
ONE_EACH: Values = {**VALUES, "engine": {**VALUES["engine"], "target": 1}}  # a replica for every request
VERBS = {"GET": "get", "PUT": "update", "PATCH": "patch"}


class WatchedApi(KubernetesApi):
    """Notes which rights each request would need."""

    def __init__(self, **replicas: int) -> None:
        super().__init__(**replicas)
        self.asked: set[tuple[str, str, str, str | None]] = set()  # API group, resource, verb, name

    def answer(self, method: str, path: str, query: dict[str, list[str]], kind: str, body: Any) -> tuple[int, Any]:
        match path.strip("/").split("/"):
            case ["apis", group, _, "namespaces", _, resource, name, subresource]:
                self.asked.add((group, f"{resource}/{subresource}", VERBS[method], name))
            case ["api", _, "namespaces", _, resource]:
                self.asked.add(("", resource, "list", None))
            case ["api", _, "namespaces", _, resource, _, subresource]:
                self.asked.add(("", f"{resource}/{subresource}", VERBS[method], None))
            case _:
                raise AssertionError(path)
        return super().answer(method, path, query, kind, body)


def kubeconfig(url: str) -> str:
    return json.dumps(
        {
            "apiVersion": "v1",
            "kind": "Config",
            "current-context": "here",
            "contexts": [{"name": "here", "context": {"cluster": "here", "user": "me"}}],
            "clusters": [{"name": "here", "cluster": {"server": url}}],
            "users": [{"name": "me", "user": {"token": "t"}}],
        }
    )


def granted(items: list[Object]) -> set[tuple[str, str, str, str | None]]:
    """Return the verbs and resources that the autoscaler's Role allows."""
    return {
        (group, resource, verb, name)
        for rule in find(items, "Role")["rules"]
        for group in rule["apiGroups"]
        for resource in rule["resources"]
        for verb in rule["verbs"]
        for name in rule.get("resourceNames", [None])
    }


def wait_for(api: WatchedApi, replicas: int, pod: Pod) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while api.replicas["millrace-engine"] != replicas:
        assert time.monotonic() < deadline, pod.log.read_text()
        time.sleep(POLL_S)


def work(request_id: str) -> dict[bytes, bytes]:
    request = Request(request_id, "g", 0, 0.0, Sampling(seed=0), Output(thinking=False))
    return to_entry(Generate(request, b"", 1))


async def wake_and_sleep(directory: Path, kind: type[Pod]) -> None:
    """Work comes and goes; the autoscaler, run by `kind`, follows it with exactly the rights that its Role gives."""
    items = objects(ONE_EACH)
    with contextlib.ExitStack() as stack:
        api = stack.enter_context(serving(WatchedApi(millrace_engine=0, millrace_mm_encoder=1)))
        assert isinstance(api, WatchedApi)
        api.add_pod("millrace-engine", "millrace-engine-0")
        secret = stack.enter_context(valkey(items, directory, free_port()))
        (directory / "kubeconfig").write_text(kubeconfig(api.url))
        pod = kind(items, AUTOSCALER, secret, directory, directory / "autoscaler.log")
        stack.callback(pod.kill)
        pod.wait_until_started()
        redis = connect(secret["engine"])
        try:
            await _wake_and_sleep(items, api, redis, pod)
        finally:
            await redis.aclose()
        assert pod.stop() == 0, pod.log.read_text()


async def _wake_and_sleep(items: list[Object], api: WatchedApi, redis: Redis, pod: Pod) -> None:
    stream = WorkStream(redis, KEYS, GENERATE, "engine", "millrace-engine-0", 3)
    await stream.join()
    for name in ("one", "two"):
        await redis.xadd(KEYS.stream(GENERATE), work(name))  # type: ignore[arg-type]
    wait_for(api, 2, pod)
    assert pod.probe("readiness")
    assert pod.probe("liveness")
    one, two = await stream.read_new(2, 0)
    await stream.ack([one.entry_id])
    wait_for(api, 1, pod)
    assert api.costs() == {"millrace-engine-0": "1"}
    await stream.ack([two.entry_id])
    wait_for(api, 0, pod)
    assert api.asked <= granted(items)
    assert {request[:3] for request in api.asked} == {right[:3] for right in granted(items)}
