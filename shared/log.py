"""Structured logs (logfmt) to stderr, a line each, with the ids of request and trace if known and never a body."""

import json
import logging
import re
import sys
from collections.abc import Iterable
from datetime import UTC, datetime

from shared.errors import ConfigError

_LEVELS = {"debug": logging.DEBUG, "info": logging.INFO, "warning": logging.WARNING, "error": logging.ERROR}
_BARE = re.compile(r"[^\s\"=\\\x00-\x1f\x7f-\x9f\u2028\u2029]+")
# Not fields of ours: what the library sets, and uvicorn's message once more, with escapes for a terminal's colours.
_STANDARD = frozenset(logging.makeLogRecord({}).__dict__) | {"message", "asctime", "taskName", "color_message"}


class Logfmt(logging.Formatter):
    """Formatter of ts, level, service, replica, logger, msg and the fields of `extra` into one line."""

    def __init__(self, service: str, name: str) -> None:
        super().__init__()
        self._who = {"service": service, "replica": name}

    def format(self, record: logging.LogRecord) -> str:
        fields: dict[str, object] = {
            "ts": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            **self._who,
            "logger": record.name,
            "msg": record.getMessage(),
        }
        extras = {key: value for key, value in record.__dict__.items() if key not in _STANDARD}
        fields |= {key: extras.pop(key) for key in ("request_id", "http_request_id", "trace_id") if key in extras}
        fields |= extras
        if record.exc_info and record.exc_info[0]:
            fields["exc"] = self.formatException(record.exc_info)
        if record.stack_info:
            fields["stack"] = record.stack_info
        return " ".join(f"{key}={_quoted(str(value))}" for key, value in fields.items())


def _quoted(text: str) -> str:
    """Return one word as it is, other text as a JSON string, without line breaks and control characters."""
    return text if _BARE.fullmatch(text) else json.dumps(text)


def setup(service: str, name: str, level: str) -> None:
    """Install the formatter on the root logger, replacing all handlers.

    Raises:
        ConfigError: unknown level.
    """
    if level not in _LEVELS:
        raise ConfigError(f"MILLRACE_LOG_LEVEL is {level!r}; expected one of {', '.join(_LEVELS)}")
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(Logfmt(service, name))
    logging.root.handlers = [handler]
    logging.root.setLevel(_LEVELS[level])


def warn_each(log: logging.Logger, warnings: Iterable[str]) -> None:
    """Log each warning as a line of its own."""
    for text in warnings:
        log.warning(text)


def logger(name: str) -> logging.Logger:
    """Return a logger whose calls take fields by `extra={"request_id": ..., ...}`."""
    return logging.getLogger(name)
