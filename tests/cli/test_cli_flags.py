"""The command line of `millrace serve`: FastDeploy's two documented launches, and everything that is refused."""

from pathlib import Path

import pytest

from cli.flags import NOT_YET, parse, unread_variables
from cli.serve import announce, describe
from shared.bus.leases import Replica
from shared.errors import ConfigError


def test_the_launch_fastdeploy_documents_for_one_card(tmp_path: Path) -> None:
    arguments = f"""--model {tmp_path} --port 8190 --metrics-port 8191 --engine-worker-queue-port 8192
        --tensor-parallel-size 1 --max-model-len 32768 --max-num-seqs 32 --reasoning-parser ernie-45-vl-thinking
        --tool-call-parser ernie-45-vl-thinking --gpu-memory-utilization 0.9 --max-num-batched-tokens 16384
        --quantization wint4 --enable-chunked-prefill""".split()
    json = ["--limit-mm-per-prompt", '{"image": 100, "video": 100}', "--mm-processor-kwargs"]
    launch = parse([*arguments, *json, '{"image_max_pixels": 12845056}'], {"FD_SAMPLING_CLASS": "rejection"})
    assert (launch.model, launch.demo, launch.redis_url, launch.redis_dir) == (tmp_path, False, None, None)
    assert (launch.port, launch.metrics_port) == (8190, 8191)
    assert launch.settings == {
        "tensor_parallel_size": 1,
        "max_model_len": 32768,
        "reasoning_parser": "ernie-45-vl-thinking",
        "tool_call_parser": "ernie-45-vl-thinking",
        "max_num_seqs": 32,
        "limit_mm_per_prompt": {"image": 100, "video": 100},
        "mm_processor_kwargs": {"image_max_pixels": 12845056},
        "gpu_memory_utilization": 0.9,
        "max_num_batched_tokens": 16384,
        "quantization": "wint4",
        "enable_chunked_prefill": True,
        "sampling_class": "rejection",
    }


def test_the_launch_fastdeploy_documents_for_two_cards(tmp_path: Path) -> None:
    arguments = f"""--model {tmp_path} --port 8180 --metrics-port 8181 --engine-worker-queue-port 8182
        --tensor-parallel-size 2 --max-model-len 131072 --max-num-seqs 128 --reasoning-parser ernie-45-vl-thinking
        --tool-call-parser ernie-45-vl-thinking --gpu-memory-utilization 0.9 --max-num-batched-tokens 16384
        --quantization wint4""".split()
    json = ["--limit-mm-per-prompt", '{"image": 100, "video": 100}', "--mm-processor-kwargs"]
    launch = parse([*arguments, *json, '{"image_max_pixels": 12845056}'], {})
    assert launch.settings["tensor_parallel_size"] == 2
    assert launch.settings["max_model_len"] == 131072


def test_what_is_not_given_sets_nothing() -> None:
    launch = parse(["--demo"], {})
    assert launch.settings == {}
    assert (launch.demo, launch.host, launch.port) == (True, "0.0.0.0", 8180)
    assert launch.metrics_port == 8181


def test_the_number_of_gateways_goes_by_fastdeploys_name_too() -> None:
    assert [parse(["--demo", *more], {}).gateways for more in ([], ["--gateways", "3"], ["--workers=2"])] == [1, 3, 2]


def test_flags_that_repeat_or_negate() -> None:
    arguments = ["--demo", "--api-key", "a", "--api-key=b", "--no-enable-prefix-caching", "--redis-url=redis://h:1/0"]
    arguments.append("--no-tool-calls-in-reasoning")
    networks = ["--media-allow-network", "127.0.0.1/32", "--media-allow-network=::1/128"]
    launch = parse([*arguments, *networks], {"FD_API_KEY": "c"})
    assert launch.redis_url == "redis://h:1/0"
    assert launch.settings == {
        "api_keys": ["a", "b"],
        "enable_prefix_caching": False,
        "tool_calls_in_reasoning": False,
        "media_allow_networks": ["127.0.0.1/32", "::1/128"],
    }


@pytest.mark.parametrize(
    "arguments", [["--served-model-name", "a", "b"], ["--served-model-name=a", "--demo", "--served-model-name", "b"]]
)
def test_several_names_of_the_model(arguments: list[str]) -> None:
    assert parse([*arguments, *["--demo"] * ("--demo" not in arguments)], {}).settings == {
        "served_model_names": ["a", "b"]
    }


def test_what_bounds_requests() -> None:
    launch = parse(["--demo", "--max-queue", "9", "--request-timeout", "2.5", "--retain-seconds", "0"], {})
    assert launch.settings == {"max_queue": 9, "request_timeout_s": 2.5, "retain_s": 0.0}


def test_flags_may_be_written_with_underscores() -> None:
    arguments = ["--demo", "--max_model_len", "512", "--max_num_seqs=2", "--api_key=a_b", "--no_enable_prefix_caching"]
    assert parse(arguments, {}).settings == {
        "max_model_len": 512,
        "max_num_seqs": 2,
        "api_keys": ["a_b"],
        "enable_prefix_caching": False,
    }


def test_what_requests_may_do_by_default() -> None:
    launch = parse(["--demo", "--trust-request-chat-template", "--tool-call-ends-reasoning"], {})
    assert launch.settings == {"trust_request_chat_template": True, "tool_call_ends_reasoning": True}
    assert parse(["--demo", "--force-nonempty-content"], {}).settings == {"force_nonempty_content": True}


def test_what_is_always_so_may_be_asked_for() -> None:
    assert parse(["--demo", "--enable-logprob"], {}).settings == {}


