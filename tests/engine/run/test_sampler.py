"""The sampler: each operation by its formula, both strategies against exact probabilities, rows against batches."""

import math
import warnings
from collections.abc import Sequence as Ordered
from typing import Any

import numpy as np
import pytest
import torch
from engine_cases import EOS, THINK_CLOSE, TOOL_CALL, VOCAB, last, sequence
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from services.engine.run.assembly import sampling_ops
from services.engine.run.grammar_masks import GrammarMasks
from services.engine.run.sampler import MIN_LOGPROB, Sampled, Sampler
from services.engine.run.sampling_plan import plan_sampling
from services.engine.schedule.sequence import Sequence
from services.engine.settings import SamplingClass
from shared.grammar import forms
from shared.messages import Grammar

CLASSES: tuple[SamplingClass, ...] = ("base", "rejection")
MASKS = GrammarMasks(VOCAB, 1)


def sample(logits: Tensor, sequences: Ordered[Sequence], kind: SamplingClass = "base") -> list[Sampled]:
    sampler = Sampler((EOS,), sampling_ops(kind, on_gpu=False), torch.device("cpu"))
    return sampler.draw(logits.clone(), plan_sampling(last(sequences), MASKS)).read()


def choice(*texts: str) -> Grammar:
    return Grammar(forms.write(forms.choice(texts), thinking=False), "choice")


def tokens(logits: Tensor, sequences: Ordered[Sequence], kind: SamplingClass = "base") -> list[int]:
    return [sampled.token for sampled in sample(logits, sequences, kind)]


def row(**values: float) -> Tensor:
    """[1, VOCAB] logits: -5, but for tokens given as t<id>=value."""
    out = torch.full((1, VOCAB), -5.0)
    for name, value in values.items():
        out[0, int(name[1:])] = value
    return out


# ------------------------------------------------------------------------------------------ single operations, greedy


@pytest.mark.parametrize(
    ("logits", "prompt", "generated", "options", "expected"),
    [
        (row(t30=2.0, t31=1.9), [5], [], {}, 30),
        (row(t30=2.0, t31=1.9), [5], [], {"temperature": 9e-6}, 30),
        (row(t30=2.0, t31=1.9), [5], [], {"logit_bias": {31: 0.2}}, 31),
        (row(t30=2.0, t31=1.9), [5], [], {"logit_bias": {30: -100.0}}, 31),
        # repetition: positive logits are divided; the prompt counts as seen
        (row(t30=2.0, t31=1.9), [30], [], {"repetition_penalty": 1.1}, 31),
        (row(t30=2.0, t31=1.9), [5], [30], {"repetition_penalty": 1.1}, 31),
        (row(t30=2.0, t31=1.9), [5], [31], {"repetition_penalty": 1.1}, 30),
        # ... and negative ones multiplied
        (row(t30=-1.0, t31=-1.1), [30], [], {"repetition_penalty": 1.2}, 31),
        (row(t30=-1.0, t31=-1.1), [31], [], {"repetition_penalty": 0.5}, 31),
        # presence and frequency look at the answer only
        (row(t30=2.0, t31=1.9), [30], [], {"presence_penalty": 1.0}, 30),
        (row(t30=2.0, t31=1.9), [5], [30], {"presence_penalty": 0.2}, 31),
        (row(t30=2.0, t31=1.5), [5], [30] * 4, {"presence_penalty": 0.4}, 30),
        (row(t30=2.0, t31=1.5), [5], [30] * 4, {"frequency_penalty": 0.2}, 31),
        (row(t30=2.0, t31=1.5), [5], [30], {"frequency_penalty": 0.2}, 30),
        (row(t30=2.0, t31=1.9), [5], [31], {"presence_penalty": -0.2}, 31),
        # repetition first, then subtraction: 2 / 2 - 0.3 = 0.7 < 0.8 < (2 - 0.3) / 2
        (row(t30=2.0, t31=0.8), [5], [30], {"repetition_penalty": 2.0, "presence_penalty": 0.3}, 31),
        # the bias comes before the penalties: (2 + 2) / 2 = 2 < 2.5 < 2 / 2 + 2
        (row(t30=2.0, t31=2.5), [30], [], {"logit_bias": {30: 2.0}, "repetition_penalty": 2.0}, 31),
        # no end before min_tokens
        (row(t30=2.0, t2=3.0), [5], [30], {"min_tokens": 2}, 30),
        (row(t30=2.0, t2=3.0), [5], [30, 30], {"min_tokens": 2}, 2),
        (row(t30=2.0, t40=3.0), [5], [30], {"min_tokens": 2, "stop_token_ids": (40,)}, 30),
        (row(t30=2.0, t2=3.0), [5], [], {"min_tokens": 2, "logit_bias": {2: 100.0}}, 30),
        # bad words
        (row(t30=2.0, t31=1.9), [5], [], {"bad_words": ((30,),)}, 31),
        (row(t30=2.0, t31=1.9), [5], [8, 9], {"bad_words": ((8, 9, 30),)}, 31),
        (row(t30=2.0, t31=1.9), [5], [9, 8], {"bad_words": ((8, 9, 30),)}, 30),
        (row(t30=2.0, t31=1.9), [5], [9], {"bad_words": ((8, 9, 30),)}, 30),
        (row(t30=2.0, t31=1.9), [8, 9], [], {"bad_words": ((8, 9, 30),)}, 30),
        (row(t30=2.0, t31=1.9), [5], [], {"bad_words": ((30,),), "logit_bias": {30: 100.0}}, 31),
    ],
)
def test_each_operation_moves_the_choice(
    logits: Tensor, prompt: list[int], generated: list[int], options: dict[str, Any], expected: int
) -> None:
    neutral = sequence([5], max_tokens=9)
    made = sequence(prompt, generated, max_tokens=20, **options)
    assert tokens(logits, [made]) == [expected]
    # Neighbours neither change it nor are changed by it, wherever they stand.
    plain = int(logits.argmax())
    assert tokens(logits.repeat(3, 1), [neutral, made, neutral]) == [plain, expected, plain]


