"""POST /v1/completions with the unmodified `openai` package; how likely tokens are is judged by transformers."""

import asyncio
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from answers import user
from machine import PATIENCE_S
from openai import APIStatusError, AsyncOpenAI, BadRequestError, OpenAI
from openai.types import Completion
from oracle import Model, hf_logits, load_transformers
from scripted_model import CONTENT_WITHOUT_TOOLS, REASONING
from system import System

from shared.model.tokenizer import Tokenizer

QUESTION = user("What is the answer?")
TEXT = "Once upon a time, näher € by. </think> <|end_of_sentence|>"
LONG = " ".join(f"word{i}" for i in range(300))  # some chunks of prefill
TOLERANCE = 1e-3  # the sums of a real process


@pytest.fixture(scope="module")
def tokenizer(system: System) -> Tokenizer:
    return Tokenizer.load(system.directory / "demo")


@pytest.fixture(scope="module")
def reference(system: System) -> Iterator[Model]:
    return load_transformers(system.directory / "demo")


def complete(client: OpenAI, prompt: Any, **options: Any) -> Completion:
    return client.completions.create(**{"model": "m", "prompt": prompt, "seed": 3, **options})


def listen(client: OpenAI, prompt: Any, **options: Any) -> list[Completion]:
    usage = {"stream_options": {"include_usage": True}}
    return list(complete(client, prompt, stream=True, **{**usage, **options}))


def assembled(chunks: list[Completion]) -> list[dict[str, Any]]:
    """The choices of a stream, each as one that was not streamed."""
    made: dict[int, dict[str, Any]] = {}
    for choice in (choice for chunk in chunks for choice in chunk.choices):
        one = made.setdefault(choice.index, {"index": choice.index, "text": "", "logprobs": None})
        one["text"] += choice.text
        one["finish_reason"] = choice.finish_reason
        if choice.logprobs is not None:
            lists = choice.logprobs.model_dump()
            one["logprobs"] = {name: [*(one["logprobs"] or {}).get(name, []), *part] for name, part in lists.items()}
    return [made[index] for index in sorted(made)]


def choices(reply: Completion) -> list[dict[str, Any]]:
    return [choice.model_dump(exclude_unset=True) for choice in reply.choices]


def check_same(ours: list[dict[str, Any]], theirs: list[dict[str, Any]]) -> None:
    """Compare choices; of log-probabilities, the last bits depend on the company in which they were computed."""
    for one, other in zip(ours, theirs, strict=True):
        first, second = one.pop("logprobs") or {}, other.pop("logprobs") or {}
        assert one == other
        assert [first.get(name) for name in ("tokens", "text_offset")] == [
            second.get(name) for name in ("tokens", "text_offset")
        ]
        for name in ("token_logprobs", "top_logprobs"):
            for mine, yours in zip(first.get(name, ()), second.get(name, ()), strict=True):
                assert mine == pytest.approx(yours, abs=1e-4)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"n": 2, "max_tokens": 5},
        {"echo": True, "max_tokens": 4},
        {"logprobs": 2, "max_tokens": 6},
        {"echo": True, "logprobs": 1, "max_tokens": 6, "n": 2},
        {"echo": True, "logprobs": 1, "max_tokens": 0},
        {"stop": ["e"], "max_tokens": 30},
    ],
    ids=str,
)
def test_streamed_and_whole_answers_are_the_same(client: OpenAI, options: dict[str, Any]) -> None:
    whole, streamed = complete(client, TEXT, **options), listen(client, TEXT, **options)
    check_same(assembled(streamed), choices(whole))
    assert streamed[-1].usage is not None
    assert whole.usage is not None
    assert streamed[-1].usage.total_tokens == whole.usage.total_tokens
    assert (whole.object, whole.id[:5]) == ("text_completion", "cmpl-")
    echoed = [choice.text.startswith(TEXT) for choice in whole.choices]
    assert all(echoed) == bool(options.get("echo"))


