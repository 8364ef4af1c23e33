"""Requests beyond the plain form, and what becomes of them: history as it was, other spellings, other APIs' fields."""

import json
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from whole_parser import WholeParser

from services.gateway.request.chat import ChatFormat
from services.gateway.request.parsed import ParsedRequest
from services.gateway.request.sampling import ServerDefaults
from services.gateway.request.schemas import MAX_SEED, ChatRequest, StructuredOutputs, digest_body
from services.gateway.request.surrogates import replace_lone_surrogates, replaced_paths
from services.gateway.request.unsupported import NEUTRAL_VALUES, NO_EFFECT
from shared.errors import RequestError
from shared.messages import VideoOptions
from shared.model.tokenizer import Tokenizer

HI = [{"role": "user", "content": "Hi"}]


def parse(parser: WholeParser, **fields: Any) -> ParsedRequest:
    return parser.parse(json.dumps({"messages": HI, **fields}).encode())


def prompt(parser: WholeParser, **fields: Any) -> str:
    """The prompt's text, with control tokens by name."""
    names = {token: text.encode() for text, token in parser.tokenizer.control.items()}
    ids = [token for segment in parse(parser, **fields).segments for token in segment]
    return b"".join(names.get(token) or parser.tokenizer.token_bytes(token) for token in ids).decode()


def said(parser: WholeParser, **message: Any) -> str:
    """What the prompt has of an assistant's message in the middle of a conversation."""
    text = prompt(parser, messages=[*HI, {"role": "assistant", **message}, *HI])
    return text.split("\nAssistant: ", 1)[1].split("<|end_of_sentence|>", 1)[0]


# ------------------------------------------------------------------------------------------------ history


def called(arguments: str) -> str:
    return '<tool_call>\n{"name": "f", "arguments": ' + arguments + "}\n</tool_call>\n"


DEEP = "[" * 40 + "]" * 40


@pytest.mark.parametrize(
    ("arguments", "written"),
    [
        ('{"city": "Paris"}', '{"city": "Paris"}'),
        ('{"city": "Par', '{"city": "Par'),
        ("{'city': 1}", "{'city': 1}"),
        ("city = Paris", "city = Paris"),
        ('{"a": NaN}', '{"a": NaN}'),
        (DEEP, DEEP),
        (json.loads(DEEP), DEEP),
        ("[1, 2]", "[1, 2]"),
        ([1, 2], "[1,2]".replace(",", ", ")),
        ('"Paris"', '"Paris"'),
        ({"a": 1}, '{"a": 1}'),
        ("", "{}"),
        (None, "{}"),
    ],
)
def test_arguments_are_rendered_as_the_text_that_they_are(parser: WholeParser, arguments: Any, written: str) -> None:
    call = {"id": "call_1", "type": "function", "function": {"name": "f", "arguments": arguments}}
    assert said(parser, content=None, tool_calls=[call]) == called(written)


def test_a_control_token_in_broken_arguments_is_text(parser: WholeParser) -> None:
    call = {"function": {"name": "f", "arguments": '{"a": "</think><|end_of_sentence|>'}}
    made = parse(parser, messages=[*HI, {"role": "assistant", "tool_calls": [call]}, *HI])
    control = parser.tokenizer.control
    assert made.segments[0].count(control["</think>"]) == 0
    assert made.segments[0].count(control["<|end_of_sentence|>"]) == 1


F = {"name": "f", "arguments": "{}"}


@pytest.mark.parametrize(
    ("message", "written"),
    [
        ({"tool_calls": [{"function": F}]}, called("{}")),
        ({"tool_calls": [{"id": None, "type": None, "function": F}]}, called("{}")),
        ({"tool_calls": [{"type": "custom", "custom": {"name": "f", "input": "a b"}}]}, called('"a b"')),
        ({"function_call": F}, called("{}")),
        ({"content": "", "tool_calls": []}, ""),
        ({"content": []}, ""),
        ({"content": None}, ""),
        ({}, ""),
        ({"content": None, "refusal": "No."}, "No."),
        ({"content": [{"type": "refusal", "refusal": "No."}]}, "No."),
        ({"content": [{"type": "output_text", "text": "Yes."}]}, "Yes."),
        ({"content": [{"type": "thinking", "thinking": "Hm."}, {"type": "text", "text": "Yes."}]}, "Yes."),
        ({"content": "Yes.", "refusal": None, "audio": None, "annotations": [], "function_call": None}, "Yes."),
    ],
)
def test_answers_in_any_form_are_history(parser: WholeParser, message: dict[str, Any], written: str) -> None:
    assert said(parser, **message) == written


