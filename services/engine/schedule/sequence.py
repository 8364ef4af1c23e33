"""One request inside the engine: its tokens, their positions and blocks, and the sampling state that follows from them.

All sampling state is a function of the prompt and the generated tokens, so a sequence built from a journal of n tokens
is in the state of one that has generated them here.
"""

from array import array
from collections.abc import Sequence as Ordered
from copy import copy
from dataclasses import dataclass, field

import msgspec
import numpy as np
from numpy.typing import NDArray

from services.engine.schedule.blocks import ROOT, block_hash, root_hash
from services.engine.schedule.drafter import Drafter
from services.engine.schedule.embeds import Embeds, PromptEmbeds
from services.engine.schedule.grammar_state import GrammarState
from services.engine.schedule.loops import LoopDetector
from services.engine.schedule.positions import positions
from services.engine.schedule.prompt_scores import PromptScores
from services.engine.schedule.seen_tokens import Ids, SeenTokens
from services.engine.schedule.thinking import UNLIMITED, ThinkingBudget
from services.engine.schedule.timeline import Timeline
from shared.errors import context_length, internal, invalid
from shared.limits import check_prompt_logprobs
from shared.messages import Begin, Finish, Generate, MediaSpan, Sampling, unpack_ids
from shared.model.config import ModelConfig

Bits = NDArray[np.uint8]  # [bytes]: bit b of byte i is token 8 i + b


class EngineFacts(msgspec.Struct, frozen=True):
    """Limits and ids that every sequence is checked against."""

    model: ModelConfig
    max_model_len: int  # prompt and answer together
    think_close_id: int  # </think>
    tool_call_id: int | None = None  # <tool_call>; None: the vocabulary has no such token


