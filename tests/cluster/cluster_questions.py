"""What the load asks: questions whose answers are the same in any company, where such can be found.

Sums of one row and of several round differently, on CPUs too, so that an answer depends on its company wherever a token
hangs on less than that. Of which there is no such token, a system on this machine says that judges itself
(tests/near_ties.py), and by several times what another order of sums was seen to change.
"""

import asyncio
from pathlib import Path

from chaos_quiet import quiet_answers
from chaos_requests import Ask
from chaos_system import MODEL_NAME
from cluster_load import asking

from cli.demo import Dtype, write_demo

DTYPE: Dtype = "float32"  # in bfloat16 every other answer has a token that hangs on the order of sums
QUESTIONS = [f"Question {number}: what is a mill race?" for number in range(4)]


def questions(exact: bool, directory: Path) -> list[str]:
    """QUESTIONS; if `exact`, in words that a demo checkpoint in DTYPE always gives the same answer to."""
    return asyncio.run(_steady(directory)) if exact else QUESTIONS


async def _steady(directory: Path) -> list[str]:
    model = directory / "model"
    write_demo(model, dtype=DTYPE)
    asks = [Ask(number, "text", asking(MODEL_NAME, text, number, None)) for number, text in enumerate(QUESTIONS)]
    answered = await quiet_answers(directory / "quiet", model, asks)
    return [str(ask.body["messages"][0]["content"][-1]["text"]) for ask, _ in answered]