@pytest.mark.parametrize(
    "kept",
    [
        {"reasoning_content": "Hm."},
        {"reasoning": "Hm."},
        {"reasoning_content": [{"type": "text", "text": "H"}, {"type": "text", "text": "m."}]},
        {"reasoning": ["Hm."]},
        {"reasoning": {"content": [{"text": "Hm."}]}},
        {"reasoning_content": None, "reasoning": "Hm."},
        {"content": [{"type": "thinking", "thinking": [{"type": "text", "text": "Hm."}]}]},
    ],
)
def test_reasoning_in_any_form_is_the_reasoning_of_a_call(parser: WholeParser, kept: dict[str, Any]) -> None:
    call = {"role": "assistant", "tool_calls": [{"function": F}], **kept}
    text = prompt(parser, messages=[*HI, call, {"role": "tool", "content": "5"}])
    assert "<think>\nHm.\n</think>\n\n" + called("{}") in text


def test_reasoning_that_is_no_text_is_none(parser: WholeParser) -> None:
    for value in (7, {}, [[[[[["deep"]]]]]], {"content": None}):
        assert said(parser, content="Yes.", reasoning=value) == "Yes."


def test_a_functions_result_is_a_tools(parser: WholeParser) -> None:
    old, new = (
        prompt(parser, messages=[*HI, {"role": role, "name": "f", "content": "5"}]) for role in ("function", "tool")
    )
    assert old == new


@pytest.mark.parametrize("role", ["user", "system", "tool"])
def test_empty_content_is_empty(parser: WholeParser, role: str) -> None:
    empty = prompt(parser, messages=[{"role": role, "content": ""}, *HI])
    assert prompt(parser, messages=[{"role": role, "content": None}, *HI]) == empty
    assert prompt(parser, messages=[{"role": role}, *HI]) == empty
    assert prompt(parser, messages=[{"role": role, "content": []}, *HI]) == empty


def test_the_case_of_a_client_whose_call_was_cut_off(parser: WholeParser) -> None:
    call = {"id": "call_1", "type": "function", "function": {"name": "get_weather", "arguments": '{"city": "Par'}}
    text = prompt(
        parser,
        model="demo",
        max_tokens=5,
        messages=[
            {"role": "user", "content": "Weather in Paris?"},
            {"role": "assistant", "content": None, "tool_calls": [call]},
            {"role": "tool", "tool_call_id": "call_1", "content": "Error: arguments were cut off; try again."},
        ],
    )
    assert '{"name": "get_weather", "arguments": {"city": "Par}\n</tool_call>' in text


# ------------------------------------------------------------------------------------------------ spellings


def test_every_optional_field_may_be_null(parser: WholeParser) -> None:
    names = [name for name in ChatRequest.__struct_fields__ if name != "messages"]
    nulls = parse(parser, **dict.fromkeys([*names, *NEUTRAL_VALUES, *NO_EFFECT]))
    plain = parse(parser)
    same = msgspec.structs.replace(nulls.sampling, seed=plain.sampling.seed)
    assert msgspec.structs.replace(nulls, sampling=same) == plain


def test_nulls_within_fields(parser: WholeParser) -> None:
    function = {"name": "f", "description": None, "parameters": None, "strict": None}
    parse(
        parser,
        messages=[{"role": "user", "content": "Hi", "name": None, "tool_calls": None, "tool_call_id": None}],
        tools=[{"type": None, "function": function}],
        thinking={"type": None, "budget_tokens": None},
        reasoning={"effort": None, "max_tokens": None, "enabled": None, "exclude": None},
    )


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"max_tokens": 5.0}, {"max_tokens": 5}),
        ({"max_tokens": "5"}, {"max_tokens": 5}),
        ({"seed": 7.0}, {"seed": 7}),
        ({"seed": -7}, {"seed": MAX_SEED - 6}),
        ({"top_k": 3.0, "temperature": "0.5"}, {"top_k": 3, "temperature": 0.5}),
        ({"stop_token_ids": [5.0]}, {"stop_token_ids": (5,)}),
    ],
)
def test_numbers_in_other_spellings(parser: WholeParser, fields: dict[str, Any], expected: dict[str, Any]) -> None:
    sampling = parse(parser, **fields).sampling
    assert {name: getattr(sampling, name) for name in expected} == expected


def test_a_seed_of_minus_one_is_drawn(parser: WholeParser) -> None:
    assert parse(parser, seed=-1).sampling.seed != parse(parser, seed=-1).sampling.seed


