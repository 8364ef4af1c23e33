"""The engine with a real small checkpoint against transformers, token by token, and seeded draws against themselves."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from engine_bench import Reader, Seen, engine, submit
from engine_cases import generate
from guesses import among, guessing
from near_ties import NEAR_TIE, judging
from oracle import Model, hf_generate, save_with_transformers
from redis.asyncio import Redis

from services.engine.__main__ import build, load
from services.engine.run.runner import Runner
from services.engine.schedule.sequence import EngineFacts
from services.engine.settings import EngineSettings, SpeculativeConfig
from shared.bus.blobs import Blobs
from shared.bus.keys import Keys
from shared.bus.records import Records
from shared.errors import ConfigError
from shared.messages import Generate, MediaSpan
from shared.model.config import ModelConfig, load_model_config

LENGTH = 12
GRID = (1, 8, 10)  # patches of the image: 20 tokens


class Case:
    """A prompt, and what transformers makes of it."""

    def __init__(self, name: str, ids: list[int], expected: list[int], spans: tuple[MediaSpan, ...] = ()) -> None:
        self.name = name
        self.ids = ids
        self.expected = expected
        self.spans = spans

    def message(self, request_id: str, **sampling: Any) -> Generate:
        return generate(request_id, self.ids, LENGTH, spans=self.spans, ignore_eos=True, **sampling)


class Oracle:
    """The checkpoint on disk, transformers' model of it, and the cases."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.model: Model = save_with_transformers(directory)
        self.config: ModelConfig = load_model_config(directory)
        generator = torch.Generator().manual_seed(3)
        long = torch.randint(300, 1000, (70,), generator=generator).tolist()
        self.embeds: dict[str, torch.Tensor] = {}
        self.cases = [
            self._text("short", [301, 302, 303]),
            self._text("long", long),
            self._text("same beginning", [*long[:40], 555, 556]),
            self._image("image", [401, 402], seed=1),
            self._image("another image", [401, 402], seed=2),
        ]

    def facts(self) -> EngineFacts:
        return EngineFacts(self.config, 256, think_close_id=9)

    async def store(self, redis: Redis, keys: Keys) -> None:
        for key, rows in self.embeds.items():
            meta = {"grid": GRID, "rows": len(rows), "hidden": rows.shape[1], "dtype": "float32"}
            await Blobs(redis, keys, 60, 1 << 26).put("embeds", key, rows.numpy().tobytes(), json.dumps(meta).encode())

    def runner(self, redis_url: str, **changes: Any) -> tuple[Runner, int, dict[str, Any]]:
        told = {
            "model": str(self.directory),
            "max_model_len": 256,
            "block_size": 16,
            "max_num_seqs": 8,
            "max_num_batched_tokens": 8192,
            "device": "cpu",
            **changes,
        }
        runner, blocks = load(EngineSettings(redis_url=redis_url, **told), self.config, "cpu")
        return runner, blocks, told

    def _text(self, name: str, ids: list[int]) -> Case:
        return Case(name, ids, hf_generate(self.model, ids, LENGTH, ignore_eos=True))

    def _image(self, key: str, text: list[int], seed: int) -> Case:
        pixels = torch.randn(80, 588, generator=torch.Generator().manual_seed(seed))
        grids = torch.tensor([GRID])
        with torch.no_grad():
            rows = torch.cat(self.model.get_image_features(pixels, grids).pooler_output)
        self.embeds[key] = rows
        config = self.config
        ids = [*text, config.image_start_id, *[config.image_patch_id] * len(rows), config.image_end_id, 777]
        spans = (MediaSpan("image", key, len(text) + 1, len(rows), GRID),)
        expected = hf_generate(self.model, ids, LENGTH, ignore_eos=True, images=(pixels, grids))
        return Case(key, ids, expected, spans)


@pytest.fixture(scope="module")
def oracle(tmp_path_factory: pytest.TempPathFactory) -> Oracle:
    return Oracle(tmp_path_factory.mktemp("engine-tokens") / "checkpoint")


def check(cases: Sequence[Case], seen: Sequence[Seen]) -> None:
    assert [(case.name, made.tokens) for case, made in zip(cases, seen, strict=True)] == [
        (case.name, case.expected) for case in cases
    ]


