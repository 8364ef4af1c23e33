"""The chart's two scripts: the one that fetches a model, against a hub on loopback, and the one that chats."""

import hashlib
import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from helm_chart import CHART, objects, pods
from machine import PATIENCE_S
from server_thread import served

FETCH = CHART / "files" / "fetch_model.py"
CHAT = CHART / "files" / "chat.py"
FILES = {
    "config.json": b"{}",
    "model-1.safetensors": bytes(range(256)) * 5000,
    "tokenizer.model": b"pieces",
    "modeling.py": b"import os",
    "weights.bin": b"a pickle",
}
LARGE = "model-1.safetensors"


class Hub(ThreadingHTTPServer):
    """As much of a hub as the script needs, with the mishaps that happen."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.files = dict(FILES)
        self.break_off_after: int | None = None  # bytes of the next large answer
        self.ranges = True
        self.names: list[str] = []  # of files, in a list that is not theirs
        self.seen: list[tuple[str, str | None, str | None]] = []  # path, Range, Authorization
        self.down = False
        self.asked = threading.Event()
        self.halted = threading.Event()  # cleared: large files are not sent until it is set
        self.halted.set()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class Handler(BaseHTTPRequestHandler):
    server: Hub

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def do_GET(self) -> None:
        hub, path = self.server, self.path
        hub.seen.append((path, self.headers["Range"], self.headers["Authorization"]))
        if hub.down:
            self.send_error(503)
        elif path == "/api/models/baidu/ernie/revision/main?blobs=true":
            self._send(json.dumps({"siblings": self._siblings()}).encode())
        elif path.startswith("/baidu/ernie/resolve/main/"):
            self.send_response(302)
            self.send_header("Location", path.replace("/baidu/ernie/resolve/main", "/cdn"))
            self.send_header("Content-Length", "0")
            self.end_headers()
        elif (name := path.removeprefix("/cdn/")) in hub.files:
            if name == LARGE:
                hub.asked.set()
                hub.halted.wait(PATIENCE_S)
            self._file(hub.files[name])
        else:
            self.send_error(404)

    def _siblings(self) -> list[dict[str, object]]:
        listed = [{"rfilename": name, "size": len(data)} for name, data in FILES.items()]
        large = next(file for file in listed if file["rfilename"] == LARGE)
        large["lfs"] = {"sha256": hashlib.sha256(FILES[LARGE]).hexdigest()}
        return listed + [{"rfilename": name, "size": 1} for name in self.server.names]

    def _file(self, data: bytes) -> None:
        start = 0
        if self.server.ranges and (asked := self.headers["Range"]):
            start = int(asked.removeprefix("bytes=").rstrip("-"))
        self._send(data[start:], 206 if start else 200)

    def _send(self, data: bytes, status: int = 200) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        limit = self.server.break_off_after
        if limit is not None and len(data) > limit:
            self.server.break_off_after = None
            data = data[:limit]
        self.wfile.write(data)


@pytest.fixture
def hub() -> Iterator[Hub]:
    server = Hub()
    with served(server):
        yield server


def run(script: Path, *arguments: str, **environ: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, "-I", str(script), *arguments],
        env=environ,
        capture_output=True,
        text=True,
        check=False,
        timeout=PATIENCE_S,
    )


def fetch(hub: Hub, directory: Path, **environ: str) -> "subprocess.CompletedProcess[str]":
    return run(FETCH, hub.url, "baidu/ernie", "main", str(directory), HUB_PATIENCE="0", **environ)


def test_what_the_services_read_is_fetched_and_nothing_that_could_run(hub: Hub, tmp_path: Path) -> None:
    done = fetch(hub, tmp_path / "model")
    assert done.returncode == 0, done.stderr
    names = {path.name for path in (tmp_path / "model").iterdir()}
    assert names == {"config.json", LARGE, "tokenizer.model", ".complete", ".state", ".lock"}
    assert (tmp_path / "model" / LARGE).read_bytes() == FILES[LARGE]
    hub.seen.clear()
    assert fetch(hub, tmp_path / "model").returncode == 0
    assert hub.seen == [], "what is complete is not asked for again"


@pytest.mark.parametrize("ranges", [True, False])
def test_a_broken_download_goes_on_where_it_was(hub: Hub, tmp_path: Path, ranges: bool) -> None:
    hub.break_off_after, hub.ranges = 1000, ranges
    done = fetch(hub, tmp_path)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / LARGE).read_bytes() == FILES[LARGE]
    assert (f"/cdn/{LARGE}", "bytes=1000-", None) in hub.seen


def test_a_changed_file_is_never_accepted(hub: Hub, tmp_path: Path) -> None:
    hub.files[LARGE] = bytes(len(FILES[LARGE]))
    done = fetch(hub, tmp_path)
    assert (done.returncode, "SHA-256" in done.stderr) == (1, True)
    assert not (tmp_path / LARGE).exists()
    assert not (tmp_path / ".complete").exists()


def test_the_token_stays_with_the_hub(hub: Hub, tmp_path: Path) -> None:
    assert fetch(hub, tmp_path, HUB_TOKEN="secret").returncode == 0
    for path, _, token in hub.seen:
        assert token == (None if path.startswith("/cdn/") else "Bearer secret"), path


def test_a_file_outside_the_directory_is_refused(hub: Hub, tmp_path: Path) -> None:
    hub.names = ["../../etc/evil.json"]
    done = fetch(hub, tmp_path / "model")
    assert (done.returncode, "not a path inside" in done.stderr) == (1, True)
    assert {path.name for path in (tmp_path / "model").iterdir()} == {".lock", ".state"}
    assert not (tmp_path.parent / "etc").exists()


def test_what_the_hub_does_not_have_is_an_error_at_once(hub: Hub, tmp_path: Path) -> None:
    done = run(FETCH, hub.url, "baidu/other", "main", str(tmp_path))
    assert (done.returncode, "404" in done.stderr) == (1, True)
    assert len(hub.seen) == 1


def waiting(directory: Path) -> "subprocess.Popen[str]":
    """Start what waits for the model in a service's pod, with the directory in place of the volume's."""
    made = objects({"model": {"download": {"repository": "baidu/ernie"}}})
    (container,) = pods(made)["engine"][1]["initContainers"]
    (script,) = container["args"]
    assert "/model/ernie/main" in script
    command = [*container["command"], script.replace("/model/ernie/main", str(directory))]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def test_whoever_waits_for_the_model_says_for_what_and_why(hub: Hub, tmp_path: Path) -> None:
    """While the download fails, and until it has succeeded after all."""
    with waiting(tmp_path) as waits:
        assert waits.stdout is not None
        assert "component=model fetches: it has not begun" in waits.stdout.readline()
        hub.down = True
        assert fetch(hub, tmp_path).returncode == 1
        failed = "failed, and is tried again within 5 minutes: HTTPError: HTTP Error 503"
        assert any(failed in line for line in waits.stdout), "it may have seen the state before, too"
        hub.down = False
        assert fetch(hub, tmp_path).returncode == 0
        assert waits.wait(PATIENCE_S) == 0


def test_whoever_waits_for_the_model_ends_when_told_to(tmp_path: Path) -> None:
    """By a trap: the first process of a container ignores every signal that it does not handle."""
    with waiting(tmp_path) as waits:
        assert waits.stdout is not None
        waits.stdout.readline()
        waits.terminate()
        assert waits.wait(PATIENCE_S) == 143


def test_a_download_ends_when_told_to_and_the_next_goes_on(hub: Hub, tmp_path: Path) -> None:
    hub.halted.clear()
    command = [sys.executable, "-I", str(FETCH), hub.url, "baidu/ernie", "main", str(tmp_path)]
    with subprocess.Popen(command, env={"HUB_PATIENCE": "0"}) as process:
        assert hub.asked.wait(PATIENCE_S)
        process.terminate()
        assert process.wait(PATIENCE_S) == 143
    hub.halted.set()
    assert fetch(hub, tmp_path).returncode == 0


def test_of_two_downloads_into_one_directory_one_works(hub: Hub, tmp_path: Path) -> None:
    with ThreadPoolExecutor(2) as both:
        done = list(both.map(lambda _: fetch(hub, tmp_path).returncode, range(2)))
    assert done == [0, 0]
    assert [path for path, _, _ in hub.seen].count(f"/cdn/{LARGE}") == 1


class Gateway(BaseHTTPRequestHandler):
    """Answers as the gateway does, or not."""

    tokens = 2
    finish: str | None = "stop"
    ends = True

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self.headers["Authorization"] != "Bearer sk-one" or self.path != "/v1/chat/completions":
            self.send_error(401)
            return
        answer = self._stream() if body["stream"] else self._whole()
        self.send_response(200)
        self.send_header("Content-Length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer.encode())

    def _whole(self) -> str:
        message = {"reasoning_content": None, "content": "Hello"}
        choices = [{"message": message, "finish_reason": "stop"}]
        return json.dumps({"choices": choices, "usage": {"completion_tokens": self.tokens}})

    def _stream(self) -> str:
        choices = [{"delta": {"content": part}, "finish_reason": None} for part in ("Hel", "lo")]
        choices.append({"delta": {}, "finish_reason": self.finish})
        lines = [f"data: {json.dumps({'choices': [choice]})}" for choice in choices] + ["data: [DONE]"] * self.ends
        return ": keep-alive\n" + "".join(f"{line}\n\n" for line in lines)


@pytest.mark.parametrize(
    ("behaviour", "keys", "passes"),
    [
        ({}, '["sk-one", "sk-two"]', True),
        ({"tokens": 0}, '["sk-one"]', False),
        ({"finish": None}, '["sk-one"]', False),
        ({"ends": False}, '["sk-one"]', False),
        ({}, '["sk-two"]', False),
    ],
)
def test_helm_test_passes_only_if_both_ways_are_answered_to_the_end(
    behaviour: dict[str, object], keys: str, passes: bool
) -> None:
    handler = type("OneGateway", (Gateway,), behaviour)
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    with served(server):
        done = run(CHAT, f"http://127.0.0.1:{server.server_address[1]}", "ernie", MILLRACE_API_KEYS=keys)
    assert (done.returncode == 0) is passes, done.stderr