# ------------------------------------------------------------------------------------------------------ distributions


def exact(
    logits: Tensor, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0
) -> dict[int, float]:
    """The distribution by its definition, in plain numbers."""
    scaled = [value / temperature for value in logits[0].tolist()]
    total = sum(math.exp(value) for value in scaled)
    probs = {token: math.exp(value) / total for token, value in enumerate(scaled)}
    most = max(probs.values())
    probs = {token: p for token, p in probs.items() if p >= min_p * most}
    mass = 1.0
    if top_k > 0:
        smallest = sorted(probs.values(), reverse=True)[:top_k][-1]
        probs = {token: p for token, p in probs.items() if p >= smallest}
        mass = sum(probs.values())
    if top_p < 1:
        probs = {token: p for token, p in probs.items() if sum(q for q in probs.values() if q > p) < top_p * mass}
    total = sum(probs.values())
    return {token: p / total for token, p in probs.items()}


# A few likely tokens, two of them equally likely, and a long tail of 0.1 % each.
CURVE = row(t30=4.0, t31=3.5, t32=3.5, t33=3.0, t34=2.0, t35=1.5)
CURVE[0, 36:] = -2.5
CURVE[0, :30] = -30.0

DRAWS = 4000


def chi_square_limit(freedom: int) -> float:
    """Exceeded by one seed in ten thousand (Wilson and Hilferty's approximation)."""
    spread = 2 / (9 * freedom)
    return freedom * (1 - spread + 3.719 * math.sqrt(spread)) ** 3