def test_a_prompt_is_a_text_or_its_tokens_and_nothing_is_added(client: OpenAI, tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode_text(TEXT)
    assert not set(ids) & tokenizer.special_ids, "a text never becomes a special token"
    by_text, by_ids = complete(client, TEXT), complete(client, ids)
    assert by_text.choices[0].text == by_ids.choices[0].text
    assert by_text.usage is not None
    assert (by_text.usage.prompt_tokens, by_text.usage.completion_tokens) == (len(ids), 16)  # OpenAI's default
    named = complete(client, [tokenizer.control["</s>"], *ids], echo=True, max_tokens=1)
    assert named.choices[0].text.startswith(f"</s>{TEXT}"), "a special token is shown by its name"


def test_answers_to_several_prompts_are_those_to_each(client: OpenAI, tokenizer: Tokenizer) -> None:
    """Choice j of prompt i is i * n + j."""
    prompts = [TEXT, "Another one", "A third"]
    sampled = {"n": 2, "temperature": 1.0, "max_tokens": 6}
    together = complete(client, prompts, **sampled)
    alone = [complete(client, prompt, **sampled) for prompt in prompts]
    assert [choice.text for choice in together.choices] == [choice.text for one in alone for choice in one.choices]
    assert [choice.index for choice in together.choices] == list(range(6))
    as_ids = complete(client, [tokenizer.encode_text(prompt) for prompt in prompts], **sampled)
    assert [choice.text for choice in as_ids.choices] == [choice.text for choice in together.choices]
    assert together.usage is not None
    assert together.usage.prompt_tokens == sum(one.usage.prompt_tokens for one in alone if one.usage is not None)
    assert together.usage.completion_tokens == 36


@pytest.mark.parametrize("prompt", [TEXT, LONG], ids=["short", "long"])
@pytest.mark.parametrize("max_tokens", [0, 1])
def test_an_echo_is_scored_as_transformers_rates_it(
    client: OpenAI, reference: Model, tokenizer: Tokenizer, prompt: str, max_tokens: int
) -> None:
    ids = tokenizer.encode_text(prompt)
    expected = torch.log_softmax(hf_logits(reference, ids), dim=-1)
    reply = complete(client, prompt, echo=True, logprobs=2, max_tokens=max_tokens)
    [choice] = reply.choices
    assert choice.logprobs is not None
    lists = choice.logprobs.model_dump()
    assert {len(one) for one in lists.values()} == {len(ids) + max_tokens}
    assert (lists["token_logprobs"][0], lists["top_logprobs"][0]) == (None, None)
    own = expected[:-1].gather(1, torch.tensor(ids[1:]).unsqueeze(1)).squeeze(1)
    given = torch.tensor(lists["token_logprobs"][1 : len(ids)])
    assert float((given - own).abs().max()) <= TOLERANCE
    best = expected[:-1].max(dim=1).values
    tops = torch.tensor([max(top.values()) for top in lists["top_logprobs"][1 : len(ids)]])
    assert float((tops - best).abs().max()) <= TOLERANCE
    offsets = lists["text_offset"]
    assert offsets == sorted(offsets)
    spelled = [
        token == choice.text[start:end]
        for token, start, end in zip(lists["tokens"], offsets, [*offsets[1:], len(choice.text)], strict=True)
        if not token.startswith("bytes:") and token != "</s>"
    ]
    assert all(spelled)
    assert len(spelled) > 5
    assert reply.usage is not None
    assert reply.usage.completion_tokens == max_tokens


def test_the_token_that_ends_an_answer_has_its_log_probability(client: OpenAI, tokenizer: Tokenizer) -> None:
    """Clients that rate prompts cut one entry off for the one token that they had generated."""
    end = tokenizer.control["</s>"]
    options = {"logprobs": 1, "max_tokens": 1, "extra_body": {"logit_bias": {str(end): 100.0}}}
    [choice] = complete(client, TEXT, **options).choices
    assert (choice.text, choice.finish_reason) == ("", "stop")
    assert choice.logprobs is not None
    assert choice.logprobs.tokens == ["</s>"]
    assert assembled(listen(client, TEXT, **options)) == [choice.model_dump(exclude_unset=True)]


def test_prompt_logprobs_of_both_apis_are_vllms(client: OpenAI, reference: Model, tokenizer: Tokenizer) -> None:
    asked = {"prompt_logprobs": 1, "return_token_ids": True}
    chat: Any = client.chat.completions.create(model="m", messages=QUESTION, max_tokens=2, extra_body=asked)
    ids = chat.choices[0].message.prompt_token_ids
    completion: Any = complete(client, ids, max_tokens=2, extra_body=asked)
    rated = chat.prompt_logprobs
    assert completion.choices[0].prompt_logprobs == rated
    expected = torch.log_softmax(hf_logits(reference, ids), dim=-1)
    assert (rated[0], len(rated)) == (None, len(ids))
    for row, token, one in zip(expected[:-1], ids[1:], rated[1:], strict=True):
        mine = one[str(token)]
        assert abs(mine["logprob"] - float(row[token])) <= TOLERANCE
        assert abs(mine["rank"] - int((row > row[token]).sum()) - 1) <= 1
        assert len(one) == (1 if mine["rank"] == 1 else 2)
        spelled = tokenizer.token_bytes(token).decode("utf-8", "replace")
        assert mine["decoded_token"] == spelled or (not spelled and mine["decoded_token"] in tokenizer.control)


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"suffix": "x"}, "suffix"),
        ({"messages": QUESTION}, "messages"),
        ({"best_of": 3}, "best_of"),
        ({"prompt": ""}, "prompt"),
        ({"prompt": ["a", ""]}, "prompt[1]"),
        ({"prompt": [[1], [999_999]]}, "prompt[1]"),
        ({"prompt": ["a"] * 129}, "prompt"),
        ({"prompt": ["a"] * 100, "n": 2}, "n"),
        ({"prompt": [1] * 5000}, "prompt"),
        ({"logprobs": 21}, "logprobs"),
        ({"prompt": [[5] * 4000] * 8, "echo": True, "logprobs": 20}, "prompt_logprobs"),
        ({"prompt_logprobs": 1, "stream": True}, "prompt_logprobs"),
        ({"tools": [{"function": {"name": "f"}}]}, "tools"),
    ],
    ids=str,
)
def test_what_is_refused_is_named(client: OpenAI, fields: dict[str, Any], param: str) -> None:
    with pytest.raises(BadRequestError) as refused:
        client.post("/completions", body={"prompt": "a", **fields}, cast_to=object)
    assert refused.value.param == param


