"""Requests as clients send them: what each field becomes, and what is refused, with which field blamed."""

import base64
import json
from typing import Any
from urllib.parse import quote

import msgspec
import pytest
from whole_parser import WholeParser

from services.gateway.request.model_names import ModelNames
from services.gateway.request.parsed import ParsedRequest
from services.gateway.request.schemas import ChatRequest
from services.gateway.request.unsupported import NEUTRAL_VALUES
from services.gateway.request.validate import MAX_SCHEMA_BYTES
from shared.errors import Failure, RequestError
from shared.messages import VideoOptions
from shared.model.tokenizer import Tokenizer

HI = [{"role": "user", "content": "Hi"}]
PNG = "data:image/png;base64," + base64.b64encode(b"pixels").decode()
MP4 = "data:video/mp4;base64," + base64.b64encode(b"frames").decode()


def image(url: Any) -> dict[str, Any]:
    return {"type": "image_url", "image_url": url}


def video(url: Any) -> dict[str, Any]:
    return {"type": "video_url", "video_url": url}


def saying(*parts: Any, role: str = "user") -> dict[str, Any]:
    return {"messages": [{"role": role, "content": list(parts)}]}


def tool(**function: Any) -> dict[str, Any]:
    return {"tools": [{"type": "function", "function": {"name": "f", **function}}]}


def deep(levels: int) -> Any:
    return {"a": deep(levels - 1)} if levels else 1


def parse(parser: WholeParser, **fields: Any) -> ParsedRequest:
    return parser.parse(json.dumps({"messages": HI, **fields}).encode())


def refusal(parser: WholeParser, body: bytes) -> Failure:
    with pytest.raises(RequestError) as refused:
        parser.parse(body)
    return refused.value.failure