@pytest.mark.parametrize("kind", CLASSES)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"temperature": 0.5},
        {"temperature": 1.7},
        {"top_k": 1},
        {"top_k": 3},
        {"top_k": 4},
        {"top_k": 10_000},
        {"top_p": 0.5},
        {"top_p": 0.7},
        {"top_p": 0.95},
        {"top_p": 1e-9},
        {"min_p": 0.3},
        {"min_p": 0.3, "top_p": 0.9},
        {"top_k": 4, "top_p": 0.8},
        {"top_k": 5, "top_p": 0.6, "min_p": 0.1, "temperature": 1.3},
    ],
    ids=str,
)
def test_draws_follow_the_exact_distribution(kind: SamplingClass, options: dict[str, Any]) -> None:
    expected = exact(CURVE, **options)
    asked: dict[str, Any] = {"temperature": 1.0, **options}
    sequences = [sequence([5], max_tokens=9, seed=seed, **asked) for seed in range(DRAWS)]
    drawn = tokens(CURVE.expand(DRAWS, -1), sequences, kind)
    assert set(drawn) <= set(expected), "a token that was cut away was drawn"
    counts = np.bincount(drawn, minlength=VOCAB)
    # Cells of fewer than five expected draws are taken together.
    rare = {token for token, p in expected.items() if p * DRAWS < 5}
    cells = [(counts[token], p * DRAWS) for token, p in expected.items() if token not in rare]
    if rare:
        cells.append((sum(counts[token] for token in rare), sum(expected[token] for token in rare) * DRAWS))
    if len(cells) > 1:
        statistic = sum((seen - wanted) ** 2 / wanted for seen, wanted in cells)
        assert statistic < chi_square_limit(len(cells) - 1)


@pytest.mark.parametrize("kind", CLASSES)
def test_draws_of_one_request_follow_it_too(kind: SamplingClass) -> None:
    """Over the indices of one seed, as over seeds."""
    made = sequence([5], max_tokens=500, seed=99, temperature=1.0, top_p=0.8, ignore_eos=True)
    expected = exact(CURVE, top_p=0.8)
    drawn = []
    for _ in range(500):
        drawn += tokens(CURVE, [made], kind)
        made.append(drawn[-1])
    counts = np.bincount(drawn, minlength=VOCAB)
    statistic = sum((counts[token] - 500 * p) ** 2 / (500 * p) for token, p in expected.items())
    assert statistic < chi_square_limit(len(expected) - 1)


def test_minus_infinity_is_never_drawn_nor_sent() -> None:
    logits = torch.full((1, VOCAB), -torch.inf)
    logits[0, 30:32] = torch.tensor([1.0, 0.0])
    [drawn] = sample(logits, [sequence([5], temperature=1.0, logprobs=5)])
    assert drawn.token in (30, 31)
    assert drawn.logprob is not None
    assert [value for _, value in drawn.logprob.top][2:] == [MIN_LOGPROB] * 3
    assert all(math.isfinite(value) for _, value in drawn.logprob.top)


def test_a_row_of_banned_tokens_still_gives_one() -> None:
    made = sequence([5], temperature=1.0, bad_words=tuple((token,) for token in range(VOCAB)))
    assert tokens(row(t30=2.0), [made])[0] in range(VOCAB)


# ------------------------------------------------------------------------------------------------------- independence


MIXED: list[dict[str, Any]] = [
    {"temperature": 1.0},
    {"temperature": 0.0, "logprobs": 0},
    {"temperature": 0.7, "top_p": 0.6},
    {"temperature": 1.2, "top_k": 5},
    {"temperature": 1.0, "min_p": 0.1, "repetition_penalty": 1.2},
    {"temperature": 1.0, "top_k": 7, "top_p": 0.9, "presence_penalty": 0.5, "logprobs": 2},
    {"temperature": 1.0, "logit_bias": {30: 4.0}, "bad_words": ((31,),), "min_tokens": 3},
    {"temperature": 1.0, "thinking": True, "reasoning_max_tokens": 0},
]


def mixed(rows: int) -> tuple[Tensor, list[Sequence]]:
    """Logits and sequences that ask for everything there is, each for something else."""
    logits = torch.randn(rows, VOCAB, generator=torch.Generator().manual_seed(5)) * 2
    made = [sequence([5, 6], [7] * (i % 4), max_tokens=9, seed=i, **MIXED[i % len(MIXED)]) for i in range(rows)]
    return logits, made


