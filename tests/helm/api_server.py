"""An API server as far as Helm uses one: objects are created, applied, patched, listed and deleted over real HTTP, and
`.spec.replicas` of a Deployment has owners, by the rules of server-side apply.

Those rules, as Kubernetes documents them: an apply that asks for another value than a field has is refused while
somebody else owns the field, unless it is forced; one that asks for the same value shares it; one that no longer names
the field gives it up, and a field that nobody owns goes back to its default. Whatever is written in another way, by
`kubectl scale` say, is taken over from all others.
"""

import copy
import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, urlsplit

import yaml
from server_thread import served

Object = dict[str, Any]

DEFAULT_REPLICAS = 1
# Kinds of the chart and of Helm, by group and version: plural -> kind.
KINDS: dict[str, dict[str, str]] = {
    "v1": {
        "configmaps": "ConfigMap",
        "namespaces": "Namespace",
        "persistentvolumeclaims": "PersistentVolumeClaim",
        "pods": "Pod",
        "secrets": "Secret",
        "serviceaccounts": "ServiceAccount",
        "services": "Service",
    },
    "apps/v1": {"deployments": "Deployment", "statefulsets": "StatefulSet"},
    "autoscaling/v2": {"horizontalpodautoscalers": "HorizontalPodAutoscaler"},
    "batch/v1": {"jobs": "Job"},
    "networking.k8s.io/v1": {"ingresses": "Ingress", "networkpolicies": "NetworkPolicy"},
    "policy/v1": {"poddisruptionbudgets": "PodDisruptionBudget"},
    "rbac.authorization.k8s.io/v1": {"roles": "Role", "rolebindings": "RoleBinding"},
}


class Refused(Exception):
    """Answer with a status of its own."""

    def __init__(self, status: int, reason: str, message: str) -> None:
        super().__init__(message)
        self.status = status
        self.body = {
            "kind": "Status",
            "apiVersion": "v1",
            "status": "Failure",
            "reason": reason,
            "code": status,
            "message": message,
        }


