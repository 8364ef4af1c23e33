"""Environments of the services' processes, computed and checked before anything is started."""

import errno
import socket
from collections.abc import Mapping
from pathlib import Path

import msgspec

from cli.flags import Launch
from services.engine.settings import EngineSettings
from services.gateway.settings import GatewaySettings
from services.mm_encoder.settings import MmEncoderSettings
from services.mm_encoder.vision.memory import device_bytes
from services.postproc.settings import PostprocSettings
from shared import config
from shared.config import CommonSettings
from shared.cpu_share import compute_threads, usable_cores
from shared.errors import ConfigError
from shared.model.config import load_model_config
from shared.model.division import divided
from shared.model.foreign_checkpoints import refuse_foreign

PREFIX = "MILLRACE_"
# In the order in which they are stopped: the one that lets requests in first, the one that gives answers out last.
SETTINGS: dict[str, type[CommonSettings]] = {
    "gateway": GatewaySettings,
    "mm_encoder": MmEncoderSettings,
    "engine": EngineSettings,
    "postproc": PostprocSettings,
}


# As the Makefile calls them.
PORT_NAMES = {"--port": "PORT", "--metrics-port": "METRICS_PORT"}

COMPUTE_SERVICES = ("mm_encoder", "engine")  # use torch, and share the cores of this machine


def check_ports(launch: Launch, environ: Mapping[str, str]) -> None:
    """Check that every port is free at the address at which it will be opened.

    Raises:
        ConfigError: two of our ports are the same, or one is taken; the message names the flag.
    """
    wanted = {
        "--port": (launch.host, launch.port),
        "--metrics-port": (metrics_address(launch, environ), launch.metrics_port),
    }
    seen: dict[int, str] = {}
    for flag, (host, port) in wanted.items():
        if port in seen:
            raise ConfigError(f"{flag}: port {port} is also that of {seen[port]}; give each its own")
        seen[port] = flag
        with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((host, port))
            except OSError as error:
                raise ConfigError(f"{flag}: cannot listen on {host}:{port}: {_why_not(error, flag)}") from None


def metrics_address(launch: Launch, environ: Mapping[str, str]) -> str:
    """Return the address that metrics are served at: the API's, unless there is a setting."""
    return environ.get(_variable("metrics_host"), launch.host)


def _why_not(error: OSError, flag: str) -> str:
    """Return why a port cannot be had, and what to do where another program has it."""
    why = error.strerror or str(error)
    if error.errno != errno.EADDRINUSE:
        return why
    return (
        f"{why}; end the program that listens there, or choose another ({flag} N, or make serve {PORT_NAMES[flag]}=N)"
    )


def environments(launch: Launch, redis_url: str, environ: Mapping[str, str]) -> dict[str, dict[str, str]]:
    """Return each service's environment, in the order of SETTINGS: ours, with the settings of this service alone.

    A MILLRACE_ variable of ours fills a setting where no flag does.

    Raises:
        ConfigError: no service has a setting, or one refuses its value.
        CheckpointError: the model is of another format, or its configuration cannot be read.
    """
    refuse_foreign(launch.model)
    ours = {name: value for name, value in environ.items() if name.startswith(PREFIX)}
    plain = {name: value for name, value in environ.items() if name not in ours}
    given = {**launch.settings, "model": str(launch.model.absolute()), "redis_url": redis_url}
    given["metrics_port"] = 0  # one listener shows the metrics of all, and it is ours
    given = ours | {_variable(name): _value(value) for name, value in given.items()}
    given |= _context_length(launch.model, given)
    _check_division(launch.model, given)
    given.setdefault(_variable("foreign_bytes"), str(_encoder_bytes(launch.model, given)))
    if "OMP_NUM_THREADS" not in plain:  # which torch reads: a number that somebody chose for both
        given.setdefault(_variable("torch_threads"), str(compute_threads(usable_cores(), len(COMPUTE_SERVICES))))
    only_gateway = {_variable(name): _value(getattr(launch, name)) for name in ("host", "port")}
    known = {
        service: {_variable(name) for name in settings.__struct_fields__} for service, settings in SETTINGS.items()
    }
    for name in sorted(given.keys() - set().union(*known.values())):
        raise ConfigError(f"{name}: no service has this setting")
    result = {}
    for service, settings in SETTINGS.items():
        own = {name: value for name, value in given.items() if name in known[service]}
        own |= only_gateway if service == "gateway" else {}
        config.load(settings, own)
        result[service] = plain | own
    return result


def settings_of(environ: Mapping[str, str]) -> CommonSettings:
    """Read the settings that all services share from one service's environment."""
    known = {_variable(name) for name in CommonSettings.__struct_fields__}
    return config.load(CommonSettings, {name: value for name, value in environ.items() if name in known})


def _variable(setting: str) -> str:
    return PREFIX + setting.upper()


def _value(value: object) -> str:
    return value if isinstance(value, str) else msgspec.json.encode(value).decode()


def _encoder_bytes(model: Path, given: Mapping[str, str]) -> int:
    """Return the memory that mm_encoder will take of the GPU it shares with the engine, which may start before it."""
    known = {_variable(name) for name in MmEncoderSettings.__struct_fields__}
    settings = config.load(MmEncoderSettings, {name: value for name, value in given.items() if name in known})
    if settings.device == "cpu":
        return 0
    facts = load_model_config(model)
    return device_bytes(facts, settings.largest_pass(facts.vision))


def _context_length(model: Path, given: Mapping[str, str]) -> dict[str, str]:
    """Return the context length for all services where none is set: the default, or the model's if that is less."""
    name, longest = _variable("max_model_len"), load_model_config(model).max_position_embeddings
    if name not in given:
        default = next(f.default for f in msgspec.structs.fields(CommonSettings) if f.name == "max_model_len")
        return {name: str(min(default, longest))}
    if given[name].isdigit() and int(given[name]) > longest:
        raise ConfigError(f"--max-model-len: {given[name]} is more than the {longest} positions this model has")
    return {}


def _check_division(model: Path, given: Mapping[str, str]) -> None:
    """Check that as many ranks as are asked for can share the model; what is no number the engine's settings refuse."""
    size = given.get(_variable("tensor_parallel_size"), "1")
    if not size.isdigit() or int(size) < 1:
        return
    try:
        divided(load_model_config(model), int(size))
    except ConfigError as error:
        raise ConfigError(f"--tensor-parallel-size: {error}") from None
