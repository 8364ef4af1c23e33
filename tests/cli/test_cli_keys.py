"""`millrace keys`: new keys, hashes, and usage as the gateways have written it."""

import asyncio
import io
import json

import pytest

from cli import connection
from cli.main import main
from cli.redis_users import sign_in
from services.gateway.tenants.key_file import parse, written_digest
from shared.bus.client import connect
from shared.bus.keys import Keys


def test_a_new_key_opens_with_the_entry_that_was_printed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(connection, "found_here", lambda: {1: "unix:///a", 2: "unix:///b"})  # of no matter here
    assert main(["keys", "new", "alice"]) == 0
    _, key, _, entry = capsys.readouterr().out.splitlines()
    [tenant] = parse(f'{{"keys": [{entry}]}}'.encode()).values()
    assert (tenant.name, tenant.hashes) == ("alice", (written_digest(key),))
    assert len(key) > 40
    assert main(["keys", "new", "alice"]) == 0
    assert key not in capsys.readouterr().out


def test_a_name_that_no_key_can_have(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["keys", "new", "a:b"]) == 2
    assert "needs a name of letters" in capsys.readouterr().err


def test_hash(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("secret\n"))
    assert main(["keys", "hash"]) == 0
    assert capsys.readouterr().out == f"{written_digest('secret')}\n"


@pytest.mark.parametrize(
    ("typed", "said"), [("", "no key"), (" \n", "no key"), ("a\udcffb\n", "ASCII"), ("é", "ASCII")]
)
def test_no_hash_of_what_no_client_can_send(
    typed: str, said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO(typed))
    assert main(["keys", "hash"]) == 2
    shown = capsys.readouterr()
    assert said in shown.err
    assert shown.out == ""


def test_usage_of_which_one_is_asked_where_several_run(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(connection, "found_here", lambda: {1: "unix:///a", 2: "unix:///b"})
    assert main(["keys", "usage"]) == 2
    assert "--redis-url: more than one `millrace serve` runs here; name one: unix:///a" in capsys.readouterr().err


def test_usage(redis_url: str, capsys: pytest.CaptureFixture[str]) -> None:
    async def prepare() -> None:
        redis, keys = connect(redis_url), Keys("test")
        fields = {"since": "5", "used:requests": "2", "used:prompt": "30", "used:generated": "x", "tokens": "1:2"}
        await redis.hset(keys.tenant("alice"), mapping=fields)
        await redis.hset(keys.tenant_open("alice"), "r", "0:1")
        await redis.hset(keys.tenant("bob"), "used:refused", "7")
        await redis.hset(keys.tenant(""), "queued", "7")
        await redis.aclose()

    asyncio.run(prepare())
    flags = ["--redis-url", sign_in(redis_url, "viewer"), "--namespace", "test"]
    assert main(["keys", "usage", *flags]) == 0
    title, alice, bob = capsys.readouterr().out.splitlines()
    assert title.split()[0] == "key"
    assert alice.split() == ["alice", "2", "0", "30", "0", "0", "1"]
    assert bob.split() == ["bob", "0", "7", "0", "0", "0", "0"]
    assert main(["keys", "usage", "alice", "--json", *flags]) == 0
    [usage] = json.loads(capsys.readouterr().out)
    assert (usage["name"], usage["requests"], usage["open"], usage["since"]) == ("alice", 2, 1, 5)


def test_usage_without_a_redis(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["keys", "usage", "--redis-url", "unix:///nowhere/redis.sock"]) == 2
    assert "Redis does not answer" in capsys.readouterr().err