@pytest.mark.parametrize("kind", CLASSES)
def test_a_row_draws_the_same_alone_and_in_any_company(kind: SamplingClass) -> None:
    logits, sequences = mixed(40)
    together = sample(logits, sequences, kind)
    for i, made in enumerate(sequences):
        [alone] = sample(logits[i : i + 1], [made], kind)
        assert alone.token == together[i].token
    backwards = sample(logits.flip(0), sequences[::-1], kind)
    assert [s.token for s in backwards[::-1]] == [s.token for s in together]


@pytest.mark.parametrize("kind", CLASSES)
def test_seed_and_index_both_matter(kind: SamplingClass) -> None:
    flat = torch.zeros(1, VOCAB)
    by_seed = {tokens(flat, [sequence([5], temperature=1.0, seed=seed)], kind)[0] for seed in range(20)}
    by_index = {
        tokens(flat, [sequence([5], [7] * n, temperature=1.0, seed=1, max_tokens=30)], kind)[0] for n in range(20)
    }
    assert len(by_seed) > 15
    assert len(by_index) > 15


def test_all_ways_to_sample_draw_the_same_tokens() -> None:
    """Sorting, searching, and the kernels of the GPU (interpreted where there is none)."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    logits, sequences = mixed(40)
    plan = plan_sampling(last(sequences), MASKS)
    ways = [sampling_ops("base", True), sampling_ops("rejection", False), sampling_ops("rejection", True)]
    assert len({ops.threshold for ops in ways}) == 3
    drawn = [Sampler((EOS,), ops, device).draw(logits.clone().to(device), plan).read() for ops in ways]
    assert drawn[1:] == drawn[:1] * 2
    assert len({sampled.token for sampled in drawn[0]}) > 10


class Asked(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Notes what was run, and by which names the host reads a value of a tensor."""

    READS = ("_local_scalar_dense", "is_nonzero", "equal", "nonzero", "masked_select", "_unique", "unique")

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        self.names.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))

    @property
    def reads(self) -> list[str]:
        return [name for name in self.names if name.startswith(self.READS)]


@pytest.mark.parametrize("kind", CLASSES)
def test_no_decision_waits_for_the_device(kind: SamplingClass) -> None:
    """Launches are decided by the plan, which is on the host; only the result is read."""
    logits, sequences = mixed(16)
    with Asked() as asked:
        sample(logits, sequences, kind)
    assert "_softmax" in asked.names
    assert asked.reads == []


@pytest.mark.skipif(not torch.cuda.is_available(), reason="a GPU says when it is waited for")
@pytest.mark.parametrize("kind", CLASSES)
def test_the_device_is_waited_for_where_it_is_read(kind: SamplingClass) -> None:
    logits, sequences = mixed(16)
    plan, device = plan_sampling(last(sequences), MASKS), torch.device("cuda")
    sampler, moved = Sampler((EOS,), sampling_ops(kind, True), device), logits.to(device)
    expected = sampler.draw(moved.clone(), plan).read()
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            drawn = sampler.draw(moved.clone(), plan)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert [w for w in warned if "called a synchronizing" in str(w.message)] == []
    assert drawn.read() == expected


@pytest.mark.parametrize("kind", CLASSES)
def test_the_rehearsal_is_the_heaviest_step(kind: SamplingClass) -> None:
    """It limits, and reports log-probabilities: what a step without either runs, it runs too."""
    light = [sequence([5], temperature=0.5, seed=1), sequence([5], temperature=0.5, seed=2)]
    heavy = [
        sequence([5], temperature=0.5, top_k=3, top_p=0.5, min_p=0.1, logprobs=20, grammar=choice("a"), seed=i)
        for i in range(2)
    ]
    logits, sampler = torch.randn(2, VOCAB), Sampler((EOS,), sampling_ops(kind, False), torch.device("cpu"))
    sampler.rehearse(logits.clone())  # what is looked up once in a process is not counted
    ran = []
    for sequences in (light, heavy):
        with Asked() as asked:
            sampler.draw(logits.clone(), plan_sampling(last(sequences), MASKS))
        ran.append(set(asked.names))
    with Asked() as rehearsed:
        sampler.rehearse(logits.clone())
    assert ran[0] < ran[1] == set(rehearsed.names)


# ---------------------------------------------------------------------------------------------------- grammars

