"""The unmodified `openai` package against the running system: what people send, and what they get."""

import json
from typing import Any

import jsonschema
import pytest
from answers import TOOLS, ask, assembled, collected, image, listen, text, user, video
from openai import AuthenticationError, BadRequestError, NotFoundError, OpenAI
from scripted_model import CONTENT_WITHOUT_TOOLS, REASONING
from system import System, data_url, encoded, file_server, mp4, picture

PICTURE = picture(150, 100)
JPEG, PNG, MP4 = encoded(PICTURE, "JPEG"), encoded(PICTURE, "PNG"), mp4(8)
PICTURE_TOKENS = 5 * 4  # 150 x 100 becomes 140 x 112: 10 x 8 patches, four to a token
QUESTION = user("What is the answer?")
CONVERSATIONS: dict[str, dict[str, Any]] = {
    "text": {"messages": QUESTION},
    "several turns": {
        "messages": [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": [text("Hello."), text(" Who are you?")]},
            {"role": "assistant", "content": "ERNIE.", "reasoning_content": "They ask who I am."},
            *QUESTION,
        ]
    },
    "jpeg": {"messages": user(image(data_url(JPEG, "image/jpeg")), text("Describe it."))},
    "two images": {
        "messages": user(
            image(data_url(PNG, "image/png")),
            image(data_url(encoded(picture(56, 84), "PNG"), "image/png")),
            text("Compare."),
        )
    },
    "video": {"messages": user(video(data_url(MP4, "video/mp4")), text("What happens?"))},
    "tools": {"messages": QUESTION, "tools": TOOLS},
    "two choices": {"messages": QUESTION, "n": 2},
    "logprobs": {"messages": QUESTION, "logprobs": True, "top_logprobs": 3},
    "no thinking": {"messages": QUESTION, "extra_body": {"enable_thinking": False}},
}


@pytest.mark.parametrize("conversation", CONVERSATIONS.values(), ids=CONVERSATIONS)
def test_streamed_and_whole_answers_are_the_same(client: OpenAI, conversation: dict[str, Any]) -> None:
    whole = collected(ask(client, seed=7, **conversation))
    streamed = assembled(listen(client, seed=7, **conversation))
    for answer in (whole, streamed):
        answer["usage"]["prompt_tokens_details"].pop("cached_tokens")  # the second finds the first's prompt cached
    assert streamed == whole
    for choice in whole["choices"]:
        assert choice["reasoning_content"] == choice["reasoning"]
        assert choice["reasoning"] + choice["content"]
        assert choice["finish_reason"] in ("stop", "length")


def test_a_conversation_goes_on_after_its_second_picture(scripted: OpenAI) -> None:
    """The history is sent with every turn, so a limit of one picture would end the conversation."""
    dot = image(data_url(encoded(picture(28, 28), "PNG"), "image/png"))
    turns: list[dict[str, Any]] = []
    for question in ("what?", "and this?", "and this one?"):
        turns += user(dot, text(question))
        answer = ask(scripted, turns, model="script").choices[0].message
        turns.append({"role": "assistant", "content": answer.content})
    assert ask(scripted, [*turns, *user("Thanks.")], model="script").choices[0].message.content


def test_an_answer_has_the_shape_of_openais(client: OpenAI) -> None:
    reply = ask(client, QUESTION, max_tokens=5, extra_body={"ignore_eos": True})
    assert reply.id.startswith("chatcmpl-")
    assert (reply.object, reply.model) == ("chat.completion", "default")
    assert [choice.finish_reason for choice in reply.choices] == ["length"]
    assert reply.usage.completion_tokens == 5
    assert reply.usage.total_tokens == reply.usage.prompt_tokens + 5
    assert reply.usage.completion_tokens_details.reasoning_tokens <= 5


def test_models(client: OpenAI) -> None:
    models = client.models.list().data
    assert [(model.id, model.to_dict()["max_model_len"]) for model in models] == [("demo", 4096)]


@pytest.mark.parametrize("model", [None, "null", "gpt-17"])
def test_any_name_of_the_model_is_repeated_where_none_is_set(client: OpenAI, model: str | None) -> None:
    assert ask(client, QUESTION, model=model, max_tokens=2).model == (model or "demo")


@pytest.mark.parametrize(("form", "data"), [("png", PNG), ("jpeg", JPEG)])
def test_an_image_is_the_same_by_data_url_and_by_link(client: OpenAI, form: str, data: bytes) -> None:
    with file_server({"/picture": (f"image/{form}", data)}) as files:
        urls = [data_url(data, f"image/{form}"), f"{files}/picture"]
        replies = [ask(client, user(image(url), text("Describe it.")), seed=3) for url in urls]
    assert {reply.usage.prompt_tokens_details.image_tokens for reply in replies} == {PICTURE_TOKENS}
    assert replies[0].choices[0].message == replies[1].choices[0].message


