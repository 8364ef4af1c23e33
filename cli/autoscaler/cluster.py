"""Client of Kubernetes for scaling: the scale of a Deployment, and the deletion cost of each of its pods.

Needs `get` and `update` on deployments/scale, `list` on pods, and `patch` on pods/status. An annotation may be written
through the status, too, and who has that right cannot change what a pod runs, as who may patch the pod can.
"""

from collections.abc import Awaitable, Callable, Mapping
from typing import TypeVar

import aiohttp
from kubernetes.aio import client, config
from kubernetes.aio.client.exceptions import ApiException, OpenApiException

from shared.errors import ConfigError, MillraceError

COST = "controller.kubernetes.io/pod-deletion-cost"
TIMEOUT_S = 10.0
_MERGE = "application/merge-patch+json"

T = TypeVar("T")


class ClusterError(MillraceError):
    """Error of a call that the API server refused or did not answer."""


class Scale:
    """Number of replicas that a Deployment was asked for, as read at one moment."""

    def __init__(self, read: client.V1Scale) -> None:
        assert read.spec is not None
        self.read = read
        self.replicas = read.spec.replicas or 0

    @property
    def selector(self) -> str:
        """Return the label selector of its pods."""
        assert self.read.status is not None
        return self.read.status.selector or ""


class Cluster:
    """Client of one namespace. Close it with `close`."""

    def __init__(self, api: client.ApiClient, namespace: str) -> None:
        self._api = api
        self._apps = client.AppsV1Api(api)
        self._core = client.CoreV1Api(api)
        self._namespace = namespace

    async def scale(self, deployment: str) -> Scale:
        """Read a Deployment's scale.

        Raises:
            ClusterError: it could not be read.
        """
        return Scale(await self._ask(self._apps.read_namespaced_deployment_scale, name=deployment))

    async def set_replicas(self, deployment: str, scale: Scale, replicas: int) -> None:
        """Write a scale back with another number.

        Raises:
            ClusterError: refused; above all where someone has changed the Deployment since it was read.
        """
        assert scale.read.spec is not None
        body = scale.read.model_copy(deep=True)
        assert body.spec is not None
        body.spec.replicas = replicas
        await self._ask(self._apps.replace_namespaced_deployment_scale, name=deployment, body=body)

    async def set_costs(self, scale: Scale, held: Mapping[str, int]) -> None:
        """Let Kubernetes delete the pods with the least work first. A pod missing in `held` has none.

        Raises:
            ClusterError: some could not be written.
        """
        pods = await self._ask(self._core.list_namespaced_pod, label_selector=scale.selector)
        for pod in pods.items:
            assert pod.metadata is not None
            name = pod.metadata.name or ""
            cost = str(held.get(name, 0))
            if (pod.metadata.annotations or {}).get(COST, "0") != cost:
                body = {"metadata": {"annotations": {COST: cost}}}
                await self._ask(self._core.patch_namespaced_pod_status, name=name, body=body, _content_type=_MERGE)

    async def close(self) -> None:
        await self._api.close()  # type: ignore[no-untyped-call]

    async def _ask(self, call: Callable[..., Awaitable[T]], **arguments: object) -> T:
        try:
            return await call(namespace=self._namespace, _request_timeout=TIMEOUT_S, **arguments)
        except ApiException as error:
            raise ClusterError(f"{arguments.get('name', 'pods')}: {error.status} {error.reason}") from error
        except (OpenApiException, aiohttp.ClientError, TimeoutError, ValueError) as error:
            raise ClusterError(f"{arguments.get('name', 'pods')}: {error or type(error).__name__}") from error


async def connect(namespace: str) -> Cluster:
    """Connect as the pod's service account or, outside a cluster, with the kubeconfig that kubectl would use.

    Raises:
        ConfigError: there is neither.
    """
    settings = client.Configuration()
    try:
        config.load_incluster_config(client_configuration=settings)  # type: ignore[no-untyped-call]
    except config.ConfigException:
        try:
            await config.load_kube_config(client_configuration=settings)  # type: ignore[no-untyped-call]
        except (config.ConfigException, OSError) as error:
            raise ConfigError(
                f"no cluster: this is no pod with a service account, and there is no kubeconfig: {error}"
            ) from error
    return Cluster(client.ApiClient(settings), namespace)