@pytest.mark.parametrize(("stop", "left"), [([""], ()), ("", ()), (["", "a"], ("a",))])
def test_empty_stop_strings_are_left_out(parser: WholeParser, stop: Any, left: tuple[str, ...]) -> None:
    assert parse(parser, stop=stop).output.stop == left


def test_a_tool_without_a_type_is_a_function(parser: WholeParser) -> None:
    function = {"name": "f", "parameters": {"type": "object"}}
    typed = prompt(parser, tools=[{"type": "function", "function": function}])
    assert prompt(parser, tools=[{"function": function}]) == typed


def test_parts_of_the_responses_api(parser: WholeParser) -> None:
    png = "data:image/png;base64,AAAA"
    ours = [{"type": "image_url", "image_url": png}, {"type": "text", "text": "what?"}]
    theirs = [{"type": "input_image", "image_url": png, "detail": "auto"}, {"type": "input_text", "text": "what?"}]
    made = [parse(parser, messages=[{"role": "user", "content": parts}]) for parts in (ours, theirs)]
    assert (made[0].segments, made[0].media) == (made[1].segments, made[1].media)
    assert made[1].media[0].data == b"\0\0\0"


# ------------------------------------------------------------------------------------------------ surrogates


def test_lone_surrogates_are_replaced_and_reported(parser: WholeParser) -> None:
    cut = b'{"role": "user", "content": "a\\ud83dz\\uDE00"}'
    body = b'{"messages": [{"role": "user", "content": "Hi"}, %b], "stop": "\\ud800"}' % cut
    made = parser.parse(body)
    assert made.output.stop == ("\ufffd",)
    assert made.warnings == (
        "`messages[1]`: a lone surrogate was replaced by U+FFFD",
        "`stop`: a lone surrogate was replaced by U+FFFD",
    )
    assert len(digest_body(body)) == 64


def test_pairs_and_escaped_backslashes_are_left_alone() -> None:
    for body in (rb'{"a": "\ud83d\ude00"}', rb'{"a": "\\ud800"}', rb'{"a": "\\\\ud800 \n"}'):
        assert replace_lone_surrogates(body) == body
        assert replaced_paths(body) == []


@given(st.text(st.characters(min_codepoint=0xD700, max_codepoint=0xE010) | st.sampled_from('"\\u d8')))
def test_every_string_becomes_one_that_utf_8_holds(text: str) -> None:
    body = json.dumps({"a": text}).encode()
    expected = text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
    assert msgspec.json.decode(replace_lone_surrogates(body)) == {"a": expected}


# ------------------------------------------------------------------------------------------------ other APIs' fields


@pytest.mark.parametrize(
    "fields",
    [
        {"thinking": {"type": "disabled"}},
        {"thinking": False},
        {"chat_template_kwargs": {"thinking": False}},
        {"reasoning": {"enabled": False}},
        {"reasoning": {"effort": "none"}},
        {"reasoning_effort": "none"},
        {"thinking_budget": 0},
        {"thinking_token_budget": 0},
        {"thinking": {"type": "enabled"}, "enable_thinking": False},
    ],
)
def test_thinking_is_turned_off_by_any_of_the_fields(parser: WholeParser, fields: dict[str, Any]) -> None:
    assert not parse(parser, **fields).output.thinking


@pytest.mark.parametrize(
    ("fields", "budget"),
    [
        ({"reasoning_max_tokens": 9, "thinking_budget": 5}, 9),
        ({"thinking_token_budget": 9}, 9),
        ({"thinking_budget": 9}, 9),
        ({"thinking": {"type": "enabled", "budget_tokens": 9}}, 9),
        ({"reasoning": {"max_tokens": 9}}, 9),
        ({"thinking_budget": -1}, None),
        ({"thinking": {"type": "adaptive"}}, None),
        ({"thinking": True}, None),
        ({"reasoning": {"effort": "high"}}, None),
    ],
)
def test_budgets_of_thinking(parser: WholeParser, fields: dict[str, Any], budget: int | None) -> None:
    made = parse(parser, **fields)
    assert (made.output.thinking, made.sampling.reasoning_max_tokens) == (True, budget)


def test_what_is_shown_of_reasoning(parser: WholeParser) -> None:
    plain = parse(parser).output
    assert (plain.include_reasoning, plain.separate_reasoning, plain.stop_in_reasoning) == (True, True, False)
    assert not parse(parser, include_reasoning=False).output.include_reasoning
    assert not parse(parser, reasoning={"exclude": True}).output.include_reasoning
    joined = parse(parser, separate_reasoning=False).output
    assert (joined.separate_reasoning, joined.stop_in_reasoning) == (False, True)
    assert parse(parser, stop_in_reasoning=True).output.stop_in_reasoning


