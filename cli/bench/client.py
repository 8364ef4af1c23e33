"""Client process of `millrace bench serve`.

    python -m cli.bench.client

Reads a `Load`, a line of JSON; says `ready`; reads the time to begin at; and writes a `Part`, when all is over.
"""

import asyncio
import ipaddress
import random
import sys
import time
from collections.abc import Iterator
from contextlib import suppress

import msgspec
import uvloop

from cli.bench.http_stream import Pool
from cli.bench.load import Answer, Arrival, Load, Part
from cli.bench.pictures import Pictures
from cli.bench.rehearsal import scratch_server

PAUSE_S = 0.1  # of a client whose request has failed


class Client:
    """Sender of one load."""

    def __init__(self, load: Load) -> None:
        self._load = load
        self._pool = Pool(load.url, load.key)
        self._pictures = Pictures(load.picture) if load.picture is not None else None
        self._rng = random.Random()  # not by a seed: a server that knows a prompt again would not compute it
        self.answers: list[Answer] = []

    @property
    def is_link_local(self) -> bool:
        """True if the server's address is of IPv6 and holds within one network alone, which its zone names."""
        try:
            return ipaddress.IPv6Address(self._pool.host).is_link_local
        except ValueError:
            return False

    async def run(self, begin: float) -> None:
        """Send everything from `begin` on; return when all was answered or the time is up."""
        load = self._load
        await asyncio.sleep(begin - time.monotonic())
        if load.arrivals:
            tasks = [asyncio.create_task(self._arrive(begin, arrival)) for arrival in load.arrivals]
        else:
            numbers: Iterator[int] = iter(range(sys.maxsize if load.requests is None else load.requests))
            tasks = [asyncio.create_task(self._loop(numbers)) for _ in range(load.clients)]
        left = None if load.seconds is None else begin + load.seconds - time.monotonic()
        done, late = await asyncio.wait(tasks, timeout=left)
        for task in late:
            task.cancel()
        await asyncio.gather(*late, return_exceptions=True)
        for task in done:
            task.result()
        self._pool.close()

    async def _loop(self, numbers: Iterator[int]) -> None:
        for _ in numbers:
            if (await self._ask(self._rng.randint(*self._load.prompt))).error is not None:
                await asyncio.sleep(PAUSE_S)

    async def _arrive(self, begin: float, arrival: Arrival) -> None:
        await asyncio.sleep(begin + arrival.at - time.monotonic())
        await self._ask(arrival.prompt)

    async def _ask(self, length: int) -> Answer:
        low, high = self._load.ids
        asked: dict[str, object]
        if self._pictures is not None:
            asked = {"messages": self._pictures.question(self._load.seen), "logprobs": True}
        else:
            asked = {"prompt": self._rng.choices(range(low, high + 1), k=length)}
        body = {
            **asked,
            "model": self._load.model,
            "max_tokens": self._load.output,
            "temperature": 0,
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        encoded = msgspec.json.encode(body)
        answer = Answer(length, 0.0)
        self.answers.append(answer)
        await self._pool.ask(encoded, answer)
        return answer


async def rehearse(load: Load) -> None:
    """Send one request to a server of our own, as those of `load` will be sent. Where this machine cannot reach itself
    the load is measured without."""
    with suppress(OSError):
        async with scratch_server() as url:
            once = msgspec.structs.replace(
                load, url=url, prompt=(1, 1), picture=None, clients=1, requests=1, seconds=None, arrivals=()
            )
            await Client(once).run(time.monotonic())


async def measure(client: Client, load: Load) -> Part:
    """Send a load from the moment on that standard input names; return what came."""
    await rehearse(load)
    print("ready", flush=True)
    began, busy = float(sys.stdin.readline()), time.process_time()
    await client.run(began)
    return Part(client.answers, (time.process_time() - busy) / (time.monotonic() - began))


def main() -> int:
    load = msgspec.json.decode(sys.stdin.readline(), type=Load)
    client = Client(load)
    # uvloop leaves out the zone of an address, and waits for ever for a link-local one without.
    part = (asyncio.run if client.is_link_local else uvloop.run)(measure(client, load))
    # Not sys.stdout: where Python is told to be unbuffered, it writes as much as the pipe takes at once, and no more.
    with open(sys.stdout.fileno(), "wb", closefd=False) as out:
        out.write(msgspec.json.encode(part))
    return 0


if __name__ == "__main__":
    sys.exit(main())
