"""Sampling and output parameters of a request: limits checked, defaults filled in.

Defaults are the checkpoint's (generation_config.json), else the reference server's: `GenerationDefaults`.
"""

import secrets
from typing import TypeVar

import msgspec

from services.gateway.request.schemas import MAX_SEED, ChatRequest
from services.gateway.request.structured import requested_grammar
from services.gateway.request.thinking import read_switch, thinking_budget
from services.gateway.request.tool_choice import read_tool_choice
from shared.errors import invalid
from shared.messages import Output, Sampling
from shared.model.generation import GenerationDefaults
from shared.model.tokenizer import Tokenizer

GREEDY_BELOW = 1e-5
MIN_TOP_P = 1e-5  # top_p = 0 asks for the smallest nucleus, which is one token

T = TypeVar("T", int, float, bool)


class ServerDefaults(msgspec.Struct, frozen=True):
    """Options of the server for requests that do not say."""

    tool_call_ends_reasoning: bool = False
    force_nonempty_content: bool = False
    thinking_loop_repeats: int = 0
    thinking_loop_tokens: int = 64


def resolve_sampling(
    request: ChatRequest,
    defaults: GenerationDefaults,
    tokenizer: Tokenizer,
    thinking: bool,
    server: ServerDefaults,
) -> Sampling:
    """Return the sampling parameters of the first choice; choice i adds i to the seed.

    Raises:
        RequestError: 400 naming the field and its limit.
    """
    temperature = _or_default(request.temperature, defaults.temperature)
    max_tokens = _most_tokens(request)
    min_tokens = request.min_tokens or 0
    budget = thinking_budget(request)
    if max_tokens is not None and min_tokens > max_tokens:
        raise invalid(f"`min_tokens` is {min_tokens}, more than the {max_tokens} tokens allowed.", "min_tokens")
    grammar = requested_grammar(request, tokenizer.control, thinking)
    loop_repeats, loop_tokens = _loops(request, server) if thinking else (0, 0)
    allowed = _check_vocabulary(request.allowed_token_ids or [], tokenizer, "allowed_token_ids")
    if allowed and grammar is not None:
        text = f"`allowed_token_ids` and `{grammar.param}` cannot both be given."
        raise invalid(text, "allowed_token_ids")
    return Sampling(
        seed=secrets.randbits(63) if request.seed in (None, -1) else request.seed % (MAX_SEED + 1),
        temperature=0.0 if temperature < GREEDY_BELOW else temperature,
        top_p=max(_or_default(request.top_p, defaults.top_p), MIN_TOP_P),
        top_k=max(_or_default(request.top_k, defaults.top_k), 0),
        min_p=_or_default(request.min_p, defaults.min_p),
        repetition_penalty=_or_default(request.repetition_penalty, defaults.repetition_penalty),
        presence_penalty=_or_default(request.presence_penalty, defaults.presence_penalty),
        frequency_penalty=_or_default(request.frequency_penalty, defaults.frequency_penalty),
        max_tokens=max_tokens,
        min_tokens=min_tokens,
        stop_token_ids=_check_vocabulary(request.stop_token_ids or [], tokenizer, "stop_token_ids"),
        ignore_eos=bool(request.ignore_eos),
        bad_words=_bad_words(request, tokenizer),
        logit_bias=_logit_bias(request, tokenizer),
        logprobs=_logprobs(request),
        prompt_logprobs=request.prompt_logprobs,
        reasoning_max_tokens=budget if thinking else None,
        grammar=grammar,
        allowed_token_ids=allowed,
        loop_repeats=loop_repeats,
        loop_tokens=loop_tokens,
    )


def _most_tokens(request: ChatRequest) -> int | None:
    """Return the most tokens of an answer that the client wants; None: no limit.

    -1 says the same as nothing, as it does to LM Studio and llama.cpp, whose clients send it.

    Raises:
        RequestError: 400, a limit is 0.
    """
    limits = {name: getattr(request, name) for name in ("max_completion_tokens", "max_tokens")}
    for name, limit in limits.items():
        if limit == 0:
            raise invalid(f"`{name}` must be at least 1, or -1 for no limit.", name)
    limit = next((limit for limit in limits.values() if limit is not None), -1)
    return None if limit == -1 else limit


