"""The chart as Helm's own SDK renders it, for the tests beside this file."""

import base64
import json
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import yaml
from helm_python import _native, lint
from helm_python.chart import Chart

ROOT = Path(__file__).resolve().parents[2]
CHART = ROOT / "helm"
SERVICES = ("gateway", "mm_encoder", "engine", "postproc")
RELEASE = "millrace"
NAMESPACE = "models"

Values = dict[str, Any]
Object = dict[str, Any]

CLAIM: Values = {"model": {"existingClaim": "checkpoint"}}
# What people install, and with the chart's defaults every branch of every template.
MATRIX: dict[str, Values] = {
    "defaults": CLAIM,
    "cpu, nothing kept, no policies": {
        "model": {"hostPath": "/var/lib/checkpoints", "subPath": "ernie"},
        "redis": {"size": "", "exporterImage": ""},
        "mm_encoder": {"gpus": 0},
        "engine": {"gpus": 0, "settings": {"max_num_seqs": 4, "num_gpu_blocks_override": 64}},
        "networkPolicy": {"enabled": False},
        "pods": {"spreadBy": []},
    },
    "fetched model, keda, monitoring, tls": {
        "model": {"download": {"repository": "baidu/ERNIE-4.5-VL-28B-A3B-Thinking", "tokenSecret": "hub"}},
        "image": {"registry": "registry.example.com/team/", "tag": "1.2.3", "pullSecrets": [{"name": "pull"}]},
        "apiKeys": ["sk-one", "sk-two"],
        "redis": {"tlsSecret": "redis-tls", "storageClass": "fast"},
        "autoscaling": {"kind": "keda"},
        "mm_encoder": {"replicas": 0},
        "engine": {"replicas": 0, "gpus": 2},
        "gpu": {"runtimeClassName": "nvidia"},
        "monitoring": {"podMonitor": True, "rules": True, "dashboard": True, "labels": {"release": "prometheus"}},
        "networkPolicy": {
            "clients": [{"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": "ingress"}}}],
            "scrapers": [{"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": "monitoring"}}}],
            "hub": [{"ipBlock": {"cidr": "10.20.0.0/16"}}],
        },
        "ingress": {"enabled": True, "className": "nginx", "tlsSecret": "site", "annotations": {"a": "b"}},
        "host": "chat.example.com",
        "route": {"parentRefs": [{"name": "public", "namespace": "ingress"}]},
        "service": {
            "annotations": {"a": "b"},
            "type": "LoadBalancer",
            "nodePort": 30080,
            "sourceRanges": ["192.0.2.0/24"],
        },
        "commonLabels": {"team": "vision"},
        "extraObjects": [
            {
                "apiVersion": "v1",
                "kind": "ConfigMap",
                "metadata": {
                    "name": '{{ include "millrace.fullname" . }}-own',
                    "labels": {"app.kubernetes.io/instance": "{{ .Release.Name }}"},
                },
            }
        ],
    },
    "external redis with users, hpa, placement": {
        "model": {"existingClaim": "checkpoint", "name": ["ernie", "vl"]},
        "apiKeysSecret": "keys",
        "apiKeysFile": {"secret": "tenants", "key": "tenants.json"},
        "redis": {
            "existingSecret": "redis-users",
            "external": {
                "url": "rediss://redis.example.com:6380/2",
                "blobUrl": "rediss://blobs.example.com:6381/0",
                "cidrs": ["192.0.2.0/24"],
            },
            "tlsSecret": "redis-ca",
        },
        "autoscaling": {"kind": "hpa"},
        "pods": {
            "annotations": {"a": "b"},
            "env": {"HTTPS_PROXY": "http://proxy:3128"},
            "labels": {"tier": "models"},
            "extraEnv": [{"name": "NODE", "valueFrom": {"fieldRef": {"fieldPath": "spec.nodeName"}}}],
            "extraVolumes": [{"name": "authority", "configMap": {"name": "authority"}}],
            "extraVolumeMounts": [{"name": "authority", "mountPath": "/etc/authority", "readOnly": True}],
            "serviceAccountAnnotations": {"cloud.example.com/role": "reader"},
            "disruptionBudget": False,
            "nodeSelector": {"pool": "cpu"},
            "tolerations": [{"key": "gpu", "operator": "Exists"}],
            "affinity": {"nodeAffinity": {}},
            "spreadBy": ["topology.kubernetes.io/zone", "kubernetes.io/hostname"],
            "priorityClassName": "serving",
            "preStopSeconds": 12,
        },
        "engine": {
            "nodeSelector": {"pool": "gpu"},
            "priorityClassName": "gpu",
            "surge": 1,
            "kernelCache": {"persistentVolumeClaim": {"claimName": "kernels"}},
        },
        "gateway": {"settings": {"limit_mm_per_prompt": {"image": 20}, "request_timeout_s": 1800}},
        "mm_encoder": {
            "settings": {
                "mm_processor_kwargs": {"video_max_frames": 60},
                "media_allow_networks": ["10.1.0.0/16"],
                "media_max_bytes": 4294967296,
                "log_level": "debug",
            }
        },
        "ingress": {"enabled": True},
        "monitoring": {"rules": True},
    },
    "autoscaler of its own": {
        **CLAIM,
        "redis": {"tlsSecret": "redis-tls"},
        "autoscaling": {"kind": "builtin", "cooldownSeconds": 120},
        "engine": {"replicas": 0, "target": 64},
        "settings": {"log_level": "debug", "otlp_endpoint": "http://collector.tracing:4318", "trace_ratio": 0.1},
        "pods": {"annotations": {"a": "b"}},
        "networkPolicy": {
            "scrapers": [{"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": "monitoring"}}}],
            "apiServer": [{"ipBlock": {"cidr": "192.0.2.1/32"}}],
        },
    },
    "external redis, open": {
        **CLAIM,
        "redis": {"external": {"url": "redis://redis:6379"}},
        "autoscaling": {"kind": "keda"},
    },
}


