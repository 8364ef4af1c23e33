"""What the tests of a real cluster are told, all by environment variables:

KUBECONFIG               the cluster; without it these tests are skipped
MILLRACE_TEST_REGISTRY   where the images are, REGISTRY/millrace-gateway and so on; unset: on the nodes already
MILLRACE_TEST_TAG        their tag; unset: the chart's appVersion
MILLRACE_TEST_VALUES     a YAML file with values for the chart, which win over those in this file
MILLRACE_TEST_NAMESPACE  a namespace that is there; unset: one of our own, deleted at the end
MILLRACE_TEST_PATIENCE   seconds that any one thing may take (900)

Unless the values say where a model is, the tests put a small one with random weights into a claim of the cluster's
default storage class. All then runs on CPUs, on one node if volumes there can be mounted by one node only.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

Values = dict[str, Any]

# A kubeconfig may say that the API server's certificate is not to be verified, and every request then warns of it.
UNVERIFIED = pytest.mark.filterwarnings("ignore::urllib3.exceptions.InsecureRequestWarning")
CLAIM = "millrace-test-model"
MODEL = "demo"
SMALL: Values = {
    "image": {"registry": "", "tag": ""},
    "model": {"existingClaim": CLAIM, "name": MODEL},
    "settings": {"shards": 2, "max_model_len": 2048},
    "redis": {"maxMemoryMb": 512, "cpu": "200m", "size": "1Gi", "exporterImage": ""},
    "gateway": {"cpu": "200m", "memory": "512Mi"},
    "mm_encoder": {"replicas": 0, "cpu": "200m", "memory": "2Gi", "gpus": 0},
    "engine": {
        "replicas": 0,
        "cpu": "200m",
        "memory": "3Gi",
        "gpus": 0,
        "settings": {"max_num_seqs": 8, "kv_cache_bytes": 33554432},
    },
    "postproc": {"cpu": "200m", "memory": "512Mi"},
    # A stage sleeps when a test puts it to sleep, and not in the middle of another.
    "autoscaling": {"kind": "builtin", "cooldownSeconds": 3600},
}


@dataclass(frozen=True)
class ClusterSettings:
    kubeconfig: str
    values: Values
    namespace: str | None
    patience_s: float

    @property
    def brings_model(self) -> bool:
        """Whether the tests put a model into the cluster."""
        return bool(self.values["model"].get("existingClaim") == CLAIM)

    @property
    def model(self) -> str:
        """What clients call it."""
        return str(self.values["model"]["name"])

    @property
    def api_keys(self) -> list[str]:
        return list(self.values.get("apiKeys", []))

    @property
    def exact(self) -> bool:
        """Whether there are questions that always have the same answer (cluster_questions.py): our model, on CPUs."""
        return self.brings_model and not self.values["engine"].get("gpus", 1)


def read(environ: Mapping[str, str]) -> ClusterSettings:
    """
    Raises:
        OSError, yaml.YAMLError: the file of values cannot be read.
    """
    values = merged(SMALL, _given(environ.get("MILLRACE_TEST_VALUES", "")))
    image = {
        key: environ[f"MILLRACE_TEST_{key.upper()}"]
        for key in ("registry", "tag")
        if environ.get(f"MILLRACE_TEST_{key.upper()}")
    }
    return ClusterSettings(
        kubeconfig=environ["KUBECONFIG"],
        values=merged(values, {"image": image}),
        namespace=environ.get("MILLRACE_TEST_NAMESPACE") or None,
        patience_s=float(environ.get("MILLRACE_TEST_PATIENCE") or 900),
    )


def merged(base: Values, over: Values) -> Values:
    """`base` with `over` on top, maps key by key."""
    result = dict(base)
    for key, value in over.items():
        both = isinstance(value, dict) and isinstance(base.get(key), dict)
        result[key] = merged(base[key], value) if both else value
    return result


def _given(path: str) -> Values:
    """The values of a file; one that says where its own model is takes ours away."""
    if not path:
        return {}
    values: Values = yaml.safe_load(Path(path).read_text(encoding="utf-8")) or {}
    model = values.get("model", {})
    if model.get("hostPath") or model.get("download", {}).get("repository"):
        values = merged({"model": {"existingClaim": ""}}, values)
    return values
