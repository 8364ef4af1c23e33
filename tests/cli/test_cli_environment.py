"""What each service's process is told: the settings it has, checked before anything is started."""

import socket
from pathlib import Path

import pytest
from machine import free_ports
from prometheus_client import CollectorRegistry

from cli import environment
from cli.demo import write_demo
from cli.environment import check_ports, environments, metrics_address, settings_of
from cli.flags import Launch, parse
from services.engine.metrics import EngineMetrics
from services.engine.settings import EngineSettings
from services.gateway.metrics import GatewayMetrics
from services.gateway.settings import GatewaySettings
from services.mm_encoder.metrics import Metrics
from services.mm_encoder.settings import MmEncoderSettings
from services.mm_encoder.vision.memory import device_bytes
from services.postproc.metrics import PostprocMetrics
from shared import config
from shared.errors import CheckpointError, ConfigError
from shared.model.config import load_model_config

URL = "redis://127.0.0.1:1"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("model") / "demo"
    write_demo(directory)
    return directory


def launch(model: Path, *arguments: str) -> Launch:
    return parse(["--model", str(model), *arguments], {})


def own(environ: dict[str, str]) -> dict[str, str]:
    return {name: value for name, value in environ.items() if name.startswith("MILLRACE_")}


def test_metrics_listen_where_the_api_does(model: Path) -> None:
    for environ, host in (({}, "127.0.0.2"), ({"MILLRACE_METRICS_HOST": "127.0.0.3"}, "127.0.0.3")):
        assert metrics_address(launch(model, "--host", "127.0.0.2"), environ) == host


def test_no_service_listens_for_metrics_of_all(model: Path) -> None:
    told = environments(launch(model, "--metrics-port", "7001"), URL, {"MILLRACE_METRICS_PORT": "7002"})
    assert {settings_of(environ).metrics_port for environ in told.values()} == {0}


def test_each_service_is_told_what_it_has_a_setting_for(model: Path) -> None:
    arguments = ["--max-num-seqs", "4", "--max-model-len", "100", "--port", "7000", "--metrics-port", "7001"]
    arguments += ["--limit-mm-per-prompt", '{"image": 5}', "--mm-processor-kwargs", '{"image_max_pixels": 100000}']
    arguments += ["--media-allow-network", "127.0.0.0/8", "--api-key", "k", "--quantization", "wint8"]
    told = environments(launch(model, *arguments), URL, {"PATH": "/bin"})
    assert list(told) == ["gateway", "mm_encoder", "engine", "postproc"]
    assert {environ["PATH"] for environ in told.values()} == {"/bin"}
    gateway = config.load(GatewaySettings, own(told["gateway"]))
    assert (gateway.host, gateway.port) == ("0.0.0.0", 7000)
    assert (gateway.media_limits(), gateway.api_keys) == ({"image": 5, "video": 100}, ("k",))
    mm_encoder = config.load(MmEncoderSettings, own(told["mm_encoder"]))
    assert mm_encoder.mm_processor_kwargs.image_max_pixels == 100000
    assert mm_encoder.media_allow_networks == ("127.0.0.0/8",)
    engine = config.load(EngineSettings, own(told["engine"]))
    assert (engine.max_num_seqs, engine.quantization, engine.metrics_port) == (4, "wint8", 0)
    for environ in told.values():
        common = settings_of(environ)
        assert (common.model, common.redis_url, common.max_model_len) == (str(model), URL, 100)


def test_variables_of_ours_fill_what_no_flag_does(model: Path) -> None:
    environ = {"MILLRACE_LOG_LEVEL": "debug", "MILLRACE_JOURNAL_EVERY": "8", "MILLRACE_MAX_MODEL_LEN": "50"}
    told = environments(launch(model, "--max-model-len", "60"), URL, environ)
    assert {settings_of(each).log_level for each in told.values()} == {"debug"}
    assert {settings_of(each).max_model_len for each in told.values()} == {60}
    assert [name for name, each in told.items() if "MILLRACE_JOURNAL_EVERY" in each] == ["postproc"]


def test_the_context_is_the_default_as_far_as_the_model_reaches(model: Path, tmp_path: Path) -> None:
    assert settings_of(environments(launch(model), URL, {})["engine"]).max_model_len == 32768
    short = tmp_path / "short"
    write_demo(short)
    text = (short / "config.json").read_text()
    (short / "config.json").write_text(
        text.replace('"max_position_embeddings": 131072', '"max_position_embeddings": 64')
    )
    assert settings_of(environments(launch(short), URL, {})["gateway"]).max_model_len == 64
    with pytest.raises(ConfigError, match="--max-model-len: 65 is more than the 64"):
        environments(launch(short, "--max-model-len", "65"), URL, {})