BAD: list[tuple[dict[str, Any], int, str | None, str]] = [
    ({"messages": None}, 400, "messages", "array"),
    ({"messages": []}, 400, "messages", ">= 1"),
    ({"messages": [{"role": "robot", "content": "Hi"}]}, 400, "messages[0].role", "robot"),
    ({"messages": [{"content": "Hi"}]}, 400, "messages[0].role", "Missing"),
    ({"messages": [{"role": "user", "content": 3}]}, 400, "messages[0].content", "int"),
    ({"messages": [{"role": "user", "content": {"a": 1}}]}, 400, "messages[0].content", "object"),
    ({"messages": [{"role": "tool", "content": deep(40)}]}, 400, "messages[0].content", "32"),
    (
        {"messages": [{"role": "user", "content": "", "tool_calls": [{"function": {"name": "f"}}]}]},
        400,
        "messages[0].tool_calls",
        "assistant",
    ),
    (saying({"type": "audio_url", "audio_url": "x"}), 400, "messages[0].content[0].type", "audio_url"),
    (saying({"text": "x"}), 400, "messages[0].content[0].type", "Missing"),
    (saying({"type": "image_url"}), 400, "messages[0].content[0].image_url", "Missing"),
    (saying(image(PNG), role="system"), 400, "messages[0].content[0].type", "system"),
    (saying(image("file:///etc/passwd")), 400, "messages[0].content[0].image_url", "http"),
    (saying(image("ftp://example.org/a.png")), 400, "messages[0].content[0].image_url", "http"),
    (saying(image("http://a\\@b/")), 400, "messages[0].content[0].image_url", "http"),
    (saying(image("https://example.org/" + "a" * 9000)), 400, "messages[0].content[0].image_url", "8192"),
    (saying(image("data:image/png;base64,!!!!")), 400, "messages[0].content[0].image_url", "base64"),
    (saying(image("data:image/png;base64,AAAAA")), 400, "messages[0].content[0].image_url", "base64"),
    (saying(image("data:image/png;base64,AA?AA")), 400, "messages[0].content[0].image_url", "base64"),
    (saying(image("data:image/png;base64,\u00e9AAA")), 400, "messages[0].content[0].image_url", "base64"),
    (saying(image("data:image/png;base64,")), 400, "messages[0].content[0].image_url", "empty"),
    (saying(image("data:image/png,AAAA")), 400, "messages[0].content[0].image_url", "data URL"),
    (saying(image(MP4)), 400, "messages[0].content[0].image_url", "video/mp4"),
    (saying(video(PNG)), 400, "messages[0].content[0].video_url", "image/png"),
    (saying(image("data:image/png;base64," + "AAAA" * 400)), 400, "messages[0].content[0].image_url", "1000"),
    (
        saying(*[image(PNG)] * 3),
        400,
        "messages[0].content[2].image_url",
        "got 3 but limit is 2 (the setting limit_mm_per_prompt",
    ),
    (saying(*[video(MP4)] * 2), 400, "messages[0].content[1].video_url", "got 2 but limit is 1"),
    (
        saying({"type": "file", "file": {"file_id": "file-1"}}),
        400,
        "messages[0].content[0].file.file_id",
        "batches alone",
    ),
    (saying({"type": "file", "file": {}}), 400, "messages[0].content[0].file.file_data", "Missing"),
    (
        saying({"type": "file", "file": {"file_data": "aGVsbG8="}}),
        400,
        "messages[0].content[0].file",
        "image or a video",
    ),
    (saying(video({"url": MP4, "frames_sample": "last"})), 400, "messages[0].content[0].video_url.frames_sample", ""),
    (saying(video({"url": MP4, "subtitles": [{}]})), 400, "messages[0].content[0].video_url.subtitles", "supported"),
    ({"model": 4}, 400, "model", "int"),
    ({"model": "m" * 257}, 400, "model", "256"),
    ({"max_tokens": 0}, 400, "max_tokens", "at least 1"),
    ({"max_tokens": -5}, 400, "max_tokens", ">= -1"),
    ({"max_completion_tokens": 0}, 400, "max_completion_tokens", "at least 1"),
    ({"max_completion_tokens": 9, "max_tokens": 0}, 400, "max_tokens", "at least 1"),
    ({"max_tokens": 5, "min_tokens": 6}, 400, "min_tokens", "5"),
    ({"temperature": -1}, 400, "temperature", ">= 0"),
    ({"temperature": "hot"}, 400, "temperature", "str"),
    ({"top_p": 1.5}, 400, "top_p", "<= 1"),
    ({"top_k": -2}, 400, "top_k", ">= -1"),
    ({"min_p": 2}, 400, "min_p", "<= 1"),
    ({"repetition_penalty": 0}, 400, "repetition_penalty", "> 0"),
    ({"presence_penalty": 3}, 400, "presence_penalty", "<= 2"),
    ({"frequency_penalty": -3}, 400, "frequency_penalty", ">= -2"),
    ({"seed": -(2**63)}, 400, "seed", ">="),
    ({"seed": 5.5}, 400, "seed", "float"),
    ({"temperature": "inf"}, 400, "temperature", "<="),
    ({"repetition_penalty": "Infinity"}, 400, "repetition_penalty", "<="),
    ({"stop": ["a"] * 17}, 400, "stop", "<= 16"),
    ({"stop_token_ids": [10**6]}, 400, "stop_token_ids", "1000000"),
    ({"bad_words_token_ids": [[10**6]]}, 400, "bad_words_token_ids", "1000000"),
    ({"logit_bias": {"x": 1}}, 400, "logit_bias", "'x'"),
    ({"logit_bias": {"1": 101}}, 400, "logit_bias[...]", "<= 100"),
    ({"logit_bias": {"999999": 1}}, 400, "logit_bias", "999999"),
    ({"top_logprobs": 3}, 400, "top_logprobs", "logprobs"),
    ({"logprobs": True, "top_logprobs": 21}, 400, "top_logprobs", "<= 20"),
    ({"reasoning_max_tokens": 0}, 400, "reasoning_max_tokens", "at least 1"),
    ({"thinking_loop_repeats": 1}, 400, "thinking_loop_repeats", "at least 2"),
    ({"thinking_loop_tokens": 1025}, 400, "thinking_loop_tokens", "<= 1024"),
    ({"reasoning_max_tokens": -2}, 400, "reasoning_max_tokens", ">= -1"),
    ({"n": 0}, 400, "n", ">= 1"),
    ({"n": 5}, 400, "n", "at most 4"),
    ({"stream_options": {"include_usage": True}}, 400, "stream_options", "stream"),
    (
        {"stream": True, "stream_options": {"continuous_usage_stats": "some"}},
        400,
        "stream_options.continuous_usage_stats",
        "bool",
    ),
    ({"tool_choice": {"type": "function", "function": {"name": "f"}}}, 400, "tool_choice", "not one of"),
    ({"tool_choice": "some"}, 400, "tool_choice", "some"),
    (tool(name="a b"), 400, "tools[0].function.name", "a-zA-Z0-9"),
    (tool(parameters=deep(40)), 400, "tools[0].function.parameters", "32"),
    (tool(description="x" * (MAX_SCHEMA_BYTES + 1)), 400, "tools[0].function.parameters", "limit"),
    ({"tools": [{"type": "custom", "custom": {"name": "f"}}]}, 400, "tools[0].type", "custom"),
    ({"reasoning_effort": "huge"}, 400, "reasoning_effort", "huge"),
    ({"chat_template_kwargs": {"messages": []}}, 400, "chat_template_kwargs.messages", "messages"),
    ({"chat_template_kwargs": {"a b": 1}}, 400, "chat_template_kwargs.a b", "a b"),
    ({"chat_template_kwargs": {"a": deep(40)}}, 400, "chat_template_kwargs", "32"),
    ({"chat_template_kwargs": {"a": "x" * 20_000}}, 400, "chat_template_kwargs", "16384"),
    ({"chat_template_kwargs": {"options": 3}}, 400, "chat_template_kwargs.options", "object"),
    (
        {"chat_template_kwargs": {"options": {"thinking_mode": "maybe"}}},
        400,
        "chat_template_kwargs.options.thinking_mode",
        "maybe",
    ),
    ({"reasoning": {"effort": "huge"}}, 400, "reasoning.effort", "huge"),
    ({"thinking": {"type": "maybe"}}, 400, "thinking.type", "maybe"),
    ({"thinking_budget": -2}, 400, "thinking_budget", ">= -1"),
    ({"chat_template": "{{ 1 }}"}, 400, "chat_template", "trust_request_chat_template"),
    ({"continue_final_message": True}, 400, "continue_final_message", "assistant"),
    (
        {"messages": [*HI, {"role": "assistant", "tool_calls": [{"function": {}}]}], "continue_final_message": True},
        400,
        "continue_final_message",
        "text",
    ),
    (
        {
            "messages": [*HI, {"role": "assistant", "content": "So"}],
            "continue_final_message": True,
            "add_generation_prompt": True,
        },
        400,
        "continue_final_message",
        "both",
    ),
    ({"messages": [{"role": "user", "content": "Hi", "prefix": True}]}, 400, "messages[0].prefix", "assistant"),
    ({"cache_salt": ""}, 400, "cache_salt", ">= 1"),
    ({"extra_key": ["a", "b"]}, 400, "extra_key", "str"),
    ({"watermark": {"key": 7}}, 400, "watermark", "not supported"),
    ({"response_max_tokens": 9}, 400, "response_max_tokens", "not supported"),
    ({"request_id": "a b"}, 400, "request_id", "x21"),
    ({"request_id": "a\n"}, 400, "request_id", "x21"),
    ({"priority": 1}, 400, "priority", "not supported"),
    ({"verbosity": "low"}, 400, "verbosity", "not supported"),
    ({"prompt_logprobs": 1, "stream": True}, 400, "prompt_logprobs", "cannot be given with `stream` true"),
    ({"prompt_logprobs": -1}, 400, "prompt_logprobs", ">= 0"),
    ({"prompt_logprobs": 21}, 400, "prompt_logprobs", "<= 20"),
    ({"echo": True}, 400, "echo", "not supported"),
    ({"response_format": {"type": "yaml"}}, 400, "response_format.type", "Invalid value 'yaml'"),
    ({"guided_regex": "a", "regex": "b"}, 400, "regex", "Only one of `guided_regex` and `regex`"),
    ({"guided_json": "[1]"}, 400, "guided_json", "must be a JSON object, not list"),
    ({"ebnf": "root := x"}, 400, "ebnf", "Expected ::="),
    ({"guided_regex": "a" * 140_000}, 400, "guided_regex", "the limit is 131072"),
    ({"prompt_token_ids": [1]}, 400, "prompt_token_ids", "not supported"),
    ({"functions": [{"name": "f"}]}, 400, "functions", "not supported"),
    *[
        ({"reasoning_format": form}, 400, "reasoning_format", "not supported")
        for form in ("raw", "hidden", "none", "deepseek-legacy")
    ],
    ({"input_ids": [1]}, 400, "input_ids", "not supported"),
    ({"image_data": ["x"]}, 400, "image_data", "not supported"),
    ({"search_parameters": {"mode": "auto"}}, 400, "search_parameters", "not supported"),
    ({"tools": [{"function": {"name": "f"}, "defer_loading": True}]}, 400, "tools[0].defer_loading", "not supported"),
    ({"tools": [{"name": "f", "defer_loading": True}]}, 400, "tools[0].defer_loading", "not supported"),
    (
        {"tools": [{"function": {"name": "f", "defer_loading": True}}]},
        400,
        "tools[0].function.defer_loading",
        "not supported",
    ),
    (
        {"messages": [{"role": "system", "content": "x", "tools": [{"function": {"name": "f"}}]}, *HI]},
        400,
        "messages[0].tools",
        "not supported",
    ),
    ({"messages": [{"role": "user", "content": "word " * 5000}]}, 400, "messages", "2048"),
]


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"tools": [{"type": "custom", "custom": {"name": "x"}}]}, "tools[0].type"),
        ({"tools": [{"type": "web_search"}]}, "tools[0].type"),
        *(
            ({"messages": [{"role": "user", "content": [{"type": kind}]}]}, "messages[0].content[0].type")
            for kind in ("input_audio", "audio_url", "image_embeds", "image_pil")
        ),
    ],
)
def test_a_type_that_others_define_is_refused_as_such(parser: WholeParser, fields: dict[str, Any], param: str) -> None:
    failure = refusal(parser, json.dumps({"messages": HI, **fields}).encode())
    assert (failure.status, failure.param, failure.code) == (400, param, "unsupported_parameter")
    assert "is not supported by this server" in failure.message


