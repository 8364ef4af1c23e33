"""Shared cases of the engine's tests: a small model's configuration, requests, sequences, and a model that is one
sum.
"""

from collections.abc import Callable
from collections.abc import Sequence as Ordered
from functools import cache
from typing import Any, ClassVar

import numpy as np
from llguidance import LLMatcher

from services.engine.run.prompt_scorer import Scored
from services.engine.run.sampler import Sampled
from services.engine.schedule.embeds import Embeds
from services.engine.schedule.grammar_state import GrammarState
from services.engine.schedule.plan import Chunk, Plan
from services.engine.schedule.sequence import EngineFacts, Sequence, build
from services.engine.schedule.step_times import StepTimes
from shared.grammar.compiler import GrammarCompiler
from shared.messages import Generate, MediaSpan, Output, Request, Sampling, pack_ids
from shared.model.config import ModelConfig, VisionConfig

EOS = 2
THINK_CLOSE = 3
TOOL_CALL = 4
TOOL_CALL_END = 5
PATCH = 200  # placeholder; ids from here on are the vision experts'
VOCAB = 256

CONFIG = ModelConfig(
    vocab_size=VOCAB,
    hidden_size=8,
    intermediate_size=16,
    num_layers=2,
    num_heads=2,
    num_kv_heads=1,
    head_dim=4,
    max_position_embeddings=4096,
    norm_eps=1e-5,
    rope_theta=10000.0,
    time_freqs=1,
    tie_embeddings=True,
    num_experts=4,
    text_expert_size=8,
    vision_expert_size=4,
    experts_per_token=2,
    num_shared_experts=1,
    shared_expert_size=8,
    dense_layers=(0,),
    image_patch_id=PATCH,
    image_start_id=PATCH + 1,
    image_end_id=PATCH + 2,
    video_start_id=PATCH + 3,
    video_end_id=PATCH + 4,
    pad_id=0,
    bos_id=1,
    eos_ids=(EOS,),
    dtype="float32",
    vision=VisionConfig(
        depth=1,
        hidden_size=8,
        num_heads=1,
        intermediate_size=8,
        patch_size=14,
        in_channels=3,
        spatial_merge_size=2,
        temporal_merge_size=2,
        norm_eps=1e-6,
        rope_theta=10000.0,
    ),
)

FACTS = EngineFacts(CONFIG, max_model_len=512, think_close_id=THINK_CLOSE, tool_call_id=TOOL_CALL)


def generate(
    request_id: str,
    prompt: Ordered[int],
    max_tokens: int = 8,
    *,
    shard: int = 0,
    thinking: bool = False,
    cache_salt: str = "",
    spans: tuple[MediaSpan, ...] = (),
    **options: Any,
) -> Generate:
    """A `generate` message with options of Sampling and Output; sampling is greedy unless it says otherwise."""
    sampling = {name: value for name, value in options.items() if name in Sampling.__struct_fields__}
    asked = Sampling(**{"seed": 0, "temperature": 0.0, **sampling})
    output = Output(thinking=thinking, **{name: options[name] for name in options.keys() - sampling.keys()})
    request = Request(request_id, "gateway-0", shard, 0.0, asked, output, cache_salt=cache_salt)
    return Generate(request, pack_ids(prompt), max_tokens, spans)


def sequence(
    prompt: Ordered[int],
    generated: Ordered[int] = (),
    *,
    request_id: str = "r",
    embeds: tuple[Embeds | None, ...] = (),
    facts: EngineFacts = FACTS,
    **options: Any,
) -> Sequence:
    message = generate(request_id, prompt, **options)
    asked = message.request.sampling.grammar
    grammar = None if asked is None else GrammarState(compile_grammar(asked.text))
    return build(message, 1, generated, embeds, facts, grammar)


def next_token(tokens: Ordered[int]) -> int:
    """Return the sum model's next token: it depends on every token before and on their order, and never ends the
    answer."""
    digest = 7
    for token in tokens:
        digest = (digest * 31 + token) % 100_003
    return 10 + digest % 90


def continuation(prompt: Ordered[int], length: int) -> list[int]:
    """Return the sum model's answer to a prompt."""
    tokens = list(prompt)
    for _ in range(length):
        tokens.append(next_token(tokens))
    return tokens[len(prompt) :]


def last(sequences: Ordered[Sequence]) -> list[Chunk]:
    """Return the chunks of a step in which each sequence computes its last token."""
    return [Chunk(made, made.num_tokens - 1, 1, samples=True) for made in sequences]


class ByteTokenizer:
    """The vocabulary as a grammar reads it: an id is that byte, but for those that end and close, and placeholders."""

    control: ClassVar[dict[str, int]] = {
        "</s>": EOS,
        "</think>": THINK_CLOSE,
        "<tool_call>": TOOL_CALL,
        "</tool_call>": TOOL_CALL_END,
    }

    def token_bytes(self, token_id: int) -> bytes:
        return b"" if token_id in self.control.values() or token_id >= PATCH else bytes([token_id])

    def encode_text(self, text: str) -> list[int]:
        return list(text.encode())


@cache
def compiler() -> GrammarCompiler:
    return GrammarCompiler(ByteTokenizer(), VOCAB, (EOS,))


def compile_grammar(text: str) -> LLMatcher:
    """Compile for the engine's tests."""
    return compiler().compile(text)


class Computed:
    """A launched step whose tokens are all known."""

    def __init__(self, sampled: list[Sampled]) -> None:
        self._sampled = sampled

    def sample(self) -> None:
        pass

    def read(self) -> list[Sampled]:
        return self._sampled

    def scores(self) -> list[Scored]:
        return []


class SumRunner:
    """Runs plans with the sum model, reading every token from a paged cache that it writes as the real one would, so
    that a wrong block, a lost block or a stale prefix changes what comes out. A token in flight is one that it sampled
    itself, so that a wrong source does too."""

    def __init__(self, num_blocks: int, block_size: int, overlaps: bool = False) -> None:
        self._cache = np.full((num_blocks, block_size), -1, np.int64)
        self._last: list[int] = []
        self.overlaps = overlaps
        self.step_times: StepTimes | None = None
        self.plans: list[Plan] = []

    def launch(self, plan: Plan, meanwhile: Callable[[], None] = lambda: None) -> Computed:
        meanwhile()
        self.plans.append(plan)
        sampled = self._run(plan)
        self._last[: len(sampled)] = [s.token for s in sampled]
        return Computed(sampled)

    def _run(self, plan: Plan) -> list[Sampled]:
        block_size = self._cache.shape[1]
        for chunk in plan.chunks:
            for at in range(chunk.start, chunk.start + chunk.length):
                block = chunk.sequence.blocks[at // block_size]
                known = chunk.sequence.tokens[at] if chunk.source is None else self._last[chunk.source]
                self._cache[block, at % block_size] = known
        out = []
        for row in plan.draws():
            cached = self._cache[list(row.sequence.blocks)].flatten()[: row.stop]
            out.append(Sampled(next_token(cached.tolist())))
        return out
