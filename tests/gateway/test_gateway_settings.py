"""Settings that no type can check."""

import pytest

from services.gateway.settings import GatewaySettings
from shared.errors import ConfigError


def test_an_empty_key_is_refused_before_anything_starts() -> None:
    with pytest.raises(ConfigError, match="MILLRACE_API_KEYS: a key is empty") as refused:
        GatewaySettings(redis_url="unix:///nowhere", model="nowhere", api_keys=("secret", ""))
    assert "secret" not in str(refused.value)
