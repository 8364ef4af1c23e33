"""Body of a request for the continuation of texts, and the chat request that asks for the same of its prompts."""

from typing import Annotated, Any, cast

import msgspec
from msgspec import Meta

from services.gateway.request.schemas import (
    MAX_TOP_LOGPROBS,
    Budget,
    ChatRequest,
    GenerationRequest,
    TokenId,
    decode_json,
)
from services.gateway.request.unsupported import COMPLETION_NEUTRAL_VALUES, NO_EFFECT
from services.gateway.request.validate import check_supported, check_whole
from shared.errors import invalid

MAX_PROMPTS = 128
MAX_ANSWERS = 128  # to all prompts together: each is a request of its own for the other stages
DEFAULT_MAX_TOKENS = 16  # OpenAI's, and vLLM's

_PromptItem = int | str | Annotated[list[TokenId], Meta(min_length=1)]


class CompletionRequest(GenerationRequest, frozen=True, kw_only=True):
    """The body of POST /v1/completions: all fields that do something."""

    # A text, a list of texts, a list of token ids, or a list of such lists; special tokens are ids alone, never text.
    prompt: str | Annotated[list[_PromptItem], Meta(min_length=1)]
    # The most tokens of an answer; 16 by default, 0: none, -1: all that there is room for.
    max_tokens: Budget | None = None
    best_of: Annotated[int, Meta(ge=1)] | None = None  # 1, or as many as `n`: every answer is returned
    echo: bool | None = None  # an answer begins with its prompt, and so do its log-probabilities
    # How likely each token was, and this many others in its place.
    logprobs: Annotated[int, Meta(ge=0, le=MAX_TOP_LOGPROBS)] | None = None

    @property
    def scores_only(self) -> bool:
        """True if the answers have no tokens: their prompts are wanted, and how likely those are."""
        return self.max_tokens == 0

    def prompts(self) -> tuple[str | list[int], ...]:
        """Return each prompt: a text, or token ids.

        Raises:
            RequestError: 400, there are too many, or they are of several kinds.
        """
        given = self.prompt
        if isinstance(given, str):
            return (given,)
        texts = [item for item in given if isinstance(item, str)]
        lists = [item for item in given if isinstance(item, list)]
        ids = [item for item in given if isinstance(item, int)]
        if len(given) not in (len(texts), len(lists), len(ids)):
            raise invalid("`prompt` must be a text or token ids, or a list of one of the two.", "prompt")
        if ids:
            if min(ids) < 0:
                raise invalid("`prompt`: token ids must not be negative.", "prompt")
            return (ids,)
        if len(given) > MAX_PROMPTS:
            raise invalid(f"`prompt` has {len(given)} prompts; the limit is {MAX_PROMPTS}.", "prompt")
        return tuple(texts or lists)

    def as_chat(self) -> ChatRequest:
        """Return the chat request that asks for such answers, but for its conversation."""
        same = {name: getattr(self, name) for name in GenerationRequest.__struct_fields__}
        scores = [count for count in (self.logprobs if self.echo else None, self.prompt_logprobs) if count is not None]
        limit = DEFAULT_MAX_TOKENS if self.max_tokens is None else self.max_tokens
        own = {
            "max_tokens": limit or 1,
            "logprobs": self.logprobs is not None,
            "top_logprobs": self.logprobs,
            "prompt_logprobs": max(scores, default=None),
            # The ids of a prompt are what its echo is made of, at whichever gateway the answer is written.
            "return_token_ids": self.return_token_ids or self.echo,
        }
        return ChatRequest(messages=[], **same | own)


# The fields of a conversation mean nothing beside a raw prompt, so whatever they ask for is refused.
_REFUSED: dict[str, tuple[Any, ...]] = {
    name: COMPLETION_NEUTRAL_VALUES.get(name, ())
    for name in dict.fromkeys((*COMPLETION_NEUTRAL_VALUES, *ChatRequest.__struct_fields__))
    if name not in CompletionRequest.__struct_fields__ and name != "metadata"
}
_Body = msgspec.defstruct(
    "_Body", [(name, Any, None) for name in _REFUSED], bases=(CompletionRequest,), frozen=True, kw_only=True
)
_body = msgspec.json.Decoder(cast(type[CompletionRequest], _Body), strict=False)
KNOWN = frozenset(CompletionRequest.__struct_fields__) | _REFUSED.keys() | NO_EFFECT | {"metadata"}


def decode_completion(body: bytes) -> CompletionRequest:
    """Decode and check a body.

    Raises:
        RequestError: 400 naming the field.
    """
    request = decode_json(_body, body)
    check_supported(request, _REFUSED)
    check_whole(request)
    answers = request.n or 1
    if request.best_of not in (None, 1, answers):
        raise invalid(
            "`best_of` must be 1 or equal to `n`: every answer that is generated is returned.",
            "best_of",
            "unsupported_parameter",
        )
    prompts = len(request.prompts())
    if prompts * answers > MAX_ANSWERS:
        raise invalid(f"{prompts} prompts with `n` {answers} are more than {MAX_ANSWERS} answers.", "n")
    return request
