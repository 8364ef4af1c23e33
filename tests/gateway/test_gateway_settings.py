"""Settings that no type can check."""

import pytest

from services.gateway.settings import GatewaySettings
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
