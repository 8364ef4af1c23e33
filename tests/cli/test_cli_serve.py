"""`millrace serve` as a person meets it: the demo, deaths of its processes, Ctrl-C once and twice, another Redis."""

import fcntl
import json
import os
import pty
import resource
import signal
import stat
import subprocess
import sys
import tempfile
import termios
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import hub_files
import pytest
import torch
from machine import PATIENCE_S, free_ports
from redis.asyncio import Redis
from safetensors.torch import load_file, save_file
from system import System, running, started

from cli.demo import hub_config, write_demo
from cli.main import main
from cli.serve import SHARED_BYTES, _has_room
from shared.bus.client import connect
from shared.bus.keys import Keys

STRANGERS = ("shared/__init__.py", "services/__init__.py", "cli/__init__.py", "torch.py", "redis.py")
HELLO: dict[str, Any] = {"model": "default", "messages": [{"role": "user", "content": "Hello"}]}


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Iterator[System]:
    """Started in a directory where other people's code has the names of ours."""
    directory = tmp_path_factory.mktemp("demo")
    for name in STRANGERS:
        (directory / name).parent.mkdir(exist_ok=True)
        (directory / name).write_text("raise ImportError(f'{__file__} was found through the working directory')\n")
    with running(["--demo"], directory, {"TMPDIR": str(directory)}) as system:
        yield system


@pytest.fixture
def model(demo: System) -> list[str]:
    """The flags for the checkpoint that the demo has written: who finds it there is ready sooner."""
    return ["--model", str(demo.directory / "demo")]


def chat(system: System, **options: Any) -> httpx.Response:
    body = {**HELLO, "max_tokens": 4, **options}
    return httpx.post(f"{system.base_url}/v1/chat/completions", json=body, timeout=PATIENCE_S)