@pytest.mark.parametrize(("fields", "status", "param", "message"), BAD)
def test_what_is_refused(
    parser: WholeParser, fields: dict[str, Any], status: int, param: str | None, message: str
) -> None:
    failure = refusal(parser, json.dumps({"messages": HI, **fields}).encode())
    assert (failure.status, failure.param) == (status, param)
    assert message in failure.message
    assert failure.type == "invalid_request_error"


@pytest.mark.parametrize(
    ("body", "param", "code"),
    [
        (b"", None, "invalid_json"),
        (b'{"messages": [', None, "invalid_json"),
        (b"[]", None, "invalid_value"),
        (b'{"messages": [{"role": "user", "content": "Hi"}], "\xff": 1}', None, "invalid_json"),
        (b'{"messages": [{"role": "user", "content": "Hi"}], "\xed\xa0\xbd": 1, "a": "\\ud800"}', None, "invalid_json"),
        (b"{}", "messages", "missing_required_parameter"),
        (b'{"messages": [{"role": "user", "content": "\xff"}]}', None, "invalid_json"),
        (b'{"messages": [{"role": "tool", "content": ' + b'{"a":' * 100_000, None, "invalid_json"),
        (b'{"messages": [{"role": "user", "content": "Hi"}], "guided_json": "\xed\xa0\xbd"}', None, "invalid_json"),
        (b'{"messages": [{"role": "user", "content": "Hi"}], "prompt": ' + b"[" * 100_000, None, "invalid_json"),
        (b'{"messages": [{"role": "user", "content": "Hi"}], "temperature": NaN}', None, "invalid_json"),
        (b'{"messages": [{"role": "user", "content": "Hi"}], "temperature": 1e999}', "temperature", "invalid_value"),
    ],
)
def test_bodies_that_are_no_request(parser: WholeParser, body: bytes, param: str | None, code: str) -> None:
    failure = refusal(parser, body)
    assert (failure.status, failure.param, failure.code) == (400, param, code)


