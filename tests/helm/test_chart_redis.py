"""How the services reach Redis; and the chart's Valkey itself, with its configuration and its users."""

import copy
import os
import re
import shutil
import subprocess
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
from api_server import api_server
from chart_autoscaler import kubeconfig
from chart_valkey import say, valkey
from helm_chart import CHART, CLAIM, ROOT, Object, case, container, environment, find, objects, pods, secret_data
from helm_python import Config
from machine import PATIENCE_S, free_port
from redis.asyncio import Redis
from redis.exceptions import AuthenticationError, NoPermissionError

from cli.autoscaler.leader import Leadership
from cli.redis_users import users_file
from shared.bus import pipeline_view
from shared.bus.client import command, connect
from shared.bus.keys import SERVICES, Keys
from shared.bus.leases import Lease, live

SERVICE_KEYS = ("gateway", "mm-encoder", "engine", "postproc")
NAMESPACE = "models.millrace"


@pytest.fixture(scope="module")
def rendered() -> list[Object]:
    return objects(CLAIM)


@pytest.fixture(scope="module")
def secret(rendered: list[Object], tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    with valkey(rendered, tmp_path_factory.mktemp("valkey"), free_port()) as urls:
        yield urls


@pytest.fixture
async def client(secret: dict[str, str]) -> AsyncIterator[Redis]:
    client = connect(secret["engine"])
    yield client
    await client.aclose()


@pytest.mark.parametrize("user", SERVICE_KEYS)
async def test_a_service_is_let_in_and_has_the_rights_of_its_own(secret: dict[str, str], user: str) -> None:
    """What these are all tests of the services judge: their users have the same (tests/shared/bus/test_users.py)."""
    client, keys, service = connect(secret[user]), Keys(NAMESPACE), user.replace("-", "_")
    try:
        lease = Lease(client, keys, service, "me", 60_000)
        await lease.renew("ready")
        assert [replica.name for replica in await live(client, keys, service)] == ["me"]
        await lease.release()
        for other in set(SERVICES) - {service}:
            with pytest.raises(NoPermissionError):
                await Lease(client, keys, other, "me", 60_000).renew("ready")
    finally:
        await client.aclose()


def test_its_users_are_those_of_the_embedded_redis() -> None:
    assert (CHART / "files" / "users.acl").read_text() == (ROOT / "shared" / "bus" / "users.acl").read_text(), (
        "cp shared/bus/users.acl helm/files/users.acl"
    )


def test_the_secret_has_the_rights_of_the_table_and_passwords(rendered: list[Object]) -> None:
    default, *users = secret_data(rendered, "millrace-redis")["users.acl"].splitlines()
    assert default == "user default on nopass resetkeys resetchannels -@all +ping"
    assert [re.sub(" #[0-9a-f]{64}", " nopass", user) for user in users] == users_file(NAMESPACE).splitlines()[1:]


async def test_a_service_may_not_administer_nor_leave_its_release(client: Redis) -> None:
    assert (await client.info("memory"))["maxmemory_policy"] == "noeviction", "by which it sees that nothing is evicted"
    for words in (
        ("FLUSHALL",),
        ("CONFIG", "GET", "*"),
        ("KEYS", "*"),
        ("ACL", "LIST"),
        ("SHUTDOWN",),
        ("GET", "other:x"),
    ):
        with pytest.raises(NoPermissionError):
            await command(client, *words)


async def test_nobody_comes_in_without_a_password(secret: dict[str, str]) -> None:
    stranger = connect(f"redis://{secret['engine'].split('@')[1]}")
    try:
        assert await command(stranger, "PING")
        with pytest.raises(NoPermissionError):
            await command(stranger, "XLEN", f"{NAMESPACE}:generate")
    finally:
        await stranger.aclose()
    assert say(port(secret), "AUTH engine guess").startswith(b"-WRONGPASS")


async def test_the_scaler_and_the_monitor_see_only_what_they_count(secret: dict[str, str], client: Redis) -> None:
    await command(client, "XADD", f"{NAMESPACE}:generate", "1-1", "a", "b")
    await command(client, "SADD", f"{NAMESPACE}:replicas:engine", "one")
    address = secret["engine"].split("@")[1]
    scaler = connect(f"redis://scaler:{secret['scaler-password']}@{address}")
    monitor = connect(f"redis://monitor:{secret['monitor-password']}@{address}")
    try:
        assert await command(scaler, "XLEN", f"{NAMESPACE}:generate") == 1
        assert await command(monitor, "XINFO", "STREAM", f"{NAMESPACE}:generate")
        assert await command(monitor, "SCARD", f"{NAMESPACE}:replicas:engine") == 1
        for each in (scaler, monitor):
            with pytest.raises(NoPermissionError):
                await command(each, "XRANGE", f"{NAMESPACE}:generate", "-", "+")
    finally:
        await scaler.aclose()
        await monitor.aclose()


async def test_the_viewer_sees_the_pipeline_and_the_autoscaler_may_lead(secret: dict[str, str]) -> None:
    address = secret["engine"].split("@")[1]
    viewer = connect(f"redis://viewer:{secret['viewer-password']}@{address}")
    autoscaler = connect(f"redis://autoscaler:{secret['autoscaler-password']}@{address}")
    try:
        assert (await pipeline_view.read(viewer, Keys(NAMESPACE))).redis is not None
        assert await Leadership(autoscaler, Keys(NAMESPACE), "me", 1000).hold()
        for client, words in (
            (viewer, ("SET", f"{NAMESPACE}:x", "1")),
            (autoscaler, ("XADD", f"{NAMESPACE}:x", "*", "a", "b")),
        ):
            with pytest.raises(NoPermissionError):
                await command(client, *words)
    finally:
        await viewer.aclose()
        await autoscaler.aclose()


@pytest.mark.parametrize("name", ["defaults", "autoscaler of its own"])
def test_the_probe_asks_as_a_service_does(name: str) -> None:
    """At the pod's address and as a service's user: loopback and a ping are open even where no service gets in."""
    spec = container(pods(case(name))["redis"][1])
    told = {each["name"]: each["valueFrom"] for each in spec["env"]}
    assert told["PROBE_URL"] == {"secretKeyRef": {"name": "millrace-redis", "key": "gateway"}}
    assert told["POD_IP"] == {"fieldRef": {"fieldPath": "status.podIP"}}
    for kind in ("startup", "readiness"):
        (_, _, command) = spec[f"{kind}Probe"]["exec"]["command"]
        assert command.startswith('valkey-cli -u "$PROBE_URL" -h "$POD_IP" ')
        assert f"xlen {NAMESPACE}:generate" in command
        assert ("--cacert /etc/millrace/redis-tls/ca.crt" in command) is (name != "defaults")
        assert "--insecure" not in command


CLI = shutil.which("valkey-cli") or shutil.which("redis-cli")


@pytest.mark.skipif(CLI is None, reason="neither valkey-cli nor redis-cli is on PATH")
def test_the_probe_tells_a_service_that_is_let_in_from_one_that_is_not(
    rendered: list[Object], secret: dict[str, str]
) -> None:
    (*shell, command) = container(pods(rendered)["redis"][1])["readinessProbe"]["exec"]["command"]
    command = command.replace("valkey-cli", str(CLI))

    def probe(url: str) -> bool:
        environ = {"PATH": os.environ["PATH"], "PROBE_URL": url, "POD_IP": "127.0.0.1"}
        return subprocess.run([*shell, command], env=environ, timeout=PATIENCE_S, check=False).returncode == 0

    assert probe(secret["gateway"])
    assert not probe(secret["gateway"].replace("gateway:", "gateway:wrong"))
    assert not probe(secret["gateway"].replace("gateway:", "nobody:"))


async def test_what_is_promised_is_neither_evicted_nor_lost(secret: dict[str, str], client: Redis) -> None:
    """Asked of the server itself, by the user that may read its configuration."""
    address = secret["engine"].split("@")[1]
    monitor = connect(f"redis://monitor:{secret['monitor-password']}@{address}")
    try:
        told = {}
        for name in ("maxmemory-policy", "maxmemory", "appendonly", "appendfsync", "protected-mode"):
            reply = await command(monitor, "CONFIG", "GET", name)
            pairs = reply.items() if isinstance(reply, dict) else zip(reply[::2], reply[1::2], strict=True)
            told |= {_text(key): _text(value) for key, value in pairs}
    finally:
        await monitor.aclose()
    assert told == {
        "maxmemory-policy": "noeviction",
        "maxmemory": str(6144 << 20),
        "appendonly": "yes",
        "appendfsync": "everysec",
        "protected-mode": "no",  # it would shut out every pod, for the default user has no password
    }


def port(secret: dict[str, str]) -> int:
    return int(secret["engine"].rpartition(":")[2].partition("/")[0])


def _text(value: bytes | str) -> str:
    return value.decode() if isinstance(value, bytes) else value


async def test_the_autoscalers_url_is_its_users(secret: dict[str, str]) -> None:
    own = connect(secret["autoscaler"])
    try:
        assert "user=autoscaler " in _text(await command(own, "CLIENT", "INFO"))
    finally:
        await own.aclose()


async def test_a_password_holds_until_the_generation_after_the_next(tmp_path: Path) -> None:
    """Three upgrades by Helm itself; after each a Valkey with the Secret's users, asked by every URL so far."""
    secrets = []
    with api_server() as api:
        (tmp_path / "kubeconfig").write_text(kubeconfig(api.url))
        with Config(
            kubeconfig_path=str(tmp_path / "kubeconfig"), namespace="models", storage_driver="memory", qps=1000.0
        ) as helm:
            helm.install(CHART, "millrace", CLAIM, timeout=60)
            for generation in (1, 2, 3):
                helm.upgrade(CHART, "millrace", {**CLAIM, "redis": {"passwordGeneration": generation}}, timeout=60)
                items = [*map(copy.deepcopy, api.objects.values())]
                secrets.append(secret_data(items, "millrace-redis"))
                where = tmp_path / str(generation)
                where.mkdir()
                with valkey(items, where, free_port()) as secret:
                    urls = [each["engine"].replace("millrace-redis.models.svc:6379", host(secret)) for each in secrets]
                    assert [await lets_in(url) for url in urls] == [[True], [True, True], [False, True, True]][
                        generation - 1
                    ]
                    again = secret["viewer-password"]
                    assert await lets_in(f"redis://viewer:{again}@{host(secret)}")
            assert "engine-previous" not in secrets[0]


def host(secret: dict[str, str]) -> str:
    return secret["engine"].split("@")[1].partition("/")[0]


async def lets_in(url: str) -> bool:
    client = connect(url)
    try:
        await command(client, "XLEN", f"{NAMESPACE}:generate")
    except AuthenticationError:
        return False
    finally:
        await client.aclose()
    return True


def test_new_passwords_restart_what_uses_them_and_nothing_else() -> None:
    def marks(generation: int) -> dict[str, Object]:
        values = {**CLAIM, "redis": {"passwordGeneration": generation}, "autoscaling": {"kind": "builtin"}}
        return {name: metadata.get("annotations", {}) for name, (metadata, _) in pods(objects(values)).items()}

    old, new = marks(1), marks(2)
    assert {name for name in old if old[name] != new[name]} == {*SERVICE_KEYS, "autoscaler", "redis"}


def test_each_service_has_a_url_of_its_own(rendered: list[Object]) -> None:
    urls = {
        service: environment(rendered, service)["MILLRACE_REDIS_URL"]["secretKeyRef"]
        for service in ("gateway", "mm_encoder", "engine", "postproc")
    }
    assert {name["name"] for name in urls.values()} == {"millrace-redis"}
    assert {name["key"] for name in urls.values()} == set(SERVICE_KEYS)
    data = secret_data(rendered, "millrace-redis")
    others = ("scaler", "monitor", "viewer", "operator", "autoscaler")
    assert len({data[f"{user}-password"] for user in (*SERVICE_KEYS, *others)}) == 9


def test_an_external_redis_is_reached_by_its_secret_or_its_url() -> None:
    made = case("external redis with users, hpa, placement")
    assert environment(made, "engine")["MILLRACE_REDIS_URL"] == {
        "secretKeyRef": {"name": "redis-users", "key": "engine"}
    }
    assert environment(made, "mm_encoder")["MILLRACE_BLOB_REDIS_URL"] == {
        "secretKeyRef": {"name": "redis-users", "key": "mm-encoder-blobs"}
    }
    assert "MILLRACE_BLOB_REDIS_URL" not in environment(made, "postproc")
    assert "redis" not in pods(made)
    assert environment(case("external redis, open"), "engine")["MILLRACE_REDIS_URL"] == "redis://redis:6379"


def test_tls_is_asked_for_and_its_authority_known_everywhere() -> None:
    made = case("fetched model, keda, monitoring, tls")
    data = secret_data(made, "millrace-redis")
    config = find(made, "ConfigMap", "millrace-redis")["data"]["valkey.conf"]
    assert "port 0" in config.splitlines()
    assert "tls-port 6379" in config.splitlines()
    for component in (*SERVICE_KEYS, "autoscaler"):
        assert data[component].startswith("rediss://")
        path = data[component].partition("?ssl_ca_certs=")[2]
        connect(data[component].replace(path, __file__))  # a file that is there
        _, spec = pods(made if component in SERVICE_KEYS else case("autoscaler of its own"))[component]
        (mount,) = [each for each in container(spec)["volumeMounts"] if each["name"] == "redis-tls"]
        assert path == f"{mount['mountPath']}/ca.crt"
    trigger = find(made, "ScaledObject", "millrace-engine")["spec"]["triggers"][0]
    assert trigger["metadata"]["enableTLS"] == "true"


def test_valkeys_pod_has_room_to_rewrite_its_file() -> None:
    made = find(objects({**CLAIM, "redis": {"maxMemoryMb": 1000}}), "StatefulSet")
    assert container(made["spec"]["template"]["spec"])["resources"]["limits"]["memory"] == "1500Mi"


def test_valkey_restarts_for_its_own_configuration_only() -> None:
    def marks(values: Object) -> Object:
        return pods(objects({**CLAIM, **values}))["redis"][0]["annotations"]

    assert marks({}) == marks({"image": {"tag": "2"}, "engine": {"replicas": 3}})
    assert marks({}) != marks({"redis": {"maxMemoryMb": 1}})
    assert marks({}) != marks({"settings": {"namespace": "other"}})


def test_nothing_of_valkey_stays_after_an_uninstall() -> None:
    made = find(case("defaults"), "StatefulSet")["spec"]
    assert made["persistentVolumeClaimRetentionPolicy"]["whenDeleted"] == "Delete"
    made = find(case("cpu, nothing kept, no policies"), "StatefulSet")["spec"]
    assert "volumeClaimTemplates" not in made
    assert {"name": "data", "emptyDir": {}} in made["template"]["spec"]["volumes"]
