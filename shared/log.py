"""One-line structured logs (logfmt) to stderr, with the request id where there is one and never a body."""

import logging


def setup(service: str, name: str, level: str) -> None:
    """Install the formatter.

    Raises:
        ConfigError: unknown level.
    """
    raise NotImplementedError


def logger(name: str) -> logging.Logger:
    """A logger whose calls take fields by `extra={"request_id": ..., ...}`."""
    return logging.getLogger(name)