def render(values: Values, name: str = RELEASE, kube_version: str = "1.31.0") -> dict[str, str]:
    """Text of every template, by its path in the chart. The SDK's own `render` cannot be told the cluster's version."""
    options = {"name": name, "namespace": NAMESPACE, "kube_version": kube_version}
    with Chart.load(CHART) as chart:
        rendered = _native.call_string("helm_render", chart._raw(), json.dumps(values), json.dumps(options))
    return {path.removeprefix("millrace/"): text for path, text in json.loads(rendered).items()}


def parse(rendered: dict[str, str]) -> list[Object]:
    """Every object of every template."""
    return [
        item for path, text in rendered.items() if path.endswith(".yaml") for item in yaml.safe_load_all(text) if item
    ]


@cache
def case(name: str) -> tuple[Object, ...]:
    """Render the objects of one case of MATRIX."""
    return tuple(parse(render(MATRIX[name])))


def objects(values: Values) -> list[Object]:
    return parse(render(values))


def find(items: Iterator[Object] | list[Object] | tuple[Object, ...], kind: str, name: str | None = None) -> Object:
    """Return the one object of this kind and, if given, name."""
    (found,) = [item for item in items if item["kind"] == kind and name in (None, item["metadata"]["name"])]
    return found


def secret_data(items: list[Object] | tuple[Object, ...], name: str) -> dict[str, str]:
    """Return the values of a Secret, decoded."""
    return {key: base64.b64decode(value).decode() for key, value in find(items, "Secret", name)["data"].items()}


def pods(items: list[Object] | tuple[Object, ...]) -> dict[str, tuple[Object, Object]]:
    """Metadata and spec of every pod that the objects make, by component."""
    found = {}
    for item in items:
        if item["kind"] in ("Deployment", "StatefulSet", "Job"):
            template = item["spec"]["template"]
        elif item["kind"] == "Pod":
            template = item
        else:
            continue
        found[template["metadata"]["labels"]["app.kubernetes.io/component"]] = template["metadata"], template["spec"]
    return found


def container(spec: Object, name: str | None = None) -> Object:
    """Return the pod's container of this name, or its first."""
    return next(each for each in spec["containers"] if name in (None, each["name"]))


def environment(items: list[Object] | tuple[Object, ...], service: str) -> dict[str, Any]:
    """Return a service's environment: text, or the reference that it comes from."""
    component = service.replace("_", "-")
    _, spec = pods(items)[component]
    return {each["name"]: each.get("value", each.get("valueFrom")) for each in container(spec, component)["env"]}


def complaints(values: Values) -> list[str]:
    """Return the complaints of `helm lint --strict` about the chart, without hints."""
    report = lint(CHART, values, strict=True, namespace=NAMESPACE)
    return [message["error"] for message in report["messages"] if message["severity"] > 1] + report["errors"]
