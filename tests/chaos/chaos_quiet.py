"""The answers of a system in which nothing goes wrong."""

import random
from pathlib import Path

import httpx
from chaos_client import Broken, Client, Manner, Transcript
from chaos_requests import Ask
from chaos_system import REQUEST_TIMEOUT_S, running
from machine import PATIENCE_S

ONE_OF_EACH = {"gateway": 1, "mm_encoder": 1, "engine": 1, "postproc": 1}
Answered = list[tuple[Ask, Transcript]]


async def quiet_answers(directory: Path, model: Path, asks: list[Ask]) -> Answered:
    """Ask for everything, one request at a time and nothing streamed."""
    async with running(directory, model, ONE_OF_EACH) as system, httpx.AsyncClient(timeout=PATIENCE_S) as http:
        client = Client(http, lambda: [gateway.url for gateway in system.of("gateway")], random.Random(0))
        try:
            return [(ask, await client.ask(ask, Manner(stream=False), REQUEST_TIMEOUT_S)) for ask in asks]
        except Broken as broken:
            raise AssertionError(f"the quiet system: {broken}\n{system.tails()}") from None
