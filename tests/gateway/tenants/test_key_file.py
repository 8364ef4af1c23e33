"""The key file and the keyring: plain values, and files that change."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
from prometheus_client import CollectorRegistry

from services.gateway.tenants.headers import duration
from services.gateway.tenants.key_file import parse, written_digest
from services.gateway.tenants.keyring import Keyring
from services.gateway.tenants.metrics import TenantMetrics
from shared.errors import ConfigError


def entry(name: str = "alice", *keys: str, **fields: Any) -> dict[str, Any]:
    return {"name": name, "hashes": [written_digest(key) for key in keys or (f"key-of-{name}",)], **fields}


def write(path: Path, *entries: dict[str, Any]) -> str:
    path.write_text(json.dumps({"keys": entries}))
    return str(path)


def test_an_entry_has_defaults() -> None:
    [tenant] = parse(json.dumps({"keys": [entry()]}).encode()).values()
    assert (tenant.name, tenant.weight, tenant.priority, tenant.models) == ("alice", 1.0, "normal", ())
    assert tenant.limits.requests_per_min is None


@pytest.mark.parametrize(
    ("entries", "says"),
    [
        ([entry("")], "regex"),
        ([entry("a:b")], "regex"),
        ([entry(weight=0)], "weight"),
        ([entry(priority="urgent")], "urgent"),
        ([entry(limits={"requests": 1})], "requests"),
        ([entry(limits={"requests_per_min": 0})], "requests_per_min"),
        ([entry(colour="red")], "colour"),
        ([{"name": "a", "hashes": []}], "hashes"),
        ([{"name": "a", "hashes": ["secret"]}], "hashes"),
        ([entry("a", "x"), entry("a", "y")], "the name a stands twice"),
        ([entry("a", "x"), entry("b", "x")], "stands twice"),
        (
            [{"name": "a", "hashes": [written_digest("b"), written_digest("")]}],
            "empty key, which would let everybody in",
        ),
        ([entry(f"k{n}") for n in range(1001)], "at most 1000"),
    ],
)
def test_a_wrong_file_is_refused(entries: list[dict[str, Any]], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        parse(json.dumps({"keys": entries}).encode())


def test_no_json_is_refused() -> None:
    with pytest.raises(ConfigError, match="JSON"):
        parse(b"keys:")


def test_keys_of_the_settings_and_of_the_file_open(tmp_path: Path) -> None:
    keyring = Keyring(["plain"], write(tmp_path / "keys", entry("alice", "new", "old")))
    plain, new, old = keyring.find("plain"), keyring.find("new"), keyring.find("old")
    assert plain is not None
    assert plain.tenant is None
    assert new is not None
    assert old is not None
    assert new.tenant is old.tenant is not None
    assert new.owner == old.owner != plain.owner
    assert keyring.by_owner(new.owner) == new
    assert keyring.by_owner(plain.owner) == plain
    assert keyring.by_owner("@bob") is keyring.by_owner("00") is None
    for unknown in ("", "@", "zz", "0" * 64, "g" * 64, "é" * 64):
        assert keyring.by_owner(unknown) is None
    assert keyring.find("other") is None
    assert keyring.find(written_digest("new")) is None


def test_what_a_key_of_the_settings_has_begun_goes_on_when_it_moves_into_the_file(tmp_path: Path) -> None:
    before = Keyring(["plain"]).find("plain")
    moved = Keyring([], write(tmp_path / "keys", entry("alice", "plain")))
    now = moved.find("plain")
    assert before is not None
    assert now is not None
    found = moved.by_owner(before.owner)
    assert found is not None
    assert (found.owner, found.tenant, found.share) == (before.owner, now.tenant, now.share)
    assert Keyring([], write(tmp_path / "keys", entry("alice", "another"))).by_owner(before.owner) is None


def test_a_file_without_keys_lets_nobody_in(tmp_path: Path) -> None:
    keyring = Keyring([], write(tmp_path / "keys"))
    assert not keyring.is_open
    assert keyring.find("") is None
    assert Keyring([]).is_open


def test_a_file_that_is_not_there_at_the_start(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"MILLRACE_API_KEYS_FILE.*No such file"):
        Keyring([], str(tmp_path / "keys"))


def test_a_changed_file_is_read_again_and_a_wrong_one_changes_nothing(tmp_path: Path) -> None:
    path, registry = tmp_path / "keys", CollectorRegistry()
    keyring = Keyring([], write(path, entry("alice")), TenantMetrics(registry).reloads)

    def reloads(outcome: str) -> float | None:
        return registry.get_sample_value("millrace_key_file_reloads_total", {"outcome": outcome})

    keyring.reload()
    assert (reloads("read"), reloads("failed")) == (0, 0)
    write(path, entry("alice"), entry("bob"))
    keyring.reload()
    assert keyring.find("key-of-bob") is not None
    path.write_text('{"keys": [')
    keyring.reload()
    keyring.reload()  # tells of it once
    assert keyring.find("key-of-bob") is not None
    path.unlink()
    keyring.reload()
    keyring.reload()
    assert keyring.find("key-of-bob") is not None
    write(path, entry("bob"))
    keyring.reload()
    assert keyring.find("key-of-alice") is None
    assert (reloads("read"), reloads("failed")) == (2, 2)


def test_a_mounted_secret_is_replaced_by_turning_a_link(tmp_path: Path) -> None:
    for version, name in (("v1", "alice"), ("v2", "carol")):
        (tmp_path / version).mkdir()
        write(tmp_path / version / "keys.json", entry(name))
    (tmp_path / "data").symlink_to("v1")
    (tmp_path / "keys.json").symlink_to("data/keys.json")
    keyring = Keyring([], str(tmp_path / "keys.json"))
    (tmp_path / "turned").symlink_to("v2")
    os.replace(tmp_path / "turned", tmp_path / "data")
    keyring.reload()
    assert keyring.find("key-of-carol") is not None
    assert keyring.find("key-of-alice") is None


@pytest.mark.parametrize(
    ("ms", "text"), [(0, "0ms"), (20, "20ms"), (1500, "1.5s"), (60_000, "1m0s"), (372_000, "6m12s")]
)
def test_durations_as_openai_writes_them(ms: int, text: str) -> None:
    assert duration(ms) == text
