"""A checkpoint that 2 and 4 ranks can share, and requests of every kind for it."""

import os
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
from engine_cases import ByteTokenizer, generate
from engine_loop import BLOCK, Bench

from cli import demo
from services.engine.__main__ import load
from services.engine.loop.mailbox import Add
from services.engine.ranks.processes import Lost, Ranks
from services.engine.run.runner import Runner
from services.engine.schedule.embeds import Embeds
from services.engine.schedule.grammar_state import GrammarState
from services.engine.schedule.sequence import EngineFacts, Sequence, build
from services.engine.settings import EngineSettings
from shared.grammar.compiler import GrammarCompiler
from shared.grammar.forms import json_schema, write
from shared.messages import Grammar, MediaSpan
from shared.model.config import ModelConfig, load_model_config

LENGTH = 12
ROWS = 20  # of an image
DRAWN: dict[str, Any] = {
    "temperature": 1.0,
    "top_p": 0.9,
    "top_k": 40,
    "repetition_penalty": 1.1,
    "presence_penalty": 0.2,
}
JSON = Grammar(write(json_schema({"type": "array", "minItems": 2, "items": {"enum": ["a", 12]}}), False), "field")


def write_checkpoint(directory: Path) -> None:
    with patch.object(demo, "KV_HEADS", 4):
        demo.write_demo(directory, dtype="float32")


def settings_for(directory: Path, size: int, **changes: Any) -> EngineSettings:
    told = {
        "redis_url": "redis://u:secret@127.0.0.1:1/0",
        "model": str(directory),
        "device": "cpu",
        "max_model_len": 256,
        "block_size": BLOCK,
        "max_num_seqs": 4,
        "num_gpu_blocks_override": 128,
        "tensor_parallel_size": size,
        **changes,
    }
    return EngineSettings(**told)


class Loaded:
    """An engine of so many ranks, the first in this process. A context."""

    def __init__(self, directory: Path, size: int, lose: Callable[[Lost], None] | None = None, **changes: Any) -> None:
        self._settings = settings_for(directory, size, **changes)
        self._config = load_model_config(directory)
        self.ranks = Ranks(self._settings, os.environ, lose) if size > 1 else None
        self._stack = ExitStack()

    def __enter__(self) -> Runner:
        if self.ranks is not None:
            self._stack.enter_context(self.ranks)
        return load(self._settings, self._config, "cpu", self.ranks)[0]

    def __exit__(self, *failure: Any) -> None:
        self._stack.close()


class Cases:
    """Requests: texts that begin alike, images, draws, a grammar."""

    def __init__(self, config: ModelConfig, seed: int) -> None:
        self._config = config
        self._facts = EngineFacts(config, 256, think_close_id=9)
        self._compiler = GrammarCompiler(ByteTokenizer(), config.vocab_size, config.eos_ids)
        self._random = np.random.default_rng(seed)
        self._long = self._random.integers(300, 1000, 70).tolist()

    def adds(self) -> list[Add]:
        long = self._long
        asked = [
            self._text("greedy", long),
            self._text("same beginning", [*long[:40], 555, 556]),
            self._text("drawn", long[:9], seed=1, logprobs=2, **DRAWN),
            self._text("prompt scores", long[5:30], prompt_logprobs=1),
            self._text("grammar", long[:5], seed=2, temperature=1.0, grammar=JSON),
            self._image("image"),
            self._image("drawn image", seed=3, **DRAWN),
            self._text("resumed", long[:20], generated=long[20:25], seed=4, **DRAWN),
        ]
        return [Add(one) for one in asked]

    def _text(self, name: str, ids: list[int], generated: list[int] | None = None, **options: Any) -> Sequence:
        message = generate(name, ids, LENGTH, ignore_eos="grammar" not in options, **options)
        grammar = options.get("grammar")
        state = None if grammar is None else GrammarState(self._compiler.compile(grammar.text))
        return build(message, 1, generated or [], (), self._facts, state)

    def _image(self, name: str, **options: Any) -> Sequence:
        config = self._config
        ids = [401, 402, config.image_start_id, *[config.image_patch_id] * ROWS, config.image_end_id, 777]
        rows = np.random.default_rng(5).standard_normal((ROWS, config.hidden_size)).astype(np.float32)
        spans = (MediaSpan("image", name, 3, ROWS, (1, 8, 10)),)
        message = generate(name, ids, LENGTH, spans=spans, ignore_eos=True, **options)
        return build(message, 1, [], (Embeds(rows.tobytes(), "float32"),), self._facts)


def answers(runner: Runner, config: ModelConfig, seed: int) -> dict[str, dict[str, list[int]]]:
    """Return the tokens of all requests: whole prompts, prompts in chunks beside decoding, and with so few blocks that
    they preempt each other."""
    found = {}
    for name, tokens, blocks in (("whole", 512, 128), ("chunks", 7, 128), ("preempted", 64, 22)):
        adds = Cases(config, seed).adds()
        resumed = {add.sequence.request_id: add.sequence.num_generated for add in adds}
        bench = Bench(
            {0: adds[:5], 3: adds[5:]}, runner=runner, resumed=resumed, max_num_batched_tokens=tokens, blocks=blocks
        )
        found[name] = {request_id: bench.answer(request_id) for request_id in resumed}
        assert bench.metric("prefix_cache_hits_total") > 0
        assert (bench.metric("num_preemptions_total") > 0) == (name == "preempted")
    return found