@pytest.mark.parametrize(
    ("arguments", "environ", "named"),
    [
        (["--mm-processor-kwargs", '{"image_max_pixel": 1}'], {}, "image_max_pixel"),
        (["--limit-mm-per-prompt", '{"sound": 1}'], {}, "sound"),
        (["--no-enable-chunked-prefill", "--max-num-batched-tokens", "16"], {}, "max_num_batched_tokens"),
        ([], {"MILLRACE_MAX_NUM_SEQ": "3"}, "MILLRACE_MAX_NUM_SEQ"),
        ([], {"MILLRACE_MAX_NUM_SEQS": "many"}, "MILLRACE_MAX_NUM_SEQS"),
        ([], {"MILLRACE_DEVICE": "tpu"}, "DEVICE"),
    ],
)
def test_what_a_service_would_refuse_is_refused_before_any_starts(
    model: Path, arguments: list[str], environ: dict[str, str], named: str
) -> None:
    with pytest.raises(ConfigError) as refused:
        environments(launch(model, *arguments), URL, environ)
    assert named in str(refused.value)


def test_a_model_that_ranks_cannot_share_is_refused_with_its_numbers(model: Path) -> None:
    told = environments(launch(model, "--tensor-parallel-size", "2"), URL, {})
    assert told["engine"]["MILLRACE_TENSOR_PARALLEL_SIZE"] == "2"
    with pytest.raises(ConfigError, match=r"--tensor-parallel-size: .* 2 key-value heads .* it can be 1, 2"):
        environments(launch(model, "--tensor-parallel-size", "4"), URL, {})


def test_a_directory_without_a_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"config\.json"):
        environments(launch(tmp_path), URL, {})


def test_taken_and_doubled_ports_are_named(model: Path) -> None:
    first, second = map(str, free_ports(2))
    ports = ["--port", first, "--metrics-port", second]
    check_ports(launch(model, *ports), {})
    with pytest.raises(ConfigError, match=r"--metrics-port: port \d+ is also that of --port"):
        check_ports(launch(model, *ports, "--metrics-port", first), {})
    for flag, port in (("--port", first), ("--metrics-port", second)):
        with socket.socket() as taken:
            taken.bind(("127.0.0.1", int(port)))
            taken.listen()
            with pytest.raises(ConfigError, match=f"^{flag}: cannot listen on .*:{port}: .*choose another"):
                check_ports(launch(model, *ports), {})


def test_the_port_of_metrics_is_tried_where_they_listen(model: Path) -> None:
    api, metrics = map(str, free_ports(2))
    here = launch(model, "--host", "127.0.0.2", "--port", api, "--metrics-port", metrics)
    with socket.socket() as taken:
        taken.bind(("127.0.0.3", int(metrics)))
        taken.listen()
        check_ports(here, {})
        with pytest.raises(ConfigError, match=rf"^--metrics-port: cannot listen on 127\.0\.0\.3:{metrics}"):
            check_ports(here, {"MILLRACE_METRICS_HOST": "127.0.0.3"})


def test_one_listener_can_show_the_metrics_of_all_four() -> None:
    """Processes that share prometheus-client's directory add up what has the same name."""
    registry = CollectorRegistry()
    for metrics in (GatewayMetrics, Metrics, EngineMetrics, PostprocMetrics):
        metrics(registry)


def foreign_bytes(model: Path, *arguments: str, **environ: str) -> int:
    told = environments(launch(model, *arguments), URL, environ)
    return config.load(EngineSettings, own(told["engine"])).foreign_bytes


def test_the_engine_leaves_room_for_the_vision_model_on_its_card(model: Path) -> None:
    usual = foreign_bytes(model)
    assert usual == device_bytes(load_model_config(model), 32768)
    larger = foreign_bytes(model, "--mm-processor-kwargs", '{"image_max_pixels": 12845056}')
    assert larger == device_bytes(load_model_config(model), 65536) > usual
    assert foreign_bytes(model, MILLRACE_DEVICE="cpu") == 0
    assert foreign_bytes(model, MILLRACE_FOREIGN_BYTES="7") == 7


def torch_threads(model: Path, *arguments: str, **environ: str) -> int:
    told = environments(launch(model, *arguments), URL, environ)
    return config.load(EngineSettings, own(told["engine"])).torch_threads


def test_services_that_compute_share_the_cores(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(environment, "usable_cores", lambda: 8)
    assert torch_threads(model) == 4
    assert torch_threads(model, "--torch-threads", "7") == 7
    assert torch_threads(model, MILLRACE_TORCH_THREADS="3") == 3
    assert torch_threads(model, OMP_NUM_THREADS="5") == 0, "torch reads that variable itself"
    having = {name for name, each in environments(launch(model), URL, {}).items() if "MILLRACE_TORCH_THREADS" in each}
    assert having == {"mm_encoder", "engine"}
    assert having <= set(environment.COMPUTE_SERVICES)
