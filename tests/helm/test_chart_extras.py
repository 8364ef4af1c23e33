"""What people expect of any chart: names, labels, volumes, variables and objects of their own."""

import pytest
from helm_chart import CHART, CLAIM, SERVICES, Object, Values, case, container, find, objects, pods, render
from helm_python.errors import HelmError
from test_chart_render import FOREIGN, validator

PLACED = "external redis with users, hpa, placement"
LABELLED = "fetched model, keda, monitoring, tls"
COMPONENTS = tuple(service.replace("_", "-") for service in SERVICES)


def valid(values: Values) -> list[Object]:
    """Render the objects, each of which Kubernetes would take."""
    made = objects({**CLAIM, **values})
    for item in made:
        if item["kind"] not in FOREIGN:
            assert list(validator("1.31", item["kind"], item["apiVersion"]).iter_errors(item)) == []
    return made


def test_names_can_be_others() -> None:
    made = objects({**CLAIM, "fullnameOverride": "chat"})
    assert all(item["metadata"]["name"].startswith("chat-") for item in made)
    made = objects({**CLAIM, "nameOverride": "vision"})
    assert find(made, "Service", "millrace-vision-gateway")
    with pytest.raises(HelmError, match="fullnameOverride"):
        render({**CLAIM, "fullnameOverride": "Chat_1"})


def test_common_labels_are_on_every_object_and_pod_and_select_nothing() -> None:
    for item in case(LABELLED):
        if not item["metadata"]["name"].endswith("-own"):
            assert item["metadata"]["labels"]["team"] == "vision", item["metadata"]["name"]
        if item["kind"] in ("Deployment", "StatefulSet"):
            assert "team" not in item["spec"]["selector"]["matchLabels"]
    for component in (*COMPONENTS, "redis"):
        assert pods(case(LABELLED))[component][0]["labels"]["team"] == "vision"


@pytest.mark.parametrize("component", COMPONENTS)
def test_a_pod_has_labels_variables_and_volumes_of_its_operators(component: str) -> None:
    metadata, spec = pods(case(PLACED))[component]
    assert metadata["labels"]["tier"] == "models"
    assert {"name": "authority", "configMap": {"name": "authority"}} in spec["volumes"]
    mounts = container(spec, component)["volumeMounts"]
    assert {"name": "authority", "mountPath": "/etc/authority", "readOnly": True} in mounts
    told = container(spec, component)["env"]
    assert {"name": "NODE", "valueFrom": {"fieldRef": {"fieldPath": "spec.nodeName"}}} in told
    account = find(case(PLACED), "ServiceAccount", f"millrace-{component}")
    assert account["metadata"]["annotations"] == {"cloud.example.com/role": "reader"}


def test_settings_are_not_smuggled_past_their_schema() -> None:
    with pytest.raises(HelmError, match="extraEnv"):
        render({**CLAIM, "pods": {"extraEnv": [{"name": "MILLRACE_SHARDS", "value": "0"}]}})


def test_budgets_can_be_left_out() -> None:
    assert not [item for item in case(PLACED) if item["kind"] == "PodDisruptionBudget"]
    one = objects({**CLAIM, "engine": {"disruptionBudget": False}})
    assert len([item for item in one if item["kind"] == "PodDisruptionBudget"]) == len(SERVICES) - 1


def test_a_load_balancer_lets_in_whom_it_is_told() -> None:
    service = find(case(LABELLED), "Service", "millrace-gateway")["spec"]
    assert service["loadBalancerSourceRanges"] == ["192.0.2.0/24"]
    assert service["ports"][0]["nodePort"] == 30080
    assert "nodePort" not in find(case("defaults"), "Service", "millrace-gateway")["spec"]["ports"][0]


def test_objects_of_ones_own_are_rendered() -> None:
    own = find(case(LABELLED), "ConfigMap", "millrace-own")
    assert own["metadata"]["labels"] == {"app.kubernetes.io/instance": "millrace"}