@dataclass(slots=True, eq=False)
class Sequence:
    """State of one request. Made by `build`; changed by the scheduler alone."""

    request_id: str
    shard: int
    epoch: int
    sampling: Sampling
    prompt_len: int
    max_tokens: int  # resolved: prompt_len + max_tokens never exceeds the context
    tokens: Ids  # prompt, answer so far, room for the rest
    num_tokens: int  # how many of `tokens` are known
    prompt_positions: NDArray[np.int32]  # [3, prompt_len]
    next_position: int  # of the first generated token
    spans: tuple[MediaSpan, ...]
    embeds: PromptEmbeds
    eos_ids: tuple[int, ...]
    stop_ids: frozenset[int]  # tokens that end it
    hides_stops: bool  # inside an open <think>, in which of `stop_ids` only `eos_ids` end it
    think_close_id: int  # </think>
    thinking: bool  # inside an open <think>, of which a budget, a grammar or the allowed tokens depend
    budget: ThinkingBudget | None
    loops: LoopDetector | None  # only where a loop of the thinking closes it
    seen: SeenTokens | None  # only where a penalty asks
    grammar: GrammarState | None = None  # of the answer after the thinking
    allowed: Bits | None = None  # tokens of which that consists; there is a grammar or these
    arrival: int = -1  # order of service, given by the scheduler
    num_computed: int = 0  # tokens whose keys and values are in the cache, or will be when the planned steps have run
    in_flight: int = 0  # tokens that planned steps sample and that are not known yet
    row: int = 0  # index of its token among those of the last planned step
    drafts: int = 0  # guessed tokens that a planned step verifies; they stand behind the known ones
    drafter: Drafter | None = None  # made when guesses are first wanted
    blocks: "array[int]" = field(default_factory=lambda: array("i"))
    cached_tokens: int = 0  # of the prompt, taken from the prefix cache when first scheduled
    begun: bool = False  # Begin has been emitted
    prompt: bytes = b""  # as Begin carries it
    root: bytes = ROOT  # what its first block's hash begins with
    scores: PromptScores | None = None  # of the prompt, where the request asks and no token is known yet
    timeline: Timeline = field(default_factory=Timeline)
    _hashes: list[bytes] = field(default_factory=list)

    @property
    def num_generated(self) -> int:
        return self.num_tokens - self.prompt_len

    @property
    def generated(self) -> Ids:
        """The answer so far."""
        return self.tokens[self.prompt_len : self.num_tokens]

    @property
    def max_cached(self) -> int:
        """The most tokens the cache will ever hold of it: the last one generated is never fed back."""
        return self.prompt_len + max(self.max_tokens, self.num_generated) - 1

    @property
    def can_continue(self) -> bool:
        """True if the tokens in flight leave room for another. A token that ends the sequence may be among them."""
        return self.num_generated + self.in_flight < self.max_tokens

    @property
    def backlog(self) -> int:
        """The number of tokens that could be computed now."""
        return self.embeds.reach(self.num_computed, self.num_tokens) - self.num_computed

    @property
    def cacheable(self) -> int:
        """The most tokens that may be taken from the prefix cache. At least one is left to compute, for its logits; of
        a prompt that is scored all are that have not been, since the cache has no logits."""
        others = self.num_tokens - 1
        return others if self.scores is None or self.scores.complete else min(others, self.scores.known)

    @property
    def depends_on_tokens(self) -> bool:
        """True if sampling depends on which tokens came before, not on their number alone."""
        early = self.hides_stops and self.num_generated < self.sampling.min_tokens
        depends = early or self.thinking or self.seen is not None or self.grammar is not None
        return depends or bool(self.sampling.bad_words)

    @property
    def ending_ids(self) -> tuple[int, ...]:
        """Tokens that could end it now."""
        return self.eos_ids if self.hides_stops else (*self.eos_ids, *self.sampling.stop_token_ids)

    @property
    def loops_in_thinking(self) -> bool:
        """True if the thinking goes round in circles, so that the next token closes it."""
        return self.thinking and self.loops is not None and self.loops.found

    @property
    def open_allowed(self) -> Bits | None:
        """The tokens that may come next, where only some may."""
        return None if self.thinking else self.allowed

    @property
    def open_grammar(self) -> GrammarState | None:
        """The grammar, where it restricts the next token."""
        return None if self.thinking or self.grammar is None or self.grammar.complete else self.grammar

    def possible(self, drafts: list[int]) -> list[int]:
        """Return guessed tokens as far as they could come: a grammar allows them, or they end in its beginning."""
        if self.grammar is None:
            return drafts
        if not self.thinking:
            return drafts[: self.grammar.allowed(drafts)]
        return drafts[: drafts.index(self.think_close_id) + 1] if self.think_close_id in drafts else drafts

    def draft(self, tokens: list[int]) -> None:
        """Put guessed tokens behind the known ones."""
        self.drafts = len(tokens)
        self.tokens[self.num_tokens : self.num_tokens + len(tokens)] = tokens

    def with_draft(self) -> "Sequence":
        """Return the sequence as it is if its next token is the one that is guessed; this one stays as it is."""
        supposed = copy(self)
        supposed.grammar = self.grammar and self.grammar.copy()
        supposed.loops = self.loops and self.loops.copy()
        supposed.seen = self.seen and self.seen.copy()
        supposed.append(int(self.tokens[self.num_tokens]))
        return supposed

    def append(self, token: int) -> None:
        """Append a token to the answer."""
        self.tokens[self.num_tokens] = token
        self.num_tokens += 1
        if self.grammar is not None and not self.thinking:
            self.grammar.advance(token)
        if self.loops is not None and self.thinking:
            self.loops.add(token)
        if token == self.think_close_id:
            self.thinking = self.hides_stops = False
        if self.seen is not None:
            self.seen.add(token)

    def finish(self) -> Finish | None:
        """Return why it has ended, if its last token ended it."""
        if self.num_generated == 0:
            return None
        if self.grammar is not None and (failure := self.grammar.failure) is not None:
            return Finish("error", failure=failure)
        last = int(self.tokens[self.num_tokens - 1])
        if last in self.stop_ids and (not self.hides_stops or last in self.eos_ids):
            return Finish("stop", stop_token=last)
        if self.grammar is not None and self.grammar.complete:
            return Finish("stop")
        return Finish("length") if self.num_generated >= self.max_tokens else None

    def positions(self, start: int, stop: int) -> NDArray[np.int64]:
        """Return [3, stop - start] positions of tokens [start, stop)."""
        out = np.empty((3, stop - start), np.int64)
        inside = max(0, min(stop, self.prompt_len) - start)
        out[:, :inside] = self.prompt_positions[:, start : start + inside]
        first = self.next_position + start + inside - self.prompt_len
        out[:, inside:] = np.arange(first, first + stop - start - inside)
        return out

    def block_hash(self, block_size: int, nth: int) -> bytes:
        """Return the content hash of a block, all of whose tokens are known. Each is computed once."""
        assert (nth + 1) * block_size <= self.num_tokens
        while len(self._hashes) <= nth:
            start = len(self._hashes) * block_size
            parent = self._hashes[-1] if self._hashes else self.root
            content = self.tokens[start : start + block_size].tobytes()
            self._hashes.append(block_hash(parent, content, media_in(self.spans, start, start + block_size)))
        return self._hashes[nth]

    def begin(self) -> Begin:
        """Return the message that tells postproc that the engine has taken the request."""
        image, video = media_tokens(self.spans)
        counts = self.num_generated, self.prompt_len, self.cached_tokens, image, video
        scores = self.scores.packed() if self.scores is not None and self.scores.complete else None
        return Begin(self.request_id, self.epoch, *counts, self.prompt, scores)


