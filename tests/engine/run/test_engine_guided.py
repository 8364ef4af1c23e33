"""Answers with grammars from the engine's own parts around a small model: each rule of docs/structured-output.md, in
every way in which a step can come about.
"""

import json
from collections.abc import Sequence as Ordered
from typing import Any

import jsonschema
import pytest
from engine_cases import EOS, THINK_CLOSE, TOOL_CALL, TOOL_CALL_END, ByteTokenizer, compile_grammar, sequence
from engine_loop import Bench, Script, prompt
from guesses import GUESSING, among, guessing
from small_model import PAGE, SEQS, SMALL_FACTS, StepByStep, runner, small_model

from services.engine.loop.mailbox import Add, Command
from services.engine.model.ernie import ErnieModel
from services.engine.run.runner import ModelRunner
from services.engine.schedule.sequence import Sequence
from shared.grammar import forms, structural_tag
from shared.grammar.structural_tag import Format, JsonText, SeparatedTags, Tag, TriggeredTags
from shared.messages import Finish, Grammar

SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {"city": {"type": "string", "maxLength": 5}, "degrees": {"type": "integer", "maximum": 50}},
    "required": ["city", "degrees"],
    "additionalProperties": False,
}
CALL = Tag('<tool_call>\n{"name": "get_weather", "arguments": ', JsonText(SCHEMA), "}\n</tool_call>")
GUIDES = ("json", "forced calls", "possible calls", "none")


pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def model() -> ErnieModel:
    return small_model()


def grammar(guide: str, thinking: bool = True) -> Grammar | None:
    """Return the grammar of an answer: JSON, calls of a tool, or text in which such calls may be."""
    formats: dict[str, Format] = {
        "forced calls": SeparatedTags([CALL], "\n", True),
        "possible calls": TriggeredTags(["<tool_call>"], [CALL]),
    }
    if guide == "none":
        return None
    if guide == "json":
        return Grammar(forms.write(forms.json_schema(SCHEMA), thinking), "response_format")
    return Grammar(structural_tag.write(formats[guide], ByteTokenizer.control, thinking), "tools")


def ask(guide: str, generated: Ordered[int] = (), *, index: int = 0, request_id: str = "0", **options: Any) -> Sequence:
    """Return a request that thinks for four tokens and is seeded, unless options say otherwise."""
    options = {
        "thinking": True, "reasoning_max_tokens": 4, "temperature": 1.0, "seed": index, "max_tokens": 44, **options,
    }  # fmt: skip
    made = options.pop("grammar", None) or grammar(guide, options["thinking"])
    tokens = prompt(index, 5 + 4 * index)
    return sequence(tokens, generated, request_id=request_id, facts=SMALL_FACTS, grammar=made, **options)


def run(
    model: ErnieModel, asked: Ordered[Sequence], kind: type[ModelRunner] = ModelRunner, every: int = 0, **bounds: Any
) -> Bench:
    """Run all at once, or one `every` so many turns."""
    script: dict[int, list[Command]] = {every * i: [] for i in range(len(asked))}
    for i, one in enumerate(asked):
        script[every * i].append(Add(one))
    return Bench(script, runner=runner(model, kind), **{"max_num_seqs": SEQS, "block_size": PAGE, **bounds})


def content(answer: Ordered[int], thinking: bool = True) -> list[int]:
    """Return what follows the thinking, without the token that ended it."""
    after = list(answer[answer.index(THINK_CLOSE) + 1 :] if thinking else answer)
    return after[:-1] if after and after[-1] == EOS else after


def check(guide: str, tokens: list[int]) -> None:
    """Check a whole answer against the schema, without a grammar. One of `none` may be anything."""
    if guide == "none":
        return
    calls = [guide == "json"] * (guide == "json")
    if guide == "json":
        jsonschema.validate(json.loads(bytes(tokens)), SCHEMA)
    while TOOL_CALL in tokens:
        end = tokens.index(TOOL_CALL_END)
        call = json.loads(bytes(tokens[tokens.index(TOOL_CALL) + 1 : end]))
        assert call["name"] == "get_weather"
        jsonschema.validate(call["arguments"], SCHEMA)
        calls.append(True)
        tokens = tokens[end + 1 :]
    assert TOOL_CALL_END not in tokens
    assert calls or guide == "possible calls"


