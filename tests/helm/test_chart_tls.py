"""TLS to the chart's own Valkey, end to end: the Secret's URLs, the authority that the pods mount, a certificate."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import certificates
import pytest
from chart_pods import VALUES, Pod
from chart_tls import tls_valkey
from helm_chart import Object, Values, objects
from redis.asyncio import Redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import ConnectionError

from cli.demo import write_demo
from shared.bus.client import command, connect

pytestmark = pytest.mark.system
TLS: Values = {**VALUES, "redis": {**VALUES["redis"], "tlsSecret": "redis-tls"}}
USERS = ("gateway", "mm-encoder", "engine", "postproc", "autoscaler")


@pytest.fixture(scope="module")
def rendered() -> list[Object]:
    return objects(TLS)


@pytest.fixture
def secret(rendered: list[Object], tmp_path: Path) -> Iterator[dict[str, str]]:
    with tls_valkey(rendered, tmp_path) as urls:
        yield urls


async def length(url: str) -> int:
    """Ask as a service does, once."""
    client = connect(url)
    try:
        return int(await command(client, "XLEN", "models.millrace:generate"))
    finally:
        await client.aclose()


async def refusal(url: str) -> str:
    """Return why a connection cannot be made, tried once. Our own client tries for longer."""
    client = Redis.from_url(url, retry=Retry(NoBackoff(), 0))
    try:
        with pytest.raises(ConnectionError) as refused:
            await client.execute_command("PING")
    finally:
        await client.aclose()
    return str(refused.value)


async def test_every_user_comes_in_over_tls(secret: dict[str, str]) -> None:
    for user in USERS:
        assert secret[user].startswith("rediss://")
        assert await length(secret[user]) == 0


async def test_nobody_comes_in_without_tls(secret: dict[str, str]) -> None:
    assert await refusal(secret["engine"].partition("?")[0].replace("rediss://", "redis://"))


async def test_a_server_that_another_authority_vouches_for_is_refused(secret: dict[str, str], tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    certificates.make(other, ["IP:127.0.0.1"])
    shutil.copy(other / "ca.crt", tmp_path / "ca.crt")
    said = await refusal(secret["engine"])
    assert "certificate verify failed" in said
    assert "mismatch" not in said


async def test_a_server_of_another_name_is_refused(rendered: list[Object], tmp_path: Path) -> None:
    with tls_valkey(rendered, tmp_path, ("DNS:elsewhere",)) as secret:
        assert "IP address mismatch" in await refusal(secret["engine"])


def test_a_services_pod_and_its_probes_work_over_tls(
    rendered: list[Object], secret: dict[str, str], tmp_path: Path
) -> None:
    write_demo(tmp_path / "model", dtype="float32")
    pod = Pod(rendered, "postproc", secret, tmp_path / "model", tmp_path / "postproc.log")
    try:
        pod.wait_until_started()
        assert pod.probe("readiness")
        assert pod.stop() == 0, pod.log.read_text()
    finally:
        pod.kill()
