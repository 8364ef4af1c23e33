"""Flags that say which deployment a command is about."""

import argparse
import os
import socket
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NoReturn

from redis.exceptions import ConnectionError, RedisError, TimeoutError

from shared.config import variable
from shared.errors import ConfigError

_SOCKET = "redis.sock"
NAMESPACE = "millrace"  # what a deployment's keys begin with unless told otherwise


def no_answer(error: RedisError) -> str:
    """Say that the Redis of --redis-url does not answer, or what, and what to do. Without the URL, which may have a
    password."""
    if not isinstance(error, ConnectionError | TimeoutError):
        return f"Redis refuses: {error}"
    return f"Redis does not answer: {error} Is the deployment running, and is this the Redis that --redis-url names?"


def scratch_prefix(port: int) -> str:
    """Return the first part of the name of a directory in which `millrace serve` has its Redis's socket.

    It is by this name that other commands find the one whose API is at `port`.
    """
    return f"millrace-{port}-"


def scratch_socket(directory: Path) -> Path:
    """Return the path of the Redis's socket in such a directory."""
    return directory / _SOCKET


def found_here() -> dict[int, str]:
    """Return the URLs of the Redis servers of this user's `millrace serve`s, by the ports of their APIs."""
    places = sorted(Path(tempfile.gettempdir()).glob(f"millrace-*-*/{_SOCKET}"))
    ports = {path: path.parent.name.split("-")[1] for path in places}
    return {int(port): f"unix://{path}" for path, port in ports.items() if port.isdecimal() and _is_ours(path)}


def _is_ours(path: Path) -> bool:
    """Return True if a process of this user, and not one that has died, listens on a socket."""
    try:
        owner = path.stat().st_uid
    except OSError:  # it has just ended
        return False
    with socket.socket(socket.AF_UNIX) as probe:
        return owner == os.getuid() and probe.connect_ex(str(path)) == 0


def named_or_found(url: str) -> str:
    """Return the URL, if one was named, else that of the instance which runs here.

    Raises:
        ConfigError: several do, or none.
    """
    if url:
        return url
    found = found_here()
    if len(found) > 1:
        named = ", ".join(f"{url} (that of port {port})" for port, url in found.items())
        raise ConfigError(f"argument --redis-url: more than one `millrace serve` runs here; name one: {named}")
    if not found:
        raise ConfigError("argument --redis-url: no `millrace serve` of this user runs here; name a deployment's Redis")
    return next(iter(found.values()))


class Parser(argparse.ArgumentParser):
    """Argument parser whose errors are ConfigErrors, as every other mistake's."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError(message)


def parser(
    prog: str, description: str, environ: Mapping[str, str], which: Callable[[str], str] = named_or_found
) -> Parser:
    """Make a parser with --redis-url, --blob-redis-url and --namespace, with the services' variables as defaults.

    `which` makes the URL of what was given, "" if nothing was.
    """
    made = Parser(prog=prog, description=description, allow_abbrev=False)
    made.add_argument(
        "--redis-url",
        type=which,
        default=environ.get(variable("redis_url"), ""),
        metavar="URL",
        help=f"the deployment's Redis (unset: {variable('redis_url')}, or that of the `millrace serve` that runs here)",
    )
    made.add_argument(
        "--blob-redis-url",
        default=environ.get(variable("blob_redis_url")) or None,
        metavar="URL",
        help="the Redis of media and embeddings, if it is another",
    )
    made.add_argument(
        "--namespace",
        default=environ.get(variable("namespace"), NAMESPACE),
        metavar="NAME",
        help="what the deployment's keys begin with (%(default)s)",
    )
    return made