@pytest.mark.parametrize("field", ["tool_call_ends_reasoning", "force_nonempty_content"])
def test_options_that_the_server_has_too(parser: WholeParser, field: str) -> None:
    forcing = msgspec.structs.replace(parser, server=ServerDefaults(True, True))
    for default, made in ((False, parser), (True, forcing)):
        assert getattr(parse(made).output, field) is default
        assert getattr(parse(made, **{field: None}).output, field) is default
        assert getattr(parse(made, **{field: not default}).output, field) is not default
    in_kwargs = parse(parser, chat_template_kwargs={"force_nonempty_content": True})
    assert in_kwargs.output.force_nonempty_content


def test_the_servers_own_bound_on_loops(parser: WholeParser) -> None:
    breaking = msgspec.structs.replace(parser, server=ServerDefaults(thinking_loop_repeats=3, thinking_loop_tokens=8))
    assert parse(breaking).sampling.loop_repeats == 3
    assert parse(breaking).sampling.loop_tokens == 8
    assert parse(breaking, thinking_loop_repeats=0).sampling.loop_repeats == 0
    assert parse(breaking, thinking_loop_repeats=5).sampling.loop_repeats == 5


def test_unknown_fields_are_ignored_and_said(parser: WholeParser) -> None:
    made = parse(parser, max_token=5, ünknown=1, store=True)
    assert made.warnings == (
        "`max_token` is no field that this server knows; it is ignored",
        "`\\xfcnknown` is no field that this server knows; it is ignored",
    )
    assert parse(parser).warnings == ()
    assert len(parse(parser, **{f"field{i}": i for i in range(99)}).warnings) == 8


def test_each_field_is_in_one_of_the_tables() -> None:
    assert not set(NEUTRAL_VALUES) & NO_EFFECT
    assert not set(ChatRequest.__struct_fields__) & NO_EFFECT


def test_salt_and_id_arrive(parser: WholeParser) -> None:
    made = parse(parser, cache_salt="s", request_id="mine-1")
    assert (made.cache_salt, made.request_id) == ("s", "mine-1")


def test_prefixes_are_shared_within_salt_and_extra_key(parser: WholeParser) -> None:
    """A key alone is a salt, both are another however they are cut, and an empty key is none."""
    pairs = [(None, None), ("a", None), (None, "b"), ("a", "b"), ("ab", None), ("a", "bc"), ("ab", "c"), ("b", "a")]
    salts = [parse(parser, cache_salt=salt, extra_key=key).cache_salt for salt, key in pairs]
    assert len(set(salts)) == len(pairs)
    assert parse(parser, extra_key="").cache_salt == ""
    assert parse(parser, extra_key="a").cache_salt == "a"


# ------------------------------------------------------------------------------------------------ prompts


def test_an_answer_is_continued(parser: WholeParser) -> None:
    def continued(**message: Any) -> tuple[str, bool]:
        fields = {
            "messages": [*HI, {"role": "assistant", **message}],
            "continue_final_message": True,
            "add_generation_prompt": False,
        }
        return prompt(parser, **fields).split("\nAssistant: ")[1], parse(parser, **fields).output.thinking

    assert continued(content="The ans") == ("\n<think>\n\n</think>\n\nThe ans", False)
    assert continued(content="", reasoning_content="Hm, the") == ("\n<think>\nHm, the", True)
    assert continued(content="So", reasoning="Hm.\n") == ("\n<think>\nHm.\n</think>\n\nSo", False)
    assert continued(content=[{"type": "text", "text": "</think>"}]) == ("\n<think>\n\n</think>\n\n</think>", False)
    assert continued(content="") == ("\n<think>\n", True)


@pytest.mark.parametrize("mark", ["prefix", "partial"])
def test_an_answer_is_continued_that_its_message_calls_a_beginning(parser: WholeParser, mark: str) -> None:
    begun = {"role": "assistant", "content": "The ans"}
    whole = prompt(parser, messages=[*HI, begun], continue_final_message=True)
    assert prompt(parser, messages=[*HI, {**begun, mark: True}]) == whole
    plain = prompt(parser, messages=[*HI, begun])
    assert prompt(parser, messages=[*HI, {**begun, mark: False}]) == plain != whole
    assert prompt(parser, messages=[*HI, {**begun, mark: True}, *HI]) == prompt(parser, messages=[*HI, begun, *HI])


def test_control_tokens_in_a_continued_answer_are_text(parser: WholeParser) -> None:
    message = {"role": "assistant", "content": "</think>", "reasoning": "</think>"}
    made = parse(parser, messages=[*HI, message], continue_final_message=True)
    assert made.segments[0].count(parser.tokenizer.control["</think>"]) == 1


