"""Answers of OpenAI's completions: deltas as the chunks of a stream, or as one JSON body."""

from collections.abc import Sequence
from itertools import chain
from typing import Any

import msgspec

from services.gateway.dialects.chat_events import AnswerHead, one_line, quote, total_usage
from services.gateway.dialects.collected import CollectedChoice, prompt_ids
from services.gateway.dialects.completion_logprobs import CompletionLogprobs, answer_entries, prompt_entries
from services.gateway.dialects.event_ids import EventIds, NoEventIds
from services.gateway.dialects.prompt_logprobs import TokenTexts, prompt_logprobs_json
from shared.messages import Delta, PromptLogprobs, Usage

OBJECT = "text_completion"
_NOTHING = Delta("", 0)

_json = msgspec.json.Encoder()


class CompletionForm(msgspec.Struct, frozen=True, omit_defaults=True):
    """Parts of an answer that are shown; kept with the request."""

    prompts: int = 1
    echo: bool = False
    logprobs: int | None = None  # alternatives to each token; None: no log-probabilities
    prompt_logprobs: int | None = None  # the same of the prompt, in vLLM's form
    token_ids: bool = False
    scores_only: bool = False  # nothing of the one token that the engine generates


class ChoiceWriter:
    """Writer of one choice, part by part."""

    def __init__(self, form: CompletionForm, texts: TokenTexts) -> None:
        self._form = form
        self._texts = texts
        self._logprobs = CompletionLogprobs()

    def prompt(self, ids: Sequence[int] | None, found: PromptLogprobs | None) -> tuple[str, dict[str, Any] | None]:
        """Return the text of the prompt, and its log-probabilities."""
        if not ids:
            return "", None  # an engine of a release that does not send them
        text, shown = self._texts.text_of(ids), self._form.logprobs
        if shown is None:
            return text, None
        return text, self._logprobs.add(prompt_entries(ids, found, shown, self._texts), ends=True)

    def answer(self, shown: Sequence[Any]) -> dict[str, Any] | None:
        """Return the log-probabilities of the answer's next tokens."""
        if self._form.logprobs is None or self._form.scores_only:
            return None
        return self._logprobs.add(answer_entries(shown))


class CompletionChunks:
    """Formatter of the chunks of one stream."""

    def __init__(
        self, head: AnswerHead, n: int, form: CompletionForm, texts: TokenTexts, usage: bool, continuous_usage: bool
    ) -> None:
        """Prepare the fixed parts. `usage`: chunks have a place for it; `continuous_usage`: each says it."""
        self._form = form
        self._prefix = b"data: " + one_line(_fields(head))[:-1]
        self._suffix = b',"usage":null}\n\n' if usage else b"}\n\n"
        self._continuous_usage = continuous_usage
        self._choices = [ChoiceWriter(form, texts) for _ in range(n)]

    def delta(self, index: int, delta: Delta, ids: EventIds | NoEventIds, skip: int) -> bytes:
        """Return a delta's chunks except the first `skip`: the prompt, the text, the finish."""
        shown = _NOTHING if self._form.scores_only else delta
        chunks = []
        if delta.start == 0 and (self._form.echo or self._form.token_ids):
            chunks.append(self._prompt_chunk(index, delta))
        if shown.content or (shown.logprobs and self._form.logprobs is not None) or self._lists_ids(shown):
            chunks.append(self._text_chunk(index, shown))
        if delta.finish_reason:
            reason = "length" if self._form.scores_only else delta.finish_reason
            chunks.append(self._chunk(index, "", finish_reason=reason, usage=delta.usage))
        lines = ids.advance(index, delta, len(chunks))
        return b"".join(chain(*list(zip(lines, chunks, strict=False))[skip:]))

    def usage(self, usage: dict[str, Any]) -> bytes:
        """Return the chunk without choices that ends the stream if the client asked for usage."""
        return self._prefix + b',"choices":[],"usage":' + _json.encode(usage) + b"}\n\n"

    def _lists_ids(self, delta: Delta) -> bool:
        return self._form.token_ids and bool(delta.token_ids)

    def _prompt_chunk(self, index: int, delta: Delta) -> bytes:
        text, logprobs = "", None
        if self._form.echo:
            text, logprobs = self._choices[index].prompt(prompt_ids(delta), delta.prompt_logprobs)
        more = {"prompt_token_ids": prompt_ids(delta)} if self._form.token_ids else {}
        usage = delta.usage and msgspec.structs.replace(delta.usage, completion_tokens=0)
        return self._chunk(index, text, logprobs, more, usage=usage)

    def _text_chunk(self, index: int, delta: Delta) -> bytes:
        logprobs = self._choices[index].answer(delta.logprobs) if delta.logprobs else None
        more = {"completion_token_ids": delta.token_ids} if self._lists_ids(delta) else {}
        return self._chunk(index, delta.content, logprobs, more, usage=delta.usage)

    def _chunk(
        self,
        index: int,
        text: str,
        logprobs: dict[str, Any] | None = None,
        more: dict[str, Any] | None = None,
        finish_reason: str | None = None,
        usage: Usage | None = None,
    ) -> bytes:
        details = one_line({"logprobs": logprobs, "finish_reason": finish_reason, **(more or {})})[1:]
        suffix = self._suffix
        if self._continuous_usage:
            counted = None if usage is None else completion_usage([usage], self._form)
            suffix = b',"usage":' + _json.encode(counted) + b"}\n\n"
        choice = b',"choices":[{"index":%d,"text":%b,%b]' % (index, quote(text), details)
        return self._prefix + choice + suffix


