"""The values: few, described by a schema that follows the services' settings, and refused where they contradict."""

import json

import jsonschema
import pytest
import values_schema
import yaml
from helm_chart import CHART, CLAIM, MATRIX, Values, render
from helm_python.errors import HelmError

from shared import config
from shared.errors import ConfigError

MOST_KEYS = 140  # what people expect of a chart, and no setting of a service mapped by hand


def leaves(values: object, path: str = "") -> list[str]:
    if not isinstance(values, dict) or not values:
        return [path]
    return [leaf for key, value in values.items() for leaf in leaves(value, f"{path}.{key}")]


def defaults() -> Values:
    return yaml.safe_load((CHART / "values.yaml").read_text())


def merged(base: Values, extra: Values) -> Values:
    return {
        key: merged(base.get(key, {}), value) if isinstance(value, dict) else value
        for key, value in {**base, **extra}.items()
    }


def test_the_values_are_few() -> None:
    assert len(leaves(defaults())) < MOST_KEYS


def test_the_schema_is_what_the_settings_say() -> None:
    written = (CHART / "values.schema.json").read_text()
    assert written == values_schema.text(), "a setting has changed: run python helm/values_schema.py"


def test_the_schema_knows_every_key_and_no_other() -> None:
    def described(schema: dict, path: str = "") -> set[str]:
        if "properties" not in schema:
            return {path}
        return {each for key, value in schema["properties"].items() for each in described(value, f"{path}.{key}")}

    known = {path for path in described(values_schema.schema()) if ".settings." not in path}
    of_pods = described(values_schema.keys(**values_schema.pod_keys()))
    overrides = {f".{service}{key}" for service in values_schema.SERVICES for key in of_pods}
    overrides |= {f".redis{key}" for key in described(values_schema.keys(**values_schema.any_pod_keys()))}
    given = {path for path in leaves(defaults()) if ".settings" not in path}
    assert given <= known
    assert known - given <= overrides


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"engin": {}}, "engin"),
        ({"engine": {"replica": 1}}, "replica"),
        ({"engine": {"settings": {"max_num_seq": 4}}}, "max_num_seq"),
        ({"engine": {"settings": {"max_num_seqs": "4"}}}, "max_num_seqs"),
        ({"engine": {"settings": {"quantization": "int3"}}}, "quantization"),
        ({"engine": {"settings": {"redis_url": "redis://x"}}}, "redis_url"),
        ({"engine": {"settings": {"max_model_len": 4096}}}, "max_model_len"),
        ({"settings": {"shards": 0}}, "shards"),
        ({"settings": {"max_num_seqs": 4}}, "max_num_seqs"),
        ({"settings": {"namespace": "a b"}}, "namespace"),
        ({"engine": {"settings": {"max_num_seqs": 257}}}, "max_num_seqs"),
        ({"engine": {"settings": {"num_gpu_blocks_override": 0}}}, "num_gpu_blocks_override"),
        ({"mm_encoder": {"settings": {"media_allow_networks": ["10.0.0.0"]}}}, "media_allow_networks"),
        ({"mm_encoder": {"settings": {"mm_processor_kwargs": {"fps": 2}}}}, "fps"),
        ({"gateway": {"settings": {"limit_mm_per_prompt": {"image": -1}}}}, "image"),
        ({"gateway": {"drainSeconds": 5}}, "drainSeconds"),
        ({"gateway": {"env": {"MILLRACE_PORT": "80"}}}, "MILLRACE_PORT"),
        ({"redis": {"external": {"url": "http://x"}}}, "url"),
        ({"redis": {"external": {"url": "redis://user:secret@x:6379"}}}, "url"),
        ({"model": {"download": {"repository": "ernie"}}}, "repository"),
        ({"service": {"type": "External"}}, "type"),
        ({"autoscaling": {"kind": "vpa"}}, "kind"),
    ],
)
def test_the_schema_refuses(values: Values, said: str) -> None:
    with pytest.raises(HelmError, match=said):
        render(merged(CLAIM, values))


def starts(service: str, name: str, value: object) -> bool:
    """Return whether the service takes a value for a setting of its own."""
    try:
        values_schema.SERVICES[service](**{"redis_url": "redis://r", "model": "m", name: value})  # type: ignore[arg-type]
    except ConfigError:
        return False
    return True


