"""Bodies of requests for the tokens of texts and conversations, and for the text of tokens; vLLM's forms."""

from typing import Annotated

import msgspec
from msgspec import Meta

from services.gateway.request.model_names import MAX_CHARS
from services.gateway.request.schemas import ChatRequest, TokenId, decode_json
from services.gateway.request.surrogates import replace_lone_surrogates

Model = Annotated[str, Meta(max_length=MAX_CHARS)] | None


class TokenizeRequest(msgspec.Struct, frozen=True, kw_only=True):
    """The body of POST /tokenize for a text. No tokens are added to it, whatever `add_special_tokens` says."""

    prompt: str
    model: Model = None
    add_special_tokens: bool | None = None
    return_token_strs: bool | None = None


class TokenizeChatRequest(ChatRequest, frozen=True, kw_only=True):
    """The body of POST /tokenize for a conversation: the fields of a chat request that make its prompt."""

    add_special_tokens: bool | None = None  # the template writes them all
    return_token_strs: bool | None = None


class DetokenizeRequest(msgspec.Struct, frozen=True, kw_only=True):
    """The body of POST /detokenize."""

    tokens: list[TokenId]
    model: Model = None


class _Kind(msgspec.Struct):
    messages: msgspec.Raw | msgspec.UnsetType = msgspec.UNSET


_kind = msgspec.json.Decoder(_Kind)
_of_text = msgspec.json.Decoder(TokenizeRequest, strict=False)
_of_chat = msgspec.json.Decoder(TokenizeChatRequest, strict=False)
_of_tokens = msgspec.json.Decoder(DetokenizeRequest, strict=False)


def decode_tokenize(body: bytes) -> TokenizeRequest | TokenizeChatRequest:
    """Decode a body of either form: with `messages` it is a conversation.

    Raises:
        RequestError: 400 naming the field.
    """
    body = replace_lone_surrogates(body)
    if decode_json(_kind, body).messages is msgspec.UNSET:
        return decode_json(_of_text, body)
    return decode_json(_of_chat, body)


def decode_detokenize(body: bytes) -> DetokenizeRequest:
    """
    Raises:
        RequestError: 400 naming the field.
    """
    return decode_json(_of_tokens, body)