A, B, C = b"abc"


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_grammar_restricts_its_own_row(temperature: float) -> None:
    logits = row(t99=9.0, t97=1.0, t50=20.0).repeat(3, 1)
    guided = sequence([5], grammar=choice("abc", "bc"), temperature=temperature, logprobs=1)
    further = sequence([5], [A, B], grammar=choice("abc", "bc"), temperature=temperature)
    [first, free, third] = sample(logits, [guided, sequence([5]), further])
    assert (first.token, free.token, third.token) == (A, 50, C)
    assert first.logprob is not None
    assert first.logprob.top[0][0] == 50, "as the model gave it"


def test_an_end_comes_only_where_the_grammar_may_end() -> None:
    logits = row(t2=50.0, t98=1.0).repeat(3, 1)
    longer = choice("a", "ab")
    options: list[dict[str, Any]] = [{}, {"ignore_eos": True}, {"min_tokens": 2}]
    assert [s.token for s in sample(logits, [sequence([5], grammar=longer, **each) for each in options])] == [A] * 3
    after = [sequence([5], [A], grammar=longer, **each) for each in options]
    assert [s.token for s in sample(logits, after)] == [EOS, B, B]


@pytest.mark.parametrize("against", [{"bad_words": ((A,),)}, {"logit_bias": {A: -100.0}}, {"temperature": 1e-4}])
def test_a_grammar_comes_before_what_else_is_asked(against: dict[str, Any]) -> None:
    asked = {"temperature": 1.0, "top_p": 0.1, "top_k": 1, "repetition_penalty": 3.0} | against
    [sampled] = sample(row(t97=-90.0, t50=90.0), [sequence([97], grammar=choice("a"), **asked)])
    assert sampled.token == A


def test_a_grammar_begins_after_the_thinking() -> None:
    logits = row(t2=50.0, t97=1.0).repeat(3, 1)
    grammar = Grammar(forms.write(forms.choice(["a"]), thinking=True), "choice")
    states = [[], [B, THINK_CLOSE], [B, THINK_CLOSE, ord("\n")]]
    sequences = [sequence([5], generated, grammar=grammar, thinking=True) for generated in states]
    assert [s.token for s in sample(logits, sequences)] == [THINK_CLOSE, A, A], "no end inside the thinking"


# ---------------------------------------------------------------------------------------------------- allowed tokens


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_only_allowed_tokens_are_drawn(temperature: float) -> None:
    logits = row(t50=20.0, t97=3.0, t99=1.0, t2=9.0).repeat(4, 1)
    allowed = sequence([5], allowed_token_ids=(99, 31), temperature=temperature, logit_bias={31: -100.0})
    guided = sequence([5], grammar=choice("abc"), temperature=temperature)
    ends = sequence([5], allowed_token_ids=(99, EOS), temperature=0.0)
    assert [s.token for s in sample(logits, [allowed, guided, sequence([5]), ends])] == [99, A, 50, EOS]


def test_thinking_is_free_of_allowed_tokens() -> None:
    logits = row(t50=20.0, t97=3.0, t2=50.0).repeat(3, 1)
    states = [[], [50, THINK_CLOSE], [50, THINK_CLOSE, A]]
    sequences = [sequence([5], generated, allowed_token_ids=(A,), thinking=True) for generated in states]
    assert [s.token for s in sample(logits, sequences)] == [THINK_CLOSE, A, A], "no end inside the thinking"


def test_a_list_of_tokens_does_not_wait_for_the_tokens_before() -> None:
    assert not sequence([5], allowed_token_ids=(A,)).depends_on_tokens


# ---------------------------------------------------------------------------------------------------- logprobs, budget


def test_logprobs_are_the_models_own() -> None:
    logits = torch.randn(2, VOCAB, generator=torch.Generator().manual_seed(1))
    loud = sequence([5], max_tokens=9, logprobs=3, temperature=2.0, logit_bias={77: 100.0})
    quiet = sequence([5], max_tokens=9)
    sampled, unasked = sample(logits, [loud, quiet])
    raw = torch.log_softmax(logits[0], -1)
    assert sampled.token == 77
    assert sampled.logprob is not None
    assert sampled.logprob.logprob == pytest.approx(float(raw[77]))
    best = raw.topk(3)
    assert [token for token, _ in sampled.logprob.top] == best.indices.tolist()
    assert [value for _, value in sampled.logprob.top] == pytest.approx(best.values.tolist())
    assert unasked.logprob is None