def test_a_prompt_without_its_generation_part(parser: WholeParser) -> None:
    assert prompt(parser, add_generation_prompt=False).endswith("User: Hi\nAssistant: ")
    assert not parse(parser, add_generation_prompt=False).output.thinking


@pytest.mark.parametrize("name", [name for name in StructuredOutputs.__struct_fields__ if name != "json"])
def test_options_of_structured_outputs_may_be_null(parser: WholeParser, name: str) -> None:
    given = parse(parser, structured_outputs={"json": {"type": "object"}, name: None}).sampling.grammar
    assert given == parse(parser, structured_outputs={"json": {"type": "object"}}).sampling.grammar


def test_tokens_that_are_allowed(parser: WholeParser) -> None:
    assert parse(parser, allowed_token_ids=[5, 9]).sampling.allowed_token_ids == (5, 9)
    for fields in (
        {"allowed_token_ids": [10**9]},
        {"allowed_token_ids": []},
        {"allowed_token_ids": [5], "response_format": {"type": "json_object"}},
    ):
        with pytest.raises(RequestError) as refused:
            parse(parser, **fields)
        assert (refused.value.failure.status, refused.value.failure.param) == (400, "allowed_token_ids")


@pytest.mark.parametrize(("given", "shown"), [(None, False), (True, False), (False, True)])
def test_special_tokens_are_shown_where_asked(parser: WholeParser, given: bool | None, shown: bool) -> None:
    assert parse(parser, skip_special_tokens=given).output.special_tokens is shown


def test_sizes_of_media_are_each_kinds_own_and_a_videos_options_win(parser: WholeParser) -> None:
    parts: list[dict[str, Any]] = [
        {"type": "image_url", "image_url": {"url": "https://example.org/a.png"}},
        {"type": "video_url", "video_url": {"url": "https://example.org/a.mp4", "fps": 1}},
    ]
    sizes = {"image_max_pixels": 9000, "video_min_pixels": 4000, "video_fps": 3, "video_max_frames": 20}
    made = parse(parser, messages=[{"role": "user", "content": parts}], mm_processor_kwargs=sizes)
    image, video = made.media
    assert (image.min_pixels, image.max_pixels, image.video) == (None, 9000, VideoOptions())
    assert (video.min_pixels, video.max_pixels, video.video) == (4000, None, VideoOptions(fps=1, max_frames=20))


@pytest.mark.parametrize(
    ("own", "sizes", "frames"),
    [
        ({"fps": 1}, {"video_target_frames": 8}, VideoOptions(fps=1)),
        ({"target_frames": 8}, {"video_fps": 2, "video_max_frames": 9}, VideoOptions(target_frames=8, max_frames=9)),
        ({"fps": -1}, {"video_target_frames": 8}, VideoOptions(fps=-1, target_frames=8)),
        ({"min_frames": 2}, {"video_target_frames": 8}, VideoOptions(min_frames=2, target_frames=8)),
    ],
)
def test_a_video_that_says_how_many_frames_is_not_asked_twice(
    parser: WholeParser, own: dict[str, Any], sizes: dict[str, Any], frames: VideoOptions
) -> None:
    part = {"type": "video_url", "video_url": {"url": "https://example.org/a.mp4", **own}}
    made = parse(parser, messages=[{"role": "user", "content": [part]}], mm_processor_kwargs=sizes)
    assert made.media[0].video == frames


@pytest.mark.parametrize("sizes", [{"image_max_pixels": 0}, {"spatial_conv_size": 2}, {"video_fps": "fast"}])
def test_sizes_of_media_that_no_server_has(parser: WholeParser, sizes: dict[str, Any]) -> None:
    with pytest.raises(RequestError) as refused:
        parse(parser, mm_processor_kwargs=sizes)
    assert (refused.value.failure.param or "").startswith("mm_processor_kwargs")


def test_a_template_of_the_requests_own(parser: WholeParser, tokenizer: Tokenizer) -> None:
    trusting = msgspec.structs.replace(parser, chat=ChatFormat("t", tokenizer, trusts_requests=True))
    template = "{% for message in messages %}[{{ message.content }}]{% endfor %}<think>"
    assert prompt(trusting, chat_template=template) == "[Hi]<think>"
    for broken in ("{% if %}", "{{ 1 / 0 }}", "<|image@placeholder|>"):
        with pytest.raises(RequestError) as refused:
            parse(trusting, chat_template=broken)
        assert (refused.value.failure.status, refused.value.failure.param) == (400, "chat_template")