def test_no_unsupported_field_hides_one_that_is_supported() -> None:
    assert not set(NEUTRAL_VALUES) & set(ChatRequest.__struct_fields__)


def test_defaults_are_the_checkpoints(parser: WholeParser) -> None:
    sampling = parse(parser).sampling
    assert (sampling.temperature, sampling.top_p, sampling.top_k) == (0.8, 0.7, 5)
    assert (sampling.repetition_penalty, sampling.presence_penalty, sampling.frequency_penalty) == (1.1, 0.2, 0.3)
    assert sampling.min_p == 0.05
    assert (sampling.max_tokens, sampling.min_tokens, sampling.logprobs) == (None, 0, None)


def test_a_seed_is_drawn_where_none_is_given(parser: WholeParser) -> None:
    assert parse(parser).sampling.seed != parse(parser).sampling.seed
    assert parse(parser, seed=7).sampling.seed == 7


def test_every_sampling_field_arrives(parser: WholeParser, tokenizer: Tokenizer) -> None:
    given = parse(
        parser,
        model="demo-model",
        temperature=0.5,
        top_p=0.25,
        top_k=3,
        min_p=0.125,
        repetition_penalty=1.5,
        presence_penalty=-1,
        frequency_penalty=2,
        seed=9,
        min_tokens=2,
        max_tokens=5,
        max_completion_tokens=4,
        stop_token_ids=[5, 6],
        ignore_eos=True,
        bad_words=["river"],
        bad_words_token_ids=[8, [9, 10]],
        logit_bias={"12": -100, "13": 1.5},
        logprobs=True,
        top_logprobs=2,
        reasoning_max_tokens=3,
    ).sampling
    assert (given.temperature, given.top_p, given.top_k, given.min_p) == (0.5, 0.25, 3, 0.125)
    assert (given.repetition_penalty, given.presence_penalty, given.frequency_penalty) == (1.5, -1, 2)
    assert (given.seed, given.min_tokens, given.max_tokens) == (9, 2, 4)
    assert (given.stop_token_ids, given.ignore_eos) == ((5, 6), True)
    words = {tuple(tokenizer.encode_text("river")), tuple(tokenizer.encode_text(" river"))}
    assert set(given.bad_words) == words | {(8,), (9, 10)}
    assert given.logit_bias == {12: -100, 13: 1.5}
    assert (given.logprobs, given.reasoning_max_tokens) == (2, 3)


