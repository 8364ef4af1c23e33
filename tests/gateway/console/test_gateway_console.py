"""The console over HTTP: its files and their policy, who may see the state, and what the state says."""

import asyncio
import json
import re
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import httpx
import msgspec
import pytest
from gateway_stages import Running, Stages, running
from machine import PATIENCE_S
from redis.asyncio import Redis

from services.gateway.console.observer import KEPT_S, MAX_WAITING, RequestObserver
from services.gateway.console.quarantine import MAX_LISTED
from services.gateway.console.routes import ASSETS, QUARANTINE_FRESH_S, STATIC, Console, Limits
from shared.bus.keys import ENCODE, GENERATE, Keys
from shared.bus.leases import Fence, Lease
from shared.bus.ownership import EntryOwnership
from shared.bus.pipeline_view import PipelineView, problems, read
from shared.bus.records import Records
from shared.bus.streams import send
from shared.bus.work_stream import WorkStream
from shared.message_codec import to_entry
from shared.messages import (
    Begin,
    Encode,
    Finish,
    Generate,
    Media,
    MediaSpan,
    Output,
    Request,
    Sampling,
    Share,
    TokenRun,
    Tokens,
    pack_ids,
)

SECRET = 7_654_321  # a token of a prompt, which must not be seen
SPAN = MediaSpan("image", "secret-key", 3, 9, (1, 6, 6))
KEY = {"Authorization": "Bearer key-1"}
LIMITS = Limits({"image": 100, "video": 100}, 1000, 500)
OURS = [name for name, _ in ASSETS.values() if not name.startswith("vendor/")]  # the others are as published


@pytest.fixture
async def server(checkpoint: Path, redis_url: str) -> AsyncIterator[Running]:
    async with running(checkpoint, redis_url, api_keys=("key-1",)) as started:
        yield started


@pytest.fixture
async def http(server: Running) -> AsyncIterator[httpx.AsyncClient]:
    async with httpx.AsyncClient(base_url=server.url, timeout=PATIENCE_S) as client:
        yield client


def request(request_id: str) -> Request:
    return Request(request_id, "gw", 1, 1.0, Sampling(seed=1), Output(thinking=True, stop=("a secret",)))


def generate(request_id: str, *spans: MediaSpan) -> Generate:
    return Generate(request(request_id), pack_ids([SECRET] * 50), 10, spans)


def encode(request_id: str) -> Encode:
    segments = (pack_ids([SECRET]), pack_ids([SECRET]))
    return Encode(request(request_id), segments, (Media("image", "messages[0]", blob="secret-blob"),))


def console_of(redis: Redis, keys: Keys, clock: Callable[[], float] = time.monotonic) -> Console:
    return Console(redis, keys, RequestObserver(redis, keys, shards=2), LIMITS, clock=clock)


async def look(redis: Redis, keys: Keys, console: Console | None = None) -> dict[str, Any]:
    return dict(json.loads(await (console or console_of(redis, keys)).state()))


def shape(view: PipelineView) -> str:
    """All of it but times."""
    return re.sub(r"(at|\w+_s)=[\d.]+", r"\1=", repr(view))