@pytest.mark.parametrize(("free", "shared"), [(64 << 20, False), ((1 << 29) - 4096, False), (1 << 29, True)])
def test_embeddings_go_through_memory_that_has_room(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, free: int, shared: bool
) -> None:
    """Docker's /dev/shm has 64 MB."""
    disk = SimpleNamespace(f_frsize=4096, f_blocks=1 << 40, f_bavail=free // 4096)
    monkeypatch.setattr(os, "statvfs", lambda path: disk)
    assert _has_room(tmp_path, SHARED_BYTES) is shared
    assert not _has_room(tmp_path / "none", 1)


def test_the_demo_writes_its_checkpoint_and_answers(demo: System) -> None:
    config = json.loads((demo.directory / "demo" / "config.json").read_text())
    assert config["model_type"] == "ernie4_5_moe_vl"
    assert chat(demo).json()["usage"]["completion_tokens"] > 0
    said = [line for line in demo.log.read_text().splitlines() if line.startswith("millrace: ")]
    for stage in ("redis", "gateway", "mm_encoder", "engine", "postproc"):
        assert any(line.startswith(f"millrace: {stage:10} ready") for line in said), said
    assert f"millrace: serving demo at {demo.base_url}/v1" in said
    assert f"millrace: chat page at {demo.base_url}/" in said


def test_nothing_is_found_through_the_working_directory(demo: System) -> None:
    assert all((demo.directory / name).exists() for name in STRANGERS)
    services = [line for line in demo.children() if "-P -m services." in line]
    assert len([line for line in services if "decoding" not in line and "templates" not in line]) == 4
    assert chat(demo).status_code == 200


def test_other_commands_find_it_whatever_its_ports(
    demo: System, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(demo.directory))
    for words in (["status"], ["top", "--once"]):
        assert main(words) == 0
        assert "engine" in capsys.readouterr().out


async def test_its_redis_is_for_its_user_alone_and_a_service_for_what_it_needs(demo: System) -> None:
    path = Path(demo.redis_url.removeprefix("unix://"))
    assert [stat.S_IMODE(each.stat().st_mode) for each in (path.parent, path)] == [0o700, 0o700]
    client = connect(demo.redis_url)
    try:
        assert await client.config_get("port", "tls-port") == {"port": "0", "tls-port": "0"}
        users = {each["user"] for each in await client.client_list()}
        assert users == {"gateway", "mm-encoder", "engine", "postproc", "default"}
    finally:
        await client.aclose()


@pytest.mark.parametrize("service", ["postproc", "engine", "mm_encoder", "gateway"])
def test_a_service_that_dies_is_started_again(demo: System, service: str) -> None:
    assert chat(demo).status_code == 200
    before = demo.log.read_text()
    demo.kill_child(f"services.{service}")
    demo.wait_for(f"{service} was ended by SIGKILL; starting it again", after=len(before))
    demo.wait_for(f"millrace: {service:10} ready", after=len(before))
    demo.wait_until_ready()
    assert chat(demo).status_code == 200
    assert demo.log.read_text().count("millrace: serving ") == 1


def test_ctrl_c_twice_ends_it_at_once(model: list[str], tmp_path: Path) -> None:
    body = {**HELLO, "max_tokens": 30_000, "stream": True, "ignore_eos": True}
    with started(model, tmp_path) as system:
        system.wait_until_ready()
        with httpx.stream("POST", f"{system.base_url}/v1/chat/completions", json=body, timeout=PATIENCE_S) as reply:
            lines = reply.iter_lines()  # kept, since the connection is closed when it goes
            next(lines)
            system.signal(signal.SIGINT)
            system.wait_for("millrace: stopping")
            time.sleep(1.1)  # two signals within a second are one Ctrl-C that came by two ways
            system.signal(signal.SIGINT)
            assert system.wait(PATIENCE_S) == 130
        assert_nothing_runs(system)


def test_ctrl_c_again_when_all_has_stopped_changes_nothing(model: list[str], tmp_path: Path) -> None:
    with started(model, tmp_path) as system:
        system.wait_until_ready()
        system.signal(signal.SIGINT)
        system.wait_for("millrace: postproc   stopped")
        system.signal(signal.SIGTERM)
        assert system.wait(PATIENCE_S) == 0
        assert_nothing_runs(system)


@pytest.mark.parametrize("below", [[], ["/bin/sh", "-c", 'trap : HUP; "$@"; exit $?', "sh"]], ids=["alone", "make"])
def test_a_terminal_that_is_closed_ends_it_in_order(model: list[str], tmp_path: Path, below: list[str]) -> None:
    """It may be its session's leader, or be waited for by one that keeps the signal to itself, as `make` does."""
    ours, theirs = pty.openpty()

    def prepare() -> None:
        signal.signal(signal.SIGHUP, signal.SIG_DFL)  # whoever runs the tests by `nohup` has it ignored
        fcntl.ioctl(theirs, termios.TIOCSCTTY, 0)

    with started(model, tmp_path, output=theirs, prepare=prepare, below=below) as system:
        os.close(theirs)
        said = b""
        while b"Ctrl-C stops" not in said:
            said += os.read(ours, 1 << 16)
        os.close(ours)  # a hangup: SIGHUP, and EIO for whatever it writes from now on
        assert system.wait(PATIENCE_S) == 0
        assert_nothing_runs(system)


@pytest.mark.skipif(sys.platform != "linux", reason="no other system ends children with their parent")
def test_nohup_and_a_reader_that_has_gone_leave_it_running_and_all_dies_with_it_when_it_is_killed(
    model: list[str], tmp_path: Path
) -> None:
    """As `nohup millrace serve ... | head -3` and a closed terminal."""
    reader, writer = os.pipe()
    with started(
        model, tmp_path, output=writer, prepare=lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN)
    ) as system:
        os.close(writer)
        with open(reader, "rb") as lines:
            assert next(lines).startswith(b"millrace: ")
        system.signal(signal.SIGHUP)
        system.wait_until_ready()  # with nobody to read that it is
        system.kill_child("services.gateway")
        system.wait_until_ready()
        assert chat(system).status_code == 200
        system.signal(signal.SIGKILL)
        system.wait(PATIENCE_S)
        system.wait_until_childless()
        assert_nothing_runs(system)


def assert_nothing_runs(system: System) -> None:
    assert system.children() == []
    assert not any(map(system.answers, (system.port, system.metrics_port)))


@pytest.fixture
def exact(tmp_path: Path) -> Iterator[System]:
    """In float32, in which what is computed again, in other steps, comes out the same."""
    write_demo(tmp_path / "model", dtype="float32")
    with running(["--model", str(tmp_path / "model")], tmp_path / "system") as system:
        yield system


def test_an_answer_goes_on_when_its_redis_dies(exact: System) -> None:
    body = {**HELLO, "max_tokens": 100, "temperature": 0, "ignore_eos": True}
    whole = httpx.post(f"{exact.base_url}/v1/chat/completions", json=body, timeout=PATIENCE_S).json()
    before = len(exact.log.read_text())
    with httpx.stream(
        "POST", f"{exact.base_url}/v1/chat/completions", json={**body, "stream": True}, timeout=PATIENCE_S
    ) as reply:
        lines = (line for line in reply.iter_lines() if line.startswith("data: "))
        read = [next(lines) for _ in range(10)]
        exact.kill_child("-server")
        read += lines
    exact.wait_for("redis ended by itself; starting it again", after=before)
    assert read.pop() == "data: [DONE]"
    deltas = [json.loads(line[6:])["choices"][0]["delta"] for line in read]
    message = whole["choices"][0]["message"]
    for part in ("reasoning_content", "content"):
        assert "".join(delta.get(part) or "" for delta in deltas) == (message.get(part) or "")


