"""Log-probabilities of prompts out of the whole loop, judged by transformers' logits in float32."""

from array import array
from pathlib import Path

import numpy as np
import pytest
import torch
from decoder_judge import Judge
from engine_cases import generate
from engine_loop import BLOCK, Bench
from torch import Tensor

from services.engine.kernels.sampling_ops import SamplingOps
from services.engine.loop.mailbox import Abort, Add
from services.engine.model.ernie import ErnieModel
from services.engine.model.inputs import KVCache
from services.engine.run.grammar_masks import GrammarMasks
from services.engine.run.prompt_scorer import Part, PromptScorer, score
from services.engine.run.runner import ModelRunner
from services.engine.run.sampler import Sampler
from services.engine.run.step import StepBuilder
from services.engine.schedule.embeds import Embeds
from services.engine.schedule.sequence import EngineFacts, Sequence, build
from shared.errors import RequestError
from shared.limits import MAX_PROMPT_LOGPROBS
from shared.messages import Finish, MediaSpan, PromptLogprobs, unpack_ids
from shared.model.config import load_model_config

TOLERANCE = 1e-4
BLOCKS = 24
PROMPT = [5, 6, 7, 8, 33, 1, 77, 2, 64, 12, 9, 41, 40, 5, 5, 6, 8]
OTHER = [PROMPT[0], *PROMPT[2:]]


@pytest.fixture(scope="module")
def facts(checkpoint_dir: Path) -> EngineFacts:
    return EngineFacts(load_model_config(checkpoint_dir), max_model_len=80, think_close_id=3)


def bench(model: ErnieModel, facts: EngineFacts, script: dict[int, list[object]], **bounds: object) -> Bench:
    config = facts.model
    blocks = int(bounds.get("blocks", BLOCKS))  # type: ignore[call-overload]
    cache = KVCache.allocate(config.num_layers, blocks, BLOCK, config.num_kv_heads, config.head_dim, model.dtype, "cpu")
    sampler = Sampler(config.eos_ids, SamplingOps(), model.device)
    builder = StepBuilder(model, BLOCK, config.image_patch_id)
    runner = ModelRunner(model, cache, sampler, builder, GrammarMasks(config.vocab_size, 1), None, max_seqs=3)
    return Bench(script, runner=runner, **{"blocks": blocks, **bounds})  # type: ignore[arg-type]


def asked(
    facts: EngineFacts, name: str, prompt: list[int], most: int | None, generated: int = 0, tokens: int = 6
) -> Add:
    message = generate(name, prompt, tokens, prompt_logprobs=most, ignore_eos=True)
    return Add(build(message, 1, [9] * generated, (), facts))


def scores(bench: Bench, name: str) -> PromptLogprobs:
    """The one that was said of a prompt, before or with its first token."""
    [found] = [begin.prompt_logprobs for begin in bench.begins[name] if begin.prompt_logprobs is not None]
    return found


def check(found: PromptLogprobs, prompt: list[int], logits: Tensor, most: int) -> None:
    expected = torch.log_softmax(logits[:-1], dim=-1)
    own = expected.gather(1, torch.tensor(prompt[1:]).unsqueeze(1))
    values = np.array(array("f", found.logprobs)).reshape(len(prompt) - 1, 1 + most)
    assert found.count == most
    assert np.abs(values[:, :1] - own.numpy()).max() <= TOLERANCE
    assert np.abs(values[:, 1:] - expected.topk(most).values.numpy()).max(initial=0) <= TOLERANCE
    ids = torch.tensor(unpack_ids(found.ids), dtype=torch.int64).reshape(len(prompt) - 1, most)
    assert np.abs(expected.gather(1, ids).numpy() - values[:, 1:]).max(initial=0) <= TOLERANCE
    least, greatest = ((expected > own + by).sum(dim=1) + 1 for by in (TOLERANCE, -TOLERANCE))
    ranks = torch.tensor(unpack_ids(found.ranks))
    assert bool((least <= ranks).all() and (ranks <= greatest).all())


@pytest.mark.parametrize("budget", [5, 64])
@pytest.mark.parametrize("most", [0, 3])
def test_scores_are_transformers_whatever_the_chunks_and_the_company(
    judge: Judge, model: ErnieModel, facts: EngineFacts, budget: int, most: int
) -> None:
    """Prompts with and without scores, of several numbers of alternatives, share steps."""
    script = {0: [asked(facts, "a", PROMPT, most), asked(facts, "b", OTHER, 5), asked(facts, "c", OTHER[1:], None)]}
    done = bench(model, facts, script, max_num_batched_tokens=budget)
    check(scores(done, "a"), PROMPT, judge.prompt(PROMPT)[1], most)
    check(scores(done, "b"), OTHER, judge.prompt(OTHER)[1], 5)
    assert not any(begin.prompt_logprobs for begin in done.begins["c"])
    assert len(done.answer("a")) == len(done.answer("b")) == 6


