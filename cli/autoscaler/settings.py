"""Settings of the autoscaler, from MILLRACE_ variables as those of the services."""

from collections.abc import Mapping
from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from cli.autoscaler.policy import Rules
from shared import config
from shared.bus.keys import SERVICES
from shared.bus.pipeline_view import QUEUES
from shared.config import Port, Positive, variable
from shared.errors import ConfigError


class AutoscalerSettings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    redis_url: str  # Redis, as redis://, rediss://, unix:// or redis+sentinel:// (docs/operations.md)
    stages: dict[str, Rules]  # rules by service, see below; a service that is not named is left alone
    kube_namespace: str  # the namespace of Kubernetes that has the Deployments
    namespace: str = "millrace"  # prefix of the deployment's keys in Redis
    name: str = ""  # this replica's; empty: hostname and process id
    log_level: Literal["debug", "info", "warning", "error"] = "info"  # the least severe that is logged
    metrics_port: Port = 0  # port of GET /metrics; 0: none
    interval_s: Annotated[float, Meta(gt=0)] = 5.0  # between two looks at the pipeline
    leader_ms: Positive = 15_000  # a leader that has not been heard of for so long is replaced


def load(environ: Mapping[str, str]) -> AutoscalerSettings:
    """Read the settings from the environment.

    Raises:
        ConfigError: a variable is unknown, missing or malformed, or `stages` asks for what cannot be.
    """
    settings = config.load(AutoscalerSettings, environ)
    for service, rules in settings.stages.items():
        where = f"{variable('stages')}: {service}"
        if service not in SERVICES:
            raise ConfigError(f"{where} is not one of {', '.join(SERVICES)}")
        if rules.least > rules.most:
            raise ConfigError(f"{where}: least is more than most")
        if rules.least == 0 and service not in QUEUES:
            raise ConfigError(f"{where}: least must be 1 or more, since no stream would wake it")
    if settings.leader_ms <= 2000 * settings.interval_s:
        raise ConfigError(f"{variable('leader_ms')} must be more than two intervals, or leadership flaps")
    return settings