class ApiServer:
    """`objects`: by the path they are read at. `owners`: who owns a Deployment's number of replicas, by its path."""

    def __init__(self) -> None:
        self.objects: dict[str, Object] = {}
        self.owners: dict[str, dict[str, bool]] = {}  # path -> manager -> it owns the pods' template, too
        self.writes: list[tuple[str, str]] = []  # method, path
        self.run_job: Callable[[Object], bool] = lambda job: True  # returns whether a Job's pod succeeds
        self.url = ""
        self._version = 0
        self._lock = threading.Lock()

    # ------------------------------------------------------------------------------------------- what tests do and see

    def deployment(self, name: str) -> Object:
        return self.objects[_path("apps/v1", "deployments", name)]

    def replicas(self, name: str) -> int:
        return int(self.deployment(name)["spec"]["replicas"])

    def scale(self, name: str, replicas: int, manager: str = "kubectl") -> None:
        """Write the scale subresource, as `kubectl scale`, an HPA or the autoscaler does."""
        with self._lock:
            self._scale(_path("apps/v1", "deployments", name), replicas, manager)

    def put(self, kind: str, item: Object) -> None:
        """Let an object be there, or be another, without having been asked for by Helm."""
        version, plural = next((v, p) for v, kinds in KINDS.items() for p, k in kinds.items() if k == kind)
        self.objects[_path(version, plural, item["metadata"]["name"])] = item

    def names(self, kind: str) -> list[str]:
        return sorted(item["metadata"]["name"] for item in self.objects.values() if item["kind"] == kind)

    # ---------------------------------------------------------------------------------------------------- requests

    def answer(self, method: str, url: str, kind: str, agent: str, body: bytes) -> Object:
        if method == "PATCH" and urlsplit(url).path.split("/")[-2] == "jobs":
            job = yaml.safe_load(body)
            condition = "Complete" if self.run_job(job) else "Failed"
            body = json.dumps({**job, "status": {"conditions": [{"type": condition, "status": "True"}]}}).encode()
        with self._lock:
            return self._answer(method, url, kind, agent, body)

    def _answer(self, method: str, url: str, kind: str, agent: str, body: bytes) -> Object:
        parts = urlsplit(url)
        query = {key: values[-1] for key, values in parse_qs(parts.query).items()}
        if found := self._discovery(parts.path):
            return found
        if method == "GET":
            return self._read(parts.path, query)
        self.writes.append((method, parts.path))
        if method == "DELETE":
            return self._delete(parts.path)
        item = yaml.safe_load(body)
        if method == "POST":
            return self._create(f"{parts.path}/{item['metadata']['name']}", item, query.get("fieldManager", agent))
        if method == "PATCH" and kind.startswith("application/apply-patch"):
            return self._apply(parts.path, item, query["fieldManager"], query.get("force") == "true")
        if method == "PUT":
            return self._store(parts.path, item)
        if parts.path.endswith("/scale"):
            return self._scale(parts.path.removesuffix("/scale"), item["spec"]["replicas"], agent)
        return self._patch(parts.path, item, query.get("fieldManager", agent))

    def _discovery(self, path: str) -> Object | None:
        if path == "/version":
            return {"major": "1", "minor": "31", "gitVersion": "v1.31.0"}
        if path == "/api":
            return {"kind": "APIVersions", "versions": ["v1"]}
        if path == "/apis":
            groups = []
            for each in KINDS:
                if "/" in each:
                    known = {"groupVersion": each, "version": each.split("/")[1]}
                    groups.append({"name": each.split("/")[0], "versions": [known], "preferredVersion": known})
            return {"kind": "APIGroupList", "apiVersion": "v1", "groups": groups}
        if path == "/openapi/v3":
            prefixed = {f"{'apis' if '/' in each else 'api'}/{each}": f"/openapi/v3/{each}" for each in KINDS}
            return {"paths": {each: {"serverRelativeURL": url} for each, url in prefixed.items()}}
        if path.startswith("/openapi/v3/"):
            return _validation(path.removeprefix("/openapi/v3/"))
        group_version = path.removeprefix("/apis/").removeprefix("/api/")
        if group_version not in KINDS:
            return None
        resources = [
            {"name": plural, "singularName": "", "namespaced": kind != "Namespace", "kind": kind, "verbs": ["get"]}
            for plural, kind in KINDS[group_version].items()
        ]
        return {"kind": "APIResourceList", "groupVersion": group_version, "resources": resources}

    def _read(self, path: str, query: dict[str, str]) -> Object:
        if query.get("watch") == "true":
            return {}  # ends at once, and whoever watches reads again
        if path in self.objects:
            return self.objects[path]
        if path.rpartition("/")[2] not in {plural for kinds in KINDS.values() for plural in kinds}:
            raise Refused(404, "NotFound", f"{path} not found")
        wanted = [pair.split("=") for pair in query.get("labelSelector", "").split(",") if pair]
        items = [
            item
            for where, item in self.objects.items()
            if where.rpartition("/")[0] == path
            and all(item["metadata"].get("labels", {}).get(key) == value for key, value in wanted)
        ]
        plural = path.rpartition("/")[2]
        version, kind = next((v, kinds[plural]) for v, kinds in KINDS.items() if plural in kinds)
        return {"apiVersion": version, "kind": f"{kind}List", "metadata": {}, "items": items}

    def _create(self, path: str, item: Object, manager: str) -> Object:
        if path in self.objects:
            raise Refused(409, "AlreadyExists", f"{path} already exists")
        if item["kind"] == "Deployment" and "replicas" in item["spec"]:
            self.owners[path] = {manager: True}
        return self._store(path, item)

    def _delete(self, path: str) -> Object:
        if path not in self.objects:
            raise Refused(404, "NotFound", f"{path} not found")
        self.owners.pop(path, None)
        self.objects.pop(path)
        return {"kind": "Status", "apiVersion": "v1", "status": "Success"}

    def _apply(self, path: str, item: Object, manager: str, force: bool) -> Object:
        if item["kind"] == "Deployment":
            self._apply_replicas(path, item, manager, force)
        return self._store(path, item)

    def _apply_replicas(self, path: str, item: Object, manager: str, force: bool) -> None:
        owners, asked = self.owners.setdefault(path, {}), item["spec"].get("replicas")
        others = [name for name in owners if name != manager]
        if asked is None:
            owners.pop(manager, None)
            item["spec"]["replicas"] = self._replicas(path) if others else DEFAULT_REPLICAS
            return
        if others and asked != self._replicas(path):
            if not force:
                conflicts = f'Apply failed with 1 conflict: conflict with "{others[0]}": .spec.replicas'
                raise Refused(409, "Conflict", conflicts)
            owners.clear()
        owners[manager] = True

    def _patch(self, path: str, patch: Object, manager: str) -> Object:
        """Merge, which is all that a patch of three ways comes to where no list is patched."""
        if path not in self.objects:
            raise Refused(404, "NotFound", f"{path} not found")
        item = merged(self.objects[path], patch)
        if item["kind"] == "Deployment" and "replicas" in patch.get("spec", {}):
            self.owners[path] = {manager: True}
        return self._store(path, item)

    def _scale(self, path: str, replicas: int, manager: str) -> Object:
        item = copy.deepcopy(self.objects[path])
        if item["spec"]["replicas"] != replicas:
            self.owners[path] = {manager: False}
        item["spec"]["replicas"] = replicas
        return self._store(path, item)

    def _replicas(self, path: str) -> int:
        return int(self.objects[path]["spec"]["replicas"]) if path in self.objects else DEFAULT_REPLICAS

    def _store(self, path: str, item: Object) -> Object:
        self._version += 1
        item["metadata"] |= {"resourceVersion": str(self._version), "uid": path, "namespace": path.split("/")[-3]}
        if item["kind"] == "Deployment":
            item["spec"].setdefault("replicas", DEFAULT_REPLICAS)
            item["metadata"]["managedFields"] = [
                {
                    "manager": manager,
                    "operation": "Apply" if whole else "Update",
                    "apiVersion": "apps/v1",
                    "fieldsType": "FieldsV1",
                    "fieldsV1": {"f:spec": {"f:replicas": {}, **({"f:template": {}} if whole else {})}},
                }
                for manager, whole in self.owners.get(path, {}).items()
            ]
        self.objects[path] = item
        return item