def test_a_cached_prefix_is_not_read_for_a_prompt_that_is_scored(
    judge: Judge, model: ErnieModel, facts: EngineFacts
) -> None:
    done = bench(
        model,
        facts,
        {
            0: [asked(facts, "a", PROMPT, None)],
            20: [asked(facts, "b", PROMPT, 2)],
            40: [asked(facts, "c", PROMPT, None)],
        },
    )
    check(scores(done, "b"), PROMPT, judge.prompt(PROMPT)[1], 2)
    assert [done.begins[name][0].cached_tokens > 0 for name in "abc"] == [False, False, True]
    assert done.answer("a") == done.answer("b") == done.answer("c")


@pytest.mark.parametrize("caching", [True, False])
def test_a_preempted_prompt_keeps_its_scores(
    judge: Judge, model: ErnieModel, facts: EngineFacts, caching: bool
) -> None:
    """The second prompt is computed in small chunks, and loses its blocks to the first one's answer in their middle.
    Tokens that it then takes from the cache, or computes again, are scored already."""
    prompt = PROMPT[:13]
    script = {0: [asked(facts, "a", [3, 4, 5], None, tokens=12), asked(facts, "b", prompt, 1)]}
    done = bench(model, facts, script, blocks=6, max_num_batched_tokens=3, caching=caching)
    [preempted] = [plan.preempted for plan in done.runner.plans if plan.preempted]
    [second] = preempted
    starts = [chunk.start for plan in done.runner.plans for chunk in plan.chunks if chunk.sequence is second]
    assert (second.request_id, starts.count(0)) == ("b", 1 if caching else 2)
    check(scores(done, "b"), prompt, judge.prompt(prompt)[1], 1)


def test_media_are_scored_as_the_text_around_them(judge: Judge, model: ErnieModel, facts: EngineFacts) -> None:
    paged, logits = judge.prompt([5, 6], ("image", (1, 4, 6)), [7, 8, 9])
    first, length = paged.ids.index(judge.placeholder), paged.ids.count(judge.placeholder)
    spans = (MediaSpan("image", "key", first, length, (1, 4, 6)),)
    rows = torch.stack([paged.embeds[at] for at in sorted(paged.embeds)])
    message = generate("a", paged.ids, 2, prompt_logprobs=1, spans=spans, ignore_eos=True)
    made = build(message, 1, [], (Embeds(rows.numpy().tobytes(), "float32"),), facts)
    done = bench(model, facts, {0: [Add(made)]}, max_num_batched_tokens=4)
    check(scores(done, "a"), paged.ids, logits, 1)


def test_a_prompt_of_one_token_has_nothing_to_score(model: ErnieModel, facts: EngineFacts) -> None:
    done = bench(model, facts, {0: [asked(facts, "a", [5], 3)]})
    assert scores(done, "a") == PromptLogprobs(3, b"", b"", b"")


def test_a_request_with_tokens_is_not_scored_again(model: ErnieModel, facts: EngineFacts) -> None:
    """Its scores were in the message of its first token, or before."""
    done = bench(model, facts, {0: [asked(facts, "a", PROMPT, 3, generated=2)]}, resumed=2)
    assert [begin.prompt_logprobs for begin in done.begins["a"]] == [None]


def test_a_request_that_leaves_in_the_middle_leaves_nothing(model: ErnieModel, facts: EngineFacts) -> None:
    script = {0: [asked(facts, "a", PROMPT, 3)], 2: [Abort("a", Finish("cancelled"))]}
    done = bench(model, facts, script, max_num_batched_tokens=4)
    assert [begin.prompt_logprobs for begin in done.begins["a"]] == [None]


def test_logits_exist_for_a_few_rows_at_a_time() -> None:
    seen: list[int] = []

    def project(x: Tensor) -> Tensor:
        seen.append(len(x))
        return x

    rows = torch.randn(10, 6)
    sequence = type("S", (), {"tokens": np.arange(11) % 6})
    [scored] = PromptScorer(project, 4, int).launch(rows, [Part(sequence, 2, 0, 0, 10)]).read()
    assert seen == [4, 4, 2]
    whole = score(rows, torch.arange(1, 11) % 6, 2)
    for part_of, all_of in zip((scored.rows.logprobs, scored.rows.ids, scored.rows.ranks), whole, strict=True):
        assert np.array_equal(part_of, all_of.numpy())


def test_more_than_the_limit_is_refused(facts: EngineFacts) -> None:
    """Of a prompt with media only the engine knows how long it is."""
    message = generate("a", [5] * 70, 2, prompt_logprobs=MAX_PROMPT_LOGPROBS // 70)
    with pytest.raises(RequestError) as refused:
        build(message, 1, [], (), facts)
    assert (refused.value.failure.status, refused.value.failure.param) == (400, "prompt_logprobs")
    assert isinstance(build(generate("a", [5] * 70, 2, prompt_logprobs=20), 1, [], (), facts), Sequence)
