"""`millrace top`: what is drawn, and the live table in a real pseudo-terminal."""

import io
import os
import pty
import select
import shlex
import shutil
import signal
import subprocess
import sys
import termios
import time
from pathlib import Path

import msgspec
import pytest
from machine import PATIENCE_S
from rich.console import Console

from cli.board import draw, duration, figure, size
from cli.main import main
from cli.redis_users import sign_in
from shared.bus import client as redis_client
from shared.bus.keys import SERVICES
from shared.bus.pipeline_view import (
    BatchesView,
    BlobsView,
    ConsumerView,
    PipelineView,
    QueueView,
    RedisView,
    ReplicaView,
    ShardView,
    StageView,
)

ENGINES = (
    ReplicaView(
        "engine-0", "ready", "0.1.0", 90, 2.5, {"held": 36, "capacity": 32, "kv_usage": 0.345, "step_s": 0.012}
    ),
    ReplicaView("engine-1", "starting", "0.1.0", 4, 2.9, {}),
)
VIEW = PipelineView(
    namespace="models",
    at=1.7e9,
    stages=(
        StageView("gateway", (ReplicaView("gateway-0", "ready", "0.1.0", 7200, 2, {"requests": 61}),), None),
        StageView("mm_encoder", (), QueueView("encode", 0, 0, None, None, (), 0)),
        StageView(
            "engine",
            ENGINES,
            QueueView(
                "generate", 61, 40, 14.0, 6.5, (ConsumerView("engine-0", 36, 1), ConsumerView("dead-7", 4, 9)), 2
            ),
        ),
        StageView("postproc", (ReplicaView("postproc-0", "gone"),), None),
    ),
    shards=(ShardView(0, 12, 0.2, "postproc-0", 3), ShardView(1, 0, None, None, 1)),
    control_length=5,
    blobs=BlobsView(24, 81_920),
    redis=RedisView("valkey 9.1.2", 3600, 2_500_000, 6_000_000_000, 45, 9, 207, 0, True),
)


def drawn(view: PipelineView, width: int = 140) -> list[str]:
    console = Console(file=io.StringIO(), width=width)
    console.print(draw(view))
    assert isinstance(console.file, io.StringIO)
    return [line.rstrip() for line in console.file.getvalue().splitlines()]


def row(lines: list[str], name: str, place: int = 0) -> list[str]:
    return [line.split() for line in lines if line.split()[:1] == [name]][place]


def test_batches_are_drawn_where_there_are_any() -> None:
    assert not [line for line in drawn(VIEW) if "batches" in line]
    lines = drawn(msgspec.structs.replace(VIEW, batches=BatchesView(2, 1, 50_000, 1200, 7200)))
    [place] = [place for place, line in enumerate(lines) if line.startswith("batches")]
    assert lines[place].split() == ["batches", "in", "work", "waiting", "lines", "done", "oldest"]
    assert lines[place + 1].split() == ["3", "2", "1", "50000", "1200", "2.0", "h"]


def test_a_stage_in_a_row() -> None:
    lines = drawn(VIEW)
    assert row(lines, "gateway") == ["gateway", "1", "-", "-", "61", "-", "-", "-", "-", "-"]
    assert row(lines, "mm_encoder") == ["mm_encoder", "0", "-", "-", "-", "0", "-", "-", "-", "-"]
    assert row(lines, "engine") == ["engine", "1", "1", "-", "36", "21", "6.5", "s", "14", "s", "2", "-"]
    assert row(lines, "postproc") == ["postproc", "0", "-", "1", "-", "-", "-", "-", "-", "-"]


def test_a_replica_in_a_row() -> None:
    lines = drawn(VIEW)
    assert " ".join(row(lines, "engine-0")) == "engine-0 ready 1.5 m 0.1.0 36/32 kv_usage=34% step=12ms"
    assert row(lines, "engine-1")[:3] == ["engine-1", "starting", "4.0"]
    assert " ".join(row(lines, "dead-7")) == "dead-7 dead - - 4 to be taken over"


