"""The chat template: the checkpoint's own, else the built-in one, run in Jinja's immutable sandbox.

Where a checkpoint's template may be, the first found wins: chat_template.jinja, chat_template.json,
tokenizer_config.json.
"""

import json
from datetime import datetime
from pathlib import Path
from typing import Any, NoReturn

import msgspec
from jinja2 import TemplateError
from jinja2.ext import loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

from shared.errors import CheckpointError, internal, invalid

BUILT_IN = Path(__file__).with_name("ernie_thinking.jinja")
_TOKEN_NAMES = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token", "mask_token")


class Refusal(TemplateError):
    """The template called raise_exception: it does not take such a conversation."""


class Template:
    """A compiled template. `name` says where it came from."""

    def __init__(self, name: str, source: str, tokens: dict[str, str], max_chars: int) -> None:
        """`tokens` are variables such as bos_token; `max_chars` bounds what one rendering may produce.

        Raises:
            CheckpointError: the source is not a template.
        """
        self.name = name
        self._tokens = tokens
        self._max_chars = max_chars
        try:
            self._template = _environment().from_string(source)
        except TemplateError as error:
            raise CheckpointError(f"{name}: the chat template does not compile: {error}") from error

    @classmethod
    def load(cls, directory: Path, max_chars: int) -> "Template":
        """The checkpoint's template, or the built-in one.

        Raises:
            CheckpointError: the file is unreadable, or its template is not one.
        """
        config = _read_json(directory / "tokenizer_config.json")
        tokens = {name: text for name in _TOKEN_NAMES if (text := _token_text(config.get(name))) is not None}
        name, source = _own_source(directory, config) or (BUILT_IN.name, BUILT_IN.read_text("utf-8"))
        return cls(name, source, tokens, max_chars)

    def render(self, variables: dict[str, Any]) -> str:
        """
        Raises:
            RequestError: 400, the template refuses the conversation or its output passes the limit; 500, it fails.
        """
        pieces: list[str] = []
        size = 0
        try:
            for piece in self._template.generate(**{**self._tokens, **variables}):
                size += len(piece)
                if size > self._max_chars:
                    limit = f"The rendered prompt has more than {self._max_chars} characters."
                    raise invalid(limit, "messages", "context_length_exceeded")
                pieces.append(piece)
        except Refusal as error:
            raise invalid(f"The chat template refuses this conversation: {error}", "messages") from error
        except (TemplateError, TypeError, ValueError, LookupError, ArithmeticError, RecursionError) as error:
            # The conversation was checked, so this is a fault of the template's. Its text may quote the client's.
            raise internal(f"The chat template {self.name} failed ({type(error).__name__}).") from error
        return "".join(pieces)


def _environment() -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols])
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    return environment


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Jinja's own escapes <, > and & for HTML, which a prompt is not."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> NoReturn:
    raise Refusal(message)


def _strftime_now(form: str) -> str:
    return datetime.now().strftime(form)


def _own_source(directory: Path, config: dict[str, Any]) -> tuple[str, str] | None:
    """(file name, template) of the first place that has one."""
    alone = directory / "chat_template.jinja"
    if alone.is_file():
        try:
            return alone.name, alone.read_text("utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise CheckpointError(f"{alone.name}: {error}") from error
    for name, holder in (
        ("chat_template.json", _read_json(directory / "chat_template.json")),
        ("tokenizer_config.json", config),
    ):
        if (given := holder.get("chat_template")) is not None:
            return name, _default_of(given, name)
    return None


def _default_of(given: Any, name: str) -> str:
    """A template, or the one named "default" of several."""
    if isinstance(given, list):
        try:
            given = {entry["name"]: entry["template"] for entry in given}.get("default")
        except (TypeError, KeyError):
            given = None
    if not isinstance(given, str):
        raise CheckpointError(f"{name}: chat_template is neither a template nor a list with one named default")
    return given


def _token_text(given: Any) -> str | None:
    """The text of a token that is written as it stands or as {"content": text}."""
    text = given.get("content") if isinstance(given, dict) else given
    return text if isinstance(text, str) else None


def _read_json(path: Path) -> dict[str, Any]:
    """The object in `path`; empty where there is no such file."""
    if not path.is_file():
        return {}
    try:
        return msgspec.json.decode(path.read_bytes(), type=dict[str, Any])
    except (OSError, UnicodeDecodeError, msgspec.DecodeError) as error:
        raise CheckpointError(f"{path.name}: {error}") from error