def test_logprobs_without_alternatives() -> None:
    few, none = sequence([5], logprobs=2), sequence([5], logprobs=0)
    sampled = sample(row(t30=2.0).repeat(2, 1), [few, none])
    assert [len(s.logprob.top) for s in sampled if s.logprob] == [2, 0]


ANY_TEXT = Grammar(forms.write(forms.regex("(.|\n)*"), thinking=True), "regex")


@pytest.mark.parametrize(
    ("generated", "logits", "options", "expected"),
    [
        ([30, 31], row(t30=2.0), {"reasoning_max_tokens": 3}, 30),
        ([30, 31, 32], row(t30=2.0), {"reasoning_max_tokens": 3}, THINK_CLOSE),
        ([], row(t30=2.0), {"reasoning_max_tokens": 0}, THINK_CLOSE),
        ([30], row(t2=2.0), {"reasoning_max_tokens": 3}, THINK_CLOSE),  # an end token while thinking
        ([30], row(t2=2.0), {"reasoning_max_tokens": 3, "ignore_eos": True}, THINK_CLOSE),
        ([30], row(t2=2.0), {}, EOS),  # no budget, no forcing
        ([30], row(t2=2.0), {"reasoning_max_tokens": -1}, EOS),
        ([30, THINK_CLOSE], row(t2=2.0), {"reasoning_max_tokens": 3}, EOS),  # closed: never again
        ([30, THINK_CLOSE, 31, 32], row(t30=2.0), {"reasoning_max_tokens": 3}, 30),
        ([30, 31, 32], row(t30=2.0), {"reasoning_max_tokens": 3, "thinking": False}, 30),
        # A call that begins in reasoning ends it, if the request says so and tools are offered.
        ([30], row(t4=2.0), {"tools": True, "tool_call_ends_reasoning": True}, THINK_CLOSE),
        ([30], row(t4=2.0), {"tools": True, "grammar": ANY_TEXT}, THINK_CLOSE),
        ([30], row(t30=2.0), {"tools": True, "tool_call_ends_reasoning": True}, 30),
        ([30, THINK_CLOSE], row(t4=2.0), {"tools": True, "tool_call_ends_reasoning": True}, TOOL_CALL),
        ([30], row(t4=2.0), {"tools": True}, TOOL_CALL),
        ([30], row(t4=2.0), {"tools": True, "reasoning_max_tokens": 3}, TOOL_CALL),
        ([30], row(t4=2.0), {"tool_call_ends_reasoning": True}, TOOL_CALL),
        # Thinking that goes round in circles is closed.
        ([30, 31] * 24, row(t30=2.0), {"max_tokens": 99, "loop_repeats": 3, "loop_tokens": 2}, THINK_CLOSE),
        ([30, 31] * 24, row(t30=2.0), {"max_tokens": 99, "loop_repeats": 3, "loop_tokens": 1}, 30),
        ([30, 31] * 24, row(t30=2.0), {"max_tokens": 99}, 30),
    ],
)
def test_the_thinking_budget(generated: list[int], logits: Tensor, options: dict[str, Any], expected: int) -> None:
    made = sequence([5], generated, **{"max_tokens": 20, "thinking": True, **options})
    assert tokens(logits, [made]) == [expected]
    assert tokens(logits.repeat(2, 1), [made, sequence([5])]) == [expected, int(logits.argmax())]


def test_a_forced_token_reports_its_own_logprob() -> None:
    made = sequence([5], max_tokens=9, thinking=True, reasoning_max_tokens=0, logprobs=1)
    logits = row(t30=2.0)
    [sampled] = sample(logits, [made])
    assert sampled.logprob is not None
    assert sampled.logprob.logprob == pytest.approx(float(torch.log_softmax(logits, -1)[0, THINK_CLOSE]))
