"""Settings that no type can check."""

import re

import pytest

from services.gateway.settings import MAX_SUBMIT_S, GatewaySettings
from services.gateway.tenants.limiter import HERE
from shared.bus.lua import read_script
from shared.config import load
from shared.errors import ConfigError
from shared.messages import MediaKind


@pytest.mark.parametrize(
    ("given", "limits"),
    [({}, {"image": 100, "video": 100}), ({"image": 3}, {"image": 3, "video": 100})],
)
def test_a_conversation_may_have_many_pictures(given: dict[MediaKind, int], limits: dict[MediaKind, int]) -> None:
    settings = GatewaySettings(redis_url="unix:///nowhere", model="nowhere", limit_mm_per_prompt=given)
    assert settings.media_limits() == limits


def test_an_empty_key_is_refused_before_anything_starts() -> None:
    with pytest.raises(ConfigError, match="MILLRACE_API_KEYS: a key is empty") as refused:
        GatewaySettings(redis_url="unix:///nowhere", model="nowhere", api_keys=("secret", ""))
    assert "secret" not in str(refused.value)


def test_a_request_keeps_its_place_while_it_may_still_be_submitted() -> None:
    """And as long again, since a script may run after its gateway has given up."""
    given = {"MILLRACE_REDIS_URL": "unix:///nowhere", "MILLRACE_MODEL": "nowhere"}
    longest = load(GatewaySettings, given | {"MILLRACE_SUBMIT_TIMEOUT_S": str(MAX_SUBMIT_S)})
    with pytest.raises(ConfigError, match="MILLRACE_SUBMIT_TIMEOUT_S"):
        load(GatewaySettings, given | {"MILLRACE_SUBMIT_TIMEOUT_S": str(MAX_SUBMIT_S + 1)})
    script = read_script("tenant_hash", HERE)
    [minute] = re.findall(r"local MINUTE = (\d+)\n.*local STALE = MINUTE ", script, re.DOTALL)
    assert int(minute) >= 2 * longest.submit_timeout_s * 1_000_000