def test_streams_and_redis() -> None:
    lines = drawn(VIEW)
    assert " ".join(row(lines, "generate")) == "generate 61 14 s engine-0 (36), dead-7 (4)"
    assert " ".join(row(lines, "tokens:0")) == "tokens:0 12 200 ms postproc-0, epoch 3"
    assert row(lines, "tokens:1")[-1] == "nobody"
    assert lines[-1].startswith("valkey 9.1.2, up 1.0 h  2.5 MB of 6.0 GB  24 blobs, 82 kB  207 commands/s")


def test_words_of_others_are_neither_markup_nor_commands_to_the_terminal() -> None:
    words = "[/bold][red]x[link=http://h]\x1b[2J\r\n"
    replica = ReplicaView(words, words, words, 1, 1, {words: 1.0})
    queue = QueueView("generate", 1, 1, 1.0, 1.0, (ConsumerView(words, 1, 1), ConsumerView(f"{words} dead", 1, 1)), 0)
    stages = tuple(StageView(stage.service, (replica,), queue) for stage in VIEW.stages)
    view = msgspec.structs.replace(VIEW, stages=stages, shards=(ShardView(0, 1, 0.2, words, 1),))
    text = "\n".join(drawn(view, 1000))
    assert text.count(r"[/bold][red]x[link=http://h]\x1b[2J\r\n") >= 4 * 4 + 4 + 1
    assert "\x1b" not in text
    assert "\r" not in text


def test_what_is_wrong_stands_on_top() -> None:
    lines = drawn(VIEW)
    assert lines[0].endswith("2 to look at")
    assert lines[1].strip() == "quarantine:generate has 2 entries, which ended replica after replica"
    assert lines[2].strip() == "postproc: no replica is ready; postproc-0 does not answer"


def test_a_narrow_terminal_loses_no_figure() -> None:
    shown = "\n".join(drawn(VIEW, 60))
    assert "kv_usage=34%" in shown
    assert "step=12ms" in shown


@pytest.mark.parametrize(
    ("seconds", "shown"),
    [
        (None, "-"),
        (0, "0 ms"),
        (0.0124, "12 ms"),
        (0.9996, "1.0 s"),
        (9.96, "10 s"),
        (59.9, "60 s"),
        (60, "1.0 m"),
        (7200, "2.0 h"),
        (200_000, "2.3 d"),
    ],
)
def test_durations(seconds: float | None, shown: str) -> None:
    assert duration(seconds) == shown


@pytest.mark.parametrize(
    ("number", "shown"), [(0, "0 B"), (999, "999 B"), (1000, "1.0 kB"), (2.5e9, "2.5 GB"), (3e15, "3000 TB")]
)
def test_sizes(number: float, shown: str) -> None:
    assert size(number) == shown


@pytest.mark.parametrize(
    ("name", "value", "shown"),
    [("kv_usage", 0.5, "50%"), ("tokens_per_s", 12.34, "12/s"), ("step_s", 0.02, "20 ms"), ("held", 3.0, "3")],
)
def test_figures_by_their_names(name: str, value: float, shown: str) -> None:
    assert figure(name, value) == shown


def test_once(redis_url: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["top", "--once", "--redis-url", sign_in(redis_url, "viewer"), "--namespace", "test"]) == 0
    assert "gateway: no replica is ready" in capsys.readouterr().out