def resolve_output(request: ChatRequest, thinking: bool, defaults: ServerDefaults) -> Output:
    """Return the parameters by which postproc turns tokens into the answer."""
    stop = [request.stop] if isinstance(request.stop, str) else request.stop or []
    separate = request.separate_reasoning is not False
    hidden = request.include_reasoning is False or bool(request.reasoning and request.reasoning.exclude)
    choice = read_tool_choice(request)
    return Output(
        thinking=thinking,
        stop=tuple(filter(None, stop)),
        include_stop=bool(request.include_stop_str_in_output),
        tools=bool(choice.tools),
        functions=tuple(tool.function.name for tool in choice.tools),
        named_tool=choice.named,
        tool_call_ends_reasoning=_or_default(request.tool_call_ends_reasoning, defaults.tool_call_ends_reasoning),
        force_nonempty_content=_forces_content(request, defaults),
        parallel_tool_calls=request.parallel_tool_calls is not False,
        logprobs=bool(request.logprobs),
        # The ids of a prompt tell of which tokens its log-probabilities are.
        return_token_ids=bool(request.return_token_ids) or request.prompt_logprobs is not None,
        continuous_usage=bool(request.stream_options and request.stream_options.continuous_usage_stats),
        # What is content for the client may be stopped, also where the model thinks.
        stop_in_reasoning=not separate if request.stop_in_reasoning is None else request.stop_in_reasoning,
        include_reasoning=not hidden,
        separate_reasoning=separate,
        special_tokens=request.skip_special_tokens is False,
    )


def _loops(request: ChatRequest, server: ServerDefaults) -> tuple[int, int]:
    """Return how many copies of how many tokens close the thinking; (0, 0): none do."""
    repeats = _or_default(request.thinking_loop_repeats, server.thinking_loop_repeats)
    if repeats == 1:
        raise invalid("`thinking_loop_repeats` must be at least 2, or 0 for none.", "thinking_loop_repeats")
    return (repeats, _or_default(request.thinking_loop_tokens, server.thinking_loop_tokens)) if repeats else (0, 0)


def _forces_content(request: ChatRequest, defaults: ServerDefaults) -> bool:
    field = "force_nonempty_content"
    in_kwargs = read_switch(request.chat_template_kwargs or {}, field, "chat_template_kwargs")  # where vLLM has it
    return _or_default(request.force_nonempty_content, _or_default(in_kwargs, defaults.force_nonempty_content))


def choice_seed(seed: int, index: int) -> int:
    """Return the seed of choice `index`: distinct for each choice, and within the range of seeds."""
    return (seed + index) % (MAX_SEED + 1)


def _or_default(value: T | None, default: T) -> T:
    return default if value is None else value


def _logprobs(request: ChatRequest) -> int | None:
    if not request.logprobs:
        if request.top_logprobs:
            raise invalid("`top_logprobs` needs `logprobs` to be true.", "top_logprobs")
        return None
    return request.top_logprobs or 0


def _bad_words(request: ChatRequest, tokenizer: Tokenizer) -> tuple[tuple[int, ...], ...]:
    """Return each word as token ids, at the start of a text and after a space, and the sequences given as ids."""
    found: dict[tuple[int, ...], None] = {}
    for word in request.bad_words or ():
        bare = word.lstrip() or word
        for text in (bare, f" {bare}"):
            found[tuple(tokenizer.encode_text(text))] = None
    for given in request.bad_words_token_ids or ():
        ids = [given] if isinstance(given, int) else given
        found[_check_vocabulary(ids, tokenizer, "bad_words_token_ids")] = None
    found.pop((), None)
    return tuple(found)


def _logit_bias(request: ChatRequest, tokenizer: Tokenizer) -> dict[int, float]:
    given = request.logit_bias or {}
    for key in given:
        if not (key.isascii() and key.isdigit() and len(key) < 10):
            raise invalid(f"`logit_bias`: {key!r:.50} is not a token id.", "logit_bias")
    ids = _check_vocabulary([int(key) for key in given], tokenizer, "logit_bias")
    return dict(zip(ids, given.values(), strict=True))


def _check_vocabulary(ids: list[int], tokenizer: Tokenizer, field: str) -> tuple[int, ...]:
    for token in ids:
        if token >= tokenizer.vocab_size:
            raise invalid(f"`{field}`: {token} is not a token id; the vocabulary has {tokenizer.vocab_size}.", field)
    return tuple(ids)
