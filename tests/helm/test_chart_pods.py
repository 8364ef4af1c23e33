"""What the pods are told and how they live: settings, probes, time to end, rights, placement."""

import msgspec
import pytest
from helm_chart import CLAIM, MATRIX, SERVICES, Object, case, container, environment, find, objects, pods

from services.engine.settings import EngineSettings
from services.gateway.settings import GatewaySettings
from services.mm_encoder.settings import MmEncoderSettings
from services.postproc.settings import PostprocSettings
from shared import config, health
from shared.config import CommonSettings

SETTINGS: dict[str, type[CommonSettings]] = {
    "gateway": GatewaySettings,
    "mm_encoder": MmEncoderSettings,
    "engine": EngineSettings,
    "postproc": PostprocSettings,
}
CLOSE_S = 10  # what `millrace serve` allows a service after its drain


def settings(name: str, service: str) -> CommonSettings:
    """Read the pod's environment as the service does, with Secrets that hold what the comments in the values say."""
    secrets = {"keys": '["sk-one"]', **dict.fromkeys(("gateway", "mm-encoder", "engine", "postproc"), "redis://u:p@r")}
    secrets |= {f"{component}-blobs": "redis://b" for component in ("gateway", "mm-encoder", "engine")}
    told = {}
    for variable, value in environment(case(name), service).items():
        if isinstance(value, str):
            told[variable] = value
        elif "fieldRef" in value:
            told[variable] = "pod-0"
        else:
            told[variable] = secrets[value["secretKeyRef"]["key"]]
    return config.load(SETTINGS[service], told)


@pytest.mark.parametrize("service", SERVICES)
@pytest.mark.parametrize("name", MATRIX)
def test_the_services_understand_what_they_are_told(name: str, service: str) -> None:
    loaded = settings(name, service)
    assert loaded.name == "pod-0"
    assert loaded.metrics_port == 8181


def test_what_all_must_agree_on_is_the_same_for_all() -> None:
    for name in MATRIX:
        told = [settings(name, service) for service in SERVICES]
        for field in ("namespace", "model", "shards", "max_model_len", "lease_ms", "max_deliveries"):
            assert len({getattr(each, field) for each in told}) == 1, (name, field)


def test_settings_are_passed_through_with_their_types() -> None:
    mm = settings("external redis with users, hpa, placement", "mm_encoder")
    assert isinstance(mm, MmEncoderSettings)
    assert mm.media_max_bytes == 4294967296
    assert mm.mm_processor_kwargs.video_max_frames == 60
    assert mm.media_allow_networks == ("10.1.0.0/16",)
    assert (mm.log_level, mm.blob_redis_url) == ("debug", "redis://b")
    gateway = settings("external redis with users, hpa, placement", "gateway")
    assert isinstance(gateway, GatewaySettings)
    assert gateway.media_limits()["image"] == 20
    assert gateway.api_keys == ("sk-one",)
    assert gateway.served_model_names == ("ernie", "vl")


@pytest.mark.parametrize("service", SERVICES)
def test_traces_are_asked_of_all_services_alike_or_of_none(service: str) -> None:
    told = environment(case("autoscaler of its own"), service)
    assert told["MILLRACE_OTLP_ENDPOINT"] == "http://collector.tracing:4318"
    assert told["MILLRACE_TRACE_RATIO"] == "0.1"
    assert not {"MILLRACE_OTLP_ENDPOINT", "MILLRACE_TRACE_RATIO"} & environment(case("defaults"), service).keys()


@pytest.mark.parametrize(("service", "device"), [("mm_encoder", "cuda"), ("engine", "cuda")])
def test_a_service_with_a_gpu_must_find_it(service: str, device: str) -> None:
    assert environment(case("defaults"), service)["MILLRACE_DEVICE"] == device
    assert environment(case("cpu, nothing kept, no policies"), service)["MILLRACE_DEVICE"] == "cpu"
    limits = container(pods(case("defaults"))[service.replace("_", "-")][1])["resources"]["limits"]
    assert limits["nvidia.com/gpu"] == 1
    limits = container(pods(case("cpu, nothing kept, no policies"))[service.replace("_", "-")][1])["resources"][
        "limits"
    ]
    assert "nvidia.com/gpu" not in limits