def media_tokens(spans: Ordered[MediaSpan]) -> tuple[int, int]:
    """Return the number of tokens of images, and of videos."""
    image, video = (sum(span.length for span in spans if span.kind == kind) for kind in ("image", "video"))
    return image, video


def asked_prompt(message: Generate) -> bytes:
    """Return the packed prompt if the client asked for token ids, else nothing."""
    return message.prompt if message.request.output.return_token_ids else b""


def media_in(spans: Ordered[MediaSpan], start: int, stop: int) -> list[tuple[int, int, str]]:
    """Return (index from start, index within the media, key) of each span's first token in [start, stop)."""
    found = []
    for span in spans:
        first = max(start, span.offset)
        if first < min(stop, span.offset + span.length):
            found.append((first - start, first - span.offset, span.key))
    return found


def build(
    message: Generate,
    epoch: int,
    generated: Ordered[int],
    embeds: Ordered[Embeds | None],
    facts: EngineFacts,
    grammar: GrammarState | None = None,
) -> Sequence:
    """Build the sequence of a request of which `generated` tokens are known already.

    Args:
        embeds: one a span; None if they are still being made.
        grammar: the request's, at its beginning.

    Raises:
        RequestError: the prompt is empty or too long (400), or the message has impossible tokens or media (4xx where
            the client chose them, 500 where another stage did).
    """
    prompt = np.array(unpack_ids(message.prompt), np.int64)
    sampling, model = message.request.sampling, facts.model
    assert (grammar is None) == (sampling.grammar is None)
    _check_tokens(prompt, sampling, facts)
    _check_generated(generated, facts)
    try:
        prompt_positions, next_position = positions(
            len(prompt), message.spans, model.vision.spatial_merge_size, model.vision.temporal_merge_size
        )
    except ValueError as error:
        raise internal(f"The prompt's media do not fit it: {error}.") from error
    max_tokens = min(message.max_tokens, facts.max_model_len - len(prompt))
    answer = np.array(generated, np.int64)
    tokens = np.empty(len(prompt) + max(max_tokens, len(answer)), np.int64)
    tokens[: len(prompt)] = prompt
    budget = _budget(message, facts)
    scored = sampling.prompt_logprobs
    check_prompt_logprobs(len(prompt), scored)
    sequence = Sequence(
        request_id=message.request.id,
        shard=message.request.shard,
        epoch=epoch,
        sampling=sampling,
        prompt_len=len(prompt),
        max_tokens=max_tokens,
        tokens=tokens,
        num_tokens=len(prompt),
        prompt_positions=prompt_positions,
        next_position=next_position,
        spans=message.spans,
        embeds=PromptEmbeds(message.spans, embeds),
        eos_ids=model.eos_ids,
        stop_ids=_stop_ids(sampling, model),
        hides_stops=_hides_stops(message),
        think_close_id=facts.think_close_id,
        thinking=budget is not None,
        budget=budget,
        loops=LoopDetector(sampling.loop_repeats, sampling.loop_tokens) if sampling.loop_repeats and budget else None,
        seen=SeenTokens(prompt, len(tokens) - len(prompt)) if _penalised(sampling) else None,
        grammar=grammar,
        allowed=_bits(sampling.allowed_token_ids, model.vocab_size) if sampling.allowed_token_ids else None,
        prompt=asked_prompt(message),
        root=root_hash(message.request.cache_salt),
        # The scores were sent before, or with, the first token.
        scores=None if scored is None or generated else PromptScores(len(prompt), scored),
    )
    for token in generated:
        sequence.append(token)
    return sequence