@pytest.mark.parametrize("name", values_schema.CHECKED)
def test_the_schema_refuses_what_a_service_refuses_and_no_more(name: str) -> None:
    (service,) = [each for each, struct in values_schema.SERVICES.items() if name in struct.__struct_fields__]
    checked = values_schema.CHECKED[name]
    good: list[object] = [checked[key] for key in ("minimum", "maximum") if key in checked]
    bad: list[object] = [checked[key] + step for key, step in (("minimum", -1), ("maximum", 1)) if key in checked]
    bad += [checked["exclusiveMinimum"]] if "exclusiveMinimum" in checked else []
    if "enum" in checked:
        good, bad = checked["enum"], ["another"]
    if "items" in checked:
        good, bad = [("10.0.0.0/8", "fd00::/8")], [("intranet",)]
    assert good
    assert [value for value in good if not starts(service, name, value)] == []
    assert [value for value in bad if starts(service, name, value)] == []
    valid = jsonschema.Draft7Validator(values_schema.service_keys(service)["properties"]["settings"]).is_valid
    assert all(valid({name: list(value) if isinstance(value, tuple) else value}) for value in good)
    assert not any(valid({name: list(value) if isinstance(value, tuple) else value}) for value in bad)


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({}, "exactly one of"),
        ({"model": {"existingClaim": "a", "hostPath": "/b"}}, "exactly one of"),
        ({**CLAIM, "apiKeys": ["a"], "apiKeysSecret": "b"}, "exclude each other"),
        ({**CLAIM, "redis": {"external": {"blobUrl": "redis://b"}}}, "needs redis.external.url"),
        ({**CLAIM, "autoscaling": {"kind": "hpa"}, "engine": {"replicas": 0}}, "cannot scale to zero"),
        ({**CLAIM, "autoscaling": {"kind": "keda"}, "postproc": {"replicas": 0}}, "must be 1 or more"),
        ({**CLAIM, "autoscaling": {"kind": "keda"}, "engine": {"replicas": 9}}, "more than engine.maxReplicas"),
        ({**CLAIM, "engine": {"settings": {"tensor_parallel_size": 2}}}, "is 2, and engine.gpus 1"),
        ({**CLAIM, "engine": {"settings": {"tensor_parallel_size": 2}, "gpus": 0}}, "is 2, and engine.gpus 0"),
        ({**CLAIM, "engine": {"settings": {"tensor_parallel_size": 1}, "gpus": 2}}, "is 1, and engine.gpus 2"),
        ({**CLAIM, "engine": {"gpus": 8}}, "1, 2 or 4"),
    ],
)
def test_contradictions_are_refused(values: Values, said: str) -> None:
    with pytest.raises(HelmError, match=said):
        render(values)


GUESSING = {"method": "ngram", "num_speculative_tokens": 8}
# What a service's own check says of settings, and what Helm says before; `max_model_len` is of all services.
TOGETHER = [
    ("engine", {"enable_chunked_prefill": False}, 1, None),
    ("engine", {"enable_chunked_prefill": False, "max_num_batched_tokens": 32767}, 1, "is 32767"),
    ("engine", {"enable_chunked_prefill": False, "max_num_batched_tokens": 32768}, 1, None),
    ("engine", {"max_num_batched_tokens": 0, "speculative_config": GUESSING | {"num_speculative_tokens": 0}}, 1, None),
    ("engine", {"speculative_config": GUESSING}, 1, None),
    ("engine", {"speculative_config": GUESSING, "max_num_seqs": 8}, 1, "num_speculative_tokens 8; a step samples"),
    ("gateway", {"max_body_bytes": 192 << 20}, 0, "three quarters of max_bodies_bytes, 201326592"),
    ("gateway", {"max_bodies_bytes": 128 << 20}, 0, "max_body_bytes is 134217728"),
    ("gateway", {"max_body_bytes": 144 << 20}, 0, None),
    *(
        ("mm_encoder", {"mm_processor_kwargs": told}, 1, said)
        for told, said in (
            ({"image_min_pixels": 0}, "image_min_pixels must be positive"),
            ({"image_min_pixels": 4842768}, None),
            ({"image_min_pixels": 4842769}, "at most image_max_pixels: 4842769, 4842768"),
            ({"image_max_pixels": 3136}, None),
            ({"image_max_pixels": 3135}, "3136, 3135"),
            ({"video_min_pixels": 937664}, None),
            ({"video_min_pixels": 937665}, "937665, 937664"),
            ({"video_max_pixels": 234416}, None),
            ({"video_max_pixels": 234415}, "234416, 234415"),
            ({"video_min_frames": 180}, None),
            ({"video_min_frames": 181}, "video_min_frames is 181, and video_max_frames 180"),
            ({"video_max_frames": 16}, None),
            ({"video_max_frames": 15}, "video_min_frames is 16, and video_max_frames 15"),
            ({"video_fps": 0}, "video_fps or video_target_frames"),
            ({"video_target_frames": 16}, None),
            ({"video_target_frames": 16, "video_fps": 2}, "exclude each other"),
            ({"video_target_frames": 15}, "video_target_frames is 15"),
            ({"video_target_frames": 181}, "video_target_frames is 181"),
            ({"video_target_frames": 181, "video_max_frames": 0}, None),
        )
    ),
]


@pytest.mark.parametrize(("service", "told", "gpus", "said"), TOGETHER)
def test_settings_that_a_service_refuses_together_are_refused(
    service: str, told: Values, gpus: int, said: str | None
) -> None:
    values = {**CLAIM, service: {"settings": told, "gpus": gpus}}
    environ = {config.variable(name): json.dumps(value) for name, value in told.items()}
    environ |= {"MILLRACE_REDIS_URL": "redis://r", "MILLRACE_MODEL": "m"}
    if said is None:
        config.load(values_schema.SERVICES[service], environ)
        assert render(values)
        return
    with pytest.raises(ConfigError):
        config.load(values_schema.SERVICES[service], environ)
    with pytest.raises(HelmError, match=said):
        render(values)


def test_the_smallest_set_of_values_is_where_the_model_is() -> None:
    assert render(CLAIM)


@pytest.mark.parametrize("name", MATRIX)
def test_the_matrix_satisfies_the_schema(name: str) -> None:
    jsonschema.Draft7Validator(values_schema.schema()).validate(merged(defaults(), MATRIX[name]))
