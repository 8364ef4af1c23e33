"""`millrace bench serve`: its figures by hand, its reading against scripted streams, the command against a server."""

import asyncio
import base64
import errno
import io
import json
import math
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import msgspec
import numpy as np
import pytest
from machine import PATIENCE_S
from PIL import Image
from scripted_stream import DONE, END, STREAM, USAGE, WORD, scripted

from cli.bench import command
from cli.bench.client import Client, rehearse
from cli.bench.command import run as run_processes
from cli.bench.figures import figures, first_of, first_table, quantile, table
from cli.bench.guesses import Counters, read
from cli.bench.http_stream import Pool
from cli.bench.load import Answer, Arrival, Load, Part, even, poisson, shares
from cli.bench.rehearsal import scratch_server
from cli.main import main
from shared.errors import ConfigError

LOAD = Load(url="", model="m", key="", prompt=(5, 9), output=3, ids=(100, 120), clients=2, requests=4)


def answer(sent: float, *events: float, tokens: int | None = None, error: str | None = None) -> Answer:
    """Return an answer that has ended if its tokens were counted or it failed."""
    ended = None if tokens is None and error is None else events[-1] if events else sent
    return Answer(7, sent, list(events), tokens, ended, error)


# ----------------------------------------------------------------------------------------------------------- figures


def test_figures_of_answers_that_were_read_to_their_end() -> None:
    parts = [Part([answer(10.0, 10.1, 10.2, 10.4, tokens=3)], 0.25), Part([answer(10.0, 10.3, 10.4, tokens=3)], 0.5)]
    made = figures("2", parts, 10.0, None)
    assert (made.answered, made.open, made.failed, made.client_cpu) == (2, 0, 0, 0.5)
    assert made.output_tok_s == pytest.approx(6 / 0.4)
    assert (made.ttft_p50, made.ttft_p99) == pytest.approx((200, 298))
    assert (made.gap_p50, made.gap_p99, made.gap_p999) == pytest.approx((100, 198, 199.8))
    assert made.tokens_per_event == 6 / 5


def test_what_was_open_when_the_time_was_up_counts_as_far_as_it_came() -> None:
    answers = [answer(0.0, 1.0, 2.0, tokens=4), answer(0.0, 1.0, 3.0, 5.0), answer(4.0), answer(4.0, error="broken")]
    made = figures("c", [Part(answers, 0.0)], 0.0, 8.0)
    assert (made.answered, made.open, made.failed, made.errors) == (1, 2, 1, {"broken": 1})
    assert made.output_tok_s == (4 + 3 * 2.0) / 8.0


def test_nothing_measured_is_no_number_and_null_in_json() -> None:
    made = figures("1", [Part([answer(0.0, error="no")], 0.0)], 0.0, 1.0)
    assert math.isnan(made.ttft_p50)
    assert made.output_tok_s == 0
    assert json.loads(msgspec.json.encode(made))["gap_p999"] is None
    assert "nan" in table([made])


def test_quantiles_are_numpys() -> None:
    values = sorted(np.random.default_rng(3).normal(size=97).tolist())
    for share in (0.0, 0.5, 0.99, 0.999, 1.0):
        assert quantile(values, share) == pytest.approx(float(np.quantile(values, share)))


def test_the_first_request_of_a_length_against_the_last() -> None:
    part = Part([answer(0.0, 3.0, 4.0, tokens=2), answer(0.0, error="x"), answer(5.0, 5.5, 5.6, tokens=2)], 0.0)
    first = first_of(1024, part)
    assert (first.ttft, first.errors) == ([3000.0, 500.0], ["x"])
    assert first.ratio == 6.0
    assert first_table([first]).splitlines()[2].split("|")[1:4] == [" 1,024  ", "    3,000.0 ", " 500.0 "]


def test_arrivals_are_of_the_rate_and_the_same_for_a_seed() -> None:
    drawn = poisson(50.0, 100.0, (200, 8000), 1)
    assert drawn == poisson(50.0, 100.0, (200, 8000), 1) != poisson(50.0, 100.0, (200, 8000), 2)
    assert abs(len(drawn) - 5000) < 5 * 5000**0.5
    assert {arrival.prompt for arrival in drawn} <= set(range(200, 8001))
    assert all(before.at < after.at < 100.0 for before, after in pairwise(drawn))


