"""Setting of Deployments' replicas after an upgrade, where the number in the values has changed and somebody else had
scaled them since. Written through the scale subresource, it takes the field over, which an apply may not.

Argument: JSON of the numbers by Deployment. It runs in a pod with a token of Kubernetes, and needs `patch` on
deployments/scale.
"""

import json
import os
import signal
import ssl
import sys
import urllib.request
from pathlib import Path

ACCOUNT = Path(os.environ.get("SERVICE_ACCOUNT", "/var/run/secrets/kubernetes.io/serviceaccount"))
TIMEOUT_S = 30


def scale(server: str, deployment: str, replicas: int) -> None:
    namespace, token = (ACCOUNT.joinpath(name).read_text().strip() for name in ("namespace", "token"))
    asked = urllib.request.Request(
        f"{server}/apis/apps/v1/namespaces/{namespace}/deployments/{deployment}/scale",
        json.dumps({"spec": {"replicas": replicas}}).encode(),
        {"Content-Type": "application/merge-patch+json", "Authorization": f"Bearer {token}"},
        method="PATCH",
    )
    trust = ssl.create_default_context(cafile=str(ACCOUNT / "ca.crt")) if server.startswith("https:") else None
    with urllib.request.urlopen(asked, timeout=TIMEOUT_S, context=trust):
        print(f"{deployment}: {replicas} replicas", flush=True)


def main(numbers: str) -> int:
    """Scale all of them, and return 1 if one could not be."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # a container's first process would ignore it otherwise
    host, port = os.environ["KUBERNETES_SERVICE_HOST"], os.environ["KUBERNETES_SERVICE_PORT"]
    server = os.environ.get("KUBERNETES_SERVER", f"https://{f'[{host}]' if ':' in host else host}:{port}")
    failed = False
    for deployment, replicas in json.loads(numbers).items():
        try:
            scale(server, deployment, replicas)
        except OSError as error:
            print(f"{deployment}: not scaled to {replicas}: {error}", file=sys.stderr)
            failed = True
    return int(failed)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
