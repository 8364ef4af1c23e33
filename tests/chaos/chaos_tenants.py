"""Tenants of a storm: a key file, and the key that a client sends. Without the file a gateway reads no key."""

import json
from pathlib import Path

from services.gateway.tenants.key_file import written_digest

TENANTS = ({"name": "heavy", "weight": 1}, {"name": "light", "weight": 10}, {"name": "batch", "priority": "low"})


def key_of(number: int) -> dict[str, str]:
    """The header of the client that asks this question; who asks it again has the same key."""
    return {"Authorization": f"Bearer key-of-{TENANTS[number % len(TENANTS)]['name']}"}


def write_key_file(directory: Path) -> str:
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / "keys.json"
    entries = [{**tenant, "hashes": [written_digest(f"key-of-{tenant['name']}")]} for tenant in TENANTS]
    path.write_text(json.dumps({"keys": entries}))
    return str(path)