@pytest.mark.parametrize(
    ("given", "repeated"),
    [
        ({"model": "null"}, "null"),
        ({"model": "default"}, "default"),
        ({"model": None}, "demo-model"),
        ({"model": ""}, "demo-model"),
        ({}, "demo-model"),
    ],
)
def test_any_model_is_accepted_and_repeated_where_no_name_is_set(
    parser: WholeParser, given: dict[str, Any], repeated: str
) -> None:
    made = parse(parser, **given)
    assert (made.model, made.answer_format("", "").model) == (repeated, repeated)


@pytest.mark.parametrize(
    ("given", "repeated"), [({"model": "a"}, "a"), ({"model": "b"}, "b"), ({"model": None}, "a"), ({}, "a")]
)
def test_served_names_are_repeated(parser: WholeParser, given: dict[str, Any], repeated: str) -> None:
    assert parse(_named(parser), **given).model == repeated


@pytest.mark.parametrize("model", ["c", "null", "default", "demo-model", "A"])
def test_nothing_but_served_names_is_accepted(parser: WholeParser, model: str) -> None:
    with pytest.raises(RequestError, match=f"'{model}' does not exist") as caught:
        parse(_named(parser), model=model)
    failure = caught.value.failure
    assert (failure.status, failure.param, failure.code) == (404, "model", "model_not_found")


def _named(parser: WholeParser) -> WholeParser:
    return msgspec.structs.replace(parser, names=ModelNames("demo-model", ("a", "b")))