def test_once_without_redis(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(redis_client, "_RETRIES", 0)
    assert main(["top", "--once", "--redis-url", f"unix://{tmp_path}/none.sock"]) == 2
    assert "Redis does not answer" in capsys.readouterr().err


def test_no_terminal(redis_url: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["top", "--redis-url", redis_url]) == 2
    assert "--once" in capsys.readouterr().err


class Terminal:
    """`millrace top` in a pseudo-terminal."""

    def __init__(self, redis_url: str) -> None:
        self._ours, self.theirs = pty.openpty()
        termios.tcsetwinsize(self.theirs, (40, 120))
        self.before = termios.tcgetattr(self.theirs)
        self.process = subprocess.Popen(
            [str(Path(sys.executable).with_name("millrace")), "top", "--redis-url", redis_url, "--namespace", "test"],
            stdin=self.theirs,
            stdout=self.theirs,
            stderr=self.theirs,
            env={**os.environ, "TERM": "xterm-256color"},
            # A shell's background job is started with it ignored, and so would be what it starts.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )
        self.shown = ""

    def wait_for(self, words: str) -> None:
        deadline = time.monotonic() + PATIENCE_S
        while words not in self.shown:
            ready, _, _ = select.select([self._ours], [], [], deadline - time.monotonic())
            assert ready, self.shown
            self.shown += os.read(self._ours, 65536).decode()

    def press(self, keys: bytes) -> None:
        os.write(self._ours, keys)

    def wait(self) -> int:
        self.wait_for("\x1b[?1049l")  # back from the alternate screen; read first, or what it still draws has no room
        status = self.process.wait(PATIENCE_S)
        assert termios.tcgetattr(self.theirs) == self.before, "the terminal is as it was"
        return status

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self._ours)
        os.close(self.theirs)


def test_live_until_q(redis_url: str) -> None:
    terminal = Terminal(redis_url)
    try:
        terminal.wait_for("gateway: no replica is ready")
        terminal.press(b"xyz")
        terminal.shown = ""
        terminal.wait_for("gateway: no replica is ready")  # the next look
        terminal.press(b"q")
        assert terminal.wait() == 0
    finally:
        terminal.close()


def test_live_until_ctrl_c(redis_url: str) -> None:
    terminal = Terminal(redis_url)
    try:
        terminal.wait_for("gateway: no replica is ready")
        terminal.process.send_signal(signal.SIGINT)
        assert terminal.wait() == 130
    finally:
        terminal.close()


@pytest.mark.skipif(shutil.which("tmux") is None, reason="needs tmux")
def test_what_a_terminal_shows(redis_url: str, tmp_path: Path) -> None:
    """As a person sees it: tmux does with what is sent to it what a terminal does."""
    tmux = ["tmux", "-S", str(tmp_path / "tmux"), "-f", "/dev/null"]
    top = shlex.join([str(Path(sys.executable).with_name("millrace")), "top", "--redis-url", redis_url])
    # Of this environment, and not of what readline has put into the process's own: a size.
    start = [*tmux, "new-session", "-d", "-x", "80", "-y", "30", f"{top}; exec sleep 600"]
    subprocess.run(start, check=True, env=dict(os.environ))

    def screen() -> list[str]:
        shown = subprocess.run([*tmux, "capture-pane", "-p"], check=True, capture_output=True, text=True)
        return [line.rstrip() for line in shown.stdout.splitlines()]

    def wait_for(words: str) -> list[str]:
        deadline = time.monotonic() + PATIENCE_S
        while not any(words in line for line in screen()):
            assert time.monotonic() < deadline, screen()
            time.sleep(0.05)
        return screen()

    try:
        lines = wait_for("every replica")  # the last of the streams
        assert lines[0].startswith("millrace  millrace  ")
        assert lines[0].endswith("2 to look at")
        assert lines[1:3] == ["  gateway: no replica is ready", "  postproc: no replica is ready"]
        [head] = [line for line in lines if line.startswith("stage ")]
        assert head.replace("in work", "in-work").split()[1:5] == ["ready", "coming", "leaving", "in-work"]
        assert head.split()[-5:] == ["waiting", "waits", "oldest", "quarantine", "rate"]
        stages = [line.split()[:2] for line in lines if line.startswith(SERVICES)]
        assert stages == [[service, "0"] for service in SERVICES]
        subprocess.run([*tmux, "send-keys", "q"], check=True)
        deadline = time.monotonic() + PATIENCE_S
        while any(screen()):
            assert time.monotonic() < deadline, "q gives the terminal back as it was: empty"
            time.sleep(0.05)
    finally:
        subprocess.run([*tmux, "kill-server"], check=True)
