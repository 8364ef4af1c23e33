"""Generator of values.schema.json: the chart's own keys are defined here, those of the `settings` maps come from the
services' settings structs, so that a misspelt or malformed one is refused before anything is installed.

Run it from the repository's root after a setting has changed: python helm/values_schema.py
"""

import json
import sys
from pathlib import Path
from typing import Any

import msgspec

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from services.engine.settings import EngineSettings  # noqa: E402
from services.gateway.settings import GatewaySettings  # noqa: E402
from services.mm_encoder.settings import MmEncoderSettings  # noqa: E402
from services.postproc.settings import ERNIE_VL_THINKING, PostprocSettings  # noqa: E402
from shared.config import CommonSettings  # noqa: E402

TARGET = ROOT / "helm" / "values.schema.json"
SERVICES: dict[str, type[CommonSettings]] = {
    "gateway": GatewaySettings,
    "mm_encoder": MmEncoderSettings,
    "engine": EngineSettings,
    "postproc": PostprocSettings,
}
# What a service checks itself, beyond the types of its settings.
CHECKED: dict[str, dict[str, Any]] = {
    "tensor_parallel_size": {"minimum": 1},
    "max_num_seqs": {"minimum": 1, "maximum": 256},
    "max_num_batched_tokens": {"minimum": 0},
    "block_size": {"minimum": 1},
    "kv_cache_bytes": {"minimum": 1},
    "foreign_bytes": {"minimum": 0},
    "num_gpu_blocks_override": {"minimum": 1},
    "gpu_memory_utilization": {"exclusiveMinimum": 0, "maximum": 1},
    "media_max_pixels": {"maximum": 89478485},  # Pillow's own
    "media_allow_networks": {"items": {"type": "string", "pattern": r"^[0-9a-fA-F.:]+/[0-9]+$"}},
    "reasoning_parser": {"enum": ["", ERNIE_VL_THINKING]},
    "tool_call_parser": {"enum": ["", ERNIE_VL_THINKING]},
}
# Settings that the chart sets from other values; the last is for tests.
OWNED = {"redis_url", "blob_redis_url", "model", "name", "namespace", "metrics_port", "metrics_host", "drain_s"}
OWNED |= {"host", "port", "listen_fd", "served_model_names", "api_keys", "api_keys_file", "device", "crash_at"}
COMMON = frozenset(CommonSettings.__struct_fields__)
OF_ONE_SERVICE = ("log_level",)  # common settings that may differ between services

Schema = dict[str, Any]

TEXT: Schema = {"type": "string"}
NAME: Schema = {"type": "string", "minLength": 1}
FLAG: Schema = {"type": "boolean"}
COUNT: Schema = {"type": "integer", "minimum": 0}
POSITIVE: Schema = {"type": "integer", "minimum": 1}
QUANTITY: Schema = {"type": "string", "pattern": r"^[0-9.]+(m|[kKMGTP]i?)?$"}
TEXTS: Schema = {"type": "array", "items": TEXT}
LABELS: Schema = {"type": "object", "additionalProperties": TEXT}
OBJECTS: Schema = {"type": "array", "items": {"type": "object"}}
MAP: Schema = {"type": "object"}
AMOUNTS: Schema = {
    "type": "object",
    "additionalProperties": {"anyOf": [{"type": "number", "minimum": 0}, QUANTITY, {"type": "null"}]},
}
# Other charts' keys may be there, too.
GLOBAL: Schema = {
    "type": "object",
    "properties": {
        "imageRegistry": TEXT,
        "imagePullSecrets": {"type": "array", "items": {"type": ["string", "object"]}},
    },
}
# Settings go through `settings`, which checks them.
ENV: Schema = {
    "type": "array",
    "items": {
        "type": "object",
        "required": ["name"],
        "properties": {"name": {"type": "string", "not": {"pattern": "^MILLRACE_"}}},
    },
}
CIDRS: Schema = {"type": "array", "items": {"type": "string", "pattern": r"^[0-9a-fA-F.:]+/[0-9]+$"}}
OBJECT_NAME: Schema = {"type": "string", "pattern": "^([a-z0-9]([a-z0-9-]{0,38}[a-z0-9])?)?$"}
REDIS_URL: Schema = {"type": "string", "pattern": r"^(rediss?(\+sentinel)?://[^@]+)?$"}
NAMESPACE: Schema = {"type": "string", "pattern": r"^[A-Za-z0-9._-]*$"}  # in ACL rules and the exporter's lists


def keys(**properties: Schema) -> Schema:
    """Return the schema of an object with these keys and no others."""
    return {"type": "object", "additionalProperties": False, "properties": properties}


def one_of(*values: str) -> Schema:
    return {"enum": list(values)}


def fields(settings: type[CommonSettings]) -> dict[str, Schema]:
    """Return the schemas of a settings struct's fields, without defaults and prose, with references resolved."""
    (schema,), definitions = msgspec.json.schema_components([settings], ref_template="{name}")
    return {name: _plain(value, definitions) for name, value in definitions[schema["$ref"]]["properties"].items()}


def _plain(schema: Any, definitions: dict[str, Any]) -> Any:
    if isinstance(schema, list):
        return [_plain(item, definitions) for item in schema]
    if not isinstance(schema, dict):
        return schema
    if "$ref" in schema:
        return _plain(definitions[schema["$ref"]], definitions)
    plain = {key: value for key, value in schema.items() if key not in ("default", "title", "description")}
    if "properties" in plain:
        return plain | {"properties": {name: _plain(value, definitions) for name, value in plain["properties"].items()}}
    return {key: _plain(value, definitions) for key, value in plain.items()}


