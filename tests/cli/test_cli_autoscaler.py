"""The autoscaler on a real Redis and an API server of its own: what it reads, whom it names, what it changes."""

import asyncio
import json
import os
import signal
import sys
import threading
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest
from kubernetes.aio import client
from kubernetes_api import KubernetesApi, serving
from machine import PATIENCE_S
from prometheus_client import CollectorRegistry
from redis.asyncio import Redis
from redis.exceptions import ConnectionError

from cli.autoscaler.cluster import Cluster, ClusterError
from cli.autoscaler.leader import Leadership
from cli.autoscaler.metrics import AutoscalerMetrics
from cli.autoscaler.policy import Rules
from cli.autoscaler.scaler import Scaler
from cli.autoscaler.settings import load
from cli.main import main
from cli.redis_users import sign_in
from shared.bus.client import connect
from shared.bus.keys import ENCODE, GENERATE, Keys
from shared.bus.leases import Lease
from shared.bus.pipeline_view import PipelineView, read
from shared.bus.work_stream import WorkStream
from shared.errors import ConfigError
from shared.message_codec import to_entry
from shared.messages import Generate, Output, Request, Sampling
from shared.metrics import value

HOUR_MS = 3_600_000
TARGET = 4
COOLDOWN_S = 60.0


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def api() -> Iterator[KubernetesApi]:
    with serving(KubernetesApi(engine=1, mm_encoder=0)) as running:
        yield running


@pytest.fixture
async def cluster(api: KubernetesApi) -> AsyncIterator[Cluster]:
    made = Cluster(client.ApiClient(client.Configuration(host=api.url)), "models")
    yield made
    await made.close()


class Deployment:
    """One autoscaler over one Redis and one cluster, and the work that tests put in."""

    def __init__(self, redis: Redis, keys: Keys, cluster: Cluster, name: str = "a", dry_run: bool = False) -> None:
        rules = {
            "mm_encoder": Rules(deployment="mm-encoder", target=TARGET, least=0, most=3, cooldown_s=COOLDOWN_S),
            "engine": Rules(deployment="engine", target=TARGET, least=0, most=3, cooldown_s=COOLDOWN_S),
        }
        self.clock = Clock()
        self.metrics = AutoscalerMetrics(CollectorRegistry())
        self.leadership = Leadership(redis, keys, name, HOUR_MS, self.clock)
        self._redis, self._keys = redis, keys
        self.scaler = Scaler(redis, keys, cluster, self.leadership, rules, self.metrics, dry_run, self.clock)

    async def turns(self, number: int = 1, every_s: float = 5.0) -> None:
        for _ in range(number):
            await self.scaler.turn()
            self.clock.now += every_s

    async def add(self, stream: str, number: int) -> None:
        request = Request("a", "g", 0, 0.0, Sampling(seed=0), Output(thinking=False))
        for _ in range(number):
            await self._redis.xadd(self._keys.stream(stream), to_entry(Generate(request, b"", 1)))  # type: ignore[arg-type]

    async def engine(self, name: str, takes: int, state: str = "ready") -> WorkStream:
        await Lease(self._redis, self._keys, "engine", name, HOUR_MS).renew(state, {"held": takes})
        stream = WorkStream(self._redis, self._keys, GENERATE, "engine", name, 3)
        await stream.join()
        await stream.read_new(takes, 0)
        return stream


@pytest.fixture
def deployment(redis: Redis, keys: Keys, cluster: Cluster) -> Deployment:
    return Deployment(redis, keys, cluster)


async def test_work_wakes_a_sleeping_stage_and_the_one_behind_it(api: KubernetesApi, deployment: Deployment) -> None:
    api.replicas["engine"] = 0
    await deployment.turns()
    assert api.requests == []
    await deployment.add(ENCODE, TARGET + 1)
    await deployment.turns()
    assert api.requests == [("scale mm-encoder", "2"), ("scale engine", "1")]
    await deployment.turns(3)
    assert len(api.requests) == 2


async def test_more_work_more_replicas_up_to_the_most(api: KubernetesApi, deployment: Deployment) -> None:
    await deployment.add(GENERATE, 100)
    await deployment.turns(3)
    assert api.requests == [("scale engine", "3")]
    assert value(deployment.metrics.changes) == 1