@pytest.mark.parametrize("service", SERVICES)
@pytest.mark.parametrize("name", MATRIX)
def test_grace_is_pre_stop_and_drain(name: str, service: str) -> None:
    """The grace period covers preStop, in which the endpoint goes away, the drain, and closing."""
    _, spec = pods(case(name))[service.replace("_", "-")]
    command = container(spec)["lifecycle"]["preStop"]["exec"]["command"]
    assert command[0] == "sleep"
    assert spec["terminationGracePeriodSeconds"] == int(command[1]) + settings(name, service).drain_s + CLOSE_S


def test_the_gateway_drains_as_long_as_a_request_may_take() -> None:
    gateway = settings("defaults", "gateway")
    assert isinstance(gateway, GatewaySettings)
    assert gateway.drain_s >= gateway.request_timeout_s


@pytest.mark.parametrize("service", ["mm_encoder", "engine", "postproc"])
def test_probes_ask_the_health_command(service: str) -> None:
    spec = container(pods(case("defaults"))[service.replace("_", "-")][1])
    asked = {kind: spec[f"{kind}Probe"]["exec"]["command"] for kind in ("startup", "readiness", "liveness")}
    for command in asked.values():
        assert command[:4] == ["python", "-m", "shared.health", service]
        assert command[4] in tuple(health.Probe)
    assert (asked["startup"][4], asked["readiness"][4], asked["liveness"][4]) == ("ready", "ready", "live")
    for kind in asked:
        assert spec[f"{kind}Probe"]["timeoutSeconds"] > health.ANSWER_S
    lease_s = settings("defaults", service).lease_ms / 1000
    assert spec["startupProbe"]["initialDelaySeconds"] > lease_s, "a predecessor's lease may still be there"
    for name in ("MILLRACE_REDIS_URL", "MILLRACE_NAMESPACE", "MILLRACE_NAME", "MILLRACE_MODEL"):
        assert name in environment(case("defaults"), service)


def test_the_gateways_probes_do_not_look_at_the_stages() -> None:
    """It must stay in its Service while a stage sleeps, for only a request wakes it."""
    spec = container(pods(case("defaults"))["gateway"][1])
    for kind in ("startup", "readiness", "liveness"):
        assert spec[f"{kind}Probe"]["httpGet"] == {"path": "/health/live", "port": "http"}


@pytest.mark.parametrize("service", SERVICES)
def test_startup_may_take_as_long_as_weights_need(service: str) -> None:
    deployment = find(case("defaults"), "Deployment", f"millrace-{service.replace('_', '-')}")
    probe = container(deployment["spec"]["template"]["spec"])["startupProbe"]
    allowed = probe["periodSeconds"] * probe["failureThreshold"]
    assert allowed == {"gateway": 120, "mm_encoder": 900, "engine": 3600, "postproc": 120}[service]
    assert deployment["spec"]["progressDeadlineSeconds"] > allowed


@pytest.mark.parametrize("name", MATRIX)
def test_no_pod_has_more_rights_than_it_needs(name: str) -> None:
    for component, (_, spec) in pods(case(name)).items():
        security = spec["securityContext"]
        assert (security["runAsNonRoot"], security["runAsUser"], security["runAsGroup"]) == (True, 10001, 10001), (
            component
        )
        assert security["seccompProfile"] == {"type": "RuntimeDefault"}
        assert spec["automountServiceAccountToken"] is (component == "autoscaler")
        assert spec["enableServiceLinks"] is False
        assert not {"hostNetwork", "hostPID", "hostIPC", "shareProcessNamespace"} & spec.keys()
        for each in [*spec["containers"], *spec.get("initContainers", [])]:
            assert each["securityContext"] == {
                "allowPrivilegeEscalation": False,
                "readOnlyRootFilesystem": True,
                "capabilities": {"drop": ["ALL"]},
            }
            assert {"cpu", "memory"} <= each["resources"]["requests"].keys()
            assert each["resources"]["limits"]["memory"] == each["resources"]["requests"]["memory"]


@pytest.mark.parametrize("name", MATRIX)
def test_every_pod_is_a_service_account_that_hands_out_no_token(name: str) -> None:
    accounts = {item["metadata"]["name"]: item for item in case(name) if item["kind"] == "ServiceAccount"}
    assert all(account["automountServiceAccountToken"] is False for account in accounts.values())
    assert {spec["serviceAccountName"] for _, spec in pods(case(name)).values()} == accounts.keys()


