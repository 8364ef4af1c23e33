"""Lists what an image holds, as CycloneDX 1.5: its Python packages and its Debian packages.

Runs inside the image, with nothing but the standard library, so that any engine can make the list:

    docker run --rm --interactive --entrypoint python IMAGE - NAME VERSION < helm/images/sbom.py > NAME.cdx.json
"""

import json
import re
import sys
import uuid
from collections.abc import Iterator
from datetime import UTC, datetime
from importlib.metadata import distributions
from pathlib import Path
from typing import Any

DPKG = Path("/var/lib/dpkg/status")
Component = dict[str, Any]


def main(name: str, version: str) -> None:
    """Print the list of an image that is called `name`."""
    bill = {
        "bomFormat": "CycloneDX",
        "specVersion": "1.5",
        "serialNumber": f"urn:uuid:{uuid.uuid4()}",
        "version": 1,
        "metadata": {
            "timestamp": datetime.now(UTC).isoformat(timespec="seconds"),
            "component": {"type": "container", "name": name, "version": version},
        },
        "components": [*python_packages(), *debian_packages(DPKG)],
    }
    print(json.dumps(bill, indent=1))


def python_packages() -> list[Component]:
    """Return the packages that this interpreter finds, each once."""
    found = {canonical(each.metadata["Name"]): each for each in distributions()}
    return [_component("pypi", name, each.version) for name, each in sorted(found.items())]


def canonical(name: str) -> str:
    """Return the name as the package index spells it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def debian_packages(status: Path) -> Iterator[Component]:
    """Yield the installed packages of dpkg's own list; none where there is no such file."""
    for paragraph in status.read_text().split("\n\n") if status.exists() else ():
        fields = dict(re.findall(r"^([A-Z][\w-]*): (.*)$", paragraph, re.MULTILINE))
        if "installed" in fields.get("Status", "").split():
            yield _component("deb/debian", fields["Package"], fields["Version"])


def _component(kind: str, name: str, version: str) -> Component:
    purl = f"pkg:{kind}/{name}@{version.replace('+', '%2B').replace(':', '%3A')}"
    return {"type": "library", "name": name, "version": version, "purl": purl, "bom-ref": purl}


if __name__ == "__main__":
    main(*sys.argv[1:])
