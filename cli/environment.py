"""What each service's process is told, worked out and checked before anything is started."""

import socket
from collections.abc import Mapping
from pathlib import Path

import msgspec

from cli.flags import Launch
from services.engine.settings import EngineSettings
from services.engine.settings import check as check_engine
from services.gateway.settings import GatewaySettings
from services.mm_encoder.footprint import device_bytes
from services.mm_encoder.settings import MmEncoderSettings
from services.postproc.settings import PostprocSettings
from shared import config
from shared.config import CommonSettings
from shared.errors import ConfigError
from shared.foreign_checkpoints import refuse_foreign
from shared.model_config import load_model_config

PREFIX = "MILLRACE_"
# In the order in which they are stopped: first who lets requests in, last who gives answers out.
SETTINGS: dict[str, type[CommonSettings]] = {
    "gateway": GatewaySettings,
    "mm_encoder": MmEncoderSettings,
    "engine": EngineSettings,
    "postproc": PostprocSettings,
}


def check_ports(launch: Launch) -> None:
    """
    Raises:
        ConfigError: two of our ports are the same, or one is taken; the message names the flag.
    """
    wanted = {"--port": (launch.host, launch.port), "--metrics-port": (launch.host, launch.metrics_port)}
    if launch.redis_url is None:
        wanted["--engine-worker-queue-port"] = ("127.0.0.1", launch.redis_port)
    seen: dict[int, str] = {}
    for flag, (host, port) in wanted.items():
        if port in seen:
            raise ConfigError(f"{flag}: {port} is also {seen[port]}")
        seen[port] = flag
        with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((host, port))
            except OSError as error:
                raise ConfigError(f"{flag}: cannot listen on {host}:{port}: {error.strerror or error}") from None


def environments(launch: Launch, redis_url: str, environ: Mapping[str, str]) -> dict[str, dict[str, str]]:
    """Each service's environment, in the order of SETTINGS: ours, with the settings that the service has and no others.

    A MILLRACE_ variable of ours fills a setting where no flag does.

    Raises:
        ConfigError: no service has a setting, or one refuses its value.
        CheckpointError: the model is of another format, or its configuration cannot be read.
    """
    refuse_foreign(launch.model)
    ours = {name: value for name, value in environ.items() if name.startswith(PREFIX)}
    plain = {name: value for name, value in environ.items() if name not in ours}
    told = {**launch.settings, "model": str(launch.model.absolute()), "redis_url": redis_url}
    told = ours | {_variable(name): _value(value) for name, value in told.items()}
    told |= _context_length(launch.model, told)
    told.setdefault(_variable("foreign_bytes"), str(_encoder_bytes(launch.model, told)))
    only_gateway = {_variable(name): _value(getattr(launch, name)) for name in ("host", "port", "metrics_port")}
    known = {
        service: {_variable(name) for name in settings.__struct_fields__} for service, settings in SETTINGS.items()
    }
    for name in sorted(told.keys() - set().union(*known.values())):
        raise ConfigError(f"{name}: no service has this setting")
    result = {}
    for service, settings in SETTINGS.items():
        own = {name: value for name, value in told.items() if name in known[service]}
        own |= only_gateway if service == "gateway" else {}
        loaded = config.load(settings, own)
        if isinstance(loaded, EngineSettings):
            check_engine(loaded)
        result[service] = plain | own
    return result


def settings_of(environ: Mapping[str, str]) -> CommonSettings:
    """What all services share, out of one service's environment."""
    known = {_variable(name) for name in CommonSettings.__struct_fields__}
    return config.load(CommonSettings, {name: value for name, value in environ.items() if name in known})


def _variable(setting: str) -> str:
    return PREFIX + setting.upper()


def _value(value: object) -> str:
    return value if isinstance(value, str) else msgspec.json.encode(value).decode()


def _encoder_bytes(model: Path, told: Mapping[str, str]) -> int:
    """What the mm_encoder will take of the card that it shares with the engine, which may look before it is there."""
    known = {_variable(name) for name in MmEncoderSettings.__struct_fields__}
    settings = config.load(MmEncoderSettings, {name: value for name, value in told.items() if name in known})
    if settings.device == "cpu":
        return 0
    facts = load_model_config(model)
    return device_bytes(facts, settings.largest_pass(facts.vision))


def _context_length(model: Path, told: Mapping[str, str]) -> dict[str, str]:
    """The context length for all services where none was asked for: the default, as far as the model reaches."""
    name, longest = _variable("max_model_len"), load_model_config(model).max_position_embeddings
    if name not in told:
        default = next(f.default for f in msgspec.structs.fields(CommonSettings) if f.name == "max_model_len")
        return {name: str(min(default, longest))}
    if told[name].isdigit() and int(told[name]) > longest:
        raise ConfigError(f"--max-model-len: {told[name]} is more than the {longest} positions this model has")
    return {}
