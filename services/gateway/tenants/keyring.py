"""The API keys that a gateway accepts: those of its settings, and those of a file that may change while it runs."""

import hmac
import os
import re
from collections.abc import Iterable
from pathlib import Path

import msgspec
from prometheus_client import Counter

from services.gateway.tenants.key_file import PRIORITIES, Tenant, digest, parse
from shared.config import variable
from shared.errors import ConfigError
from shared.log import logger
from shared.messages import Share

_log = logger(__name__)

_DIGEST = re.compile("[0-9a-f]{64}")

_Version = tuple[int, int, int]  # of a file: inode, time of the last change in ns, size


class Caller(msgspec.Struct, frozen=True):
    """Owner of a request: whose answers it may read, and whose limits hold."""

    owner: str  # its tenant as `_owner` writes it, else the digest of its API key; empty: no key is needed
    tenant: Tenant | None = None  # None: the key is one of the settings, which has no limits
    share: Share | None = None  # its place in the order of service; None: there is no key file


class Keyring:
    """Accepted keys. Without any, everybody may call."""

    def __init__(self, keys: Iterable[str], path: str = "", reloads: Counter | None = None) -> None:
        """
        Raises:
            ConfigError: the file cannot be read, or is wrong.
        """
        self._plain = [digest(key) for key in keys]
        self._path = Path(path) if path else None
        self._reloads = reloads
        self._tenants: dict[bytes, Tenant] = {}
        self._version: _Version | None = None
        if self._path is not None:
            self._version = _version(self._path)
            try:
                self._tenants = parse(self._path.read_bytes())
            except (OSError, ConfigError) as error:
                raise ConfigError(f"{variable('api_keys_file')}: {path}: {_reason(error)}") from error

    @property
    def is_open(self) -> bool:
        """True if no key is needed."""
        return not self._plain and self._path is None

    def find(self, key: str) -> Caller | None:
        """Return the caller with this key; None if it is not valid.

        Time tells nothing of a key: digests are compared and not keys, all of the settings' to their last byte. The
        file's are looked up by digest, of which who does not know the key cannot choose a single byte.
        """
        given = digest(key)
        matches = [hmac.compare_digest(given, known) for known in self._plain]
        tenant = self._tenants.get(given)
        if tenant is not None or any(matches):
            return self._caller(given.hex() if tenant is None else _owner(tenant), tenant)
        return None

    def by_owner(self, owner: str) -> Caller | None:
        """Return the caller with this owner, by what it may do now; None if it has no valid key any more.

        The digest of a key that has moved from the settings into the file is its tenant's: its batches go on.
        """
        if self.is_open:
            return Caller(owner)
        tenant = next((tenant for tenant in self._tenants.values() if _owner(tenant) == owner), None)
        if tenant is None and _DIGEST.fullmatch(owner):
            tenant = self._tenants.get(bytes.fromhex(owner))
        if tenant is None and owner not in (known.hex() for known in self._plain):
            return None
        return self._caller(owner, tenant)

    def _caller(self, owner: str, tenant: Tenant | None) -> Caller:
        return Caller(owner, tenant, None if self._path is None else _share(tenant))

    def reload(self) -> None:
        """Read the file again if it has changed. One that is wrong, or gone, changes nothing but the log."""
        if self._path is None or (version := _version(self._path)) == self._version:
            return
        self._version = version  # from before it is read: what is written meanwhile is read again
        try:
            self._tenants = parse(self._path.read_bytes())
        except (OSError, ConfigError) as error:
            self._count("failed")
            _log.error("the API keys stay as they were", extra={"file": str(self._path), "reason": _reason(error)})
            return
        self._count("read")
        _log.info("the API keys were read again", extra={"keys": len(self._tenants)})

    def _count(self, outcome: str) -> None:
        if self._reloads is not None:
            self._reloads.labels(outcome).inc()


def _owner(tenant: Tenant) -> str:
    """Return the owner of what a tenant has stored: the same for all of its keys, and like no digest of a key."""
    return f"@{tenant.name}"


def _share(tenant: Tenant | None) -> Share:
    """Return a place in the order of service; all keys of the settings have one together."""
    if tenant is None:
        return Share("")
    return Share(tenant.name, tenant.weight, PRIORITIES.index(tenant.priority))


def _version(path: Path) -> _Version | None:
    """Return what changes with the file; None if it is not there."""
    try:
        found = os.stat(path)  # of what a link leads to: a mounted Secret is replaced by turning a link
    except OSError:
        return None
    return found.st_ino, found.st_mtime_ns, found.st_size


def _reason(error: Exception) -> str:
    return (error.strerror or str(error)) if isinstance(error, OSError) else str(error)