def any_pod_keys() -> dict[str, Schema]:
    """Return the keys of `pods` that Redis's pod has, too."""
    return {
        "annotations": LABELS,
        "labels": LABELS,
        "serviceAccountAnnotations": LABELS,
        "resources": keys(requests=AMOUNTS, limits=AMOUNTS),
        "podSecurityContext": MAP,
        "securityContext": MAP,
        "nodeSelector": LABELS,
        "tolerations": OBJECTS,
        "affinity": MAP,
        "spreadBy": TEXTS,
        "priorityClassName": TEXT,
    }


def pod_keys() -> dict[str, Schema]:
    return {
        **any_pod_keys(),
        "extraEnv": ENV,
        "extraVolumes": OBJECTS,
        "extraVolumeMounts": OBJECTS,
        "initContainers": OBJECTS,
        "disruptionBudget": FLAG,
        "env": {"type": "object", "additionalProperties": TEXT, "propertyNames": {"not": {"pattern": "^MILLRACE_"}}},
        "gpus": COUNT,
        "preStopSeconds": COUNT,
        "startupSeconds": POSITIVE,
        "surge": COUNT,
    }


def service_keys(service: str) -> Schema:
    settings = fields(SERVICES[service])
    told = [name for name in settings if name not in COMMON | OWNED or name in OF_ONE_SERVICE]
    own = {name: settings[name] | CHECKED.get(name, {}) for name in told}
    return keys(
        **pod_keys(),
        image=TEXT,
        replicas=COUNT,
        maxReplicas=POSITIVE,
        target=POSITIVE,
        cpu=QUANTITY,
        memory=QUANTITY,
        drainSeconds={"type": "integer", "minimum": 10},  # ten of them are for closing
        settings=keys(**own),
        **({"kernelCache": MAP} if service == "engine" else {}),
    )


def schema() -> Schema:
    common = {name: value for name, value in fields(CommonSettings).items() if name not in OWNED}
    services = {service: service_keys(service) for service in SERVICES}
    chart = keys(
        **{"global": GLOBAL},
        nameOverride=OBJECT_NAME,
        fullnameOverride=OBJECT_NAME,
        commonLabels=LABELS,
        extraObjects=OBJECTS,
        image=keys(registry=TEXT, tag=TEXT, pullPolicy=one_of("Always", "IfNotPresent", "Never"), pullSecrets=OBJECTS),
        model=keys(
            name={"anyOf": [NAME, {"type": "array", "items": NAME, "minItems": 1}]},
            subPath=TEXT,
            existingClaim=TEXT,
            hostPath={"type": "string", "pattern": "^(/.*)?$"},
            download=keys(
                repository={"type": "string", "pattern": r"^([\w.-]+/[\w.-]+)?$"},
                revision={"type": "string", "pattern": r"^[\w.-]+$"},
                endpoint={"type": "string", "pattern": "^https?://"},
                tokenSecret=TEXT,
                size=QUANTITY,
                storageClass=TEXT,
                accessMode=one_of("ReadWriteMany", "ReadWriteOnce"),
            ),
        ),
        apiKeys={"type": "array", "items": {"type": "string", "minLength": 1}},
        apiKeysSecret=TEXT,
        apiKeysFile=keys(secret=TEXT, key=NAME),
        settings=keys(**common, namespace=NAMESPACE),
        redis=keys(
            **any_pod_keys(),
            existingSecret=TEXT,
            passwordGeneration=POSITIVE,
            tlsSecret=TEXT,
            external=keys(url=REDIS_URL, blobUrl=REDIS_URL, cidrs=CIDRS),
            image={"type": "string", "minLength": 1},
            exporterImage=TEXT,
            maxMemoryMb=POSITIVE,
            cpu=QUANTITY,
            size={"type": "string", "pattern": r"^([0-9.]+([kKMGTP]i?)?)?$"},
            storageClass=TEXT,
        ),
        pods=keys(**pod_keys()),
        **services,
        gpu=keys(resource=TEXT, runtimeClassName=TEXT),
        service=keys(
            type=one_of("ClusterIP", "NodePort", "LoadBalancer"),
            port=POSITIVE,
            nodePort=COUNT,
            sourceRanges=CIDRS,
            annotations=LABELS,
        ),
        host=TEXT,
        ingress=keys(enabled=FLAG, className=TEXT, tlsSecret=TEXT, annotations=LABELS),
        route=keys(parentRefs=OBJECTS),
        networkPolicy=keys(
            enabled=FLAG,
            clients=OBJECTS,
            scrapers=OBJECTS,
            dns=OBJECTS,
            hub=OBJECTS,
            apiServer=OBJECTS,
            collector=OBJECTS,
        ),
        autoscaling=keys(
            kind=one_of("none", "builtin", "keda", "hpa", "external"), cooldownSeconds=COUNT, kedaNamespace=TEXT
        ),
        monitoring=keys(podMonitor=FLAG, rules=FLAG, dashboard=FLAG, labels=LABELS),
    )
    return {"$schema": "http://json-schema.org/draft-07/schema#", **chart}


def text() -> str:
    return json.dumps(schema(), indent=1) + "\n"


if __name__ == "__main__":
    TARGET.write_text(text(), encoding="utf-8")