def test_security_contexts_can_be_what_a_cluster_wants() -> None:
    """OpenShift gives every namespace a range of users of its own, and refuses pods that ask for another."""
    any_user = {"runAsUser": None, "runAsGroup": None, "fsGroup": None}
    values = {"podSecurityContext": any_user, "securityContext": {"capabilities": None, "privileged": False}}
    made = valid({"pods": values, "engine": {"podSecurityContext": {"fsGroup": 1000650000}}})
    for component, (_, spec) in pods(made).items():
        security = spec["securityContext"]
        assert security.pop("fsGroup", None) == (1000650000 if component == "engine" else None)
        assert security == {
            "runAsNonRoot": True,
            "fsGroupChangePolicy": "OnRootMismatch",
            "seccompProfile": {"type": "RuntimeDefault"},
        }
        for each in spec["containers"]:
            assert each["securityContext"] == {
                "allowPrivilegeEscalation": False,
                "readOnlyRootFilesystem": True,
                "privileged": False,
            }


def test_resources_can_be_more_than_cpu_and_memory() -> None:
    made = pods(
        valid(
            {
                "pods": {"resources": {"limits": {"ephemeral-storage": "2Gi"}}},
                "engine": {"resources": {"requests": {"memory": "24Gi"}, "limits": {"cpu": 8, "rdma/hca": 1}}},
                "gateway": {"resources": {"limits": {"memory": None}}},
            }
        )
    )
    assert container(made["engine"][1])["resources"] == {
        "requests": {"cpu": "4", "memory": "24Gi"},
        "limits": {"cpu": 8, "memory": "32Gi", "nvidia.com/gpu": 1, "ephemeral-storage": "2Gi", "rdma/hca": 1},
    }
    assert container(made["gateway"][1])["resources"]["limits"] == {"ephemeral-storage": "2Gi"}
    with pytest.raises(HelmError, match="resources"):
        render({**CLAIM, "engine": {"resources": {"limit": {}}}})


def test_containers_of_ones_own_run_first() -> None:
    own = {"name": "warm", "image": "busybox:1.36", "volumeMounts": [{"name": "model", "mountPath": "/model"}]}
    made = pods(valid({"engine": {"initContainers": [own]}}))
    assert made["engine"][1]["initContainers"] == [own]
    assert "initContainers" not in made["postproc"][1]
    fetched = {"model": {"download": {"repository": "a/b"}}, "pods": {"initContainers": [own]}}
    for component in COMPONENTS:
        first, *others = pods(valid(fetched))[component][1]["initContainers"]
        assert (first["name"], others) == ("wait-for-model", [own])


def test_a_service_can_have_an_image_of_its_own() -> None:
    patched = "registry.example.com/patched@sha256:" + "0" * 64
    made = pods(valid({"mm_encoder": {"image": patched}, "autoscaling": {"kind": "builtin"}}))
    images = {component: container(spec)["image"] for component, (_, spec) in made.items()}
    assert images.pop("mm-encoder") == patched
    assert images["autoscaler"] == "millrace-autoscaler:0.1.0"
    assert patched not in images.values()
    fetched = pods(valid({"model": {"download": {"repository": "a/b"}}, "postproc": {"image": patched}}))
    assert container(fetched["model"][1])["image"] == patched
    assert fetched["postproc"][1]["initContainers"][0]["image"] == patched