def test_a_picture_changes_the_answer(client: OpenAI) -> None:
    """Two pictures of one size differ in their embeddings only."""
    urls = [data_url(encoded(picture(150, 100, seed), "PNG"), "image/png") for seed in (0, 1)]
    replies = [collected(ask(client, user(image(url), text("Describe it.")), temperature=0)) for url in urls]
    assert replies[0]["choices"] != replies[1]["choices"]


def test_a_video_is_the_same_by_data_url_and_by_link(client: OpenAI) -> None:
    with file_server({"/film.mp4": ("video/mp4", MP4)}) as files:
        urls = [data_url(MP4, "video/mp4"), f"{files}/film.mp4"]
        replies = [ask(client, user(video(url), text("What happens?")), seed=3) for url in urls]
    assert replies[0].usage.prompt_tokens_details.video_tokens > 0
    assert replies[0].choices[0].message == replies[1].choices[0].message


def test_seeds_repeat_and_differ(client: OpenAI) -> None:
    first, again, other = (collected(ask(client, QUESTION, seed=seed)) for seed in (1, 1, 2))
    assert first["choices"] == again["choices"]
    assert first["choices"] != other["choices"]


def test_logprobs_are_of_what_was_said(client: OpenAI) -> None:
    options = {"logprobs": True, "top_logprobs": 4, "temperature": 0, "extra_body": {"ignore_eos": True}}
    choice = ask(client, QUESTION, max_tokens=6, **options).choices[0]
    entries = choice.logprobs.content
    assert len(entries) == 6
    for entry in entries:
        values = [top.logprob for top in entry.top_logprobs]
        assert len(values) == 4
        assert values == sorted(values, reverse=True)
        assert entry.logprob == values[0] <= 0.0  # greedy takes the most likely
        assert bytes(entry.bytes).decode(errors="replace") == entry.token


def test_sampling_fields_change_the_answer(client: OpenAI) -> None:
    greedy = collected(ask(client, QUESTION, temperature=0))["choices"]
    one = collected(ask(client, QUESTION, temperature=1.5, seed=1, extra_body={"top_k": 1}))["choices"]
    assert one == greedy
    first = ask(client, QUESTION, temperature=0, max_tokens=1, extra_body={"return_token_ids": True})
    token = first.choices[0].message.model_extra["completion_token_ids"][0]
    for changed in ({"logit_bias": {str(token): -100}}, {"extra_body": {"bad_words_token_ids": [token]}}):
        options = {"temperature": 0, "max_tokens": 1, **changed}
        options["extra_body"] = {"return_token_ids": True, **options.get("extra_body", {})}
        other = ask(client, QUESTION, **options)
        assert other.choices[0].message.model_extra["completion_token_ids"] != [token]


def test_a_request_sets_the_size_of_its_pictures(client: OpenAI) -> None:
    def seen(most: int) -> int:
        sizes = {"mm_processor_kwargs": {"image_max_pixels": most}}
        reply = ask(client, user(image(data_url(PNG, "image/png")), text("Look.")), max_tokens=1, extra_body=sizes)
        return reply.usage.prompt_tokens_details.image_tokens

    assert (seen(28 * 28 * PICTURE_TOKENS), seen(28 * 28 * 6)) == (PICTURE_TOKENS, 6)
    with pytest.raises(BadRequestError, match="The request asks for max_pixels = 1000000000 of images"):
        seen(10**9)


def test_an_answer_of_allowed_tokens(client: OpenAI) -> None:
    allowed = [70, 90, 110]
    asked = {"allowed_token_ids": allowed, "enable_thinking": False, "return_token_ids": True}
    [choice] = ask(client, QUESTION, temperature=1, max_tokens=8, extra_body=asked).choices
    assert choice.finish_reason == "length", "no token that ends an answer is among them"
    assert set(choice.message.model_extra["completion_token_ids"]) <= set(allowed)


# ------------------------------------------------------------------------------------------- a model that is scripted


