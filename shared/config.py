"""Settings: small frozen structs, read once from the environment by each service's `__main__`.

A field `max_model_len` is the variable MILLRACE_MAX_MODEL_LEN. Text stands as it is; every other type is JSON
("4096", "true", '{"image": 100}'). An empty variable is an empty text for a field of text, and None for `str | None`. A
variable that starts with MILLRACE_ and names no field is an error; Kubernetes sets such variables for a Service of that
name unless the pod has `enableServiceLinks: false`.

The type of a field gives its range. A struct checks what types cannot express in `__post_init__`, so that no invalid
settings exist: neither in a service nor in `millrace serve`, which loads those of all services before it starts one.
"""

import difflib
import os
import socket
from collections.abc import Mapping
from typing import Annotated, Any, Literal, TypeVar

import msgspec
from msgspec import Meta

from shared.errors import ConfigError

PREFIX = "MILLRACE_"

Port = Annotated[int, Meta(ge=0, le=65535)]
Count = Annotated[int, Meta(ge=0)]
Positive = Annotated[int, Meta(ge=1)]
Share = Annotated[float, Meta(ge=0, le=1)]
LoadFormat = Literal["auto", "dummy"]
HttpUrl = Annotated[str, Meta(pattern=r"^(https?://[^/@\s]+[^@\s]*)?$")]  # or empty; without a password


class CommonSettings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Settings that every service has."""

    redis_url: str  # Redis, as redis://, rediss://, unix:// or redis+sentinel:// (docs/operations.md)
    model: str  # directory of the checkpoint, as the hub lays it out
    blob_redis_url: str | None = None  # the Redis for media and embeddings; unset: the same one
    auth_patience_s: Positive = 60  # a replica ends when Redis has refused its user or password for this long
    namespace: str = "millrace"  # prefix of every key in Redis; deployments that share one need their own
    name: str = ""  # replica name; empty: hostname and process id
    metrics_port: Port = 0  # port of GET /metrics; 0: none
    metrics_host: str = "0.0.0.0"  # the address it listens on
    log_level: Literal["debug", "info", "warning", "error"] = "info"  # the least severe that is logged
    lease_ms: Positive = 3000  # a replica that has not renewed for this long is dead
    drain_s: Annotated[float, Meta(ge=0)] = 30.0  # from SIGTERM to the end of work; a pod's grace period less preStop
    max_deliveries: Positive = 3  # an entry taken more often is quarantined
    shards: Positive = 1  # token streams, at most one postproc each; the same for all services
    max_model_len: Positive = 32768  # prompt and answer together
    blob_ttl_s: Positive = 3600  # how long media and embeddings are kept after their last use
    blob_budget_bytes: Positive = 4 << 30  # media and embeddings in Redis: half of it for uploads, the rest evicts
    otlp_endpoint: HttpUrl = ""  # an OpenTelemetry collector for traces, http://HOST:4318; empty: no traces
    trace_ratio: Share = 1.0  # share of the traces that begin here; a caller decides about the ones it began
    crash_at: str = ""  # tests only: the point at which to die (shared/crash_points.py)

    def facts(self) -> dict[str, str]:
        """Return the settings of this service alone that all its replicas must have the same, as text."""
        return {}


S = TypeVar("S", bound=msgspec.Struct)


def load(settings: type[S], environ: Mapping[str, str]) -> S:
    """Decode MILLRACE_* variables into `settings`. An empty `name` becomes the hostname and process id.

    Raises:
        ConfigError: a variable is unknown, missing, of the wrong type or out of range. The message names it; its value
            only where the struct's own check does.
    """
    fields = {variable(field.name): field for field in msgspec.structs.fields(settings)}
    values = {}
    for name, text in environ.items():
        if not name.startswith(PREFIX):
            continue
        if name not in fields:
            raise ConfigError(f"{name} is not a setting of this service{_closest(name, fields)}")
        values[fields[name].name] = _decode(name, text, fields[name].type)
    missing = [name for name, field in fields.items() if field.required and field.name not in values]
    if missing:
        raise ConfigError(f"{', '.join(missing)} must be set")
    values["name"] = values.get("name") or f"{socket.gethostname()}-{os.getpid()}"
    return settings(**values)


def variable(field: str) -> str:
    """Return the environment variable of a field."""
    return PREFIX + field.upper()


def _decode(name: str, text: str, kind: Any) -> Any:
    info = msgspec.inspect.type_info(kind)
    options = info.types if isinstance(info, msgspec.inspect.UnionType) else (info,)
    nullable = any(isinstance(option, msgspec.inspect.NoneType) for option in options)
    textual = all(_is_text(option) or isinstance(option, msgspec.inspect.NoneType) for option in options)
    try:
        if not textual:
            return msgspec.json.decode(text, type=kind)
        return None if nullable and not text else msgspec.convert(text, kind)
    except msgspec.ValidationError as error:
        raise ConfigError(f"{name}: {error}") from error
    except msgspec.DecodeError:
        raise ConfigError(f"{name}: not JSON, as every setting but text must be") from None


def _is_text(info: msgspec.inspect.Type) -> bool:
    if isinstance(info, msgspec.inspect.LiteralType):
        return all(isinstance(value, str) for value in info.values)
    return isinstance(info, msgspec.inspect.StrType)


def _closest(name: str, known: Mapping[str, object]) -> str:
    close = difflib.get_close_matches(name, known, n=1)
    return f"; did you mean {close[0]}?" if close else ""