# ------------------------------------------------------------------------------ everything asked, in every kind of step

ASKED: dict[str, dict[str, Any]] = {
    "thinking with a budget": {},
    "thinking that closes by itself": {"reasoning_max_tokens": None, "logit_bias": {THINK_CLOSE: 4.0}},
    "no thinking allowed": {"reasoning_max_tokens": 0},
    "thinking off": {"thinking": False, "reasoning_max_tokens": None},
    "min_tokens": {"min_tokens": 30, "logit_bias": {EOS: 100.0}},
    "ignore_eos": {"ignore_eos": True},
    "stop_token_ids": {"stop_token_ids": (ord(":"),)},
    "log-probabilities": {"logprobs": 3},
    "penalties": {"repetition_penalty": 1.3, "presence_penalty": 0.5, "frequency_penalty": 0.5},
    "logit_bias": {"logit_bias": {ord("7"): 5.0, ord(" "): -100.0, ord("~"): 100.0}},
    "bad_words": {"bad_words": ((ord("c"), ord("i")), (ord("7"),))},
    "narrow draws": {"top_k": 9, "top_p": 0.8, "min_p": 0.02},
    "greedy": {"temperature": 0.0},
    "cut short": {"max_tokens": 17},
}
WAYS: dict[str, dict[str, Any]] = {  # bounds of the engine
    "together and ahead": {},
    "in chunks and preempted": {"max_num_batched_tokens": 5, "blocks": -(-64 // PAGE), "max_num_seqs": 4},
    "guessed": {"speculation": GUESSING, "every": 12},
}
SHORT = ("stop_token_ids", "cut short")  # there is room for all of them


def reported(bench: Bench, request_id: str) -> list[float]:
    """Return the log-probabilities of an answer's tokens, and of the most likely ones."""
    found = [each for run in bench.runs[request_id] for each in run.logprobs or ()]
    return [value for each in found for value in (each.logprob, *(top for _, top in each.top))]


def requests(options: dict[str, Any], again: str = "") -> list[Sequence]:
    return [ask(guide, index=i, request_id=guide + again, **options) for i, guide in enumerate(GUIDES)]


@pytest.mark.parametrize("name", ASKED)
def test_a_whole_answer_is_valid_and_the_same_in_every_kind_of_step(model: ErnieModel, name: str) -> None:
    options = ASKED[name]
    alone = {one.request_id: run(model, [one], StepByStep, caching=False) for one in requests(options)}
    for guide, bench in alone.items():
        answer, finish = bench.answer(guide), bench.finish(guide)
        assert finish is not None
        assert finish.failure is None
        if finish.reason == "stop" and (finish.stop_token in (None, EOS)):
            check(guide, content(answer, options.get("thinking", True)))
    texts = [one.tokens[: one.prompt_len].tolist() + alone[one.request_id].answer(one.request_id)
             for one in requests(options)]  # fmt: skip
    for way, bounds in WAYS.items():
        with guessing(among(texts)):
            bench = run(model, requests(options), **bounds)
        assert "speculation" not in bounds or min(bench.guessed) > 10
        for guide in GUIDES:
            assert reported(bench, guide) == pytest.approx(reported(alone[guide], guide), abs=1e-3)
            said = bench.answer(guide), bench.finish(guide)
            assert said == (alone[guide].answer(guide), alone[guide].finish(guide)), (way, guide)
        assert "blocks" not in bounds or name in SHORT or any(plan.preempted for plan in bench.runner.plans)


def test_the_prefix_cache_changes_nothing(model: ErnieModel) -> None:
    first, second = requests({}), requests({}, again=" again")
    script: Script = {0: [Add(one) for one in first], 400: [Add(one) for one in second]}
    bench = Bench(script, runner=runner(model, ModelRunner), max_num_seqs=SEQS, block_size=PAGE)
    assert bench.metric("prefix_cache_hits_total") > 0
    for guide in GUIDES:
        assert bench.answer(guide + " again") == bench.answer(guide)
        assert bench.finish(guide + " again") == bench.finish(guide)


# ------------------------------------------------------------------------------------------------------ a kill anywhere


@pytest.mark.parametrize("thinking", [True, False])
@pytest.mark.parametrize("guide", GUIDES[:-1])
def test_an_answer_goes_on_from_its_journal_at_every_token(model: ErnieModel, guide: str, thinking: bool) -> None:
    options = {"thinking": thinking, "reasoning_max_tokens": 4 if thinking else None, "index": 1, "max_tokens": 34,
               "min_tokens": 25}  # fmt: skip
    whole = run(model, [ask(guide, **options)])
    answer, finish = whole.answer("0"), whole.finish("0")
    assert len(answer) > 20
    known = {str(count): count for count in range(1, len(answer))}
    again = [ask(guide, answer[:count], request_id=name, **options) for name, count in known.items()]
    rests = run(model, again, resumed=known)
    for name, count in known.items():
        assert bytes(answer[:count] + rests.answer(name)) == bytes(answer), name
        assert rests.finish(name) == finish, name
    assert ask(guide, answer, **options).finish() == finish, "its engine died before it said that it has ended"


@pytest.mark.parametrize("guide", GUIDES[:-1])
def test_max_tokens_cuts_anywhere(model: ErnieModel, guide: str) -> None:
    whole = run(model, [ask(guide, index=2, max_tokens=34)])
    answer, finish = whole.answer("0"), whole.finish("0")
    cuts = run(
        model, [ask(guide, index=2, max_tokens=most, request_id=str(most)) for most in range(1, len(answer) + 1)]
    )
    for most in range(1, len(answer)):
        assert (cuts.answer(str(most)), cuts.finish(str(most))) == (answer[:most], Finish("length"))
    exact = str(len(answer))
    assert (cuts.answer(exact), cuts.finish(exact)) == (answer, finish)


# -------------------------------------------------------------------------------------------------------- where it ends

PAIRS = Grammar(forms.write(forms.regex("(ab)+"), thinking=False), "regex")
WANTS_TO_END = {"thinking": False, "reasoning_max_tokens": None, "logit_bias": {EOS: 100.0}, "grammar": PAIRS}


@pytest.mark.parametrize(
    ("options", "text", "finish"),
    [
        ({}, b"ab", Finish("stop", stop_token=EOS)),
        ({"min_tokens": 5}, b"ababab", Finish("stop", stop_token=EOS)),
        ({"min_tokens": 4}, b"abab", Finish("stop", stop_token=EOS)),
        ({"ignore_eos": True, "max_tokens": 9}, b"ababababa", Finish("length")),
        ({"max_tokens": 1}, b"a", Finish("length")),
        ({"stop_token_ids": (ord("a"),)}, b"a", Finish("stop", stop_token=ord("a"))),
        ({"stop_token_ids": (ord("b"),), "min_tokens": 3}, b"ab", Finish("stop", stop_token=ord("b"))),
    ],
)
def test_an_end_token_comes_only_where_the_grammar_may_end(
    model: ErnieModel, options: dict[str, Any], text: bytes, finish: Finish
) -> None:
    bench = run(model, [ask("", **(WANTS_TO_END | options))])
    assert bench.finish("0") == finish
    assert bytes(content(bench.answer("0"), thinking=False)) == text


def test_thinking_that_never_closes_has_no_grammar(model: ErnieModel) -> None:
    options = {"reasoning_max_tokens": None, "logit_bias": {THINK_CLOSE: -100.0, EOS: -100.0}, "max_tokens": 30}
    guided, free = (run(model, [ask(guide, **options)]) for guide in ("json", "none"))
    assert guided.answer("0") == free.answer("0")
    assert guided.finish("0") == Finish("length")


def test_an_end_inside_the_thinking_closes_it(model: ErnieModel) -> None:
    bench = run(model, [ask("json", reasoning_max_tokens=None, logit_bias={EOS: 100.0}, max_tokens=110)])
    answer = bench.answer("0")
    assert answer[0] == THINK_CLOSE
    check("json", content(answer))


def test_thinking_that_repeats_itself_is_closed_and_counted(model: ErnieModel) -> None:
    """Any token on, and whatever the steps."""
    asked = {
        "reasoning_max_tokens": None,
        "logit_bias": {97: 100.0},
        "max_tokens": 60,
        "loop_repeats": 2,
        "loop_tokens": 9,
    }
    bench = run(model, [ask("none", **asked)])
    assert bench.answer("0") == [97] * 48 + [THINK_CLOSE] + [97] * 11
    assert bench.metric("thinking_loops_total") == 1
    resumed = run(model, [ask("none", [97] * 30, **asked)], resumed=30)
    assert [97] * 30 + resumed.answer("0") == bench.answer("0")


# --------------------------------------------------------------------------------------------------- what else is asked


def test_log_probabilities_are_the_models_before_the_mask(model: ErnieModel) -> None:
    """They are those of the same tokens without a grammar, each forced by a bias, which log-probabilities ignore."""
    bench = run(model, [ask("json", index=1, logprobs=2, max_tokens=30)])
    answer = bench.answer("0")
    told = [each for one in bench.runs["0"] for each in one.logprobs or ()]
    assert len(told) == len(answer)
    for known in range(len(answer)):
        forced = {"logit_bias": {answer[known]: 1000.0}, "temperature": 0.0, "max_tokens": known + 1}
        free = run(model, [ask("none", answer[:known], index=1, logprobs=2, reasoning_max_tokens=None, **forced)],
                   resumed=known)  # fmt: skip
        assert free.answer("0") == [answer[known]]
        [[logprobs]] = [one.logprobs or () for one in free.runs["0"]]
        # Not to the bit: on some processors sums depend on the rows beside (shared/reproducible.py).
        assert logprobs.logprob == pytest.approx(told[known].logprob, abs=1e-4)
        assert dict(logprobs.top) == pytest.approx(dict(told[known].top), abs=1e-4)


def test_what_is_asked_changes_answers_within_the_grammar(model: ErnieModel) -> None:
    """So that none of the cases above passes because an option does nothing; in one of some answers, whatever the
    model, and for bad words where one of them is wanted."""

    def answers(**options: Any) -> list[list[int]]:
        asked = [ask("json", index=seed, request_id=str(seed), **options) for seed in range(SEQS)]
        bench = run(model, asked)
        return [bench.answer(one.request_id) for one in asked]

    plain, sevens = answers(), {"logit_bias": {ord("7"): 100.0}}
    for name in ("penalties", "logit_bias", "narrow draws", "greedy", "stop_token_ids"):
        assert answers(**ASKED[name]) != plain, name
    assert answers(**ASKED["bad_words"], **sevens) != answers(**sevens)
    assert answers(**ASKED["ignore_eos"]) == plain, "nothing but an end may follow JSON that is whole"
    assert ord("7") not in content(run(model, [ask("json", index=1, **ASKED["bad_words"])]).answer("0"))
    assert ord("~") in run(model, [ask("none", index=1, **ASKED["logit_bias"])]).answer("0")


@pytest.mark.parametrize("guide", GUIDES[:-1])
def test_every_answer_begins_as_the_grammar_does(model: ErnieModel, guide: str) -> None:
    bench = run(model, [ask(guide, index=seed, max_tokens=30, request_id=str(seed)) for seed in range(4)])
    for seed in range(4):
        matcher = compile_grammar(grammar(guide).text)  # type: ignore[union-attr]
        assert matcher.consume_tokens(content(bench.answer(str(seed))))
