"""Chat template: the checkpoint's own, else the built-in one, rendered in Jinja's immutable sandbox.

A checkpoint's template is the first found of chat_template.jinja, chat_template.json and tokenizer_config.json.
"""

import json
import re
import secrets
from datetime import datetime
from pathlib import Path
from typing import Any, NoReturn

import msgspec
from jinja2 import TemplateError
from jinja2.ext import loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

from shared.errors import CheckpointError, invalid

BUILT_IN = Path(__file__).with_name("ernie_thinking.jinja")
_TOKEN_NAMES = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token", "mask_token")


class Refusal(TemplateError):
    """Call of raise_exception by the template: it does not support such a conversation."""


class TemplateFailureError(Exception):
    """Failure of the template itself, whatever the conversation; the text says in a few words what it did."""


class RawText(str):
    """Text that stands where the template writes a value as JSON: it is written as it is."""


class TemplateSource(msgspec.Struct, frozen=True):
    """Template that is not compiled yet: hostile ones hang even in that."""

    name: str  # of the file that it came from
    source: str
    tokens: dict[str, str]  # variables such as bos_token

    @classmethod
    def load(cls, directory: Path) -> "TemplateSource":
        """Load the checkpoint's template, or the built-in one.

        Raises:
            CheckpointError: the file cannot be read.
        """
        config = _read_json(directory / "tokenizer_config.json")
        tokens = {name: text for name in _TOKEN_NAMES if (text := _token_text(config.get(name))) is not None}
        name, source = _own_source(directory, config) or (BUILT_IN.name, BUILT_IN.read_text("utf-8"))
        return cls(name, source, tokens)


class Template:
    """Compiled template. It runs in a process of its own: `services/gateway/templates/`."""

    def __init__(self, source: TemplateSource, max_chars: int) -> None:
        """Compile `source`; `max_chars` bounds one rendered prompt.

        Raises:
            TemplateFailureError: it does not compile.
        """
        self._tokens = source.tokens
        self._max_chars = max_chars
        try:
            self._template = _environment().from_string(source.source)
        except (TemplateError, SyntaxError, ValueError, ArithmeticError, RecursionError) as error:
            raise TemplateFailureError(f"does not compile: {error!s:.200}") from error

    def render(self, variables: dict[str, Any]) -> str:
        """Render a prompt.

        Raises:
            RequestError: 400, the template refuses the conversation or the prompt exceeds the limit.
            TemplateFailureError: it fails.
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
            # The conversation was validated, so the template is at fault. The error's text may quote the client's.
            raise TemplateFailureError(f"failed ({type(error).__name__})") from error
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
    """Write JSON without escaping <, > and &, as Jinja's own filter does for HTML. Raw texts in it stay as they are."""
    held: dict[str, str] = {}
    value = _hold_raw(value, held)
    text = json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
    return re.sub('"raw-[0-9a-f]{32}"', lambda found: held.get(found.group(), found.group()), text) if held else text


def _hold_raw(value: Any, held: dict[str, str]) -> Any:
    """Return `value` with a random string in place of each raw text; `held` gets the texts by the strings' JSON."""
    if isinstance(value, RawText):
        name = f"raw-{secrets.token_hex(16)}"
        held[f'"{name}"'] = str(value)
        return name
    if isinstance(value, dict):
        return {key: _hold_raw(item, held) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_hold_raw(item, held) for item in value]
    return value


def _raise_exception(message: str) -> NoReturn:
    raise Refusal(message)


def _strftime_now(form: str) -> str:
    return datetime.now().strftime(form)


def _own_source(directory: Path, config: dict[str, Any]) -> tuple[str, str] | None:
    """Return (file name, template) of the first file that has one."""
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
            return name, _select_default(given, name)
    return None


def _select_default(given: Any, name: str) -> str:
    """Return a template, or of several the one named "default"."""
    if isinstance(given, list):
        try:
            given = {entry["name"]: entry["template"] for entry in given}.get("default")
        except (TypeError, KeyError):
            given = None
    if not isinstance(given, str):
        raise CheckpointError(f"{name}: chat_template is neither a template nor a list with one named default")
    return given


def _token_text(given: Any) -> str | None:
    """Return the text of a token, which is written as a string or as {"content": text}."""
    text = given.get("content") if isinstance(given, dict) else given
    return text if isinstance(text, str) else None


def _read_json(path: Path) -> dict[str, Any]:
    """Return the object in the file `path`; empty if there is no such file."""
    if not path.is_file():
        return {}
    try:
        return msgspec.json.decode(path.read_bytes(), type=dict[str, Any])
    except (OSError, UnicodeDecodeError, msgspec.DecodeError) as error:
        raise CheckpointError(f"{path.name}: {error}") from error