@pytest.mark.parametrize("name", MATRIX)
def test_only_the_autoscaler_has_rights_in_the_cluster(name: str) -> None:
    granted = [(item["kind"], item["metadata"]["name"]) for item in case(name) if "rbac" in item["apiVersion"]]
    expected = [("Role", "millrace-autoscaler"), ("RoleBinding", "millrace-autoscaler")]
    assert sorted(granted) == (expected if "autoscaler" in pods(case(name)) else [])


# Verbs that change something, by what a Role of the chart may use them on. Each leaves every pod's spec as it is.
MAY_CHANGE = {("apps", "deployments/scale"): {"update", "patch"}, ("", "pods/status"): {"patch"}}


def excesses(role: Object) -> list[str]:
    """Return what a Role allows and none of the chart may."""
    found = []
    for rule in role["rules"]:
        for group in rule["apiGroups"]:
            for resource in rule["resources"]:
                changing = set(rule["verbs"]) - {"get", "list", "watch"} - MAY_CHANGE.get((group, resource), set())
                found += [f"{verb} {resource}" for verb in sorted(changing)]
                if resource == "deployments/scale" and not rule.get("resourceNames"):
                    found.append("a Deployment that is not the chart's")
    return found


@pytest.mark.parametrize("name", MATRIX)
def test_no_role_can_change_what_a_pod_runs(name: str) -> None:
    roles = [item for item in case(name) if item["kind"] in ("Role", "ClusterRole")]
    assert [excesses(role) for role in roles] == [[] for _ in roles]


def test_a_role_that_can_is_found() -> None:
    pods_rule = {"apiGroups": [""], "resources": ["pods"], "verbs": ["list", "patch"]}
    any_scale = {"apiGroups": ["apps"], "resources": ["deployments/scale"], "verbs": ["*"]}
    assert excesses({"rules": [pods_rule]}) == ["patch pods"]
    assert excesses({"rules": [any_scale]}) == ["* deployments/scale", "a Deployment that is not the chart's"]


@pytest.mark.parametrize("name", MATRIX)
def test_the_model_is_read_only_and_where_the_services_look(name: str) -> None:
    for service in SERVICES:
        _, spec = pods(case(name))[service.replace("_", "-")]
        for each in [*spec["containers"], *spec.get("initContainers", [])]:
            (mount,) = [mount for mount in each["volumeMounts"] if mount["name"] == "model"]
            assert mount == {"name": "model", "mountPath": "/model", "readOnly": True}
        assert settings(name, service).model.startswith("/model")


def test_a_fetched_model_is_written_by_its_job_alone() -> None:
    made = case("fetched model, keda, monitoring, tls")
    path = "/model/ERNIE-4.5-VL-28B-A3B-Thinking/main"
    _, job = pods(made)["model"]
    assert container(job)["args"][-1] == path
    assert {"name": "model", "mountPath": "/model"} in container(job)["volumeMounts"]
    for service in SERVICES:
        _, spec = pods(made)[service.replace("_", "-")]
        (wait,) = spec["initContainers"]
        assert f"path='{path}'" in wait["args"][-1]
        assert environment(made, service)["MILLRACE_MODEL"] == path


def test_another_model_is_another_job() -> None:
    def job(**download: str) -> str:
        values = {"model": {"download": {"repository": "baidu/ernie", **download}}}
        return str(find(objects(values), "Job")["metadata"]["name"])

    plain = job()
    assert plain != job(revision="v2")
    base = {"model": {"download": {"repository": "baidu/ernie"}}}
    placed = {**base, "pods": {"tolerations": [{"key": "gpu", "operator": "Exists"}]}}
    assert find(objects(placed), "Job")["metadata"]["name"] != plain, "a Job's pod cannot be changed"


def test_a_download_is_never_given_up() -> None:
    """A Job that is takes its pod away, and the logs with it."""
    job = find(case("fetched model, keda, monitoring, tls"), "Job")["spec"]
    assert job["template"]["spec"]["restartPolicy"] == "OnFailure"
    assert job["backoffLimit"] >= 1_000_000


def test_placement_reaches_every_pod_and_a_services_own_counts() -> None:
    made = pods(case("external redis with users, hpa, placement"))
    assert made["gateway"][1]["nodeSelector"] == {"pool": "cpu"}
    assert made["engine"][1]["nodeSelector"] == {"pool": "gpu"}
    assert made["postproc"][1]["priorityClassName"] == "serving"
    assert made["engine"][1]["priorityClassName"] == "gpu"
    for component in ("gateway", "mm-encoder", "engine", "postproc"):
        metadata, spec = made[component]
        assert metadata["annotations"]["a"] == "b"
        assert [each["topologyKey"] for each in spec["topologySpreadConstraints"]] == [
            "topology.kubernetes.io/zone",
            "kubernetes.io/hostname",
        ]
        assert spec["tolerations"] == [{"key": "gpu", "operator": "Exists"}]
    assert environment(case("external redis with users, hpa, placement"), "postproc")["HTTPS_PROXY"]