def test_every_output_field_arrives(parser: WholeParser) -> None:
    given = parse(
        parser,
        stop=["a", "b"],
        include_stop_str_in_output=True,
        parallel_tool_calls=False,
        logprobs=True,
        return_token_ids=True,
        **tool(),
    ).output
    assert (given.stop, given.include_stop) == (("a", "b"), True)
    assert (given.tools, given.functions, given.parallel_tool_calls) == (True, ("f",), False)
    assert (given.logprobs, given.return_token_ids, given.thinking) == (True, True, True)
    assert parse(parser, stop="x").output.stop == ("x",)
    not_to_call = parse(parser, tool_choice="none", **tool()).output
    assert (not_to_call.tools, not_to_call.functions) == (False, ())


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"temperature": 0}, {"temperature": 0.0}),
        ({"temperature": 1e-6}, {"temperature": 0.0}),
        ({"top_p": 0}, {"top_p": 1e-5}),
        ({"top_k": -1}, {"top_k": 0}),
        ({"reasoning_max_tokens": -1}, {"reasoning_max_tokens": None}),
        ({"reasoning_max_tokens": 5, "enable_thinking": False}, {"reasoning_max_tokens": None}),
        ({"logprobs": True}, {"logprobs": 0}),
        ({}, {"loop_repeats": 0, "loop_tokens": 0}),
        ({"thinking_loop_repeats": 4}, {"loop_repeats": 4, "loop_tokens": 64}),
        ({"thinking_loop_repeats": 4, "thinking_loop_tokens": 9}, {"loop_repeats": 4, "loop_tokens": 9}),
        ({"thinking_loop_repeats": 4, "enable_thinking": False}, {"loop_repeats": 0, "loop_tokens": 0}),
    ],
)
def test_values_with_a_meaning_of_their_own(
    parser: WholeParser, fields: dict[str, Any], expected: dict[str, Any]
) -> None:
    sampling = parse(parser, **fields).sampling
    assert {name: getattr(sampling, name) for name in expected} == expected


def test_max_tokens_is_what_the_context_leaves(parser: WholeParser) -> None:
    free = parse(parser)
    assert free.max_tokens == parser.max_model_len - len(free.segments[0])
    assert parse(parser, max_tokens=10).max_tokens == 10
    assert parse(parser, max_tokens=10**6).max_tokens == free.max_tokens


@pytest.mark.parametrize(
    ("fields", "limit"),
    [
        ({"max_tokens": -1}, None),
        ({"max_completion_tokens": -1}, None),
        ({"max_completion_tokens": -1, "max_tokens": 7}, None),
        ({"max_completion_tokens": 7, "max_tokens": -1}, 7),
        ({"max_tokens": -1, "min_tokens": 6}, None),
    ],
)
def test_minus_one_is_no_limit(parser: WholeParser, fields: dict[str, int], limit: int | None) -> None:
    free = parse(parser)
    made = parse(parser, **fields)
    assert made.sampling.max_tokens == limit
    assert made.max_tokens == (limit or free.max_tokens)


def test_fields_no_server_needs_are_ignored_and_neutral_ones_accepted(parser: WholeParser) -> None:
    parse(
        parser,
        store=True,
        metadata={"user": "x"},
        service_tier="auto",
        user="u",
        prediction={"type": "content", "content": "x"},
        safety_identifier="s",
        prompt_cache_key="k",
        verbosity="medium",
        no_api_defines_this=1,
        response_format={"type": "text"},
        modalities=["text"],
        tool_choice="auto",
        tools=[],
        function_call=None,
        guided_json=None,
        n=1,
        stop=None,
        stream=False,
        stream_options=None,
    )


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *[("reasoning_format", form) for form in ("parsed", "auto", "deepseek")],
        ("stream_interval", 8),
        ("watermark", {"enabled": False}),
        ("custom_labels", {"team": "a"}),
        ("collect_metrics", False),
        ("input_ids", []),
        ("image_data", []),
        ("search_parameters", {}),
        ("search_parameters", {"mode": "off"}),
    ],
)
def test_what_other_servers_clients_always_send_is_accepted(parser: WholeParser, field: str, value: Any) -> None:
    """It asks for what is done here anyway, for nothing, or for nothing that an answer shows."""
    assert parse(parser, **{field: value}, seed=1) == parse(parser, seed=1)


def test_streaming_and_usage(parser: WholeParser) -> None:
    assert not parse(parser).stream
    assert not parse(parser, stream=True).include_usage
    assert parse(parser, stream=True, stream_options={"include_usage": True}).include_usage


