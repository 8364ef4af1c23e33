"""Users of the embedded Redis: each service is one, with the rights of shared/bus/users.acl and without a password.

The server's socket, in a directory that nobody else may enter, keeps others out. The rights stop mistakes of a service,
which are refused as with the chart. They stop nobody who has taken one over: it runs as the user of all, who may open
the socket and sign in as any service, or as `default`.
"""

import re
from importlib.resources import files

# Whoever can open the socket: `millrace status` and others, and a person's redis-cli.
_PERSON = "user default on nopass ~* &* +@all\n"


def users_file(namespace: str) -> str:
    """Return the server's ACL file for a deployment whose keys begin with `namespace`."""
    lines = (files("shared.bus") / "users.acl").read_text(encoding="utf-8").splitlines(keepends=True)
    rights = "".join(line for line in lines if line.strip() and not line.startswith("#")).replace("\n ", " ")
    rights = rights.replace("NS:", f"{_pattern(namespace)}:")
    return _PERSON + re.sub(r"^user (\S+)", r"user \1 on nopass", rights, flags=re.MULTILINE)


def _pattern(namespace: str) -> str:
    """Return a pattern for it, with ? (any byte) for each byte that a pattern cannot have, or not as itself."""
    return re.sub(r"[^\w.-]", lambda found: "?" * len(found[0].encode()), namespace, flags=re.ASCII)


def sign_in(url: str, service: str) -> str:
    """Return the URL by which a service reaches a server whose socket is `url`, as a user of its own."""
    return url.replace("unix://", f"unix://{service.replace('_', '-')}@", 1)