def test_runtime_class_and_shared_memory_come_with_gpus() -> None:
    made = pods(case("fetched model, keda, monitoring, tls"))
    assert made["engine"][1]["runtimeClassName"] == "nvidia"
    assert "runtimeClassName" not in made["gateway"][1]
    volume = {"name": "shared-memory", "emptyDir": {"medium": "Memory", "sizeLimit": "1Gi"}}
    assert volume in made["engine"][1]["volumes"]
    assert all(volume["name"] != "shared-memory" for volume in pods(case("defaults"))["engine"][1]["volumes"])


def test_the_gpus_of_an_engine_share_its_model() -> None:
    assert environment(case("fetched model, keda, monitoring, tls"), "engine")["MILLRACE_TENSOR_PARALLEL_SIZE"] == "2"
    assert "MILLRACE_TENSOR_PARALLEL_SIZE" not in environment(case("defaults"), "engine")


def strategy(name: str, component: str) -> Object:
    return find(case(name), "Deployment", f"millrace-{component}")["spec"]["strategy"]["rollingUpdate"]


def test_an_update_never_leaves_the_gateway_short_nor_asks_for_a_spare_gpu() -> None:
    assert strategy("defaults", "gateway") == {"maxSurge": 1, "maxUnavailable": 0}
    assert strategy("defaults", "engine") == {"maxSurge": 0, "maxUnavailable": 1}
    assert strategy("external redis with users, hpa, placement", "engine") == {"maxSurge": 1, "maxUnavailable": 0}


@pytest.mark.parametrize("service", SERVICES)
def test_nodes_can_always_be_drained_one_pod_at_a_time(service: str) -> None:
    budget = find(case("defaults"), "PodDisruptionBudget", f"millrace-{service.replace('_', '-')}")
    assert budget["spec"]["maxUnavailable"] == 1
    metadata, _ = pods(case("defaults"))[service.replace("_", "-")]
    assert budget["spec"]["selector"]["matchLabels"].items() <= metadata["labels"].items()


def test_new_keys_restart_the_gateway_alone() -> None:
    def marks(key: str) -> dict[str, Object]:
        return {
            name: metadata.get("annotations", {})
            for name, (metadata, _) in pods(objects({"model": {"existingClaim": "c"}, "apiKeys": [key]})).items()
        }

    old, new = marks("one"), marks("two")
    assert {name for name in old if old[name] != new[name]} == {"gateway"}


def test_images_are_one_per_service() -> None:
    made = pods(case("fetched model, keda, monitoring, tls"))
    for service in SERVICES:
        component = service.replace("_", "-")
        assert container(made[component][1])["image"] == f"registry.example.com/team/millrace-{component}:1.2.3"
    assert all(spec["imagePullSecrets"] == [{"name": "pull"}] for _, spec in made.values())
    assert container(pods(case("defaults"))["engine"][1])["image"] == "millrace-engine:0.1.0"


def test_what_the_chart_assumes_of_the_settings_is_so() -> None:
    """The default of a setting counts where a value of the chart follows from the setting."""
    defaults = {each.name: each.default for each in msgspec.structs.fields(GatewaySettings)}
    made = objects({**CLAIM, "ingress": {"enabled": True}, "route": {"parentRefs": [{"name": "public"}]}})
    annotations = find(made, "Ingress")["metadata"]["annotations"]
    prefix = "nginx.ingress.kubernetes.io/proxy-"
    assert int(annotations[f"{prefix}read-timeout"]) == defaults["request_timeout_s"] + 60
    assert int(annotations[f"{prefix}body-size"]) == defaults["max_body_bytes"]
    (rule,) = find(made, "HTTPRoute")["spec"]["rules"]
    assert rule["timeouts"]["request"] == f"{defaults['request_timeout_s'] + 60:.0f}s"
    probe = container(pods(made)["engine"][1])["startupProbe"]
    assert probe["initialDelaySeconds"] == defaults["lease_ms"] // 1000 + 2
