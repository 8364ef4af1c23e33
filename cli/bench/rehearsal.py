"""Rehearsal of a client process, before it measures anything.

The first request of a process takes it some milliseconds more than later ones, of imports, name resolution and code
that runs for the first time. These would be taken for the server's.
"""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from cli.bench.http_stream import CONTENT_LENGTH

_EVENTS = b'data: {"choices": [{"text": "a"}]}\n\ndata: {"choices": [], "usage": {"completion_tokens": 1}}\n\n'
_ANSWER = b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n%x\r\n%b\r\n0\r\n\r\n" % (len(_EVENTS), _EVENTS)


@asynccontextmanager
async def scratch_server() -> AsyncIterator[str]:
    """Serve the least answer that a client reads, in this process; yield the URL."""
    async with await asyncio.start_server(_answer, "127.0.0.1", 0) as server:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/v1/completions"


async def _answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Answer one request."""
    head = await reader.readuntil(b"\r\n\r\n")
    await reader.readexactly(int(head.rpartition(CONTENT_LENGTH)[2]))
    writer.write(_ANSWER)
    await writer.drain()
    writer.close()