def by_id(state: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {one["id"]: one for one in state["requests"]}


# --------------------------------------------------------------------------------------------------------- the files


async def test_the_page_is_public_and_can_run_nothing_of_others(http: httpx.AsyncClient) -> None:
    for path in ASSETS:
        await check_asset(http, path)


async def check_asset(http: httpx.AsyncClient, path: str) -> None:
    reply = await http.get(path)
    assert reply.status_code == 200
    assert reply.content == (STATIC / ASSETS[path][0]).read_bytes()
    assert reply.headers["content-type"] == ASSETS[path][1]
    policy = dict(rule.split(" ", 1) for rule in reply.headers["content-security-policy"].split("; "))
    assert policy["default-src"] == "'self'"
    assert policy["img-src"] == policy["media-src"] == "'self' blob: data:"
    assert (policy["require-trusted-types-for"], policy["trusted-types"]) == ("'script'", "'none'")
    assert "unsafe" not in reply.headers["content-security-policy"]
    assert reply.headers["x-content-type-options"] == "nosniff"
    again = await http.get(path, headers={"if-none-match": reply.headers["etag"]})
    assert (again.status_code, again.content) == (304, b"")
    assert (await http.head(path)).status_code == 200


@pytest.mark.parametrize(
    "path",
    [
        "/console/../settings.py",
        "/console/..%2fsettings.py",
        "/console/%2e%2e/console.py",
        "/console//etc/passwd",
        "/console/index.html",
        "/console/",
        "/static/app.js",
        "/app.js",
        "/console/app.js%00.css",
    ],
)
async def test_nothing_else_can_be_read(http: httpx.AsyncClient, path: str) -> None:
    """Without a key nobody learns even that it is not there."""
    assert (await http.get(path)).status_code == 401
    assert (await http.get(path, headers=KEY)).status_code == 404


def test_the_page_asks_for_nothing_from_elsewhere() -> None:
    page = (STATIC / "index.html").read_text()
    assert "style=" not in page
    assert re.search(r"\son\w+=", page) is None
    assert re.findall(r"<script[^>]*>([^<]*)</script>", page) == [""]
    makes_markup = ("innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "eval(", "DOMParser")
    for name in OURS:
        text = (STATIC / name).read_text().replace("http://www.w3.org/2000/svg", "")
        assert "http://" not in text
        assert "https://" not in text
        assert [word for word in makes_markup if word in text] == [], name


def test_every_module_that_a_module_imports_is_served() -> None:
    for name in OURS:
        for imported in re.findall(r'(?:from|import\() ?"\./([^"]+)"', (STATIC / name).read_text()):
            assert f"/console/{imported}" in ASSETS, (name, imported)


def test_the_packages_of_others_come_with_their_licences_and_in_the_pinned_versions() -> None:
    locked = json.loads((STATIC.parent / "packages" / "package-lock.json").read_text())["packages"]
    named = re.findall(r"^(\S+) (\d\S*) \(\S+\)$", (STATIC / "vendor" / "LICENSES.txt").read_text(), re.MULTILINE)
    assert {"katex", "markdown-it", "@mdit/plugin-tex"} <= {name for name, _ in named}
    assert {locked[f"node_modules/{name}"]["version"] for name, _ in named} == {version for _, version in named}
    assert {path.suffix for path in (STATIC / "vendor" / "fonts").iterdir()} == {".woff2"}
    fonts = re.findall(r"url\(([^)]+)\)", (STATIC / "vendor" / "katex.css").read_text())
    assert fonts
    assert all((STATIC / "vendor" / font).exists() for font in fonts)


async def test_files_are_read_with_get_only(http: httpx.AsyncClient) -> None:
    assert (await http.post("/", headers=KEY)).status_code == 405


# --------------------------------------------------------------------------------------------------------- the state


async def test_the_state_needs_the_key(http: httpx.AsyncClient, server: Running) -> None:
    assert (await http.get("/console/state")).status_code == 401
    reply = await http.get("/console/state", headers=KEY)
    assert reply.status_code == 200
    assert reply.headers["cache-control"] == "no-store"
    assert [stage["service"] for stage in reply.json()["pipeline"]["stages"]] == [
        "gateway",
        "mm_encoder",
        "engine",
        "postproc",
    ]
    assert server.metric('millrace_http_requests_total{method="GET",path="/console/state",status="200"}') == 1


async def test_an_open_request_is_seen_on_its_way(server: Running, stages: Stages, http: httpx.AsyncClient) -> None:
    messages: Any = [{"role": "user", "content": "Hi"}]
    asked = asyncio.ensure_future(server.client.chat.completions.create(model="demo-model", messages=messages))
    sent = await stages.request()
    state = (await http.get("/console/state", headers=KEY)).json()
    assert by_id(state)[sent.id].items() >= {"where": "generate", "waiting": True}.items()
    await stages.answer(sent, "x")
    await asked


async def test_the_state_is_the_look_that_the_commands_share_and_the_requests(redis: Redis, keys: Keys) -> None:
    await Lease(redis, keys, "engine", "e1", 60_000, "1.2", 5.0).renew("ready", {"held": 3.0})
    records = Records(redis, keys)
    work = WorkStream(redis, keys, GENERATE, "engine", "e1", 3)
    await work.join()
    for i in range(3):
        await records.submit(GENERATE, generate(f"r{i}"))
    [taken] = await work.read_new(1, 100)
    await redis.xadd(keys.quarantine(ENCODE), {"x": "y"})
    state = await look(redis, keys)
    seen = await read(redis, keys, server=False)
    told = msgspec.json.decode(json.dumps(state["pipeline"]), type=PipelineView)
    assert shape(told) == shape(seen)
    assert state["problems"] == problems(seen)
    requests = by_id(state)
    first = requests[taken.message.request.id]
    assert (first["replica"], first["waiting"], first["attempts"]) == ("e1", False, 1)
    assert requests["r1"]["waiting"]
    assert requests["r1"]["accepted"] is not None


async def test_the_limits_are_those_of_the_settings(http: httpx.AsyncClient) -> None:
    assert (await http.get("/console/limits")).status_code == 401
    told = (await http.get("/console/limits", headers=KEY)).json()
    assert told["limit_mm_per_prompt"] == {"image": 100, "video": 100}
    assert told.keys() == {"limit_mm_per_prompt", "max_body_bytes", "max_media_bytes"}


# ---------------------------------------------------------------------------------------------------------- one request


async def find(console: Console, request_id: str) -> Any:
    return json.loads(await console.find(request_id))


async def test_a_request_is_found_by_its_id_wherever_it_waits(redis: Redis, keys: Keys) -> None:
    records, console = Records(redis, keys), console_of(redis, keys)
    for i in range(MAX_WAITING + 2):
        await records.submit(GENERATE, generate(f"r{i}"))
    await records.submit(ENCODE, encode("picture"))
    await look(redis, keys, console)
    hidden = (await find(console, f"r{MAX_WAITING + 1}"))["request"]
    assert hidden.items() >= {"where": "generate", "waiting": True, "accepted": 1.0}.items()
    assert (await find(console, "picture"))["request"]["where"] == "encode"
    assert await find(console, "nobody") == {"request": None, "quarantined": []}


async def test_an_answer_that_is_kept_is_found_long_after_its_end(redis: Redis, keys: Keys) -> None:
    records = Records(redis, keys)
    await records.submit(GENERATE, Generate(msgspec.structs.replace(request("r"), retain_s=60.0), pack_ids([1]), 10))
    await records.write_journal([("r", 0, (5, 6))], [Begin("r", 1, 0, 60, 16, 9, 0)])
    await records.retain([("r", Finish("length"), 60.0)], Fence(keys, "p", {}))
    found = (await find(console_of(redis, keys), "r"))["request"]
    assert found.items() >= {"where": "ended", "reason": "length", "tokens": 2, "prompt_tokens": 60}.items()
    assert abs(found["finished"] - found["seen"]) < PATIENCE_S


async def test_a_search_takes_the_names_that_people_have(http: httpx.AsyncClient, redis: Redis, keys: Keys) -> None:
    name = "0123456789abcdef"
    await Records(redis, keys).submit(GENERATE, generate(name))
    for given in (name, f"chatcmpl-{name}"):
        found = (await http.get("/console/request", params={"id": given}, headers=KEY)).json()
        assert found["request"]["id"] == name
    assert (await http.get("/console/request", params={"id": name})).status_code == 401
    for given in ("", "../x", f"{name}-0", f"{name}*", "x" * 5000):
        refused = await http.get("/console/request", params={"id": given}, headers=KEY)
        assert (refused.status_code, refused.json()["error"]["param"]) == (400, "id")


# ---------------------------------------------------------------------------------------------------------- quarantine


async def put_away(redis: Redis, keys: Keys, stream: str, work: Encode | Generate, reason: str) -> None:
    fields: Any = {"reason": reason, "attempts": 4, **to_entry(work)}
    await redis.xadd(keys.quarantine(stream), fields)


async def test_the_quarantine_is_shown_with_its_reasons(redis: Redis, keys: Keys) -> None:
    now = [0.0]
    console = console_of(redis, keys, lambda: now[0])
    assert (await look(redis, keys, console))["quarantine"] == []
    await put_away(redis, keys, GENERATE, generate("r1"), "it ended three engines")
    await put_away(redis, keys, ENCODE, encode("r2"), "it cannot be read")
    now[0] += 1
    picture = await console.state()
    newest, first = json.loads(picture)["quarantine"]
    assert (
        newest.items() >= {"stream": ENCODE, "request_id": "r2", "reason": "it cannot be read", "attempts": 4}.items()
    )
    assert first.items() >= {"stream": GENERATE, "request_id": "r1", "reason": "it ended three engines"}.items()
    assert first["at"] == pytest.approx(json.loads(picture)["pipeline"]["at"], abs=PATIENCE_S)
    assert b"secret" not in picture
    found = await find(console, "r1")
    assert [entry["reason"] for entry in found["quarantined"]] == ["it ended three engines"]


async def test_a_large_quarantine_is_listed_in_part_and_searched_as_a_whole(redis: Redis, keys: Keys) -> None:
    now = [0.0]
    console = console_of(redis, keys, lambda: now[0])
    for i in range(MAX_LISTED + 30):
        await put_away(redis, keys, GENERATE, generate(f"r{i}"), f"reason {i}")
    listed = (await look(redis, keys, console))["quarantine"]
    assert [entry["request_id"] for entry in listed] == [f"r{i}" for i in range(MAX_LISTED + 29, 29, -1)]
    assert [entry["reason"] for entry in (await find(console, "r0"))["quarantined"]] == ["reason 0"]
    [(oldest, _)] = await redis.xrange(keys.quarantine(GENERATE), count=1)
    await redis.xdel(keys.quarantine(GENERATE), oldest, listed[0]["entry"])
    await redis.xadd(keys.quarantine(GENERATE), {"x": "y"})
    await redis.xadd(keys.quarantine(GENERATE), {"reason": b"\xff", "attempts": "many"})
    now[0] += QUARANTINE_FRESH_S
    newest, bare = (await look(redis, keys, console))["quarantine"][:2]
    assert (newest["request_id"], newest["reason"], newest["attempts"]) == ("", "\ufffd", 0)
    assert (bare["request_id"], bare["reason"]) == ("", "")


# ---------------------------------------------------------------------------------------------------------- timelines


async def test_a_request_with_media_is_followed_to_its_end(redis: Redis, keys: Keys) -> None:
    records, console = Records(redis, keys), console_of(redis, keys, iter(range(99)).__next__)
    encoder = WorkStream(redis, keys, ENCODE, "mm_encoder", "m1", 3)
    engine = WorkStream(redis, keys, GENERATE, "engine", "e1", 3)
    await encoder.join()
    await engine.join()
    await records.submit(ENCODE, encode("r"))
    assert (
        by_id(await look(redis, keys, console))["r"].items() >= {"where": "encode", "waiting": True, "media": 1}.items()
    )
    [entry] = await encoder.read_new(1, 100)
    seen = by_id(await look(redis, keys, console))["r"]
    assert seen.items() >= {"where": "encode", "waiting": False, "replica": "m1", "encoded": None}.items()
    assert seen["accepted"] <= seen["encode_taken"]
    taken = seen["encode_taken"]
    assert isinstance(entry.message, Encode)
    await EntryOwnership(redis, keys, ENCODE, "mm_encoder", "m1").forward(
        entry.entry_id, entry.message, generate("r", SPAN)
    )
    seen = by_id(await look(redis, keys, console))["r"]
    assert seen.items() >= {"where": "generate", "waiting": True}.items()
    assert seen["accepted"] <= seen["encoded"]
    [entry] = await engine.read_new(1, 100)
    seen = by_id(await look(redis, keys, console))["r"]
    assert seen.items() >= {"where": "generate", "waiting": False, "replica": "e1", "first": None}.items()
    await send(redis, keys.tokens(1), Tokens((Begin("r", 1, 0, 60, 16, 9, 0),), (TokenRun("r", 1, 0, (5,)),)))
    await send(redis, keys.tokens(1), Tokens((), (TokenRun("r", 1, 1, (6, 7), finish=Finish("length")),)))
    await engine.ack([entry.entry_id])
    seen = by_id(await look(redis, keys, console))["r"]
    told = {
        "where": "ended",
        "reason": "length",
        "tokens": 3,
        "prompt_tokens": 60,
        "cached_tokens": 16,
        "replica": "e1",
    }
    assert seen.items() >= told.items()
    assert seen["encode_taken"] == taken, "it does not move with later looks"
    assert taken <= seen["encoded"] <= seen["taken"] <= seen["begun"] <= seen["first"]
    assert seen["first"] <= seen["last"] == seen["finished"]


async def test_media_that_were_encoded_before_anybody_looked_are_known(redis: Redis, keys: Keys) -> None:
    await Records(redis, keys).submit(GENERATE, generate("r", SPAN))
    seen = by_id(await look(redis, keys))["r"]
    assert seen.items() >= {"media": 1, "accepted": request("r").created}.items()
    assert seen["encoded"] > seen["accepted"]


async def test_what_the_trimmed_streams_no_longer_say_is_in_the_record(redis: Redis, keys: Keys) -> None:
    records, console = Records(redis, keys), console_of(redis, keys, iter(range(99)).__next__)
    work = WorkStream(redis, keys, GENERATE, "engine", "e1", 3)
    await work.join()
    told = Generate(msgspec.structs.replace(request("r"), retain_s=60.0), pack_ids([SECRET]), 10)
    await records.submit(GENERATE, told)
    [entry] = await work.read_new(1, 100)
    await records.write_journal([("r", 0, (5, 6))], [Begin("r", 1, 0, 60, 16, 9, 0)])
    seen = by_id(await look(redis, keys, console))["r"]
    assert (seen["tokens"], seen["prompt_tokens"], seen["finished"]) == (2, 60, None)
    await work.ack([entry.entry_id])
    await records.retain([("r", Finish("stop"), 60.0)], Fence(keys, "p", {}))
    state = await look(redis, keys, console)
    assert by_id(state)["r"].items() >= {"where": "ended", "reason": "stop"}.items()
    assert state["pipeline"]["at"] - PATIENCE_S < by_id(state)["r"]["finished"] <= state["pipeline"]["at"]


@pytest.mark.parametrize("looked", [True, False])
async def test_a_request_that_came_and_went_between_two_looks_is_its_tenants(
    redis: Redis, keys: Keys, looked: bool
) -> None:
    """The tokens stream shows it together with its finish, and does not say whose it is."""
    records, console = Records(redis, keys), console_of(redis, keys, iter(range(99)).__next__)
    work = WorkStream(redis, keys, GENERATE, "engine", "e1", 3)
    await work.join()
    told = msgspec.structs.replace(request("r"), retain_s=60.0, share=Share("alice", 1, 1))
    await records.submit(GENERATE, Generate(told, pack_ids([SECRET]), 10))
    [entry] = await work.read_new(1, 100)
    run = TokenRun("r", 1, 0, (5, 6), finish=Finish("stop"))
    await send(redis, keys.tokens(1), Tokens((Begin("r", 1, 0, 60, 0, 0, 0),), (run,)))
    await work.ack([entry.entry_id])
    if looked:
        await records.retain([("r", Finish("stop"), 60.0)], Fence(keys, "p", {}))
    else:  # the record cannot be read during the look, and can be later
        await redis.rename(keys.request("r"), "aside")
        await look(redis, keys, console)
        await redis.rename("aside", keys.request("r"))

    async def seen(tenant: str | None) -> list[str]:
        found = json.loads(await console.find("r", tenant))["request"]
        return [one["id"] for one in (*json.loads(await console.state(tenant))["requests"], *filter(None, [found]))]

    assert await seen("alice") == ["r", "r"]
    assert await seen(None) == ["r", "r"]
    assert await seen("bob") == []


async def test_a_cancelled_request_is_told_from_a_lost_one(redis: Redis, keys: Keys) -> None:
    records, console = Records(redis, keys), console_of(redis, keys, iter(range(99)).__next__)
    work = WorkStream(redis, keys, GENERATE, "engine", "e1", 3)
    await work.join()
    await records.submit(GENERATE, generate("r"))
    [entry] = await work.read_new(1, 100)
    await look(redis, keys, console)
    await records.cancel(["r"])
    await work.ack([entry.entry_id])
    await records.delete(["r"])
    assert by_id(await look(redis, keys, console))["r"].items() >= {"where": "ended", "reason": "cancelled"}.items()


async def test_a_request_that_was_refused_is_shown_as_ended(redis: Redis, keys: Keys) -> None:
    console = console_of(redis, keys, iter(range(99)).__next__)
    work = WorkStream(redis, keys, ENCODE, "mm_encoder", "m1", 3)
    await work.join()
    await Records(redis, keys).submit(ENCODE, encode("r"))
    [entry] = await work.read_new(1, 100)
    await look(redis, keys, console)
    await work.ack([entry.entry_id])
    assert by_id(await look(redis, keys, console))["r"].items() >= {"where": "ended", "reason": None}.items()


async def test_nothing_of_what_people_sent_is_in_it(redis: Redis, keys: Keys) -> None:
    records, console = Records(redis, keys), console_of(redis, keys)
    await records.submit(ENCODE, encode("r1"))
    await records.submit(GENERATE, generate("r2"))
    picture = await console.state()
    assert b"r1" in picture
    assert b"r2" in picture
    assert b"secret" not in picture
    assert str(SECRET).encode() not in picture


async def test_a_long_queue_is_counted_and_not_listed(redis: Redis, keys: Keys) -> None:
    records = Records(redis, keys)
    for i in range(MAX_WAITING + 10):
        await records.submit(GENERATE, generate(f"r{i}"))
    state = await look(redis, keys)
    assert state["pipeline"]["stages"][2]["queue"]["length"] == MAX_WAITING + 10
    assert len(state["requests"]) == MAX_WAITING


async def test_entries_that_cannot_be_read_do_not_hide_the_others(redis: Redis, keys: Keys) -> None:
    await redis.xadd(keys.stream(GENERATE), {"v": "1", "m": b"\xc1"})
    await redis.xadd(keys.stream(GENERATE), {"other": "x"})
    await redis.xadd(keys.tokens(0), {"v": "99", "m": "x"})
    await redis.set(keys.replica("postproc", "p"), "{}")
    await redis.sadd(keys.replicas("postproc"), "p")
    await Records(redis, keys).submit(GENERATE, generate("r"))
    await send(redis, keys.tokens(0), Tokens((), (TokenRun("r", 1, 0, (5,)),)))
    state = await look(redis, keys)
    assert by_id(state)["r"]["tokens"] == 1
    stages = {stage["service"]: stage for stage in state["pipeline"]["stages"]}
    assert [replica["state"] for replica in stages["postproc"]["replicas"]] == ["unreadable"]
    assert stages["engine"]["queue"]["length"] == 3


async def test_what_ended_is_forgotten_after_a_while(redis: Redis, keys: Keys) -> None:
    long_ago = f"{int((await redis.time())[0] - KEPT_S - 5) * 1000}-0"
    old = Tokens((), (TokenRun("old", 1, 0, (5,), finish=Finish("stop")),))
    await redis.xadd(keys.tokens(0), to_entry(old), id=long_ago)  # type: ignore[arg-type]
    await send(redis, keys.tokens(0), Tokens((), (TokenRun("new", 1, 0, (5,), finish=Finish("stop")),)))
    assert by_id(await look(redis, keys)).keys() == {"new"}


async def test_many_who_look_at_once_cost_one_look(redis: Redis, keys: Keys) -> None:
    now = [0.0]
    console = console_of(redis, keys, lambda: now[0])
    first, second = await asyncio.gather(console.state(), console.state())
    assert first is second
    now[0] += 1
    assert await console.state() is not first