def test_media_as_clients_write_them(parser: WholeParser) -> None:
    options = {"fps": -1, "target_frames": 8, "min_frames": 2, "max_frames": 9, "frames_sample": "middle"}
    taken = parse(
        parser,
        **saying(
            image("https://example.org/ä.png?x=1"),
            {"type": "text", "text": "and"},
            image({"url": PNG, "detail": "high"}),
            video({"url": MP4, **options}),
        ),
    ).media
    assert [item.kind for item in taken] == ["image", "image", "video"]
    assert [item.param for item in taken] == [
        "messages[0].content[0].image_url",
        "messages[0].content[2].image_url",
        "messages[0].content[3].video_url",
    ]
    assert [item.url for item in taken] == ["https://example.org/ä.png?x=1", None, None]
    assert [item.data for item in taken] == [None, b"pixels", b"frames"]
    assert taken[2].video == VideoOptions(-1, 2, 9, 8, "middle")


@pytest.mark.parametrize(
    ("file", "kind", "url"),
    [
        ({"file_data": MP4}, "video", None),
        ({"file_data": PNG, "filename": "a.png"}, "image", None),
        ({"file_id": "https://example.org/a", "format": "video/mp4"}, "video", "https://example.org/a"),
    ],
)
def test_files_are_what_their_type_says(parser: WholeParser, file: dict[str, str], kind: str, url: str | None) -> None:
    (item,) = parse(parser, **saying({"type": "file", "file": file})).media
    assert (item.kind, item.url) == (kind, url)


BYTES = bytes(range(248, 256)) * 7 + b"xy"  # base64 with + and /, and with padding
PLAIN = base64.b64encode(BYTES).decode()
GIF = base64.b64encode(b"GIF89a").decode()


@pytest.mark.parametrize(
    "url",
    [
        f"data:application/octet-stream;base64,{PLAIN}",
        f"data:;base64,{PLAIN}",
        f"data:text/plain;charset=utf-8;base64,{PLAIN}",
        f"data:image/jpeg;name=a photo.jpg;base64,{PLAIN}",
        f"data:image/*;base64,{PLAIN}",
        f"DATA:image/png;BASE64,{PLAIN}",
        f"data:image/png;base64,{PLAIN[:40]}\r\n{PLAIN[40:]}\n",
        f"data:image/png;base64,{base64.urlsafe_b64encode(BYTES).decode()}",
        f"data:image/png;base64,{PLAIN.rstrip('=')}",
        f"data:image/png;base64,{quote(PLAIN)}",
    ],
)
def test_the_bytes_of_a_data_url_decide(parser: WholeParser, url: str) -> None:
    assert "+" in PLAIN
    assert "/" in PLAIN
    assert PLAIN.endswith("=")
    [item] = parser.parse(json.dumps(saying(image(url))).encode()).media
    assert item.data == BYTES


def test_a_gif_is_an_image_or_a_video(parser: WholeParser) -> None:
    parts = image(f"data:video/mp4;base64,{GIF}"), video(f"data:image/gif;base64,{GIF}")
    media = parser.parse(json.dumps(saying(*parts)).encode()).media
    assert [item.kind for item in media] == ["image", "video"]


@pytest.mark.parametrize(
    ("start", "kind"),
    [
        (b"\x89PNG\r\n", "image"),
        (b"RIFF\0\0\0\0WEBP", "image"),
        (b"\0\0\0\x1cftypavif", "image"),
        (b"\0\0\0\x1cftypisom", "video"),
        (b"\x1a\x45\xdf\xa3", "video"),
        (b"G" + b"\0" * 187 + b"G", "video"),
    ],
)
def test_a_file_without_a_useful_type_is_what_its_bytes_say(parser: WholeParser, start: bytes, kind: str) -> None:
    url = "data:application/octet-stream;base64," + base64.b64encode(start + b"rest").decode()
    [item] = parser.parse(json.dumps(saying({"type": "file", "file": {"file_data": url}})).encode()).media
    assert (item.kind, item.data) == (kind, start + b"rest")


def test_media_in_a_tool_result(parser: WholeParser) -> None:
    assert len(parse(parser, **saying(image(PNG), role="tool")).media) == 1


def test_text_parts_are_one_text_for_every_role(parser: WholeParser) -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    for role in ("system", "developer", "user", "assistant", "tool"):
        split = parse(parser, messages=[{"role": role, "content": parts}])
        assert split.segments == parse(parser, messages=[{"role": role, "content": "ab"}]).segments