def test_what_was_accepted_goes_on_after_a_restart_of_all(model: list[str], tmp_path: Path) -> None:
    flags = [*model, "--redis-dir", str(tmp_path / "redis")]
    body = {**HELLO, "max_tokens": 300, "temperature": 0, "ignore_eos": True, "stream": True}
    kept = {"MILLRACE_RETAIN_S": str(PATIENCE_S)}  # the answer, if it should have ended before the kill
    with started(flags, tmp_path, kept) as system:
        system.wait_until_ready()
        url, headers = f"{system.base_url}/v1/chat/completions", {"X-Event-IDs": "true"}
        with httpx.stream("POST", url, json=body, headers=headers, timeout=PATIENCE_S) as reply:
            lines = reply.iter_lines()  # kept, since the connection is closed when it goes
            read = [next(lines) for _ in range(30)]
            system.kill()
    told = [line[4:] for line in read if line.startswith("id: ")][-1]
    request_id = json.loads(next(line for line in read if line.startswith("data: "))[6:])["id"]
    with running(flags, tmp_path) as system:
        path = f"/v1/chat/completions/{request_id}/events"
        with httpx.stream("GET", system.base_url + path, headers={"Last-Event-ID": told}, timeout=PATIENCE_S) as reply:
            assert reply.status_code == 200
            lines = list(reply.iter_lines())
    events = [json.loads(line[6:]) for line in lines if line.startswith("data: {")]
    assert not [event for event in events if "error" in event]
    assert events[-1]["choices"][0]["finish_reason"] == "length"
    assert "data: [DONE]" in lines


def test_it_ends_where_its_redis_cannot_be_started_again(model: list[str], tmp_path: Path) -> None:
    with started([*model, "--redis-dir", str(tmp_path / "redis")], tmp_path) as system:
        system.wait_until_ready()
        (tmp_path / "redis" / "appendonlydir").rename(tmp_path / "gone")
        (tmp_path / "redis" / "appendonlydir").write_text("in the way")
        system.kill_child("-server")
        assert system.wait(PATIENCE_S) == 1
        assert "without Redis nothing can end in order" in system.log.read_text()
        assert_nothing_runs(system)


def test_a_broken_checkpoint_is_named_and_nothing_keeps_running(tmp_path: Path) -> None:
    model = tmp_path / "broken"
    write_demo(model)
    name = "model.layers.1.mlp.gate.weight"
    file = model / json.loads((model / "model.safetensors.index.json").read_text())["weight_map"][name]
    tensors = load_file(file)
    tensors[name] = tensors[name][:-1].contiguous()
    save_file(tensors, file)
    with started(["--model", str(model)], tmp_path) as system:
        assert system.wait(PATIENCE_S) == 1
        said = system.log.read_text()
        assert "millrace: engine ended with status 2 before it was ready; stopping all" in said
        assert name in said[said.rindex("millrace: redis      stopped") :]  # where a person looks
        assert "Traceback" not in said
        assert_nothing_runs(system)


def test_a_directory_as_the_hub_may_have_it_is_served_with_a_line_for_each_remark(tmp_path: Path) -> None:
    """The base model's keys and spellings; asked to be quantised and to answer greedily; tensors of no use."""
    model = tmp_path / "model"
    write_demo(model)
    config = hub_files.base(hub_config("bfloat16")) | {"moe_layer_end_index": -1}
    del config["freq_allocation"], config["moe_layer_interval"], config["torch_dtype"]
    online = {"quantization_config": {"quantization": "wint8", "is_quantized": False}}
    rewrite(model / "config.json", lambda _: config | online)
    rewrite(model / "tokenizer_config.json", lambda file: file | {"additional_special_tokens": None})
    sampling = {"do_sample": False, "temperature": 0.8, "top_k": -1, "max_new_tokens": 5, "num_beams": 2}
    rewrite(model / "generation_config.json", lambda file: file | sampling)
    index = json.loads((model / "model.safetensors.index.json").read_text())["weight_map"]
    shard = index["model.norm.weight"]
    extra = ["model.layers.0.self_attn.rotary_emb.inv_freq", "vision_model.rotary_pos_emb.inv_freq"]
    extra += ["model.mtp_emb_norm.0.weight"]
    save_file(load_file(model / shard) | {name: torch.ones(4) for name in extra}, model / shard)
    rewrite(
        model / "model.safetensors.index.json",
        lambda file: file | {"weight_map": file["weight_map"] | dict.fromkeys(extra, shard)},
    )
    with running(["--model", str(model), "--max-num-seqs", "2"], tmp_path) as system:
        first, second = (chat(system, max_tokens=30).json()["choices"][0]["message"] for _ in range(2))
        assert first == second
    lines = [line for line in system.log.read_text().splitlines() if " level=warning " in line]
    engine = [
        "moe_layer_end_index is -1",
        "moe_layer_interval is",
        "torch_dtype or dtype is",
        "2 named inv_freq",
        "1 of mul",
    ]
    gateway = ["additional_special_tokens", "top_k is -1", "max_new_tokens 5", "num_beams", "do_sample is false"]
    for service, texts in (("engine", engine), ("gateway", gateway)):
        for text in texts:
            found = [line for line in lines if text in line]
            assert len(found) == 1, (text, lines)
            assert f"service={service}" in found[0]


