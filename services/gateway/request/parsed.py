"""Parsing of a request: from its bytes to everything the pipeline needs. Pure; nothing has been sent yet."""

import msgspec

from services.gateway.request import validate
from services.gateway.request.answer_format import AnswerFormat
from services.gateway.request.chat import ChatFormat, Prompt, Rendering
from services.gateway.request.media import MediaItem, MediaRules
from services.gateway.request.model_names import ModelNames
from services.gateway.request.sampling import ServerDefaults, resolve_output, resolve_sampling
from services.gateway.request.statement import Statement
from services.gateway.request.structured import tool_grammars
from shared.errors import invalid
from shared.limits import check_prompt_logprobs, resolve_max_tokens
from shared.messages import Grammar, Output, Sampling
from shared.model.generation import GenerationDefaults
from shared.model.tokenizer import Tokenizer


class RawPrompt(msgspec.Struct, frozen=True):
    """Prompt that is given to the model as it is."""

    tokens: list[int]
    max_tokens: int


class ParsedRequest(msgspec.Struct, frozen=True):
    """One HTTP request, validated and tokenised."""

    model: str  # the name that the answer repeats
    segments: tuple[list[int], ...]  # token ids; segments[i] comes before media i
    media: tuple[MediaItem, ...]
    sampling: Sampling
    output: Output
    max_tokens: int  # for text alone; with media mm_encoder computes it, once it knows how many tokens they take
    n: int  # answers in all
    stream: bool
    include_usage: bool
    shows_token_ids: bool = False  # its deltas may have them for another reason
    tool_grammars: tuple[Grammar, ...] = ()  # of single tools, to name the one that has no grammar
    cache_salt: str = ""
    request_id: str | None = None  # the client's own, for headers and logs
    warnings: tuple[str, ...] = ()  # of what was ignored or replaced in the body
    dialect: str = ""  # by which API it came
    kept: bytes = b""  # what that needs to write the answer
    prompts: tuple[RawPrompt, ...] = ()  # in place of segments and media; each has the same number of answers
    keep_s: float = 0.0  # for which the answer can be read again at the least
    outlives: bool = False  # its connection: who leaves does not cancel it

    @property
    def answers_per_prompt(self) -> int:
        return self.n // max(1, len(self.prompts))

    def answer_format(self, owner: str, key: str) -> AnswerFormat:
        """Return the format of its answer; `owner` has the API key, and `key` is the Idempotency-Key's digest."""
        return AnswerFormat(
            model=self.model,
            n=self.n,
            include_usage=self.include_usage,
            token_ids=self.shows_token_ids,
            logprobs=self.output.logprobs,
            owner=owner,
            key=key,
            continuous_usage=self.output.continuous_usage,
            dialect=self.dialect,
            kept=self.kept,
            prompt_logprobs=self.sampling.prompt_logprobs is not None,
            prompts=max(1, len(self.prompts)),
            outlives=self.outlives,
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
        with stated.own_names():
            validate.check_choices(request, self.max_n)
            validate.check_messages(request.messages)
            validate.check_tools(request)
            validate.check_template_kwargs(request)
            found = self.rules.extract(request)
            media = [msgspec.structs.replace(item, own_param=stated.rename(item.param)) for item in found]
            return Draft(model, stated, media, self.chat.prepare(request, media))

    def count_text(self, draft: Draft, rendered: str) -> int:
        """Count the tokens of a rendered prompt, without those of its media.

        Raises:
            RequestError: the checkpoint's template lost or invented media.
        """
        return self.chat.tokenise(draft.rendering, rendered, draft.media).text_tokens()

    def finish(self, draft: Draft, rendered: str) -> ParsedRequest:
        """Tokenise the rendered prompt of a request, and resolve what depends on it.

        Raises:
            RequestError: 4xx naming the field and the limit; 500, the checkpoint's template lost or invented media.
        """
        with draft.stated.own_names():
            return self._finish(draft, self.chat.tokenise(draft.rendering, rendered, draft.media))

    def _finish(self, draft: Draft, prompt: Prompt) -> ParsedRequest:
        # First of all, since an error in the grammar of one names the tool.
        each_tool = tuple(map(draft.stated.renamed, tool_grammars(draft.stated.request)))
        parsed = self._resolve(draft.model, draft.stated, prompt.thinking, self.server)
        # With media the text is a lower bound of the prompt, so a text that is too long is refused here already.
        tokens = prompt.text_tokens()
        check_prompt_logprobs(tokens * parsed.n, parsed.sampling.prompt_logprobs)
        return msgspec.structs.replace(
            parsed,
            segments=prompt.segments,
            media=tuple(draft.media),
            max_tokens=resolve_max_tokens(tokens, parsed.sampling.max_tokens, self.max_model_len),
            tool_grammars=each_tool,
        )

    def complete(self, stated: Statement) -> ParsedRequest:
        """Tokenise the prompts of a request that has no conversation.

        Raises:
            RequestError: 4xx naming the field and the limit.
        """
        validate.check_choices(stated.request, self.max_n)
        texts_are_listed = len(stated.prompts) > 1
        parsed = self._resolve(self.names.resolve(stated.request.model), stated, False, ServerDefaults())
        prompts = tuple(
            self._raw_prompt(prompt, f"prompt[{i}]" if texts_are_listed else "prompt", parsed.sampling.max_tokens)
            for i, prompt in enumerate(stated.prompts)
        )
        check_prompt_logprobs(sum(len(one.tokens) for one in prompts) * parsed.n, parsed.sampling.prompt_logprobs)
        # Beside the log-probabilities of a prompt, those of every token that was generated are expected.
        output = msgspec.structs.replace(parsed.output, complete_logprobs=True)
        return msgspec.structs.replace(parsed, output=output, prompts=prompts, n=len(prompts) * parsed.n)

    def _raw_prompt(self, prompt: str | list[int], path: str, max_tokens: int | None) -> RawPrompt:
        if isinstance(prompt, str):
            tokens = self.tokenizer.encode_text(prompt)
        else:
            tokens = prompt
            validate.check_prompt_ids(tokens, self.tokenizer, path)
        if not tokens:
            raise invalid(f"`{path}` has no tokens.", path)
        return RawPrompt(tokens, resolve_max_tokens(len(tokens), max_tokens, self.max_model_len, path))

    def _resolve(self, model: str, stated: Statement, thinking: bool, server: ServerDefaults) -> ParsedRequest:
        """Return the request without its prompt."""
        request, options = stated.request, stated.request.stream_options
        sampling = resolve_sampling(request, self.defaults, self.tokenizer, thinking, server)
        if sampling.grammar is not None:
            sampling = msgspec.structs.replace(sampling, grammar=stated.renamed(sampling.grammar))
        output = resolve_output(request, thinking, server)
        return ParsedRequest(
            model=model,
            segments=(),
            media=(),
            sampling=sampling,
            output=msgspec.structs.replace(output, first_usage=stated.first_usage),
            max_tokens=0,
            n=request.n or 1,
            stream=bool(request.stream),
            include_usage=self.force_include_usage or bool(options and options.include_usage),
            shows_token_ids=bool(request.return_token_ids),
            cache_salt="\0".join(salt for salt in (request.cache_salt, request.extra_key) if salt),
            request_id=request.request_id,
            warnings=stated.warnings,
            dialect=stated.dialect,
            kept=stated.kept,
            keep_s=stated.keep_s,
            outlives=stated.outlives,
        )