async def test_the_idlest_goes_and_only_after_it_was_named(
    api: KubernetesApi, redis: Redis, keys: Keys, deployment: Deployment
) -> None:
    api.replicas["engine"] = 3
    for name in ("engine-0", "engine-1", "engine-2", "engine-3"):
        api.add_pod("engine", name)
    api.add_pod("gateway", "gateway-0")
    await deployment.add(GENERATE, 6)
    for name, takes in (("engine-0", 3), ("engine-1", 1), ("engine-2", 2)):
        await deployment.engine(name, takes)
    await deployment.turns(12)
    assert api.requests == []
    await deployment.turns()
    assert api.costs() == {"engine-0": "3", "engine-1": "1", "engine-2": "2"}, "engine-3 holds nothing, which is 0"
    assert api.replicas["engine"] == 3
    await deployment.turns()
    assert api.requests[-1] == ("scale engine", "2")


async def test_the_last_one_goes_when_nothing_is_left(
    api: KubernetesApi, redis: Redis, keys: Keys, deployment: Deployment
) -> None:
    await deployment.add(GENERATE, 1)
    stream = await deployment.engine("engine-0", 1)
    await deployment.turns(40)
    assert api.requests == []
    await stream.ack([entry_id for entry_id in stream.ownership.delivered])
    await deployment.turns(40)
    assert api.requests == [("scale engine", "0")]


async def test_a_stage_in_steady_use_stays_though_it_is_idle_at_every_look(
    api: KubernetesApi, redis: Redis, keys: Keys, deployment: Deployment
) -> None:
    """Each entry is taken, worked off and deleted before the next look: the length of the stream is always 0."""
    api.replicas["engine"] = 2
    stream = WorkStream(redis, keys, GENERATE, "engine", "engine-0", 3)
    await stream.join()
    for _ in range(60):
        await deployment.add(GENERATE, 1)
        taken = await stream.read_new(1, 0)
        await stream.ack([each.entry_id for each in taken])
        assert await redis.xlen(keys.stream(GENERATE)) == 0
        await deployment.turns()
    assert api.requests == [("scale engine", "1")]
    await deployment.turns(14)
    assert api.requests[-1] == ("scale engine", "0")


async def test_who_leads_is_said_once(
    redis: Redis, keys: Keys, cluster: Cluster, deployment: Deployment, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "cli.autoscaler.scaler")
    await deployment.turns(3)
    await redis.delete(keys.leader("autoscaler"))
    await Deployment(redis, keys, cluster, "b").leadership.hold()
    await deployment.turns(3)
    said = [record.message for record in caplog.records]
    assert said == ["leading: this replica acts", "not leading: another replica acts"]


async def test_what_leaving_replicas_hold_brings_no_others(api: KubernetesApi, deployment: Deployment) -> None:
    await deployment.add(GENERATE, TARGET + 2)
    await deployment.engine("engine-1", 2, "draining")
    await deployment.turns(2)
    assert api.requests == []


async def test_one_of_two_acts_until_it_ends(
    api: KubernetesApi, redis: Redis, keys: Keys, cluster: Cluster, deployment: Deployment
) -> None:
    second = Deployment(redis, keys, cluster, "b")
    await deployment.turns()
    await deployment.add(GENERATE, 100)
    await second.turns(2)
    assert api.requests == []
    assert value(second.metrics.leads) == 0
    assert value(deployment.metrics.leads) == 1
    await deployment.leadership.release()
    await second.turns()
    assert api.requests == [("scale engine", "3")]


async def test_a_leader_that_is_not_heard_of_is_replaced(redis: Redis, keys: Keys) -> None:
    clock = Clock()
    first, second = (Leadership(redis, keys, name, HOUR_MS, clock) for name in ("a", "b"))
    assert await first.hold()
    assert not await second.hold()
    assert await first.hold()
    await redis.delete(keys.leader("autoscaler"))  # as its expiry would
    assert await second.hold()
    assert not await first.hold()
    await first.release()
    assert await redis.get(keys.leader("autoscaler")) == b"b", "only the leader itself can release"
    assert await redis.pttl(keys.leader("autoscaler")) > 0


