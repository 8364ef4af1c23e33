"""The chat template: the built-in format, where a checkpoint's own is found, and how one may fail."""

import json
from pathlib import Path
from typing import Any

import msgspec
import pytest
from whole_parser import load_template

from services.gateway.request.chat import template_variables
from services.gateway.request.media import MediaRules
from services.gateway.request.schemas import ChatRequest
from services.gateway.request.template import Template, TemplateFailureError, TemplateSource
from shared.errors import CheckpointError, RequestError

SYSTEM = "You are a multimodal AI assistant called ERNIE developed by Baidu based on the PaddlePaddle framework."
IMAGE = {"type": "image_url", "image_url": {"url": "https://example.org/a.png"}}
VIDEO = {"type": "video_url", "video_url": "https://example.org/a.mp4"}
WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Current weather",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}
TOOL_LIST = (
    '\n<tool_list>\n[{"type": "function", "function": {"name": "get_weather", "description": "Current weather", '
    '"parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}}}]\n'
    "</tool_list>\n"
)
CALL = {"type": "function", "id": "c1", "function": {"name": "get_weather", "arguments": '{"city": "Paris"}'}}
RULES = MediaRules({"image": 9, "video": 9}, 1000)


def text(value: str) -> dict[str, str]:
    return {"type": "text", "text": value}


def render(template: Template, **fields: Any) -> str:
    request = msgspec.convert(fields, ChatRequest)
    return template.render(template_variables(request, RULES.extract(request)))


@pytest.fixture
def built_in(tmp_path: Path) -> Template:
    return load_template(tmp_path, 10_000)


SAMPLES: list[tuple[dict[str, Any], str]] = [
    (
        {"messages": [{"role": "user", "content": "1+1=?"}]},
        f"<|begin_of_sentence|>{SYSTEM}\nUser: 1+1=?\nAssistant: \n<think>\n",
    ),
    (
        {"messages": [{"role": "system", "content": "Be terse."}, {"role": "user", "content": "Hi"}]},
        "<|begin_of_sentence|>Be terse.\nUser: Hi\nAssistant: \n<think>\n",
    ),
    (
        {"messages": [{"role": "user", "content": [IMAGE, text("Describe it.")]}]},
        f"<|begin_of_sentence|>{SYSTEM}\nUser:  Picture 1:<|IMAGE_START|><|image@placeholder|><|IMAGE_END|>"
        "Describe it.\nAssistant: \n<think>\n",
    ),
    (
        {
            "messages": [
                {"role": "user", "content": [IMAGE, IMAGE, text("Compare.")]},
                {"role": "assistant", "content": "Same cat.", "reasoning_content": "two cats"},
                {"role": "user", "content": [VIDEO, text("And here?")]},
            ]
        },
        f"<|begin_of_sentence|>{SYSTEM}\nUser:  Picture 1:<|IMAGE_START|><|image@placeholder|><|IMAGE_END|>"
        " Picture 2:<|IMAGE_START|><|image@placeholder|><|IMAGE_END|>Compare.\nAssistant: Same cat."
        "<|end_of_sentence|>User:  Video 1:<|VIDEO_START|><|video@placeholder|><|VIDEO_END|>And here?\nAssistant: "
        "\n<think>\n",
    ),
    (
        {"tools": [WEATHER], "messages": [{"role": "user", "content": "Weather in Paris?"}]},
        f"<|begin_of_sentence|>{SYSTEM}\n{TOOL_LIST}User: Weather in Paris?\nAssistant: \n<think>\n",
    ),
    (
        {
            "tools": [WEATHER],
            "messages": [
                {"role": "user", "content": "Weather in Paris?"},
                {"role": "assistant", "content": None, "reasoning": "need tool\n", "tool_calls": [CALL]},
                {"role": "tool", "tool_call_id": "c1", "content": '{"temp": 20}'},
            ],
        },
        f"<|begin_of_sentence|>{SYSTEM}\n{TOOL_LIST}User: Weather in Paris?\nAssistant: \n<think>\nneed tool\n</think>"
        '\n\n<tool_call>\n{"name": "get_weather", "arguments": {"city": "Paris"}}\n</tool_call>\n<|end_of_sentence|>'
        'User: <tool_output>\n{"temp": 20}\n</tool_output>\n\nAssistant: \n<think>\n',
    ),
]


@pytest.mark.parametrize(("request_fields", "expected"), SAMPLES, ids=range(1, 7))
def test_the_built_in_template_writes_the_known_prompts(
    built_in: Template, request_fields: dict[str, Any], expected: str
) -> None:
    assert render(built_in, **request_fields) == expected


@pytest.mark.parametrize(("request_fields", "expected"), SAMPLES, ids=range(1, 7))
def test_a_checkpoints_template_gets_what_it_expects(
    checkpoint: Path, request_fields: dict[str, Any], expected: str
) -> None:
    assert render(load_template(checkpoint, 10_000), **request_fields) == expected


@pytest.mark.parametrize(
    "fields",
    [
        {"enable_thinking": False},
        {"chat_template_kwargs": {"enable_thinking": False}},
        {"chat_template_kwargs": {"options": {"thinking_mode": "close"}}},
        {"chat_template_kwargs": {"options": {"thinking_mode": False}}},
        {"metadata": {"enable_thinking": "false"}},
        {"reasoning_effort": "none"},
        {"enable_thinking": False, "reasoning_effort": "high"},
    ],
)
def test_thinking_is_closed_by_every_field_clients_have_for_it(built_in: Template, fields: dict[str, Any]) -> None:
    prompt = render(built_in, messages=[{"role": "user", "content": "Hi"}], **fields)
    assert prompt.endswith("\nAssistant: \n<think>\n\n</think>\n\n")


