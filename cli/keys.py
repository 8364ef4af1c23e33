"""Command `millrace keys`: make API keys for a key file, and see what each has used.

A key is shown once, when it is made; the file has its digest alone.
"""

import asyncio
import secrets
import sys
from collections.abc import Mapping, Sequence

import msgspec
from redis.asyncio import Redis
from redis.exceptions import RedisError

from cli.connection import named_or_found, no_answer, parser
from services.gateway.tenants.key_file import Name, Tenant, written_digest
from shared.bus.client import command, connect
from shared.bus.keys import Keys
from shared.errors import ConfigError

PREFIX = "mr-"
COUNTS = ("requests", "refused", "prompt", "generated", "media")  # fields of a tenant's hash, after "used:"
TITLES = ("requests", "refused", "prompt tokens", "answer tokens", "media bytes")


class Usage(msgspec.Struct, frozen=True):
    """Amounts that a key has used since `since`, in unix seconds."""

    name: str
    open: int  # requests that wait or run
    since: int
    requests: int
    refused: int
    prompt: int
    generated: int
    media: int


def main(words: Sequence[str], environ: Mapping[str, str]) -> int:
    """Run the command and return the exit status.

    Raises:
        ConfigError: a flag is wrong.
    """
    flags = parser("millrace keys", "API keys of a key file (docs/tenants.md).", environ, which=str)
    flags.add_argument("what", choices=("new", "hash", "usage"), help="make a key; hash one from stdin; what was used")
    flags.add_argument("name", nargs="?", default="", help="of the new key, or the only one whose usage is shown")
    flags.add_argument("--json", action="store_true", help="usage as JSON")
    given = flags.parse_args(words)
    if given.what == "new":
        return _new(given.name)
    if given.what == "hash":
        print(written_digest(_typed(sys.stdin.readline().strip())))
        return 0
    try:
        found = asyncio.run(_read(named_or_found(given.redis_url), given.namespace))
    except RedisError as error:
        print(f"millrace keys: {no_answer(error)}", file=sys.stderr)
        return 2
    shown = [usage for usage in found if not given.name or usage.name == given.name]
    print(msgspec.json.encode(shown).decode() if given.json else "\n".join(table(shown)))
    return 0


def _typed(key: str) -> str:
    """Return a key that clients can send.

    Raises:
        ConfigError: it is empty, or has a character that no header has.
    """
    if not key:
        raise ConfigError("there is no key on standard input; an empty one would let everybody in")
    if not (key.isascii() and key.isprintable()):
        raise ConfigError("the key has a character that is not printable ASCII, and so is in no header")
    return key


def _new(name: str) -> int:
    """Print a key, and the entry of the file for it."""
    key = PREFIX + secrets.token_urlsafe(32)
    try:
        tenant = Tenant(name=msgspec.convert(name, Name), hashes=(written_digest(key),))
    except msgspec.ValidationError as error:
        raise ConfigError(f"a key needs a name of letters, digits, dots, dashes and underscores: {error}") from error
    entry = msgspec.json.encode({"name": tenant.name, "hashes": tenant.hashes}).decode()
    print(f"key, for the client; it is not shown again:\n{key}\nentry, for the key file:\n{entry}")
    return 0


async def _read(redis_url: str, namespace: str) -> list[Usage]:
    redis = connect(redis_url)
    try:
        return await read_usage(redis, Keys(namespace))
    finally:
        await redis.aclose()


async def read_usage(redis: Redis, keys: Keys) -> list[Usage]:
    """Return the usage of every key that was ever used, by name."""
    found = []
    prefix = keys.tenant("")
    async for key in redis.scan_iter(match=f"{prefix}*", count=1000, _type="hash"):
        name = str(key, "utf-8")[len(prefix) :]
        if name and ":" not in name:
            fields = await command(redis, "HMGET", key, "since", *(f"used:{count}" for count in COUNTS))
            counts = [_number(field) for field in fields]
            under_way = await command(redis, "HLEN", keys.tenant_open(name))
            found.append(Usage(name, under_way, *counts))
    return sorted(found, key=lambda usage: usage.name)


def _number(value: bytes | None) -> int:
    return int(value) if value is not None and value.isdigit() else 0


def table(usages: Sequence[Usage]) -> list[str]:
    """Write usages as lines of a table."""
    rows: list[tuple[str, ...]] = [("key", *TITLES, "open")]
    rows += [(each.name, *(str(getattr(each, count)) for count in COUNTS), str(each.open)) for each in usages]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
