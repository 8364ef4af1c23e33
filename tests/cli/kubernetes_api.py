"""As much of the Kubernetes API as the autoscaler uses, over real HTTP: scales with versions, pods with selectors."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, urlsplit

from server_thread import served

COST = "controller.kubernetes.io/pod-deletion-cost"


class KubernetesApi:
    """`replicas` by Deployment; `pods`: name -> (labels, annotations). `requests` are those that changed something."""

    def __init__(self, **replicas: int) -> None:
        self.replicas = {name.replace("_", "-"): number for name, number in replicas.items()}
        self.pods: dict[str, tuple[dict[str, str], dict[str, str]]] = {}
        self.requests: list[tuple[str, str]] = []
        self.fail_with: int | None = None
        self.url = ""
        self._version = 1

    def add_pod(self, deployment: str, name: str) -> None:
        self.pods[name] = ({"app": deployment}, {})

    def someone_scales(self, deployment: str, replicas: int) -> None:
        self.replicas[deployment] = replicas
        self._version += 1

    def costs(self) -> dict[str, str]:
        return {name: annotations[COST] for name, (_, annotations) in self.pods.items() if COST in annotations}

    def answer(self, method: str, path: str, query: dict[str, list[str]], kind: str, body: Any) -> tuple[int, Any]:
        if self.fail_with is not None:
            return self.fail_with, {"message": "refused"}
        match method, path.strip("/").split("/"):
            case "GET", ["apis", "apps", "v1", "namespaces", "models", "deployments", name, "scale"]:
                return (200, self._scale(name)) if name in self.replicas else (404, {"message": "not found"})
            case "PUT", ["apis", "apps", "v1", "namespaces", "models", "deployments", name, "scale"]:
                if body["metadata"]["resourceVersion"] != str(self._version):
                    return 409, {"message": "the object has been modified"}
                self.requests.append((f"scale {name}", str(body["spec"]["replicas"])))
                self.someone_scales(name, body["spec"]["replicas"])
                return 200, self._scale(name)
            case "GET", ["api", "v1", "namespaces", "models", "pods"]:
                labels = dict(pair.split("=") for pair in query["labelSelector"][0].split(","))
                chosen = [name for name, (own, _) in self.pods.items() if labels.items() <= own.items()]
                return 200, {
                    "apiVersion": "v1",
                    "kind": "PodList",
                    "metadata": {},
                    "items": list(map(self._pod, chosen)),
                }
            case "PATCH", ["api", "v1", "namespaces", "models", "pods", name, "status"]:
                assert kind == "application/merge-patch+json"
                self.pods[name][1].update(body["metadata"]["annotations"])
                self.requests.append((f"pod {name}", body["metadata"]["annotations"][COST]))
                return 200, self._pod(name)
        return 404, {"message": f"no such thing: {method} {path}"}

    def _scale(self, name: str) -> Any:
        return {
            "apiVersion": "autoscaling/v1",
            "kind": "Scale",
            "metadata": {
                "name": name,
                "namespace": "models",
                "uid": "6f1c",
                "resourceVersion": str(self._version),
                "creationTimestamp": "2026-01-02T03:04:05Z",
            },
            "spec": {"replicas": self.replicas[name]} if self.replicas[name] else {},  # as Kubernetes leaves zeros out
            "status": {"replicas": self.replicas[name], "selector": f"app={name}"},
        }

    def _pod(self, name: str) -> Any:
        labels, annotations = self.pods[name]
        return {"metadata": {"name": name, "labels": labels, **({"annotations": annotations} if annotations else {})}}


@contextmanager
def serving(api: KubernetesApi) -> Iterator[KubernetesApi]:
    """`api` at `api.url`."""

    class Handler(BaseHTTPRequestHandler):
        def _answer(self) -> None:
            parts = urlsplit(self.path)
            length = int(self.headers.get("Content-Length") or 0)
            body = json.loads(self.rfile.read(length)) if length else None
            kind = self.headers.get("Content-Type", "")
            status, said = api.answer(self.command, parts.path, parse_qs(parts.query), kind, body)
            data = json.dumps(said).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        do_GET = do_PUT = do_PATCH = _answer

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    api.url = f"http://127.0.0.1:{server.server_port}"
    with served(server):
        yield api
