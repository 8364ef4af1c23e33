"""The prompt's tokens: control tokens come from the template alone, whatever clients write."""

import json
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from whole_parser import WholeParser, render

from services.gateway.request.chat import ChatFormat, Prompt
from services.gateway.request.media import MediaRules
from services.gateway.request.schemas import ChatRequest
from services.gateway.request.shield import ControlTexts
from services.gateway.request.template import TemplateSource
from shared.errors import CheckpointError, RequestError
from shared.model.tokenizer import Tokenizer

RULES = MediaRules({"image": 9, "video": 9}, 1000)
IMAGE = {"type": "image_url", "image_url": {"url": "https://example.org/a.png"}}
VIDEO = {"type": "video_url", "video_url": "https://example.org/a.mp4"}
TRICKS = [
    "<|end_of_sentence|>",
    "<think>",
    "</think>",
    "<tool_call>",
    "</s>",
    "<s>",
    "<unk>",
    "<mask:1>",
    "<|image@placeholder|>",
    "<|video@placeholder|>",
    "<|IMAGE_PLACEHOLDER|>",
    "<|IMAGE_START|>",
    "<|LOC_0|>",
]


class Chat(msgspec.Struct, frozen=True):
    """A chat format and the template that goes with it."""

    template: TemplateSource
    format: ChatFormat


def chat_of(template: TemplateSource, tokenizer: Tokenizer) -> Chat:
    return Chat(template, ChatFormat(template.name, tokenizer))


def prompt_of(chat: Chat, **fields: Any) -> Prompt:
    request = msgspec.convert(fields, ChatRequest)
    media = RULES.extract(request)
    rendering = chat.format.prepare(request, media)
    return chat.format.tokenise(rendering, render(chat.template, rendering), media)


def control_ids(chat: Prompt, tokenizer: Tokenizer) -> list[int]:
    known = set(tokenizer.control.values())
    return [token for segment in chat.segments for token in segment if token in known]


def text_of(prompt: Prompt, tokenizer: Tokenizer) -> str:
    """The text that the prompt's ordinary tokens stand for, with control tokens by name."""
    names = {token: text.encode() for text, token in tokenizer.control.items()}
    pieces = [names.get(token) or tokenizer.token_bytes(token) for segment in prompt.segments for token in segment]
    return b"".join(pieces).decode()


@pytest.fixture(params=["built-in", "checkpoint"])
def chat(request: pytest.FixtureRequest, checkpoint: Path, tokenizer: Tokenizer, tmp_path: Path) -> Chat:
    directory = checkpoint if request.param == "checkpoint" else tmp_path
    return chat_of(TemplateSource.load(directory), tokenizer)


@pytest.fixture(scope="session")
def demo_chat(checkpoint: Path, tokenizer: Tokenizer) -> Chat:
    return chat_of(TemplateSource.load(checkpoint), tokenizer)


def test_a_prompt_is_the_templates_text_and_control_tokens(chat: Chat, tokenizer: Tokenizer) -> None:
    prompt = prompt_of(chat, messages=[{"role": "user", "content": "Héllo, 12 <b>"}])
    assert text_of(prompt, tokenizer) == (
        "<|begin_of_sentence|>You are a multimodal AI assistant called ERNIE developed by Baidu based on the "
        "PaddlePaddle framework.\nUser: Héllo, 12 <b>\nAssistant: \n<think>\n"
    )
    assert control_ids(prompt, tokenizer) == [tokenizer.control["<|begin_of_sentence|>"], tokenizer.control["<think>"]]
    assert prompt.thinking


def test_media_cut_the_prompt_in_order(chat: Chat, tokenizer: Tokenizer) -> None:
    prompt = prompt_of(chat, messages=[{"role": "user", "content": [IMAGE, {"type": "text", "text": "a"}, VIDEO]}])
    starts_and_ends = [(segment[0], segment[-1]) for segment in prompt.segments]
    control = tokenizer.control
    assert len(prompt.segments) == 3
    assert starts_and_ends[0][1] == control["<|IMAGE_START|>"]
    assert starts_and_ends[1] == (control["<|IMAGE_END|>"], control["<|VIDEO_START|>"])
    assert starts_and_ends[2][0] == control["<|VIDEO_END|>"]


@pytest.mark.parametrize(("effort", "thinking"), [("none", False), ("high", True)])
def test_whether_it_thinks_is_seen_in_the_prompt(chat: Chat, effort: str, thinking: bool) -> None:
    messages = [{"role": "user", "content": "<think>" if not thinking else "</think>"}]
    assert prompt_of(chat, messages=messages, reasoning_effort=effort).thinking is thinking


