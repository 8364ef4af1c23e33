"""The key file: JSON that names each tenant, the digests of its API keys, and what it may have. Pure.

    {"keys": [{"name": "alice", "hashes": ["sha256:9f86…"], "weight": 2, "priority": "high",
               "limits": {"requests_per_min": 600, "tokens_per_min": 200000, "concurrent_requests": 32}}]}

Keys are random (`millrace keys new`), so a plain SHA-256 of one cannot be reversed: nobody can guess 256 bits.
"""

import hashlib
from collections import Counter
from typing import Annotated, Literal, get_args

import msgspec
from msgspec import Meta

from shared.errors import ConfigError, Failure, RequestError

MOST_KEYS = 1000  # tenants of one file, and so values of the label `key` in metrics

Name = Annotated[str, Meta(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")]
Digest = Annotated[str, Meta(pattern=r"^sha256:[0-9a-f]{64}$")]
Priority = Literal["high", "normal", "low"]
PRIORITIES: tuple[str, ...] = get_args(Priority)  # in the order of service
Limit = Annotated[int, Meta(ge=1, le=10**12)]


class Limits(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Limits of one tenant over all gateways; None: none of its own."""

    requests_per_min: Limit | None = None  # choices: n of them count n times
    tokens_per_min: Limit | None = None  # of prompts and answers
    concurrent_requests: Limit | None = None  # choices that wait or run
    queued_tokens: Limit | None = None  # tokens of prompts for which no answer has begun
    media_bytes_per_min: Limit | None = None  # of uploads
    batch_lines: Limit | None = None  # lines of batches that have no result yet


class Tenant(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Tenant: an entry of the file."""

    name: Name
    hashes: Annotated[tuple[Digest, ...], Meta(min_length=1)]  # of its keys: two while one replaces the other
    weight: Annotated[float, Meta(gt=0, le=1000)] = 1.0  # share of the engines beside others that wait
    priority: Priority = "normal"  # a lower class is served when no higher one waits
    # Prompts that are computed already are seen by their time, and by `cached_tokens`: what others ask can be guessed.
    prefix_cache: Literal["own", "shared"] = "own"  # shared: with all tenants that say so, and keys of the settings
    models: tuple[str, ...] = ()  # names of the model that it may use; empty: all
    limits: Limits = Limits()

    def salt(self, given: str) -> str:
        """Return the salt of the tenant's prefixes, where it gives one of its own or none; no client can give it."""
        return f"@{self.name}={given}" if given or self.prefix_cache == "own" else ""

    def may_use(self, model: str) -> bool:
        """Return True if the tenant may call the model by this name."""
        return not self.models or model in self.models

    def check_model(self, model: str) -> None:
        """
        Raises:
            RequestError: 403, the tenant may not call the model by this name.
        """
        if not self.may_use(model):
            text = f"The API key {self.name!r} may not use the model {model[:64]!r}."
            raise RequestError(Failure(403, text, param="model", code="model_not_allowed"))


class KeyFile(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Content of the file."""

    keys: tuple[Tenant, ...]


def parse(data: bytes) -> dict[bytes, Tenant]:
    """Return the tenants by the SHA-256 of each of their keys.

    Raises:
        ConfigError: not JSON, an unknown field, a value out of range, a name or digest that stands twice, or the digest
                of an empty key.
    """
    try:
        tenants = msgspec.json.decode(data, type=KeyFile).keys
    except msgspec.MsgspecError as error:
        raise ConfigError(str(error)) from error
    if len(tenants) > MOST_KEYS:
        raise ConfigError(f"{len(tenants)} keys; a file has at most {MOST_KEYS}")
    _check_unique("name", [tenant.name for tenant in tenants])
    empty = written_digest("")
    if any(empty in tenant.hashes for tenant in tenants):
        raise ConfigError(f"{empty} is the hash of an empty key, which would let everybody in; remove it")
    _check_unique("hash", [digest for tenant in tenants for digest in tenant.hashes])
    return {bytes.fromhex(digest[7:]): tenant for tenant in tenants for digest in tenant.hashes}


def digest(key: str) -> bytes:
    """Return the SHA-256 of an API key."""
    return hashlib.sha256(key.encode()).digest()


def written_digest(key: str) -> str:
    """Return the SHA-256 of an API key as the file has it."""
    return f"sha256:{digest(key).hex()}"


def _check_unique(what: str, values: list[str]) -> None:
    twice = [value for value, count in Counter(values).items() if count > 1]
    if twice:
        raise ConfigError(f"the {what} {twice[0]} stands twice")
