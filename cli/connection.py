"""Flags that say which deployment a command is about."""

import argparse
from collections.abc import Mapping
from typing import NoReturn

from redis.exceptions import RedisError

from shared.config import variable
from shared.errors import ConfigError

LOCAL = "redis://127.0.0.1:8182/0"  # where `millrace serve` has its Redis unless told otherwise


def no_answer(error: RedisError) -> str:
    """Say that the Redis of --redis-url does not answer, and what to do. Without the URL, which may have a password."""
    return f"Redis does not answer: {error} Is the deployment running, and is this the Redis that --redis-url names?"


class Parser(argparse.ArgumentParser):
    """Argument parser whose errors are ConfigErrors, as every other mistake's."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError(message)


def parser(prog: str, description: str, environ: Mapping[str, str]) -> Parser:
    """Make a parser with --redis-url, --blob-redis-url and --namespace, with the services' variables as defaults."""
    made = Parser(prog=prog, description=description, allow_abbrev=False)
    made.add_argument(
        "--redis-url",
        default=environ.get(variable("redis_url"), LOCAL),
        metavar="URL",
        help=f"the deployment's Redis (unset: {variable('redis_url')}, or the one of `millrace serve`)",
    )
    made.add_argument(
        "--blob-redis-url",
        default=environ.get(variable("blob_redis_url")) or None,
        metavar="URL",
        help="the Redis of media and embeddings, if it is another",
    )
    made.add_argument(
        "--namespace",
        default=environ.get(variable("namespace"), "millrace"),
        metavar="NAME",
        help="what the deployment's keys begin with (%(default)s)",
    )
    return made
