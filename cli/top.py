"""Command `millrace top`: the pipeline, live, drawn once a second; q or Ctrl-C ends it."""

import asyncio
import contextlib
import os
import sys
import termios
import tty
from collections.abc import Iterator, Mapping, Sequence

from redis.asyncio import Redis
from redis.exceptions import RedisError
from rich.console import Console, RenderableType
from rich.live import Live
from rich.text import Text

from cli.board import draw
from cli.connection import no_answer, parser
from cli.status import UNKNOWN, look, read_once
from shared.bus.client import connect
from shared.bus.keys import Keys
from shared.errors import ConfigError

EVERY_S = 1.0
WIDE = 160  # columns where there is no terminal to ask


def main(words: Sequence[str], environ: Mapping[str, str]) -> int:
    """Run the command and return the exit status.

    Raises:
        ConfigError: a flag is wrong, or there is no terminal.
    """
    flags = parser("millrace top", "Watch the pipeline. q ends it.", environ)
    flags.add_argument("--once", action="store_true", help="draw the board once and end")
    given = flags.parse_args(words)
    console = Console(width=None if sys.stdout.isatty() or "COLUMNS" in environ else WIDE)
    if given.once:
        return _once(console, given.redis_url, given.blob_redis_url, given.namespace)
    if not (console.is_terminal and sys.stdin.isatty()):
        raise ConfigError("standard input and output are not a terminal; use --once to draw the board once")
    asyncio.run(_watch(console, given.redis_url, given.blob_redis_url, Keys(given.namespace)))
    return 0


def _once(console: Console, redis_url: str, blob_redis_url: str | None, namespace: str) -> int:
    try:
        console.print(draw(asyncio.run(read_once(redis_url, blob_redis_url, namespace))))
    except RedisError as error:
        print(f"millrace top: {no_answer(error)}", file=sys.stderr)
        return UNKNOWN
    return 0


async def _watch(console: Console, redis_url: str, blob_redis_url: str | None, keys: Keys) -> None:
    """Draw until q is pressed."""
    redis = connect(redis_url)
    blobs = connect(blob_redis_url) if blob_redis_url else None
    try:
        with _pressed("q") as pressed, Live(console=console, screen=True, auto_refresh=False) as live:
            drawing = asyncio.create_task(_draw(live, redis, blobs, keys))
            await asyncio.wait([drawing, pressed], return_when=asyncio.FIRST_COMPLETED)
            drawing.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await drawing
    finally:
        for client in (redis, blobs):
            if client is not None:
                await client.aclose()


async def _draw(live: Live, redis: Redis, blobs: Redis | None, keys: Keys) -> None:
    while True:
        live.update(await _board(redis, blobs, keys), refresh=True)
        await asyncio.sleep(EVERY_S)


async def _board(redis: Redis, blobs: Redis | None, keys: Keys) -> RenderableType:
    try:
        return draw(await look(redis, keys, blobs))
    except RedisError as error:
        return Text(no_answer(error), "bold red")


@contextlib.contextmanager
def _pressed(key: str) -> Iterator[asyncio.Future[None]]:
    """Yield a future that is done once the key is pressed; meanwhile the terminal passes keys on singly, unechoed."""
    loop, descriptor = asyncio.get_running_loop(), sys.stdin.fileno()
    pressed: asyncio.Future[None] = loop.create_future()

    def read_keys() -> None:
        typed = os.read(descriptor, 64)
        if (key.encode() in typed or not typed) and not pressed.done():
            pressed.set_result(None)

    before = termios.tcgetattr(descriptor)
    tty.setcbreak(descriptor)
    loop.add_reader(descriptor, read_keys)
    try:
        yield pressed
    finally:
        loop.remove_reader(descriptor)
        termios.tcsetattr(descriptor, termios.TCSADRAIN, before)