def _validation(group_version: str) -> Object:
    """Return as much of a group's OpenAPI document as says that the server validates fields itself."""
    group, _, version = group_version.rpartition("/")
    paths = {
        f"/{plural}/{{name}}": {
            "patch": {
                "parameters": [{"name": "fieldValidation", "in": "query"}],
                "x-kubernetes-group-version-kind": {"group": group, "version": version, "kind": kind},
            }
        }
        for plural, kind in KINDS[group_version].items()
    }
    return {"openapi": "3.0.0", "info": {"title": "Kubernetes", "version": "1"}, "paths": paths}


def merged(item: Any, patch: Any) -> Any:
    """Return the result of a JSON merge patch."""
    if not isinstance(patch, dict):
        return patch
    result = dict(item) if isinstance(item, dict) else {}
    for key, value in patch.items():
        if value is None:
            result.pop(key, None)
        else:
            result[key] = merged(result.get(key), value)
    return result


def _path(version: str, plural: str, name: str) -> str:
    return f"/{'apis' if '/' in version else 'api'}/{version}/namespaces/models/{plural}/{name}"


@contextmanager
def api_server() -> Iterator[ApiServer]:
    """Run one at `url`."""
    api = ApiServer()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = True

        def _answer(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            agent = self.headers.get("User-Agent", "").partition("/")[0]
            try:
                status, said = (
                    200,
                    api.answer(self.command, self.path, self.headers.get("Content-Type", ""), agent, body),
                )
            except Refused as refusal:
                status, said = refusal.status, refusal.body
            data = json.dumps(said).encode() if said else b""
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            with suppress(BrokenPipeError):  # of a watch that is not wanted any more
                self.wfile.write(data)

        do_GET = do_PUT = do_PATCH = do_POST = do_DELETE = _answer

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    api.url = f"http://127.0.0.1:{server.server_port}"
    with served(server):
        yield api