# ------------------------------------------------------------------------------------ as every request, of any API


def test_a_repeated_key_gets_the_same_answer_and_another_body_a_409(client: OpenAI) -> None:
    headers = {"Idempotency-Key": "completion-1"}
    asked: dict[str, Any] = {"temperature": 1.0, "seed": None, "echo": True, "extra_headers": headers}
    asked["n"] = 2  # one choice is kept for a second here, which may pass before it is asked for again; two for longer
    first = complete(client, TEXT, **asked)
    again = complete(client, TEXT, **asked)
    assert (again.id, choices(again)) == (first.id, choices(first))
    with pytest.raises(APIStatusError) as refused:
        complete(client, "Another", **asked)
    assert refused.value.status_code == 409


def test_a_stream_goes_on_after_any_event(system: System) -> None:
    body = {"prompt": TEXT, "stream": True, "echo": True, "logprobs": 1, "max_tokens": 8, "n": 2, "seed": 5}
    with httpx.Client(base_url=system.base_url, timeout=PATIENCE_S) as client:
        sent = client.post("/v1/completions", json=body, headers={"X-Event-IDs": "true"}).text
        events = [event for event in sent.split("\n\n") if event.startswith("id:")]
        name = json.loads(events[0].partition("data: ")[2])["id"]
        for seen in (0, 1, len(events) // 2):
            last = events[seen].partition("\n")[0].removeprefix("id: ")
            rest = client.get(f"/v1/completions/{name}/events", headers={"Last-Event-ID": last}).text
            found = [event for event in rest.split("\n\n") if event.startswith("id:")]
            assert spoken(events[: seen + 1] + found) == spoken(events)
        whole = client.get(f"/v1/completions/{name}").json()
        assert [one["text"] for one in whole["choices"]] == [text for _, text in sorted(spoken(events).items())]
        assert client.get(f"/v1/chat/completions/chatcmpl-{name[5:]}").status_code == 404


def spoken(events: list[str]) -> dict[int, str]:
    texts: dict[int, str] = {}
    for event in events:
        for choice in json.loads(event.partition("data: ")[2])["choices"]:
            texts[choice["index"]] = texts.get(choice["index"], "") + choice["text"]
    return texts


def test_a_deadline_ends_it(client: OpenAI) -> None:
    with pytest.raises(APIStatusError) as late:
        complete(client, LONG, max_tokens=2000, extra_headers={"X-Request-Timeout": "0.05"})
    assert late.value.status_code == 504


async def test_a_client_that_leaves_ends_all_its_choices(system: System) -> None:
    async with AsyncOpenAI(base_url=f"{system.base_url}/v1", api_key="none", timeout=PATIENCE_S) as client:
        stream = await client.completions.create(
            model="m", prompt=["a", "b"], n=2, max_tokens=2000, stream=True, extra_body={"ignore_eos": True}
        )
        await anext(aiter(stream))
        await stream.close()
    async with asyncio.timeout(PATIENCE_S):
        while await system.running_requests():  # noqa: ASYNC110
            await asyncio.sleep(0.05)


def test_an_engine_that_dies_changes_nothing(system: System, client: OpenAI) -> None:
    """Killed with all of the prompt's scores still to come, or with the answer under way."""
    asked: dict[str, Any] = {"echo": True, "logprobs": 1, "max_tokens": 60, "extra_body": {"ignore_eos": True}}
    undisturbed = choices(complete(client, LONG, **asked))
    stream = complete(client, LONG, stream=True, **asked)
    system.kill_child("services.engine")
    check_same(assembled(list(stream)), undisturbed)
    system.wait_until_ready()


# ------------------------------------------------------------------------------------ an answer that is known


def test_nothing_is_looked_for_in_an_answer(scripted: OpenAI) -> None:
    """Neither reasoning nor calls: the text is what the model wrote."""
    [choice] = scripted.completions.create(model="script", prompt="Hi\n", max_tokens=64, temperature=0).choices
    assert choice.text == f"{REASONING}</think>\n\n{CONTENT_WITHOUT_TOOLS}"
    assert choice.finish_reason == "stop"


def test_the_page_shows_a_request_and_its_answer(scripted: OpenAI) -> None:
    page = (Path(__file__).parents[2] / "docs" / "api-completions.md").read_text()
    blocks = re.findall(r"(?:^    .*\n)+", page, re.MULTILINE)
    [asked, answer] = [json.loads(block) for block in blocks]
    reply = scripted.post("/completions", body={**asked, "model": "script"}, cast_to=httpx.Response).json()
    for changing in ("id", "created", "system_fingerprint", "model"):
        assert type(reply.pop(changing)) is type(answer.pop(changing))
    reply["usage"]["prompt_tokens_details"]["cached_tokens"] = 0
    shown, found = answer["choices"][0].pop("logprobs"), reply["choices"][0].pop("logprobs")
    assert reply == answer
    assert (found["tokens"], found["text_offset"]) == (shown["tokens"], shown["text_offset"])
    assert found["token_logprobs"] == pytest.approx(shown["token_logprobs"], abs=1e-2)