@pytest.mark.parametrize("streamed", [False, True], ids=["whole", "streamed"])
def test_reasoning_then_a_tool_call(scripted: OpenAI, streamed: bool) -> None:
    options = {"messages": QUESTION, "model": "script", "tools": TOOLS}
    answer = assembled(listen(scripted, **options)) if streamed else collected(ask(scripted, **options))
    assert answer["choices"] == [
        {
            "reasoning": REASONING,
            "reasoning_content": REASONING,
            "content": "",
            "tool_calls": [("function", "get_weather", '{"city": "Paris"}')],
            "logprobs": [],
            "finish_reason": "tool_calls",
        }
    ]
    assert answer["usage"]["completion_tokens_details"]["reasoning_tokens"] == 9


@pytest.mark.parametrize("streamed", [False, True], ids=["whole", "streamed"])
@pytest.mark.parametrize(
    ("stop", "keep", "content"),
    [
        (["no such text"], False, CONTENT_WITHOUT_TOOLS),
        (["weather"], False, CONTENT_WITHOUT_TOOLS.partition("weather")[0]),  # which the reasoning has, too
        (["rguments"], False, CONTENT_WITHOUT_TOOLS.partition("rguments")[0]),
        (["never", 'ity": "Pa'], True, CONTENT_WITHOUT_TOOLS.partition("ris")[0]),
    ],
)
def test_content_and_stop_strings(scripted: OpenAI, streamed: bool, stop: list[str], keep: bool, content: str) -> None:
    extra = {"include_stop_str_in_output": keep}
    options = {"messages": QUESTION, "model": "script", "stop": stop, "extra_body": extra}
    answer = assembled(listen(scripted, **options)) if streamed else collected(ask(scripted, **options))
    choice = answer["choices"][0]
    assert (choice["reasoning"], choice["content"].lstrip("\n")) == (REASONING, content)
    assert (choice["tool_calls"], choice["finish_reason"]) == ([], "stop")


@pytest.mark.parametrize("streamed", [False, True], ids=["whole", "streamed"])
@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "get_weather"}}])
def test_a_forced_call_validates(client: OpenAI, choice: Any, streamed: bool) -> None:
    """The model's weights are random: what it writes is all the grammar's doing."""
    schema = {
        "type": "object",
        "properties": {"city": {"type": "string", "maxLength": 8}, "days": {"enum": [1, 2, 3]}},
        "required": ["city", "days"],
        "additionalProperties": False,
    }
    options = {
        "messages": QUESTION,
        "tools": [{"type": "function", "function": {"name": "get_weather", "parameters": schema}}],
        "tool_choice": choice,
        "parallel_tool_calls": False,
        "max_tokens": 200,
        "extra_body": {"reasoning_max_tokens": 8},
    }
    answer = assembled(listen(client, **options)) if streamed else collected(ask(client, **options))
    [(_, name, arguments)] = answer["choices"][0]["tool_calls"]
    assert (name, answer["choices"][0]["content"]) == ("get_weather", "")
    jsonschema.validate(json.loads(arguments), schema)
    assert answer["choices"][0]["finish_reason"] == ("tool_calls" if choice == "required" else "stop")


@pytest.mark.parametrize("streamed", [False, True], ids=["whole", "streamed"])
def test_half_a_character_is_never_shown(scripted: OpenAI, streamed: bool) -> None:
    """The character's three bytes are three tokens; an answer that ends after the second shows none of it."""
    options = {"messages": QUESTION, "model": "script", "max_tokens": 6}
    answer = assembled(listen(scripted, **options)) if streamed else collected(ask(scripted, **options))
    choice = answer["choices"][0]
    assert choice["finish_reason"] == "length"
    assert choice["reasoning"].rstrip("\ufffd") == "The user asks for the weather. "


def test_only_served_names_are_accepted(scripted: OpenAI) -> None:
    assert [model.id for model in scripted.models.list().data] == ["script", "play"]
    assert ask(scripted, QUESTION, model="play", max_tokens=2).model == "play"
    with pytest.raises(NotFoundError, match="'default' does not exist"):
        ask(scripted, QUESTION, model="default")


def test_a_key_is_required_where_one_was_set(scripted_system: System) -> None:
    with (
        OpenAI(base_url=f"{scripted_system.base_url}/v1", api_key="wrong", max_retries=0) as client,
        pytest.raises(AuthenticationError),
    ):
        client.models.list()


# ------------------------------------------------------------------------------------------------------ besides /v1


def test_health_and_metrics(system: System, client: OpenAI) -> None:
    ask(client, QUESTION)
    assert system.get("/health/live")[0] == 200
    assert system.get("/health/ready")[0] == 200
    status, metrics = system.get("/metrics", system.metrics_port)
    assert status == 200
    for name in ("http_requests", "mm_running", "engine_step_seconds", "postproc_open_requests"):
        assert f"millrace_{name}" in metrics, f"of the four services' metrics one is missing: {name}"
