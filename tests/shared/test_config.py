import os
import socket
from typing import Literal

import msgspec
import pytest

from shared import config
from shared.config import CommonSettings
from shared.errors import ConfigError


class Settings(CommonSettings, frozen=True, kw_only=True):
    limits: dict[str, int] = msgspec.field(default_factory=lambda: {"image": 1})
    ratio: float = 0.5
    flag: bool = False
    mode: Literal["fast", "exact"] = "fast"
    count: int | None = None


NEEDED = {"MILLRACE_REDIS_URL": "unix:///r.sock", "MILLRACE_MODEL": "/model"}


def load(**variables: str) -> Settings:
    return config.load(Settings, {**NEEDED, **{f"MILLRACE_{name}": value for name, value in variables.items()}})


def test_every_kind_of_field() -> None:
    settings = load(
        NAME="123", LIMITS='{"image": 100}', RATIO="0.25", FLAG="true", MODE="exact", COUNT="null", SHARDS="4"
    )
    assert settings == Settings(
        redis_url="unix:///r.sock",
        model="/model",
        name="123",
        limits={"image": 100},
        ratio=0.25,
        flag=True,
        mode="exact",
        count=None,
        shards=4,
    )


def test_text_is_never_parsed() -> None:
    assert load(NAMESPACE='"quoted"').namespace == '"quoted"'
    assert load(BLOB_REDIS_URL="null").blob_redis_url == "null"


def test_empty_optional_text_is_none() -> None:
    assert load(BLOB_REDIS_URL="").blob_redis_url is None


@pytest.mark.parametrize("given", [{}, {"NAME": ""}])
def test_default_name_is_host_and_process(given: dict[str, str]) -> None:
    assert load(**given).name == f"{socket.gethostname()}-{os.getpid()}"


def test_other_variables_are_nobodys_business() -> None:
    assert config.load(Settings, {**NEEDED, "HOME": "/", "MILLRACETRACK": "1"}).model == "/model"


def test_frozen() -> None:
    with pytest.raises(AttributeError):
        load().model = "other"  # type: ignore[misc]


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("MAX_MODEL_LENGTH", "1", "MILLRACE_MAX_MODEL_LENGTH is not a setting.*did you mean MILLRACE_MAX_MODEL_LEN?"),
        ("SHARDS", "two", "MILLRACE_SHARDS: not JSON"),
        ("SHARDS", "", "MILLRACE_SHARDS: not JSON"),
        ("SHARDS", '"2"', "MILLRACE_SHARDS: Expected `int`"),
        ("SHARDS", "0", "MILLRACE_SHARDS: Expected `int` >= 1"),
        ("METRICS_PORT", "65536", "MILLRACE_METRICS_PORT"),
        ("FLAG", "yes", "MILLRACE_FLAG"),
        ("FLAG", "1", "MILLRACE_FLAG: Expected `bool`"),
        ("MODE", "slow", "MILLRACE_MODE: Invalid enum value"),
        ("LOG_LEVEL", "loud", "MILLRACE_LOG_LEVEL"),
        ("LIMITS", '{"image": "many"}', "MILLRACE_LIMITS: Expected `int`"),
    ],
)
def test_wrong_variables_are_named(name: str, value: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load(**{name: value})


def test_missing_variables_are_all_named() -> None:
    with pytest.raises(ConfigError, match="MILLRACE_REDIS_URL, MILLRACE_MODEL must be set"):
        config.load(Settings, {})


def test_values_are_not_quoted_in_errors() -> None:
    with pytest.raises(ConfigError) as raised:
        load(LIMITS='{"image": "hunter2"}')
    assert "hunter2" not in str(raised.value)


def test_every_common_setting_has_a_variable() -> None:
    names = {config.variable(field.name) for field in msgspec.structs.fields(CommonSettings)}
    assert "MILLRACE_BLOB_BUDGET_BYTES" in names
