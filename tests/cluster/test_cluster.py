"""The chart on a real cluster: every promise of docs/operations.md that only a cluster can keep or break.

cluster_settings.py says what to set; without KUBECONFIG all of this is skipped. The tests of this file are one story,
told in order, and each leaves the release as it found it.
"""

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from uuid import uuid4

import cluster_load
import pytest
import yaml
from cluster_forward import forwarded
from cluster_pods import bring_model, complaints, image, load, take_model
from cluster_questions import questions as questions_of
from cluster_release import STAGES, Release, until
from cluster_settings import UNVERIFIED, ClusterSettings, read
from helm_chart import CHART
from kubernetes import client, config
from openai import OpenAI
from openai.types.chat import ChatCompletion

pytestmark = [
    UNVERIFIED,
    pytest.mark.skipif(
        not os.environ.get("KUBECONFIG"), reason="KUBECONFIG is not set; see tests/cluster/cluster_settings.py"
    ),
]
GATEWAY_PORT = 8180


@pytest.fixture(scope="module")
def settings() -> ClusterSettings:
    return read(os.environ)


@pytest.fixture(scope="module")
def python_image(settings: ClusterSettings) -> str:
    return image(settings, str(yaml.safe_load((CHART / "Chart.yaml").read_text())["appVersion"]))


@pytest.fixture(scope="module")
def api(settings: ClusterSettings) -> Iterator[client.ApiClient]:
    configuration = client.Configuration()
    config.load_kube_config(settings.kubeconfig, client_configuration=configuration)  # type: ignore[no-untyped-call]
    made = client.ApiClient(configuration)
    yield made
    made.close()  # type: ignore[no-untyped-call]


@pytest.fixture(scope="module")
def namespace(api: client.ApiClient, settings: ClusterSettings) -> Iterator[str]:
    """One that admits only pods without any privilege, unless one is given."""
    if settings.namespace:
        yield settings.namespace
        return
    core, name = client.CoreV1Api(api), f"millrace-test-{uuid4().hex[:8]}"
    strictness = "privileged" if settings.values["model"].get("hostPath") else "restricted"
    labels = {"pod-security.kubernetes.io/enforce": strictness}
    body = {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name, "labels": labels}}
    core.create_namespace(client.V1Namespace.model_validate(body))
    yield name
    core.delete_namespace(name)


@pytest.fixture(scope="module")
def release(
    api: client.ApiClient,
    namespace: str,
    settings: ClusterSettings,
    python_image: str,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Release]:
    made = Release(api, settings.kubeconfig, namespace, settings.patience_s)
    try:
        if settings.brings_model:
            bring_model(made, settings, python_image, tmp_path_factory.mktemp("model"))
        made.install(settings.values)
        yield made
    finally:
        made.uninstall()
        take_model(made)