def test_all_images_can_come_from_one_registry() -> None:
    mirror = {"imageRegistry": "mirror.local:5000", "imagePullSecrets": ["pull", "second"], "other": 1}
    values = {
        "global": mirror,
        "image": {"registry": "registry.example.com/team", "pullSecrets": [{"name": "second"}]},
        "model": {"download": {"repository": "a/b"}},
        "engine": {"image": "localhost/engine:1"},
        "autoscaling": {"kind": "builtin"},
    }
    images = {}
    for component, (_, spec) in pods(valid(values)).items():
        assert spec["imagePullSecrets"] == [{"name": "pull"}, {"name": "second"}]
        for each in [*spec["containers"], *spec.get("initContainers", [])]:
            images[component, each["name"]] = each["image"]
    assert images["gateway", "gateway"] == "mirror.local:5000/team/millrace-gateway:0.1.0"
    assert images["engine", "engine"] == "mirror.local:5000/engine:1"
    assert images["redis", "valkey"] == "mirror.local:5000/valkey/valkey:9.1"
    assert images["redis", "exporter"].startswith("mirror.local:5000/oliver006/redis_exporter:")
    assert {image.partition("/")[0] for image in images.values()} == {"mirror.local:5000"}
    plain = pods(valid({"global": {"imageRegistry": "mirror.local"}, "redis": {"image": "valkey:9.1"}}))
    assert container(plain["gateway"][1])["image"] == "mirror.local/millrace-gateway:0.1.0"
    assert container(plain["redis"][1])["image"] == "mirror.local/valkey:9.1"


def test_redis_is_placed_and_bounded_as_the_other_pods_or_otherwise() -> None:
    common = {"nodeSelector": {"pool": "cpu"}, "annotations": {"a": "b"}, "priorityClassName": "serving", "gpus": 1}
    own = {
        "nodeSelector": {"disk": "fast"},
        "tolerations": [{"key": "redis", "operator": "Exists"}],
        "affinity": {"nodeAffinity": {}},
        "labels": {"tier": "data"},
        "resources": {"requests": {"ephemeral-storage": "1Gi"}, "limits": {"cpu": 2}},
        "podSecurityContext": {"fsGroup": None},
        "serviceAccountAnnotations": {"cloud.example.com/role": "none"},
    }
    made = valid({"pods": common, "redis": {**own, "maxMemoryMb": 2000, "cpu": "500m"}})
    metadata, spec = pods(made)["redis"]
    assert (metadata["annotations"]["a"], metadata["labels"]["tier"]) == ("b", "data")
    assert spec["nodeSelector"] == {"pool": "cpu", "disk": "fast"}
    assert (spec["tolerations"], spec["affinity"]) == (own["tolerations"], own["affinity"])
    assert spec["priorityClassName"] == "serving"
    assert "fsGroup" not in spec["securityContext"]
    assert container(spec, "valkey")["resources"] == {
        "requests": {"cpu": "500m", "memory": "3000Mi", "ephemeral-storage": "1Gi"},
        "limits": {"memory": "3000Mi", "cpu": 2},
    }
    account = find(made, "ServiceAccount", "millrace-redis")
    assert account["metadata"]["annotations"] == own["serviceAccountAnnotations"]
    assert "tolerations" not in pods(made)["gateway"][1]
    with pytest.raises(HelmError, match="extraEnv"):
        render({**CLAIM, "redis": {"extraEnv": []}})


def test_compiled_kernels_can_be_kept_where_the_image_puts_them() -> None:
    _, spec = pods(case(PLACED))["engine"]
    assert {"name": "kernels", "persistentVolumeClaim": {"claimName": "kernels"}} in spec["volumes"]
    (mount,) = [each for each in container(spec)["volumeMounts"] if each["name"] == "kernels"]
    image = (CHART / "images" / "engine.Containerfile").read_text()
    assert f"TRITON_CACHE_DIR={mount['mountPath']} " in image
    assert "kernels" not in str(pods(case("defaults"))["engine"][1]["volumes"])
    with pytest.raises(HelmError, match="kernelCache"):
        render({**CLAIM, "gateway": {"kernelCache": {}}})


def test_values_of_an_older_chart_lack_what_is_new() -> None:
    """`helm upgrade --reuse-values` brings the old chart's defaults in place of the new one's."""
    unset = dict.fromkeys(("initContainers", "resources", "podSecurityContext", "securityContext"))
    older = {
        "global": None,
        "pods": unset,
        "engine": {"kernelCache": None, "image": None},
        **{service: {"image": None} for service in ("gateway", "mm_encoder", "postproc")},
    }
    made = pods(valid(older))
    for component, (_, spec) in pods(case("defaults")).items():
        assert made[component][1] == spec, component
