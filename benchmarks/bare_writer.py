"""Floor of what a gateway costs: a uvloop server that writes ready-made events of the same size, and does nothing else.

It takes the place of the gateway and of all behind it: it waits for `--streams` requests, and writes to each connection
one event a token, at the pace of `benchmarks/synthetic_engine.py`, which it also reports in the same way.
"""

import argparse
import asyncio
import socket
import time
from pathlib import Path
from typing import cast

import uvloop

from benchmarks.synthetic_engine import Board

HEAD = (
    b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream; charset=utf-8\r\ncache-control: no-cache\r\n"
    b"transfer-encoding: chunked\r\n\r\n"
)
FIELDS = b'"id":"chatcmpl-%032x","object":"chat.completion.chunk","created":1767225600,"model":"default"' % 1
EVENT = (
    b"data: {%b" % FIELDS + b',"system_fingerprint":"fp_0123456789ab",'
    b'"choices":[{"index":0,"delta":{"content":"%b"},"logprobs":null,"finish_reason":null}]}\n\n'
)


def chunk(text: str) -> bytes:
    """Return the event of one token as HTTP/1.1 has it in a chunked body."""
    event = EVENT % text.encode()
    return b"%x\r\n%b\r\n" % (len(event), event)


class Connection(asyncio.Protocol):
    """Connection whose first bytes are its whole request."""

    def __init__(self, asked: "asyncio.Queue[asyncio.Transport]") -> None:
        self._asked = asked

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)  # uvloop's derives from no class of asyncio's

    def data_received(self, _data: bytes) -> None:
        self.transport.write(HEAD)
        self._asked.put_nowait(self.transport)


async def run(args: argparse.Namespace) -> None:
    """Serve all rounds, and stay until killed: what was written last may not be sent yet."""
    board, event = Board(args.board), chunk(args.text)
    asked: asyncio.Queue[asyncio.Transport] = asyncio.Queue()
    loop = asyncio.get_running_loop()
    with socket.create_server(("127.0.0.1", args.port), backlog=4096) as listener:
        await loop.create_server(lambda: Connection(asked), sock=listener, backlog=4096)  # else 100
        for _ in range(args.rounds):
            await one_round(args, board, event, [await asked.get() for _ in range(args.streams)])
        await asyncio.Event().wait()


async def one_round(args: argparse.Namespace, board: Board, event: bytes, transports: list[asyncio.Transport]) -> None:
    """Write one batch of streams from start to end."""
    board.received = 0
    emitted_at = board.emitted_at()
    start = time.monotonic()
    for step in range(args.tokens):
        if args.window:
            while step * args.streams - board.received > args.window:  # noqa: ASYNC110  # of another process
                await asyncio.sleep(0.0005)
        else:
            await asyncio.sleep(max(0.0, start + step / args.steps_per_s - time.monotonic()))
        emitted_at[step] = time.monotonic()
        for transport in transports:
            transport.write(event)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--board", type=Path, required=True, help="file shared with the client")
    parser.add_argument("--streams", type=int, required=True)
    parser.add_argument("--tokens", type=int, required=True, help="tokens per stream")
    parser.add_argument("--text", required=True, help="the text of each token")
    parser.add_argument("--steps-per-s", type=float, default=100.0)
    parser.add_argument("--window", type=int, default=0, help="closed loop: tokens in flight at most; 0: paced")
    parser.add_argument("--rounds", type=int, default=1)
    uvloop.run(run(parser.parse_args()))


if __name__ == "__main__":
    main()