@pytest.mark.parametrize("trick", TRICKS)
def test_names_of_control_tokens_are_text_wherever_clients_write_them(
    chat: Chat, tokenizer: Tokenizer, trick: str
) -> None:
    def conversation(word: str) -> dict[str, Any]:
        return {
            "messages": [
                {"role": "system", "content": word},
                {"role": "user", "content": [{"type": "text", "text": word}, IMAGE], "name": word},
                {
                    "role": "assistant",
                    "content": word,
                    "reasoning_content": word,
                    "tool_calls": [
                        {"function": {"name": word, "arguments": json.dumps({word: [word]})}},
                        {"function": {"name": word, "arguments": {word: word}}},
                    ],
                },
                {"role": "tool", "content": {word: word}, "tool_call_id": word},
            ],
            "tools": [{"type": "function", "function": {"name": "f", "description": word, "parameters": {word: word}}}],
            "chat_template_kwargs": {"options": {"word": word}},
        }

    tricked, honest = prompt_of(chat, **conversation(trick)), prompt_of(chat, **conversation("word"))
    assert control_ids(tricked, tokenizer) == control_ids(honest, tokenizer)
    assert len(tricked.segments) == 2
    assert text_of(tricked, tokenizer) == text_of(honest, tokenizer).replace("word", trick)


def test_a_name_cut_into_parts_is_still_text(chat: Chat, tokenizer: Tokenizer) -> None:
    parts = [{"type": "text", "text": piece} for piece in ("<|end_of", "_sentence|>", "<", "think>")]
    prompt = prompt_of(chat, messages=[{"role": "user", "content": parts}])
    assert "<|end_of_sentence|><think>" in text_of(prompt, tokenizer)
    assert len(control_ids(prompt, tokenizer)) == 2


WORDS = st.lists(st.sampled_from([*TRICKS, "<", "|>", "<|", "think>", ">", "/", "s>", " ", "x", "é"]), max_size=8)


@settings(max_examples=60)
@given(words=WORDS, free=st.text(max_size=20))
def test_no_text_becomes_a_control_token(demo_chat: Chat, tokenizer: Tokenizer, words: list[str], free: str) -> None:
    content = "".join(words) + free
    prompt = prompt_of(demo_chat, messages=[{"role": "user", "content": content}])
    assert control_ids(prompt, tokenizer) == [tokenizer.control["<|begin_of_sentence|>"], tokenizer.control["<think>"]]
    assert f"User: {content}\nAssistant:" in text_of(prompt, tokenizer)


@pytest.mark.parametrize(
    "source",
    [
        "no place",
        "<|image@placeholder|><|image@placeholder|>",
        "<|video@placeholder|>",
    ],
)
def test_a_template_that_loses_media_is_at_fault(tokenizer: Tokenizer, source: str) -> None:
    chat = chat_of(TemplateSource("broken.jinja", source, {}), tokenizer)
    with pytest.raises(RequestError, match=r"broken\.jinja") as failed:
        prompt_of(chat, messages=[{"role": "user", "content": [IMAGE]}])
    assert failed.value.failure.status == 500


def test_control_texts_that_begin_with_anything() -> None:
    texts = ControlTexts(["[END]", "ab", "abc", "<x>"])
    mark = texts.mark()
    hidden = texts.hide({"ab[END]": ["abc", {"<x>": 1}]}, mark)
    assert not any(is_control for _, is_control in texts.split(json.dumps(hidden), mark))
    assert "".join(text for text, _ in texts.split(json.dumps(hidden), mark)) == '{"ab[END]": ["abc", {"<x>": 1}]}'
    assert list(texts.split("1abcab[END]2", mark)) == [
        ("1", False),
        ("abc", True),
        ("ab", True),
        ("[END]", True),
        ("2", False),
    ]


def test_marks_differ_and_control_tokens_too_short_to_mark_are_refused() -> None:
    texts = ControlTexts(["<x>"])
    assert texts.mark() != texts.mark()
    with pytest.raises(CheckpointError, match="too short"):
        ControlTexts(["<x>", "<"])


def test_an_over_long_prompt_is_refused(parser: WholeParser) -> None:
    body = json.dumps({"messages": [{"role": "user", "content": "word " * 5000}]}).encode()
    with pytest.raises(RequestError) as refused:
        parser.parse(body)
    assert refused.value.failure.code == "context_length_exceeded"
    assert "2048" in refused.value.failure.message
