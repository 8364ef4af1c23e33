"""Parsing of a request: from its bytes to everything the pipeline needs. Pure; nothing has been sent yet."""

import msgspec

from services.gateway.request import validate
from services.gateway.request.answer_format import AnswerFormat
from services.gateway.request.chat import ChatFormat, Rendering
from services.gateway.request.media import MediaItem, MediaRules
from services.gateway.request.model_names import ModelNames
from services.gateway.request.sampling import ServerDefaults, resolve_output, resolve_sampling
from services.gateway.request.statement import Statement
from services.gateway.request.structured import tool_grammars
from shared.limits import resolve_max_tokens
from shared.messages import Grammar, Output, Sampling
from shared.model.generation import GenerationDefaults
from shared.model.tokenizer import Tokenizer


class ParsedRequest(msgspec.Struct, frozen=True):
    """One HTTP request, validated and tokenised."""

    model: str  # the name that the answer repeats
    segments: tuple[list[int], ...]  # token ids; segments[i] comes before media i
    media: tuple[MediaItem, ...]
    sampling: Sampling
    output: Output
    max_tokens: int  # for text alone; with media mm_encoder computes it, once it knows how many tokens they take
    n: int
    stream: bool
    include_usage: bool
    tool_grammars: tuple[Grammar, ...] = ()  # of single tools, to name the one that has no grammar
    cache_salt: str = ""
    request_id: str | None = None  # the client's own, for headers and logs
    warnings: tuple[str, ...] = ()  # of what was ignored or replaced in the body
    dialect: str = ""  # by which API it came
    kept: bytes = b""  # what that needs to write the answer

    def answer_format(self, owner: str, key: str) -> AnswerFormat:
        """Return the format of its answer; `owner` and `key` are digests of the API key and the Idempotency-Key."""
        return AnswerFormat(
            model=self.model,
            n=self.n,
            include_usage=self.include_usage,
            token_ids=self.output.return_token_ids,
            logprobs=self.output.logprobs,
            owner=owner,
            key=key,
            continuous_usage=self.output.continuous_usage,
            dialect=self.dialect,
            kept=self.kept,
        )


class Draft(msgspec.Struct, frozen=True):
    """Request whose prompt is not rendered yet."""

    model: str
    stated: Statement
    media: list[MediaItem]
    rendering: Rendering


class RequestParser(msgspec.Struct, frozen=True):
    """Parser of request bodies, in two halves: in between, a template is rendered. Safe to use from several threads."""

    chat: ChatFormat
    tokenizer: Tokenizer
    defaults: GenerationDefaults
    rules: MediaRules
    names: ModelNames
    max_n: int
    max_model_len: int
    force_include_usage: bool
    server: ServerDefaults = ServerDefaults()

    def read(self, stated: Statement) -> Draft:
        """Validate a request, up to the conversation that its prompt is rendered from.

        Raises:
            RequestError: 4xx naming the field and the limit.
        """
        request = stated.request
        model = self.names.resolve(request.model)
        validate.check_choices(request, self.max_n)
        validate.check_messages(request.messages)
        validate.check_tools(request)
        validate.check_template_kwargs(request)
        media = self.rules.extract(request)
        return Draft(model, stated, media, self.chat.prepare(request, media))

    def finish(self, draft: Draft, rendered: str) -> ParsedRequest:
        """Tokenise the rendered prompt of a request, and resolve what depends on it.

        Raises:
            RequestError: 4xx naming the field and the limit; 500, the checkpoint's template lost or invented media.
        """
        request = draft.stated.request
        prompt = self.chat.tokenise(draft.rendering, rendered, draft.media)
        each_tool = tool_grammars(request)
        sampling = resolve_sampling(request, self.defaults, self.tokenizer, prompt.thinking, self.server)
        options = request.stream_options
        return ParsedRequest(
            model=draft.model,
            segments=prompt.segments,
            media=tuple(draft.media),
            sampling=sampling,
            output=resolve_output(request, prompt.thinking, self.server),
            # With media the text is a lower bound of the prompt, so a text that is too long is refused here already.
            max_tokens=resolve_max_tokens(prompt.text_tokens(), sampling.max_tokens, self.max_model_len),
            n=request.n or 1,
            stream=bool(request.stream),
            include_usage=self.force_include_usage or bool(options and options.include_usage),
            tool_grammars=each_tool,
            cache_salt=request.cache_salt or "",
            request_id=request.request_id,
            warnings=draft.stated.warnings,
            dialect=draft.stated.dialect,
            kept=draft.stated.kept,
        )
