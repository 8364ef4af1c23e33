"""Fields that OpenAI's and Anthropic's own packages can send: each of them is known, so none is ignored unnoticed.

Asked are those of bodies and of some objects in them, not those of each kind of content.

A newer package with a new field fails here until the field works, is refused by its name, or is without effect.
"""

from collections.abc import Set
from typing import Any

import anthropic.types as messages
import openai.types.responses as responses
import pytest
from anthropic.types.message_count_tokens_params import MessageCountTokensParams
from anthropic.types.message_create_params import MessageCreateParamsNonStreaming
from openai.types import shared_params
from openai.types.chat import ChatCompletionStreamOptionsParam
from openai.types.chat.completion_create_params import CompletionCreateParamsNonStreaming as ChatParams
from openai.types.completion_create_params import CompletionCreateParamsNonStreaming as CompletionParams
from openai.types.responses.response_create_params import ResponseCreateParamsNonStreaming

from services.gateway.dialects.messages.schemas import COUNT_FIELDS, MESSAGE_FIELDS, OutputConfig, Tool
from services.gateway.dialects.responses import body
from services.gateway.request import completion
from services.gateway.request.conversation import Function
from services.gateway.request.schemas import CHAT_FIELDS, StreamOptions

KNOWN: dict[str, tuple[Any, Set[str]]] = {
    "chat": (ChatParams, CHAT_FIELDS),
    "completions": (CompletionParams, completion.KNOWN),
    "responses": (ResponseCreateParamsNonStreaming, body.KNOWN),
    "messages": (MessageCreateParamsNonStreaming, MESSAGE_FIELDS),
    "count_tokens": (MessageCountTokensParams, COUNT_FIELDS),
    "reasoning": (shared_params.Reasoning, frozenset(body.Reasoning.__struct_fields__)),
    "text": (responses.ResponseTextConfigParam, frozenset(body.TextOptions.__struct_fields__)),
    "function": (shared_params.FunctionDefinition, frozenset(Function.__struct_fields__)),
    "output_config": (messages.OutputConfigParam, frozenset(OutputConfig.__struct_fields__)),
    # Padding against observers, and hints, that do not change an answer:
    "stream_options": (ChatCompletionStreamOptionsParam, {*StreamOptions.__struct_fields__, "include_obfuscation"}),
    "tool": (messages.ToolParam, {*Tool.__struct_fields__, "cache_control", "eager_input_streaming"}),
}


@pytest.mark.parametrize("name", KNOWN)
def test_every_field_that_a_package_can_send_is_known(name: str) -> None:
    kind, known = KNOWN[name]
    fields = kind.__required_keys__ | kind.__optional_keys__
    assert fields
    assert fields <= known