@pytest.mark.parametrize(
    "fields",
    [{"enable_thinking": True, "reasoning_effort": "none"}, {"reasoning_effort": "low"}, {"metadata": {"a": "b"}}, {}],
)
def test_thinking_is_open_otherwise(built_in: Template, fields: dict[str, Any]) -> None:
    assert render(built_in, messages=[{"role": "user", "content": "Hi"}], **fields).endswith("Assistant: \n<think>\n")


def test_the_switch_reaches_templates_under_both_names(tmp_path: Path) -> None:
    (tmp_path / "chat_template.jinja").write_text("{{ enable_thinking }} {{ options | tojson }}")
    template = load_template(tmp_path, 1000)
    kwargs = {"options": {"thinking_mode": "false", "other": 1}}
    prompt = render(template, messages=[{"role": "user", "content": "Hi"}], chat_template_kwargs=kwargs)
    assert prompt == 'False {"other": 1, "thinking_mode": "close"}'


def test_developer_is_system_and_several_are_one(built_in: Template) -> None:
    messages = [
        {"role": "system", "content": "One."},
        {"role": "developer", "content": [text("Two"), text(".")]},
        {"role": "user", "content": [text("a"), text("b")]},
    ]
    assert render(built_in, messages=messages).startswith("<|begin_of_sentence|>One.\nTwo.\nUser: ab\n")


def test_a_system_message_in_the_middle_is_refused(built_in: Template) -> None:
    messages = [{"role": "user", "content": "Hi"}, {"role": "system", "content": "Be terse."}]
    with pytest.raises(RequestError) as refused:
        render(built_in, messages=messages)
    assert (refused.value.failure.status, refused.value.failure.param) == (400, "messages")


def test_a_tool_result_may_be_an_object(built_in: Template) -> None:
    messages = [{"role": "tool", "content": {"temp": 20, "unit": "°C"}}]
    assert '<tool_output>\n{"temp":20,"unit":"°C"}\n</tool_output>' in render(built_in, messages=messages)


def test_tools_not_to_be_called_are_not_shown(built_in: Template) -> None:
    prompt = render(built_in, messages=[{"role": "user", "content": "Hi"}], tools=[WEATHER], tool_choice="none")
    assert "tool_list" not in prompt


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"chat_template.jinja": "J", "chat_template.json": "{}", "tokenizer_config.json": "{}"}, "J"),
        ({"chat_template.json": '{"chat_template": "P"}', "tokenizer_config.json": '{"chat_template": "T"}'}, "P"),
        ({"tokenizer_config.json": '{"chat_template": "T"}'}, "T"),
        (
            {
                "tokenizer_config.json": json.dumps(
                    {"chat_template": [{"name": "x", "template": "X"}, {"name": "default", "template": "D"}]}
                )
            },
            "D",
        ),
        (
            {
                "tokenizer_config.json": json.dumps(
                    {
                        "chat_template": "{{ bos_token }}{{ eos_token }}",
                        "bos_token": "<s>",
                        "eos_token": {"content": "E"},
                    }
                )
            },
            "<s>E",
        ),
    ],
)
def test_where_a_template_is_found(tmp_path: Path, files: dict[str, str], expected: str) -> None:
    for name, content in files.items():
        (tmp_path / name).write_text(content)
    assert render(load_template(tmp_path, 100), messages=[{"role": "user", "content": "Hi"}]) == expected


@pytest.mark.parametrize(
    "content",
    ['{"chat_template": 3}', '{"chat_template": [{"name": "x", "template": "X"}]}', "{"],
)
def test_an_unusable_template_is_named(tmp_path: Path, content: str) -> None:
    (tmp_path / "tokenizer_config.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"tokenizer_config\.json"):
        TemplateSource.load(tmp_path)


def render_alone(source: str) -> str:
    template = Template(TemplateSource("t", source, {}), 10_000)
    return template.render({"messages": [{"role": "user", "content": "Hi"}]})


@pytest.mark.parametrize(
    ("source", "message"),
    [("{{ raise_exception('no') }}", "no"), ("{% for i in range(1000) %}xxxxxxxxxxxx{% endfor %}", "10000")],
)
def test_conversations_that_are_refused(source: str, message: str) -> None:
    with pytest.raises(RequestError) as failed:
        render_alone(source)
    assert (failed.value.failure.status, failed.value.failure.param) == (400, "messages")
    assert message in failed.value.failure.message


@pytest.mark.parametrize(
    ("source", "what"),
    [
        ("{% if %}", "does not compile"),
        ("{{ messages.absent.deeper }}", "UndefinedError"),
        ("{{ 1 / 0 }}", "ZeroDivisionError"),
        ("{{ ''.__class__.__mro__ }}", "SecurityError"),
        ("{{ messages.append(1) }}", "SecurityError"),
        ("{{ range(10 ** 9) }}", "OverflowError"),
    ],
)
def test_templates_that_fail(source: str, what: str) -> None:
    with pytest.raises(TemplateFailureError, match=what):
        render_alone(source)


def test_what_templates_expect_to_find() -> None:
    source = (
        "{{ {'a': 'é<&'} | tojson }} {{ strftime_now('%Y') | int > 2000 }}{% for i in [1, 2] %}{% break %}{% endfor %}"
    )
    assert Template(TemplateSource("t", source, {}), 100).render({}) == '{"a": "é<&"} True'
