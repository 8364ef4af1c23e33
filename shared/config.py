"""Settings: small frozen structs, read once from the environment by each service's `__main__`.

A field `max_model_len` is the variable MILLRACE_MAX_MODEL_LEN. Strings stand as they are; every other type is JSON
("4096", "true", '{"image": 100}'). A variable that starts with MILLRACE_ and names no field is an error.
"""

from collections.abc import Mapping
from typing import TypeVar

import msgspec


class CommonSettings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What every service is told."""

    redis_url: str  # redis://, rediss:// or unix://
    model: str  # directory of the checkpoint
    blob_redis_url: str | None = None  # None: the same Redis
    namespace: str = "millrace"
    name: str = ""  # replica name; empty: hostname and process id
    metrics_port: int = 0  # 0: no metrics listener
    log_level: str = "info"
    lease_ms: int = 3000  # a replica that has not renewed for this long is dead
    drain_s: float = 30.0  # the pod's grace period minus its preStop
    max_deliveries: int = 3  # an entry taken more often is quarantined
    shards: int = 1  # token streams; the same for all services
    max_model_len: int = 32768  # prompt and answer together
    blob_ttl_s: int = 3600
    blob_budget_bytes: int = 4 << 30


S = TypeVar("S", bound=CommonSettings)


def load(settings: type[S], environ: Mapping[str, str]) -> S:
    """Decode MILLRACE_* variables into `settings`.

    Raises:
        ConfigError: a variable is unknown, missing or of the wrong type; the message names it.
    """
    raise NotImplementedError
