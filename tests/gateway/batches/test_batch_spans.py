"""Spans lead from an upload to its batch, to each line, and to the stages that answer it."""

from pathlib import Path

from batch_files import CHAT, answering, chat_line, ended, jsonl
from collector import traced
from gateway_stages import Stages, running

from shared.messages import Request

CALLER_TRACE = f"{7:032x}"
CALLER = {"traceparent": f"00-{CALLER_TRACE}-{8:016x}-01"}


async def test_the_way_of_a_batch(checkpoint: Path, redis_url: str, stages: Stages) -> None:
    requests: list[Request] = []
    content = jsonl(chat_line("a"), chat_line("hot", top_p=2))
    with traced("gateway") as (tracing, got):
        async with running(checkpoint, redis_url, tracing) as server, answering(stages, requests.append):
            file = await server.client.files.create(file=("in.jsonl", content), purpose="batch", extra_headers=CALLER)
            batch = await server.client.batches.create(input_file_id=file.id, endpoint=CHAT, completion_window="1h")
            batch = await ended(server, batch.id)
    assert batch.status == "completed", batch
    upload, creation, *lines = got.spans()
    assert (upload.name, upload.trace) == ("POST /v1/files", CALLER_TRACE)
    assert upload.attributes["millrace.file.id"] == file.id
    assert upload.attributes["millrace.file.bytes"] == len(content)
    assert (creation.name, creation.links) == ("POST /v1/batches", (upload.id,))
    assert creation.attributes["millrace.batch.id"] == batch.id
    assert creation.attributes["millrace.batch.lines"] == 2
    good, bad = sorted(lines, key=lambda line: line.attributes["millrace.batch.line"])
    assert len({upload.trace, creation.trace, good.trace, bad.trace}) == 4
    for line, status in ((good, 200), (bad, 400)):
        assert (line.name, line.links, line.parent) == ("batch line", (creation.id,), "")
        assert line.attributes["millrace.batch.id"] == batch.id
        assert line.attributes["http.route"] == CHAT
        assert line.attributes["http.response.status_code"] == status
        assert not line.failed
    [request] = requests
    assert (request.trace or "").startswith(f"00-{good.trace}-{good.id}-")
    assert good.attributes["gen_ai.response.finish_reasons"] == ["stop"]


async def test_what_is_sent_again_has_one_span(checkpoint: Path, redis_url: str, stages: Stages) -> None:
    """The server is full when the line is sent first."""
    with traced("gateway") as (tracing, got):
        async with running(checkpoint, redis_url, tracing, max_queue=1) as server, answering(stages):
            file = await server.client.files.create(file=("in.jsonl", jsonl(chat_line("a"))), purpose="batch")
            full = await stages.redis.xadd(stages.keys.stream("generate"), {"v": "1", "m": "?"})
            batch = await server.client.batches.create(input_file_id=file.id, endpoint=CHAT, completion_window="1h")
            while not server.metric('millrace_admission_rejections_total{reason="max_queue"}'):
                await stages.redis.ping()
            await stages.redis.xdel(stages.keys.stream("generate"), full)
            assert (await ended(server, batch.id)).status == "completed"
    assert [span.name for span in got.spans()] == ["POST /v1/files", "POST /v1/batches", "batch line"]
