"""From the bytes of a request to everything the pipeline needs to serve it. Pure; nothing has been sent yet."""

import msgspec

from services.gateway import validate
from services.gateway.chat import ChatFormat
from services.gateway.form import Form
from services.gateway.media import Item, MediaRules
from services.gateway.model_names import ModelNames
from services.gateway.sampling import output, sampling
from services.gateway.schemas import parse
from shared.limits import resolve_max_tokens
from shared.messages import Output, Sampling
from shared.model_config import GenerationDefaults
from shared.tokenizer import Tokenizer


class Order(msgspec.Struct, frozen=True):
    """One HTTP request, checked and tokenised."""

    model: str  # the name that the answer repeats
    segments: tuple[list[int], ...]
    media: tuple[Item, ...]
    sampling: Sampling
    output: Output
    max_tokens: int  # for text alone; with media the mm_encoder works it out, knowing how many tokens they are
    n: int
    stream: bool
    include_usage: bool

    def form(self, owner: str, key: str) -> Form:
        """How its answer is written."""
        return Form(
            model=self.model,
            n=self.n,
            include_usage=self.include_usage,
            token_ids=self.output.return_token_ids,
            logprobs=self.output.logprobs,
            owner=owner,
            key=key,
        )


class OrderTaker(msgspec.Struct, frozen=True):
    """What turns bodies into orders. Safe to use from several threads."""

    chat: ChatFormat
    tokenizer: Tokenizer
    defaults: GenerationDefaults
    rules: MediaRules
    names: ModelNames
    max_n: int
    max_model_len: int
    force_include_usage: bool

    def take(self, body: bytes) -> Order:
        """
        Raises:
            RequestError: 4xx naming the field and the limit.
        """
        request, fields = parse(body)
        validate.check_supported(fields)
        model = self.names.resolve(request.model)
        validate.check_choices(request, self.max_n)
        validate.check_messages(request.messages)
        validate.check_tools(request)
        validate.check_template_kwargs(request)
        media = self.rules.items(request)
        prompt = self.chat.prompt(request, media)
        drawn = sampling(request, self.defaults, self.tokenizer, prompt.thinking)
        options = request.stream_options
        return Order(
            model=model,
            segments=prompt.segments,
            media=tuple(media),
            sampling=drawn,
            output=output(request, prompt.thinking),
            # With media this is a lower bound of the prompt, and already too long where it is.
            max_tokens=resolve_max_tokens(prompt.text_tokens(), drawn.max_tokens, self.max_model_len),
            n=request.n or 1,
            stream=bool(request.stream),
            include_usage=self.force_include_usage or bool(options and options.include_usage),
        )