def test_the_cases_are_telling(oracle: Oracle) -> None:
    assert len({tuple(case.expected) for case in oracle.cases}) == len(oracle.cases)
    assert oracle.cases[3].ids == oracle.cases[4].ids, "only the content key tells these apart"
    assert all(len(set(case.expected)) > 3 for case in oracle.cases)


@pytest.mark.parametrize("caching", [True, False], ids=["prefix cache", "no prefix cache"])
@pytest.mark.parametrize("budget", [1, 7, 8192])
async def test_greedy_tokens_are_transformers(
    oracle: Oracle, redis: Redis, redis_url: str, keys: Keys, budget: int, caching: bool
) -> None:
    runner, blocks, told = oracle.runner(redis_url, max_num_batched_tokens=budget, enable_prefix_caching=caching)
    reader = Reader(redis, keys)
    await oracle.store(redis, keys)
    async with engine(redis, redis_url, runner, blocks=blocks, facts=oracle.facts(), **told) as running:
        for case in oracle.cases:
            await submit(redis, keys, case.message(f"alone {case.name}"))
            check([case], await reader.finished(f"alone {case.name}"))
        others = [generate(f"other {i}", [310 + i] * (i % 4 + 1), LENGTH) for i in range(16)]
        await submit(redis, keys, *others[:8], *(case.message(case.name) for case in oracle.cases), *others[8:])
        check(oracle.cases, await reader.finished(*(case.name for case in oracle.cases)))
        await reader.finished(*(other.request.id for other in others))
        hits = running.metric("prefix_cache_hits_total")
        assert (hits > 0) == caching


async def test_greedy_tokens_survive_preemption(oracle: Oracle, redis: Redis, redis_url: str, keys: Keys) -> None:
    """Blocks of two tokens, and few of them: every answer grows into blocks that others hold."""
    runner, blocks, told = oracle.runner(
        redis_url, max_model_len=112, num_gpu_blocks_override=56, block_size=2, max_num_batched_tokens=16
    )
    reader = Reader(redis, keys)
    await oracle.store(redis, keys)
    async with engine(redis, redis_url, runner, blocks=blocks, facts=oracle.facts(), **told) as running:
        named = [(f"{case.name} {i}", case) for i in range(3) for case in oracle.cases]
        await submit(redis, keys, *(case.message(name) for name, case in named))
        check([case for _, case in named], await reader.finished(*(name for name, _ in named)))
        assert running.metric("num_preemptions_total") > 0
        assert running.metric("kv_cache_usage_perc") == 0


async def test_guessed_tokens_are_transformers_too_from_any_token_on(
    oracle: Oracle, redis: Redis, redis_url: str, keys: Keys
) -> None:
    guesses = SpeculativeConfig(method="ngram", num_speculative_tokens=4)
    runner, blocks, told = oracle.runner(redis_url, speculative_config=guesses)
    reader, records = Reader(redis, keys), Records(redis, keys)
    await oracle.store(redis, keys)
    texts = [case.ids + case.expected for case in oracle.cases]
    with guessing(among(texts), wrong=4):
        async with engine(redis, redis_url, runner, blocks=blocks, facts=oracle.facts(), **told) as running:
            await submit(redis, keys, *(case.message(case.name) for case in oracle.cases))
            check(oracle.cases, await reader.finished(*(case.name for case in oracle.cases)))
            case = oracle.cases[4]
            for cut in range(LENGTH):
                name = f"cut {cut}"
                await resume(redis, keys, records, case.message(name), case.expected[:cut])
                reader.seen[name] = Seen(case.expected[:cut])
                [resumed] = await reader.finished(name)
                assert resumed.tokens == case.expected
            drafted, right = (running.metric(f"spec_decode_num_{kind}_tokens_total") for kind in ("draft", "accepted"))
            assert drafted > right > LENGTH
    assert any(len(run.tokens) > 2 for _, message in reader.messages for run in message.runs)


SEEDED = {"temperature": 1.0, "top_p": 0.9, "repetition_penalty": 1.1, "presence_penalty": 0.2}


async def resume(redis: Redis, keys: Keys, records: Records, message: Generate, known: list[int]) -> None:
    """Submit a request of which these tokens are in the journal. The record knows an earlier owner before the entry can
    be taken, as after a crash."""
    name = message.request.id
    await records.submit("elsewhere", message)
    await redis.hincrby(keys.request(name), "epoch", 1)
    await records.write_journal([(name, 0, known)])
    entries: Any = await redis.xrange(keys.stream("elsewhere"))
    await redis.xadd(keys.stream("generate"), entries[-1][1])