@pytest.mark.parametrize(
    ("flags", "has_keys", "address", "said"),
    [
        ([], False, "127.0.0.1:8180", "all interfaces without a key"),
        ([], True, "127.0.0.1:8180", None),
        (["--host", "127.0.0.1"], False, "127.0.0.1:8180", "only this machine"),
        (["--host", "fd00::1", "--port", "9"], False, "[fd00::1]:9", "fd00::1 without a key"),
    ],
)
def test_what_is_said_of_who_can_reach_it(flags: list[str], has_keys: bool, address: str, said: str | None) -> None:
    serving, page, metrics, *more = announce(parse(["--demo", *flags], {}), "::1", has_keys)
    assert serving == f"serving demo at http://{address}/v1"
    assert page == f"chat page at http://{address}/"
    assert metrics.startswith("metrics at http://[::1]:")
    assert [said in line for line in more if said] == [True] * len(more) == [True] * (said is not None)


def test_what_a_stage_does_or_that_it_does_not_answer() -> None:
    assert describe("engine", Replica("engine", "e", "ready", load={"held": 3.0})) == "engine 3"
    assert describe("engine", Replica("engine", "e", "draining", load={"held": 3.0})) == "engine draining"
    assert describe("engine", None) == "engine does not answer"


def test_where_traces_go() -> None:
    launch = parse(["--demo", "--otlp-endpoint", "http://collector:4318", "--trace-ratio", "0"], {})
    assert launch.settings == {"otlp_endpoint": "http://collector:4318", "trace_ratio": 0.0}


def test_api_keys_of_the_environment() -> None:
    assert parse(["--demo"], {"FD_API_KEY": "a,b,"}).settings == {"api_keys": ["a", "b"]}


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ("", "--model"),
        ("--demo --model .", "--model"),
        ("--model /nowhere/at/all", "/nowhere/at/all is not a directory"),
        ("--model baidu/ERNIE-VL", "`hf download baidu/ERNIE-VL --local-dir ERNIE-VL`, and say --model ERNIE-VL"),
        ("--demo --port 0", "--port"),
        ("--demo --served-model-name", "--served-model-name"),
        ("--demo --port 65536", "--port"),
        ("--demo --port x", "--port"),
        ("--demo --tensor-parallel-size 0", "--tensor-parallel-size"),
        ("--demo --max-num-seqs 257", "--max-num-seqs"),
        ("--demo --max-num-seqs 0", "--max-num-seqs"),
        ("--demo --max-model-len -1", "--max-model-len"),
        ("--demo --max-num-batched-tokens 1.5", "--max-num-batched-tokens"),
        ("--demo --gpu-memory-utilization 1.1", "--gpu-memory-utilization"),
        ("--demo --gpu-memory-utilization nan", "--gpu-memory-utilization"),
        ("--demo --gpu-memory-utilization 0", "--gpu-memory-utilization"),
        ("--demo --trace-ratio 1.1", "--trace-ratio"),
        ("--demo --trace-ratio nan", "--trace-ratio"),
        ("--demo --max-queue 0", "--max-queue"),
        ("--demo --request-timeout 0", "--request-timeout"),
        ("--demo --request-timeout inf", "--request-timeout"),
        ("--demo --retain-seconds -1", "--retain-seconds"),
        ("--demo --retain-seconds nan", "--retain-seconds"),
        ("--demo --retain-seconds soon", "--retain-seconds"),
        ("--demo --quantization wint2", "--quantization"),
        ("--demo --torch-threads 0", "--torch-threads"),
        ("--demo --reasoning-parser qwen3", "--reasoning-parser"),
        ("--demo --tool-call-parser hermes", "--tool-call-parser"),
        ("--demo --limit-mm-per-prompt {image:1}", "--limit-mm-per-prompt"),
        ('--demo --limit-mm-per-prompt {"image":"many"}', "--limit-mm-per-prompt"),
        ("--demo --mm-processor-kwargs []", "--mm-processor-kwargs"),
        ("--demo --media-allow-network localhost", "--media-allow-network"),
        ("--demo --media-allow-network 10.0.0.1/8", "--media-allow-network"),
        ("--demo --max-model", "--max-model"),  # no abbreviations
        ("--demo --bogus 3", "--bogus: no such flag"),
        ("--demo extra", "extra: no such flag"),
        ("--demo --speculative-config mtp", "--speculative-config"),
        ("--demo --data-parallel-size 2", "--data-parallel-size: a flag of FastDeploy"),
    ],
)
def test_what_cannot_be_honoured_is_refused_by_name(arguments: str, named: str) -> None:
    with pytest.raises(ConfigError) as refused:
        parse(arguments.split(), {})
    assert named in str(refused.value)


@pytest.mark.parametrize("flag", sorted(NOT_YET))
def test_every_other_flag_of_fastdeploy_is_known_by_name(flag: str) -> None:
    with pytest.raises(ConfigError, match=f"{flag}: a flag of FastDeploy"):
        parse(["--demo", flag], {})


@pytest.mark.parametrize("name", ["air", "base_non_truncated", ""])
def test_other_sampling_classes_are_refused(name: str) -> None:
    with pytest.raises(ConfigError, match="FD_SAMPLING_CLASS"):
        parse(["--demo"], {"FD_SAMPLING_CLASS": name})


def test_variables_nothing_reads_are_listed() -> None:
    environ = {"FD_SAMPLING_CLASS": "base", "FD_API_KEY": "k", "FD_LOG_DIR": "log", "FD_DEBUG": "1", "HOME": "/"}
    assert unread_variables(environ) == ["FD_DEBUG", "FD_LOG_DIR"]


def test_help_lists_the_flags(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as done:
        parse(["--help"], {})
    assert done.value.code == 0
    shown = capsys.readouterr().out
    assert "--engine-worker-queue-port" in shown
    assert "--media-allow-network" in shown