def _bits(tokens: Ordered[int], vocab_size: int) -> Bits:
    """Return a mask of the vocabulary in whole words of 32 bits."""
    chosen = np.zeros(-(-vocab_size // 32) * 32, np.bool_)
    chosen[list(tokens)] = True
    return np.packbits(chosen, bitorder="little")


def _stop_ids(sampling: Sampling, model: ModelConfig) -> frozenset[int]:
    """Return the tokens that end a sequence. Where a grammar allows nothing but an end token, no request ignores it."""
    ends = () if sampling.ignore_eos and sampling.grammar is None else model.eos_ids
    return frozenset(sampling.stop_token_ids) | frozenset(ends)


def _penalised(sampling: Sampling) -> bool:
    """Return True if the request asks for a penalty."""
    return (sampling.repetition_penalty, sampling.presence_penalty, sampling.frequency_penalty) != (1.0, 0.0, 0.0)


def _hides_stops(message: Generate) -> bool:
    """Return True if the answer begins in reasoning in which the request's own stop ids do not count."""
    output = message.request.output
    return output.thinking and not output.stop_in_reasoning and bool(message.request.sampling.stop_token_ids)


def _budget(message: Generate, facts: EngineFacts) -> ThinkingBudget | None:
    """Return the request's thinking budget. A negative limit means unlimited, as in the reference server.

    With a grammar or allowed tokens, or where a call or a loop ends the thinking, there is one without a limit: the
    answer must not end inside the thinking.
    """
    sampling, output = message.request.sampling, message.request.output
    limit = sampling.reasoning_max_tokens
    unlimited = limit is None or limit < 0
    restricted = sampling.grammar is not None or bool(sampling.allowed_token_ids)
    loops = sampling.loop_repeats > 0
    closes = output.tools and (output.tool_call_ends_reasoning or sampling.grammar is not None)
    if not output.thinking or (unlimited and not restricted and not closes and not loops):
        return None
    call_id = facts.tool_call_id if closes else None
    return ThinkingBudget(UNLIMITED if limit is None or limit < 0 else limit, facts.think_close_id, call_id)


def _check_generated(generated: Ordered[int], facts: EngineFacts) -> None:
    """Refuse the journal of another model."""
    if generated and max(generated) >= facts.model.vocab_size:
        last = facts.model.vocab_size - 1
        raise internal(f"The answer so far has token id {max(generated)}; the vocabulary ends at {last}.")


def _check_tokens(prompt: Ids, sampling: Sampling, facts: EngineFacts) -> None:
    """Refuse ids outside the vocabulary, which would end the process in the middle of a step that all share."""
    vocabulary = range(facts.model.vocab_size)
    if len(prompt) == 0:
        raise invalid("The prompt has no tokens.", "messages")
    if len(prompt) >= facts.max_model_len:
        raise context_length(len(prompt), facts.max_model_len)
    if int(prompt.max()) not in vocabulary:
        raise internal(f"The prompt has token id {int(prompt.max())}; the vocabulary ends at {len(vocabulary) - 1}.")
    chosen = {
        "stop_token_ids": sampling.stop_token_ids,
        "logit_bias": tuple(sampling.logit_bias),
        "allowed_token_ids": sampling.allowed_token_ids,
        "bad_words": tuple(token for word in sampling.bad_words for token in word),
    }
    for field_name, ids in chosen.items():
        if any(token not in vocabulary for token in ids):
            raise invalid(f"{field_name} has a token id outside 0 .. {len(vocabulary) - 1}.", field_name)
    if any(len(word) == 0 for word in sampling.bad_words):
        raise invalid("bad_words has an empty sequence.", "bad_words")