async def test_a_leader_that_stalled_does_not_act(
    api: KubernetesApi, deployment: Deployment, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def slow(*question: Any) -> PipelineView:
        view = await read(*question)
        deployment.clock.now += HOUR_MS / 1000  # its claim has run out meanwhile
        return view

    await deployment.add(GENERATE, 100)
    monkeypatch.setattr("cli.autoscaler.scaler.read", slow)
    await deployment.turns()
    assert api.requests == []


async def test_a_claim_is_valid_by_ones_own_clock(redis: Redis, keys: Keys) -> None:
    clock = Clock()
    leadership = Leadership(redis, keys, "a", 1000, clock)
    assert not leadership.valid
    assert await leadership.hold()
    clock.now += 0.99
    assert leadership.valid
    clock.now += 0.02
    assert not leadership.valid


async def test_a_change_by_someone_else_is_seen_and_not_overwritten(api: KubernetesApi, cluster: Cluster) -> None:
    scale = await cluster.scale("engine")
    api.someone_scales("engine", 2)
    with pytest.raises(ClusterError, match="engine: 409"):
        await cluster.set_replicas("engine", scale, 3)
    assert api.replicas["engine"] == 2
    await cluster.set_replicas("engine", await cluster.scale("engine"), 3)
    assert api.replicas["engine"] == 3


async def test_one_stage_that_cannot_be_read_keeps_none_from_scaling(
    api: KubernetesApi, deployment: Deployment
) -> None:
    del api.replicas["mm-encoder"]
    await deployment.add(GENERATE, 100)
    await deployment.turns()
    assert api.requests == [("scale engine", "3")]
    assert value(deployment.metrics.failures) == 1


@pytest.mark.parametrize("status", [401, 403, 500, 503])
async def test_a_refusal_is_not_the_end(api: KubernetesApi, deployment: Deployment, status: int) -> None:
    await deployment.add(GENERATE, 100)
    api.fail_with = status
    await deployment.turns()
    api.fail_with = None
    await deployment.turns()
    assert api.requests == [("scale engine", "3")]


async def test_an_api_server_that_is_not_there(redis: Redis, keys: Keys, unused_port: int) -> None:
    nowhere = Cluster(client.ApiClient(client.Configuration(host=f"http://127.0.0.1:{unused_port}")), "models")
    deployment = Deployment(redis, keys, nowhere)
    await deployment.turns()
    assert value(deployment.metrics.failures) == 2
    await nowhere.close()


async def test_an_outage_of_redis_makes_it_watch_anew(
    api: KubernetesApi, deployment: Deployment, monkeypatch: pytest.MonkeyPatch
) -> None:
    await deployment.turns(12)
    with monkeypatch.context() as broken:

        async def fails(*_: object) -> None:
            raise ConnectionError("gone")

        broken.setattr("cli.autoscaler.scaler.read", fails)
        await deployment.turns()
    await deployment.turns(12)
    assert api.requests == []
    await deployment.turns(2)
    assert api.requests == [("scale engine", "0")]


async def test_a_dry_run_changes_nothing(api: KubernetesApi, redis: Redis, keys: Keys, cluster: Cluster) -> None:
    deployment = Deployment(redis, keys, cluster, dry_run=True)
    await deployment.add(GENERATE, 100)
    await deployment.turns(2)
    assert api.requests == []


async def test_it_needs_no_more_of_redis_than_the_rights_of_its_user(
    api: KubernetesApi, redis: Redis, redis_url: str, keys: Keys, cluster: Cluster
) -> None:
    own = connect(sign_in(redis_url, "autoscaler"))
    deployment = Deployment(own, keys, cluster)
    for _ in range(5):
        await redis.xadd(keys.stream(GENERATE), {"v": "1"})
    await deployment.turns()
    assert api.requests == [("scale engine", "2")]
    await deployment.leadership.release()
    assert await redis.get(keys.leader("autoscaler")) is None
    await own.aclose()


# ------------------------------------------------------------------------------------------------- the process

STAGES = {"engine": {"deployment": "engine", "target": 4, "least": 0, "most": 3}}


def environ(redis_url: str = "unix:///none", **changes: object) -> dict[str, str]:
    told = {"redis_url": redis_url, "namespace": "test", "kube_namespace": "models", "stages": STAGES, **changes}
    return {
        f"MILLRACE_{name.upper()}": each if isinstance(each, str) else json.dumps(each) for name, each in told.items()
    }


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"stages": {"kitchen": STAGES["engine"]}}, "MILLRACE_STAGES: kitchen is not one of"),
        ({"stages": {"engine": {**STAGES["engine"], "least": 4}}}, "engine: least is more than most"),
        ({"stages": {"gateway": STAGES["engine"]}}, "gateway: least must be 1 or more"),
        ({"stages": {"engine": {**STAGES["engine"], "replicas": 1}}}, "replicas"),
        ({"stages": {"engine": {**STAGES["engine"], "target": 0}}}, "target"),
        ({"interval_s": 10}, "MILLRACE_LEADER_MS must be more than two intervals"),
        ({"model": "somewhere"}, "MILLRACE_MODEL is not a setting"),
    ],
)
def test_what_cannot_be_meant_is_named(changes: dict[str, object], named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        load(environ(**changes))


def test_without_a_cluster(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in [name for name in os.environ if name.startswith(("MILLRACE_", "KUBE"))]:
        monkeypatch.delenv(name)
    for name, text in environ().items():
        monkeypatch.setenv(name, text)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr("cli.autoscaler.__main__.log.setup", lambda *_: None)
    assert main(["autoscale"]) == 2
    assert "no cluster: this is no pod with a service account" in capsys.readouterr().err


def test_without_the_kubernetes_client(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("cli.autoscaler.__main__", "cli.autoscaler.cluster", "cli.autoscaler.scaler"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.setitem(sys.modules, "kubernetes.aio", None)
    assert main(["autoscale"]) == 2
    said = capsys.readouterr().err
    assert "kubernetes.aio is not installed: run `pip install" in said
    assert "'.[autoscaler]'" in said


def kubeconfig(directory: Path, url: str) -> Path:
    path = directory / "kubeconfig"
    made = {
        "apiVersion": "v1",
        "kind": "Config",
        "clusters": [{"name": "c", "cluster": {"server": url}}],
        "users": [{"name": "u", "user": {"token": "t"}}],
        "contexts": [{"name": "x", "context": {"cluster": "c", "user": "u"}}],
        "current-context": "x",
    }
    path.write_text(json.dumps(made))
    return path


async def test_the_process_scales_and_ends_in_order(
    api: KubernetesApi, redis: Redis, redis_url: str, keys: Keys, tmp_path: Path
) -> None:
    await redis.xadd(keys.stream(GENERATE), {"v": "1"})
    api.replicas["engine"] = 0
    scaled = threading.Event()
    answer = api.answer

    def noted(method: str, *rest: object) -> tuple[int, object]:
        said = answer(method, *rest)  # type: ignore[arg-type]
        if method == "PUT":
            scaled.set()
        return said

    api.answer = noted  # type: ignore[method-assign,assignment]
    ours = {name: each for name, each in os.environ.items() if not name.startswith(("MILLRACE_", "KUBE"))}
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "cli.autoscaler"),
        env={**ours, **environ(sign_in(redis_url, "autoscaler")), "KUBECONFIG": str(kubeconfig(tmp_path, api.url))},
        stderr=asyncio.subprocess.PIPE,
    )
    try:
        assert await asyncio.to_thread(scaled.wait, PATIENCE_S)
        assert await redis.get(keys.leader("autoscaler"))
        process.send_signal(signal.SIGTERM)
        _, said = await asyncio.wait_for(process.communicate(), PATIENCE_S)
        assert process.returncode == 0, said
        assert b'msg=started stages="engine 0 to 3" interval_s=5.0 dry_run=False' in said
        assert b'msg="leading: this replica acts"' in said
        assert b"msg=out stage=engine from=0 to=1" in said
        assert await redis.get(keys.leader("autoscaler")) is None
        assert api.requests == [("scale engine", "1")]
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