@pytest.fixture(scope="module")
def questions(settings: ClusterSettings, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    return questions_of(settings.exact, tmp_path_factory.mktemp("questions"))


@contextmanager
def openai(release: Release, settings: ClusterSettings) -> Iterator[OpenAI]:
    """The client our users have, at one of the gateways."""
    key = (settings.api_keys or ["none"])[0]
    pod = release.pod("gateway")
    with (
        forwarded(release.api.configuration, release.namespace, pod, GATEWAY_PORT) as url,
        OpenAI(base_url=f"{url}/v1", api_key=key, timeout=release.patience_s, max_retries=0) as made,
    ):
        yield made


def ask(openai: OpenAI, model: str, picture: int | None = None) -> ChatCompletion:
    content: list[dict[str, object]] = [{"type": "text", "text": "What is a mill race?"}]
    if picture is not None:
        content.append({"type": "image_url", "image_url": {"url": cluster_load.data_url(picture)}})
    messages = [{"role": "user", "content": content}]
    return openai.chat.completions.create(model=model, max_tokens=16, messages=messages)  # type: ignore[arg-type]


def whole(answer: ChatCompletion) -> bool:
    tokens = answer.usage.completion_tokens if answer.usage else 0
    return answer.choices[0].finish_reason in ("stop", "length") and tokens > 0


def test_the_charts_own_test_passes(release: Release) -> None:
    """It fails by what it raises."""
    release.helm_test()


def test_the_openai_client_is_answered(release: Release, settings: ClusterSettings) -> None:
    with openai(release, settings) as made:
        assert whole(ask(made, settings.model))
        stream = made.chat.completions.create(
            model=settings.model, stream=True, max_tokens=16, messages=[{"role": "user", "content": "Hello?"}]
        )
        assert list(stream)[-1].choices[0].finish_reason in ("stop", "length")


def test_a_question_with_a_picture_is_answered(release: Release, settings: ClusterSettings) -> None:
    with openai(release, settings) as made:
        without, answer = ask(made, settings.model), ask(made, settings.model, picture=0)
    assert whole(answer)
    assert without.usage is not None
    assert answer.usage is not None
    assert answer.usage.prompt_tokens > without.usage.prompt_tokens


@pytest.mark.parametrize("stage", ["mm_encoder", "engine"])
def test_a_sleeping_stage_is_woken_by_its_work(release: Release, settings: ClusterSettings, stage: str) -> None:
    """By the built-in autoscaler, while the request waits in the stage's stream."""
    if settings.values["autoscaling"]["kind"] != "builtin" or settings.values[stage]["replicas"] != 0:
        pytest.skip("the values given do not let this stage sleep")
    release.scale(stage, 0)
    answers: list[ChatCompletion] = []
    with openai(release, settings) as made:
        picture = 1000 if stage == "mm_encoder" else None
        asking = threading.Thread(target=lambda: answers.append(ask(made, settings.model, picture)))
        asking.start()
        until(lambda: release.replicas(stage), release.patience_s, lambda: f"nobody woke {stage}")
        asking.join(release.patience_s)
    assert [whole(answer) for answer in answers] == [True]
    release.settle()


@pytest.mark.parametrize("stage", STAGES)
def test_a_rolling_upgrade_under_load_fails_no_request(
    release: Release, settings: ClusterSettings, python_image: str, questions: list[str], stage: str
) -> None:
    with load(release, settings, python_image, questions) as asked:
        asked.more()
        old = set(release.pods(stage))
        release.restart(stage, uuid4().hex)
        asked.more()
        answers = asked.end()
    assert not old & set(release.pods(stage))
    assert complaints(answers, settings.exact, may_repeat=False) == []


@pytest.mark.parametrize("stage", STAGES)
def test_a_killed_pod_costs_no_answer(
    release: Release, settings: ClusterSettings, python_image: str, questions: list[str], stage: str
) -> None:
    """Clients of a gateway that dies lose their connection and ask again, under the key of the first time; of all other
    deaths they notice nothing."""
    with load(release, settings, python_image, questions) as asked:
        asked.more()
        gone = release.kill(stage)
        asked.more(4)
        release.settle()
        asked.more()
        answers = asked.end()
    assert gone not in release.pods(stage)
    assert complaints(answers, settings.exact, may_repeat=stage == "gateway") == []


def test_an_upgrade_leaves_what_was_scaled_by_hand_and_sets_what_is_new(release: Release) -> None:
    """With nobody else to scale, as `kubectl scale` is documented, and back to the scaler that there was."""
    old = release.replicas("postproc")
    own = {"autoscaling": {"kind": "none"}}
    release.upgrade({**own, "postproc": {"replicas": 1}})
    release.scale("postproc", 2)
    release.upgrade({**own, "postproc": {"replicas": 1}})
    assert release.replicas("postproc") == 2
    release.upgrade({**own, "postproc": {"replicas": 3}})
    assert release.replicas("postproc") == 3
    release.upgrade({})
    assert release.replicas("postproc") == 3
    release.scale("postproc", old)


def test_an_uninstall_leaves_nothing(release: Release) -> None:
    """Last in this file."""
    assert release.leftovers(), "nothing is found even now, so the test looks in the wrong place"
    release.uninstall()
    until(lambda: not release.leftovers(), release.patience_s, lambda: f"left: {release.leftovers()}")