@pytest.fixture
def short_directory() -> Iterator[Path]:
    """Yield a directory for sockets, whose paths may have 107 bytes."""
    with tempfile.TemporaryDirectory() as name:
        yield Path(name)


@pytest.mark.skipif(sys.platform != "linux", reason="no other system limits the files of a process that runs")
def test_a_disk_that_stays_full_is_named_and_keeps_nothing_from_ending(
    model: list[str], tmp_path: Path, short_directory: Path
) -> None:
    scratch = short_directory
    with started(model, tmp_path, {"TMPDIR": str(scratch), "MILLRACE_DRAIN_S": "3600"}) as system:
        system.wait_until_ready()
        body = {**HELLO, "max_tokens": 2000, "min_tokens": 2000, "ignore_eos": True, "stream": True}
        with httpx.stream("POST", f"{system.base_url}/v1/chat/completions", json=body, timeout=PATIENCE_S) as reply:
            lines = reply.iter_lines()
            assert next(lines).startswith("data: ")
            [redis] = system.pids("-server ")
            [data] = scratch.glob("millrace-*/redis")
            resource.prlimit(redis, resource.RLIMIT_FSIZE, (0, resource.RLIM_INFINITY))
            system.wait_for("redis takes no writes")
            system.signal(signal.SIGINT)
            assert any("shutting down" in line for line in lines)
        assert system.wait(PATIENCE_S) == 0, system.tail()
        said = [line for line in system.log.read_text().splitlines() if line.startswith("millrace: ")]
        assert f"MISCONF Errors writing to the AOF file: File too large (its data are in {data})" in said[-1]
        stages = ("gateway", "mm_encoder", "engine", "postproc", "redis")
        assert said[-6:-1] == [f"millrace: {stage:10} stopped" for stage in stages]
        assert not list(scratch.iterdir())


def rewrite(path: Path, change: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    path.write_text(json.dumps(change(json.loads(path.read_text()))))


async def test_a_redis_of_ones_own(model: list[str], redis: Redis, redis_url: str, tmp_path: Path) -> None:
    with running([*model, "--redis-url", redis_url], tmp_path) as system:
        assert chat(system).status_code == 200
        assert await redis.smembers(Keys("millrace").replicas("engine"))
        assert not [line for line in system.children() if "-server" in line]


@pytest.mark.parametrize("quantization", ["wint4", "wint8"])
def test_the_launch_fastdeploy_documents(tmp_path: Path, quantization: str) -> None:
    """With a model of our own, and otherwise word for word."""
    write_demo(tmp_path / "model")
    arguments = f"""--model {tmp_path / "model"} --tensor-parallel-size 1 --max-model-len 32768 --max-num-seqs 32
        --reasoning-parser ernie-45-vl-thinking --tool-call-parser ernie-45-vl-thinking --gpu-memory-utilization 0.9
        --max-num-batched-tokens 16384 --quantization {quantization} --enable-chunked-prefill"""
    media = ["--limit-mm-per-prompt", '{"image": 100, "video": 100}']
    media += ["--mm-processor-kwargs", '{"image_max_pixels": 12845056}']
    with running([*arguments.split(), *media], tmp_path, {"FD_SAMPLING_CLASS": "rejection"}) as system:
        assert chat(system).json()["usage"]["completion_tokens"] > 0


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ([], "usage: millrace serve"),
        (["dance"], "no such command: dance"),
        (["serve"], "--model"),
        (["serve", "--model", "."], "config.json"),
    ],
)
def test_what_cannot_work_is_told_at_once(
    arguments: list[str],
    named: str,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    port, metrics_port = map(str, free_ports(2))
    flags = ["--port", port, "--metrics-port", metrics_port]
    assert main([*arguments, *(flags if arguments[:1] == ["serve"] else [])]) == 2
    shown = capsys.readouterr()
    assert named in shown.out + shown.err
    assert list(tmp_path.iterdir()) == []


def test_a_taken_port_is_told_before_anything_starts(demo: System, tmp_path: Path) -> None:
    command = [str(Path(sys.executable).with_name("millrace")), "serve", "--demo", "--port", str(demo.port)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=PATIENCE_S, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith(f"millrace serve: error: --port: cannot listen on 0.0.0.0:{demo.port}")
    assert list(tmp_path.iterdir()) == []