def choice_json(collected: CollectedChoice, index: int, form: CompletionForm, texts: TokenTexts) -> dict[str, Any]:
    """Return the element of `choices`."""
    writer = ChoiceWriter(form, texts)
    text, logprobs = "", None
    if form.echo:
        text, logprobs = writer.prompt(collected.prompt_ids, collected.prompt_logprobs)
    answer = writer.answer(collected.logprobs)
    if logprobs is None or answer is None:
        logprobs = logprobs or answer
    else:
        logprobs = {name: logprobs[name] + answer[name] for name in logprobs}
    choice: dict[str, Any] = {
        "index": index,
        "text": text if form.scores_only else text + collected.content,
        "logprobs": logprobs,
        "finish_reason": "length" if form.scores_only else collected.finish_reason,
    }
    if form.prompt_logprobs is not None:
        choice["prompt_logprobs"] = prompt_logprobs_json(collected.prompt_ids, collected.prompt_logprobs, texts)
    if form.token_ids:
        choice["prompt_token_ids"] = collected.prompt_ids
        choice["completion_token_ids"] = [] if form.scores_only else collected.token_ids
    return choice


def completion_body(head: AnswerHead, choices: list[dict[str, Any]], usage: dict[str, Any]) -> bytes:
    """Return the body of an answer that is not streamed."""
    return _json.encode({**_fields(head), "choices": choices, "usage": usage})


def completion_usage(usages: Sequence[Usage], form: CompletionForm) -> dict[str, Any]:
    """Add up the usage of all choices; each prompt counts once."""
    if form.scores_only:
        usages = [msgspec.structs.replace(usage, completion_tokens=0) for usage in usages]
    total = total_usage(usages)
    prompts = usages[:: max(1, len(usages) // form.prompts)]
    prompt_tokens = sum(usage.prompt_tokens for usage in prompts)
    total["prompt_tokens"] = prompt_tokens
    total["total_tokens"] = prompt_tokens + total["completion_tokens"]
    total["prompt_tokens_details"]["cached_tokens"] = sum(usage.cached_tokens for usage in prompts)
    return total


def status_body(head: AnswerHead) -> bytes:
    """Return the body that says that an answer is not complete yet."""
    return _json.encode({**_fields(head), "object": f"{OBJECT}.status", "status": "in_progress"})


def _fields(head: AnswerHead) -> dict[str, Any]:
    return {
        "id": head.id,
        "object": OBJECT,
        "created": head.created,
        "model": head.model,
        "system_fingerprint": head.system_fingerprint,
    }
