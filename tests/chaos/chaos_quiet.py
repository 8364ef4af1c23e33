"""The answers of a system in which nothing goes wrong, to requests whose answers are the same in any company."""

import random
from pathlib import Path

import httpx
from chaos_client import Broken, Client, Manner, Transcript
from chaos_requests import Ask
from chaos_system import REQUEST_TIMEOUT_S, System, running
from machine import PATIENCE_S
from near_ties import NEAR_TIE

ONE_OF_EACH = {"gateway": 1, "mm_encoder": 1, "engine": 1, "postproc": 1}
WORDINGS = 30  # of a request, until one has no near tie; more than half have none
Answered = list[tuple[Ask, Transcript]]


async def quiet_answers(directory: Path, model: Path, asks: list[Ask]) -> Answered:
    """Ask for everything, one request at a time and nothing streamed.

    A request whose answer hangs on how sums are rounded (near_ties.py) is asked for in other words, and those are
    returned: what is wrong about an answer is then never the order of some sums.
    """
    # What is found in the prefix cache would not be judged again.
    settings = {"enable_prefix_caching": False}
    async with running(directory, model, ONE_OF_EACH, judged=True, engine=settings) as system:
        try:
            return [await _steady(system, ask) for ask in asks]
        except Broken as broken:
            raise AssertionError(f"the quiet system: {broken}\n{system.tails()}") from None


async def _steady(system: System, ask: Ask) -> tuple[Ask, Transcript]:
    (engine,) = system.of("engine")
    async with httpx.AsyncClient(timeout=PATIENCE_S) as http:
        client = Client(http, lambda: [gateway.url for gateway in system.of("gateway")], random.Random(0))
        for wording in range(WORDINGS):
            worded = ask.reworded(wording)
            ties = engine.log.read_text().count(NEAR_TIE)
            answer = await client.ask(worded, Manner(stream=False), REQUEST_TIMEOUT_S)
            # A tie is told of before the token is.
            if engine.log.read_text().count(NEAR_TIE) == ties:
                return worded, answer
    raise AssertionError(f"each of {WORDINGS} wordings of request {ask.number} ({ask.kind}) has a near tie")