@pytest.fixture
def judged() -> Iterator[None]:
    with judging():
        yield


@pytest.mark.usefixtures("judged")
@pytest.mark.parametrize("kind", ["base", "rejection"])
async def test_seeded_draws_are_the_same_alone_among_others_and_resumed(
    oracle: Oracle, redis: Redis, redis_url: str, keys: Keys, capsys: pytest.CaptureFixture[str], kind: str
) -> None:
    # What is found cached is not judged again.
    runner, blocks, told = oracle.runner(redis_url, sampling_class=kind, enable_prefix_caching=False)
    reader, records = Reader(redis, keys), Records(redis, keys)
    await oracle.store(redis, keys)

    async def steady(case: Case) -> tuple[int, list[int]]:
        """A seed with which no token hangs on how sums are rounded, and the tokens."""
        for seed in range(30):
            name = f"alone {case.name} {seed}"
            capsys.readouterr()
            await submit(redis, keys, case.message(name, seed=seed, **SEEDED))
            [seen] = await reader.finished(name)
            if NEAR_TIE not in capsys.readouterr().err:
                return seed, seen.tokens
        raise AssertionError(f"{case.name}: with each seed there is a near tie; take another prompt")

    async with engine(redis, redis_url, runner, blocks=blocks, facts=oracle.facts(), **told):
        found = {case.name: await steady(case) for case in oracle.cases}
        alone = {name: tokens for name, (_, tokens) in found.items()}
        others = [generate(f"other {i}", [310 + i] * (i + 1), LENGTH, temperature=1.0, top_k=5) for i in range(16)]
        together = [case.message(case.name, seed=found[case.name][0], **SEEDED) for case in oracle.cases]
        await submit(redis, keys, *others[:8], *together, *others[8:])
        seen_together = await reader.finished(*(case.name for case in oracle.cases))
        assert {c.name: s.tokens for c, s in zip(oracle.cases, seen_together, strict=True)} == alone
        case = oracle.cases[3]
        for cut in range(LENGTH):
            name, whole = f"cut {cut}", alone[case.name]
            reader.seen[name] = Seen(whole[:cut])
            message = case.message(name, seed=found[case.name][0], **SEEDED)
            await resume(redis, keys, records, message, whole[:cut])
            [resumed] = await reader.finished(name)
            assert resumed.tokens == whole
            # The first Begin shuts out the former owner before what it left is read; the second says where we go on.
            assert [(begin.epoch, begin.index) for begin in resumed.begins] == [(2, 0), (2, cut)]


async def test_logprobs_are_transformers(oracle: Oracle, redis: Redis, redis_url: str, keys: Keys) -> None:
    runner, blocks, told = oracle.runner(redis_url)
    reader, case = Reader(redis, keys), oracle.cases[0]
    async with engine(redis, redis_url, runner, blocks=blocks, facts=oracle.facts(), **told):
        await submit(redis, keys, case.message("r", logprobs=4))
        await reader.finished("r")
    [run, *_] = [run for _, message in reader.messages for run in message.runs]
    with torch.no_grad():
        expected = torch.log_softmax(
            oracle.model(
                input_ids=torch.tensor([case.ids]),
                mm_token_type_ids=torch.zeros(1, len(case.ids), dtype=torch.int64),
                moe_mm_token_type_ids=torch.zeros(1, len(case.ids), dtype=torch.int64),
            ).logits[0, -1],
            -1,
        ).topk(4)
    assert run.logprobs is not None
    [logprob] = run.logprobs
    assert [token for token, _ in logprob.top] == expected.indices.tolist()
    assert [value for _, value in logprob.top] == pytest.approx(expected.values.tolist(), abs=1e-4)
    assert logprob.logprob == logprob.top[0][1]


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"max_model_len": 1 << 20}, "max_model_len"),
        ({"max_num_seqs": 0}, "max_num_seqs"),
        ({"device": "cuda"}, "device"),
    ],
)
async def test_the_composition_root_names_what_it_cannot_do(
    oracle: Oracle, redis: Redis, redis_url: str, changes: dict[str, Any], named: str
) -> None:
    if changes.get("device") == "cuda" and torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    with pytest.raises(ConfigError, match=named):
        build(EngineSettings(redis_url=redis_url, model=str(oracle.directory), **changes), redis)