@pytest.mark.system
@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_what_clients_saw_comes_whole_however_much_it_is(unbuffered: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONUNBUFFERED", unbuffered)
    with scripted(pieces=(WORD * 2000 + END + USAGE + DONE,)) as (url, _):
        load = msgspec.structs.replace(LOAD, url=f"{url}/v1/completions", clients=2, requests=8)
        parts, _ = run_processes(shares(load, 2))
    assert [len(one.events) for part in parts for one in part.answers] == [2000] * 8
    assert len(msgspec.json.encode(parts[0])) > 1 << 16, "what a pipe holds"


def test_a_load_is_divided_without_loss() -> None:
    loop = shares(msgspec.structs.replace(LOAD, clients=7, requests=30), 4)
    assert [(part.clients, part.requests) for part in loop] == [(2, 8), (2, 8), (2, 7), (1, 7)]
    assert [part.clients for part in shares(msgspec.structs.replace(LOAD, clients=2, requests=None), 4)] == [1, 1]
    arrivals = tuple(Arrival(float(i), i) for i in range(5))
    dealt = shares(msgspec.structs.replace(LOAD, arrivals=arrivals), 3)
    assert sorted(arrival.prompt for part in dealt for arrival in part.arrivals) == [0, 1, 2, 3, 4]
    assert len(shares(msgspec.structs.replace(LOAD, arrivals=arrivals[:1]), 3)) == 1
    assert sum(even(17, 5)) == 17


# ------------------------------------------------------------------------------------------------- a scripted server


def run(url: str, **changes: Any) -> list[Answer]:
    """Run one client process's part here, and return what it saw."""
    client = Client(msgspec.structs.replace(LOAD, url=f"{url}/v1/completions", **changes))
    asyncio.run(client.run(time.monotonic()))
    return client.answers


def test_events_with_tokens_count_however_the_stream_is_cut() -> None:
    for pieces in ((STREAM,), tuple(STREAM[i : i + 7] for i in range(0, len(STREAM), 7))):
        with scripted(pieces=pieces) as (url, _):
            answers = run(url)
        assert [(len(one.events), one.tokens, one.error) for one in answers] == [(3, 3, None)] * 4
        assert all(one.ended is not None and one.sent <= one.events[0] <= one.ended for one in answers)


def test_a_request_is_the_same_for_every_server() -> None:
    with scripted() as (url, handler):
        run(url, requests=100, key="secret")  # so many that every id is drawn
    assert len(handler.connections) <= 2  # one a client, kept
    assert {seen["authorization"] for seen in handler.headers_seen} == {"Bearer secret"}
    prompts = [body.pop("prompt") for body in handler.bodies]
    assert {len(prompt) for prompt in prompts} <= set(range(5, 10))
    assert {token for prompt in prompts for token in prompt} == set(range(100, 121))
    assert (
        handler.bodies
        == [
            {
                **{"model": "m", "max_tokens": 3, "temperature": 0, "ignore_eos": True},
                **{"stream": True, "stream_options": {"include_usage": True}},
            }
        ]
        * 100
    )


ROLE = b'data: {"choices": [{"delta": {"role": "assistant", "content": ""}, "finish_reason": null}]}\n\n'
THOUGHT = b'data: {"choices": [{"delta": {"reasoning_content": "w"}, "finish_reason": null}]}\n\n'
SAID = b'data: {"choices": [{"delta": {"content": "w"}, "logprobs": null, "finish_reason": null}]}\n\n'
WORDLESS = b'data: {"choices": [{"delta": {}, "logprobs": {"content": [{"token": ""}]}, "finish_reason": null}]}\n\n'
STOPPED = b'data: {"choices": [{"delta": {}, "finish_reason": "length"}]}\n\n'


def test_a_picture_is_asked_about_in_a_chat_and_is_new_each_time() -> None:
    with scripted(pieces=(ROLE, THOUGHT, SAID, WORDLESS, STOPPED, USAGE, DONE)) as (url, handler):
        answers = run(url, picture=(32, 24))
        new = [picture_of(body) for body in handler.bodies]
        run(url, picture=(32, 24), seen=True)
        seen = [picture_of(body) for body in handler.bodies[len(new) :]]
    assert [(len(one.events), one.tokens, one.error) for one in answers] == [(3, 3, None)] * 4
    assert len(set(new)) == len(new) == len(seen) == 4
    assert len(set(seen)) == 1
    assert len({Image.open(io.BytesIO(data)).tobytes() for data in new + seen}) == 1, "they differ by a comment"
    assert Image.open(io.BytesIO(new[0])).size == (32, 24)


def picture_of(body: dict[str, Any]) -> bytes:
    assert "prompt" not in body
    [message] = body["messages"]
    return base64.b64decode(message["content"][0]["image_url"]["url"].removeprefix("data:image/jpeg;base64,"))


@pytest.mark.parametrize(
    ("script", "error"),
    [
        ({"status": 429, "pieces": (b'{"error": "full"}',)}, 'HTTP 429: {"error": "full"}'),
        ({"pieces": (WORD, b'data: {"error": {"message": "lost"}}\n\n', DONE)}, '{"message": "lost"}'),
        ({"pieces": (WORD, DONE)}, "the stream ended without usage"),
        ({"pieces": (WORD,), "breaks_off": True}, "the connection was closed before the answer had ended"),
        ({"pieces": (b"data: {\n\n",)}, "the answer cannot be read: "),
    ],
)
def test_an_answer_that_is_not_whole_has_failed(script: dict[str, Any], error: str) -> None:
    with scripted(**script) as (url, handler):
        answers = run(url, clients=1, requests=2)
    assert len(handler.bodies) == len(answers) == 2
    assert all(one.error is not None and one.error.startswith(error) for one in answers)


def test_a_server_that_is_not_there(unused_port: int) -> None:
    (one,) = run(f"http://127.0.0.1:{unused_port}", requests=1)
    assert one.error is not None
    assert one.error.startswith("cannot connect: ")


@pytest.mark.parametrize("host", ["a..b", f"{'a' * 64}.example"])
def test_a_name_that_no_host_can_have_is_a_failure_and_no_traceback(host: str) -> None:
    (one,) = run(f"http://{host}:8180", requests=1)
    assert one.error is not None
    assert one.error.startswith("cannot connect: ")


@pytest.mark.system
@pytest.mark.parametrize("zone", ["", "%25lo"])
def test_an_address_of_a_network_without_the_server_is_a_failure(
    zone: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not a wait, of whose end the time would be."""
    monkeypatch.setattr(socket, "if_nameindex", lambda: [(1, "lo")])
    url = f"http://[fe80::1{zone}]:8180"
    asked = ["--clients", "1", "--seconds", "1", "--processes", "1"]
    assert main(["bench", "serve", "--url", url, "--model", "m", *asked]) == 1
    assert "cannot connect: " in capsys.readouterr().err


@pytest.mark.parametrize(
    ("address", "host", "local"),
    [
        ("[fe80::1%25eth0]", "fe80::1%eth0", True),
        ("[fe90::1%2512]", "fe90::1%12", True),
        ("[fe80::1%12]", "fe80::1%12", True),  # as people write it
        ("[fd00::1]", "fd00::1", False),
        ("fe80.example", "fe80.example", False),
    ],
)
def test_a_zone_follows_a_percent_sign_that_a_url_escapes(address: str, host: str, local: bool) -> None:
    url = f"http://{address}:8180/v1/completions"
    assert Pool(url, "").host == host
    assert Client(msgspec.structs.replace(LOAD, url=url)).is_link_local is local


def test_a_zone_is_for_the_socket_and_not_for_the_server() -> None:
    async def ask(pool: Pool) -> Answer:
        await pool.ask(b"{}", answer := Answer(1, 0.0))
        pool.close()
        return answer

    with scripted() as (url, handler):
        pool = Pool(url.replace("127.0.0.1", "[fe80::AB%25Net0]") + "/v1/completions", "")
        assert pool.host == "fe80::ab%Net0"
        pool.host = "127.0.0.1"
        assert asyncio.run(ask(pool)).error is None
    assert handler.headers_seen[0]["host"] == f"[fe80::AB]:{urlsplit(url).port}"


def test_a_server_that_closes_before_tls_is_told_with_a_reason() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        closing = threading.Thread(target=lambda: server.accept()[0].close())
        closing.start()
        (one,) = run(f"https://127.0.0.1:{server.getsockname()[1]}", requests=1)
        closing.join()
    assert one.error is not None
    assert one.error.removeprefix("cannot connect: ")


def test_the_time_being_up_ends_it() -> None:
    with scripted(pieces=(WORD,)) as (url, _):
        answers = run(url, arrivals=(Arrival(0.0, 5), Arrival(3600.0, 5)), seconds=0.0)
    assert len(answers) <= 1  # the second one's time never came


def test_a_load_is_measured_where_the_machine_cannot_reach_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    async def no_server(*_: object) -> None:
        raise OSError(errno.EADDRNOTAVAIL, "Cannot assign requested address")

    monkeypatch.setattr(asyncio, "start_server", no_server)
    asyncio.run(rehearse(LOAD))


def test_a_process_rehearses_with_a_whole_answer_that_it_reads() -> None:
    async def ask() -> Answer:
        answer = Answer(1, 0.0)
        async with scratch_server() as url:
            await Pool(url, "key").ask(b'{"prompt": [1]}', answer)
        return answer

    answer = asyncio.run(ask())
    assert (len(answer.events), answer.tokens, answer.error) == (1, 1, None)


# ------------------------------------------------------------------------------------------------------- the command


@pytest.mark.system
def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with scripted() as (url, handler):
        flags = ["bench", "serve", "--url", url, "--model", "m", "--input", "4-6", "--output", "3", "--ids", "7-9"]
        written = tmp_path / "found.json"
        assert main([*flags, "--clients", "1,3", "--requests", "6", "--processes", "2", "--json", str(written)]) == 0
        table = capsys.readouterr().out.splitlines()
        assert [line.split("|")[1:5] for line in table[2:]] == [
            [" 1    ", *cells(6, 0, 0)],
            [" 3    ", *cells(6, 0, 0)],
        ]
        loads = json.loads(written.read_text())["loads"]
        assert [(load["answered"], load["tokens_per_event"]) for load in loads] == [(6, 1.0), (6, 1.0)]
        assert len(handler.bodies) == 12
        assert main([*flags, "--first", "5,2"]) == 0
        assert [len(body["prompt"]) for body in handler.bodies[12:]] == [5] * 10 + [2] * 10
        assert [line.split("|")[1].strip() for line in capsys.readouterr().out.splitlines()[2:]] == ["5", "2"]
        assert main([*flags, "--rate", "100", "--seconds", "0.2"]) == 0
        assert capsys.readouterr().out.splitlines()[2].startswith("| 100/s |")
        handler.status = 503
        assert main([*flags, "--clients", "1", "--requests", "2"]) == 1
        assert "failed (2): HTTP 503: " in capsys.readouterr().err


METRICS = """# TYPE vllm:generation_tokens_total counter
vllm:generation_tokens_total{{engine="0"}} {0}0.0
vllm:generation_tokens_total{{engine="1"}} 5
vllm:spec_decode_num_draft_tokens_total{{engine="0",model_name="m"}} {0}.0
vllm:spec_decode_num_draft_tokens_total{{engine="1",model_name="m"}} {0}.0
vllm:spec_decode_num_accepted_tokens_total{{engine="0"}} {0}
vllm:spec_decode_num_accepted_tokens_per_pos_total{{engine="0",position="0"}} 1e9
"""
OURS = METRICS.replace("vllm:", "millrace_").replace('{{engine="0"}}', "")


@pytest.mark.system
@pytest.mark.parametrize("metrics", [METRICS, OURS])
def test_guesses_are_told_by_the_servers_metrics(
    metrics: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with scripted(metrics=metrics) as (url, _):
        written = tmp_path / "found.json"
        flags = ["bench", "serve", "--url", url, "--model", "m", "--clients", "1,2", "--requests", "4"]
        assert main([*flags, "--metrics", f"{url}/metrics", "--json", str(written)]) == 0
    title, _, *rows = capsys.readouterr().out.splitlines()
    assert title.endswith("| guesses right | tokens guessed |")
    assert all(row.split("|")[-3:-1] == ["          0.50 ", "           0.10 "] for row in rows)
    loads = json.loads(written.read_text())["loads"]
    assert [(load["guesses_right"], load["tokens_guessed"]) for load in loads] == [(0.5, 0.1)] * 2


@pytest.mark.system
def test_metrics_that_end_with_a_load_cost_their_figures_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with scripted(metrics=METRICS, metrics_until=5) as (url, handler):
        written = tmp_path / "found.json"
        flags = ["bench", "serve", "--url", url, "--model", "m", "--clients", "1,2,3", "--requests", "4"]
        assert main([*flags, "--metrics", f"{url}/metrics", "--json", str(written)]) == 0
        assert len(handler.bodies) == 12
    loads = json.loads(written.read_text())["loads"]
    assert [(load["answered"], load["guesses_right"]) for load in loads] == [(4, 0.5), (4, None), (4, None)]
    told = [line for line in capsys.readouterr().err.splitlines() if "guesses" in line]
    assert [line.partition("--metrics: ")[0] for line in told] == [
        "2: no figures of guesses: ",
        "3: no figures of guesses: ",
    ]


@pytest.mark.system
def test_a_ctrl_c_in_a_terminal_ends_a_load_without_a_word_from_its_clients() -> None:
    """It comes to the whole group, of which the clients are not."""
    came, held = threading.Event(), threading.Event()
    with scripted(pieces=(), breaks_off=True, came=came, held=held) as (url, _):
        flags = ["bench", "serve", "--url", url, "--model", "m", "--clients", "2", "--processes", "2"]
        process = subprocess.Popen(
            [sys.executable, "-m", "cli.main", *flags],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
            start_new_session=True,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
        )
        assert came.wait(PATIENCE_S)
        os.killpg(process.pid, signal.SIGINT)
        said, _ = process.communicate(timeout=PATIENCE_S)
        held.set()
    assert (process.returncode, said) == (130, b"")


@pytest.mark.parametrize("failure", [ConfigError("a client process failed"), KeyboardInterrupt()])
@pytest.mark.parametrize(("what", "key"), [("--clients", "loads"), ("--first", "first")])
def test_what_was_measured_before_a_failure_is_told(
    what: str,
    key: str,
    failure: BaseException,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    outcomes: list[BaseException | None] = [None, None, failure]

    def measured(loads: Sequence[Load]) -> tuple[list[Part], float]:
        if (outcome := outcomes.pop(0)) is not None:
            raise outcome
        return [Part([answer(0.0, 0.1, 0.2, tokens=2), answer(0.0, error="broken")], 0.0) for _ in loads], 0.0

    monkeypatch.setattr(command, "run", measured)
    written = tmp_path / "found.json"
    flags = ["--url", "http://h", "--model", "m", "--processes", "1", "--json", str(written)]
    assert main(["bench", "serve", *flags, what, "1,2,3,4"]) == (2 if isinstance(failure, ConfigError) else 130)
    said = capsys.readouterr()
    assert [line.split("|")[1].strip() for line in said.out.splitlines()[2:]] == ["1", "2"]
    assert len(json.loads(written.read_text())[key]) == 2
    assert "failed (2): broken" in said.err
    assert ("a client process failed" in said.err) == isinstance(failure, ConfigError)


def test_a_server_that_guesses_nothing_has_no_share_of_guesses() -> None:
    before, after = Counters(0.0, 0.0, 7.0), Counters(0.0, 0.0, 17.0)
    assert [math.isnan(share) for share in after.since(before)] == [True, False]
    assert all(math.isnan(share) for share in before.since(before))


@pytest.mark.parametrize(("text", "named"), [("", "no counter"), (None, "cannot be read")])
def test_metrics_that_are_not_there_are_named(text: str | None, named: str, unused_port: int) -> None:
    with scripted(metrics=text or "") as (url, _), pytest.raises(ConfigError, match=named):
        read(f"{url}/metrics" if text is not None else f"http://127.0.0.1:{unused_port}/metrics")


@pytest.mark.parametrize("script", [{"metrics": "vllm:generation_tokens_total x"}, {"metrics_until": 0}])
def test_an_answer_without_numbers_or_http_is_named(script: dict[str, Any]) -> None:
    with scripted(**script) as (url, _), pytest.raises(ConfigError, match=r"^--metrics: .* cannot be read"):
        read(f"{url}/metrics")


def test_metrics_at_no_url_are_named() -> None:
    with pytest.raises(ConfigError, match=r"^--metrics: http://h:port/ cannot be read"):
        read("http://h:port/")


def cells(*numbers: int) -> list[str]:
    return [f" {number:>{width}} " for number, width in zip(numbers, (8, 4, 6), strict=True)]


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (["--url", "127.0.0.1:1", "--model", "m", "--clients", "1"], "--url"),
        (["--url", "http://127.0.0.1:8180x", "--model", "m", "--clients", "1"], "--url: http://127.0.0.1:8180x is not"),
        (["--url", "http://h:65536", "--model", "m", "--clients", "1"], "--url: http://h:65536 is not a URL: Port out"),
        (["--url", "http://h:0", "--model", "m", "--clients", "1"], "--url"),
        (["--url", "http://", "--model", "m", "--clients", "1"], "--url"),
        (["--url", "http://[::1", "--model", "m", "--clients", "1"], "--url"),
        (["--url", "http://[fe80::1%25nozone0]:8180", "--model", "m", "--clients", "1"], "interface nozone0, which"),
        (["--url", "http://h/v1\r\nx: y", "--model", "m", "--clients", "1"], "--url"),
        (["--url", "http://h/?x=1", "--model", "m", "--clients", "1"], "--url"),
        (["--url", "http://me:secret@h", "--model", "m", "--clients", "1"], "--url"),
        (["--url", "http://h", "--model", "m", "--clients", "1", "--json", "/no/such/file"], "--json: /no/such/file"),
        (["--url", "http://h", "--model", "m"], "--clients"),
        (["--url", "http://h", "--model", "m", "--clients", "1,x"], "'x'"),
        (["--url", "http://h", "--model", "m", "--clients", "1", "--input", "9-3"], "'9-3'"),
        (["--url", "http://h", "--model", "m", "--rate", "0"], "'0'"),
        (["--url", "http://h", "--model", "m", "--rate", "2", "--requests", "3"], "--requests"),
        (["--url", "http://h", "--model", "m", "--clients", "1", "--picture", "64"], "''"),
        (["--url", "http://h", "--model", "m", "--clients", "1", "--seen"], "--seen"),
        (["--url", "http://h", "--model", "m", "--first", "5", "--picture", "64x64"], "--picture"),
        (["--url", "http://h", "--model", "m", "--first", "5", "--metrics", "http://h"], "--metrics"),
    ],
)
def test_a_wrong_flag_is_named(flags: list[str], named: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "serve", *flags]) == 2
    assert named in capsys.readouterr().err


def test_a_file_that_is_there_is_written_whoever_has_its_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As /dev/stdout and /dev/null are."""
    allowed, there = os.access, tmp_path / "there"
    there.touch()
    monkeypatch.setattr(os, "access", lambda path, mode: allowed(path, mode) and (path, mode) != (tmp_path, os.W_OK))
    assert command._can_be_written(there)
    assert not command._can_be_written(tmp_path / "new")
    assert not command._can_be_written(tmp_path)


def test_a_key_that_no_header_can_hold_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-1\n")
    assert main(["bench", "serve", "--url", "http://h", "--model", "m", "--clients", "1"]) == 2
    assert "OPENAI_API_KEY has a character" in capsys.readouterr().err


def test_something_else_cannot_be_measured(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "engine"]) == 2
    assert "millrace bench serve" in capsys.readouterr().err
