"""A client that does what a careful one may do: it comes back after a broken connection, and reads closely."""

import asyncio
import json
import random
import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import httpx
from chaos_requests import Ask
from chaos_tenants import key_of

LATER = (429, 503)  # not now, not here: try again
ELSEWHERE = "The server is shutting down."  # inside a stream: it goes on at another gateway
RETRY_S = (0.05, 0.4)
TOLERANCE = 1e-3  # of log-probabilities: the same sums in another order


class Broken(Exception):
    """An answer that no client should get."""


@dataclass
class Choice:
    """One choice of an answer, put together from deltas or read as a whole."""

    reasoning: str = ""
    content: str = ""
    calls: list[dict[str, str]] = field(default_factory=list)
    prompt: list[int] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    logprobs: list[tuple[str, float]] = field(default_factory=list)
    finish: str | None = None

    def add(self, part: dict[str, Any], logprobs: dict[str, Any] | None, finish: str | None) -> None:
        """A delta of a stream, or a whole message."""
        if self.finish is not None:
            raise Broken(f"something comes after the finish: {part}")
        self.reasoning += part.get("reasoning_content") or ""
        self.content += part.get("content") or ""
        self.prompt += part.get("prompt_token_ids") or []
        self.tokens += part.get("completion_token_ids") or []
        for place, call in enumerate(part.get("tool_calls") or []):
            self._call(call.get("index", place), call)
        self.logprobs += [(one["token"], one["logprob"]) for one in (logprobs or {}).get("content") or []]
        self.finish = finish

    def _call(self, index: int, call: dict[str, Any]) -> None:
        if index == len(self.calls):
            self.calls.append({"name": call["function"]["name"], "arguments": ""})
        elif call.get("id") is not None:
            raise Broken(f"tool call {index} begins twice")
        self.calls[index]["arguments"] += call["function"].get("arguments") or ""


@dataclass
class Transcript:
    """All that a client was told in answer to one request."""

    choices: list[Choice] = field(default_factory=list)
    usage: dict[str, int] | None = None

    def differs(self, expected: "Transcript", *, usage_asked: bool = True) -> str:
        """Return the first difference from `expected`, or "". Without `usage_asked`, usage may be missing."""
        if len(self.choices) != len(expected.choices):
            return f"{len(self.choices)} choices, expected {len(expected.choices)}"
        for index, (ours, theirs) in enumerate(zip(self.choices, expected.choices, strict=True)):
            for name in ("prompt", "tokens", "reasoning", "content", "calls", "finish"):
                if getattr(ours, name) != getattr(theirs, name):
                    return f"choice {index}: {name} is {getattr(ours, name)!r}, expected {getattr(theirs, name)!r}"
            if [token for token, _ in ours.logprobs] != [token for token, _ in theirs.logprobs]:
                return f"choice {index}: logprobs of {len(ours.logprobs)} tokens, expected {len(theirs.logprobs)}"
            if any(abs(a - b) > TOLERANCE for (_, a), (_, b) in zip(ours.logprobs, theirs.logprobs, strict=True)):
                return f"choice {index}: logprobs differ"
        if self.usage != expected.usage and (usage_asked or self.usage is not None):
            return f"usage is {self.usage}, expected {expected.usage}"
        return ""

    def begins(self, expected: "Transcript") -> str:
        """As `differs`, for an answer that was not read to its end."""
        for index, ours in enumerate(self.choices):
            theirs = expected.choices[index]
            for name in ("prompt", "tokens", "reasoning", "content"):
                if getattr(theirs, name)[: len(getattr(ours, name))] != getattr(ours, name):
                    return f"choice {index}: {name} begins {getattr(ours, name)!r}, expected {getattr(theirs, name)!r}"
        return ""


@dataclass(frozen=True)
class Manner:
    """Manners of a client: streaming, breaking off, coming back."""

    stream: bool = True
    key: str | None = None  # its Idempotency-Key
    leaves_after: int | None = None  # events, and for good; 0: at the headers, as the first event may need a token
    breaks_after: int | None = None  # events, and comes back
    shared: bool = False  # another uses the key too, and may have been the first


class Client:
    """One request to its end, over as many connections as that takes."""

    def __init__(self, http: httpx.AsyncClient, gateways: Callable[[], Sequence[str]], rng: random.Random) -> None:
        """`gateways`: base URLs of those that may be there."""
        self._http = http
        self._gateways = gateways
        self._rng = rng
        self.connections = 0
        self.resumed = 0
        self.longest_silence_s = 0.0

    async def ask(self, ask: Ask, manner: Manner, deadline_s: float) -> Transcript:
        """
        Raises:
            Broken: an error, or an answer out of order; also when the time is up.
        """
        talk = _Talk(self, ask, manner)
        try:
            async with asyncio.timeout(deadline_s):
                await talk.run()
        except TimeoutError:
            raise Broken(f"no answer within {deadline_s:.0f} s; {talk.so_far()}") from None
        except Broken as broken:
            raise Broken(f"{broken}; {talk.so_far()}") from None
        return talk.transcript

    def gateway(self) -> str:
        return self._rng.choice(self._gateways())

    async def pause(self) -> None:
        await asyncio.sleep(self._rng.uniform(*RETRY_S))


class _Talk:
    """State of the one request of a `Client.ask`."""

    def __init__(self, client: Client, ask: Ask, manner: Manner) -> None:
        self._client = client
        self._ask = ask
        self._manner = manner
        self.transcript = Transcript([Choice() for _ in range(ask.body.get("n", 1))])
        self._id = ""
        self._last_event = ""
        self._events = 0
        self._done = False
        self._broke = False
        self._history: list[str] = []
        self._heard: float | None = None  # when the last event came, on whichever connection

    def so_far(self) -> str:
        return f"request {self._id or 'without an id'}, {self._events} events; {' | '.join(self._history[-12:])}"

    async def run(self) -> None:
        while not self._done:
            if self._history:
                await self._client.pause()
            self._client.connections += 1
            try:
                await (self._go_on() if self._id else self._begin())
            except httpx.TransportError as error:
                self._history.append(type(error).__name__)

    async def _begin(self) -> None:
        self._start_again()
        body = {**self._ask.body, "stream": self._manner.stream}
        if self._manner.stream:
            body["stream_options"] = {"include_usage": True}
        headers = {"X-Event-IDs": "true"} if self._manner.key is None else {"Idempotency-Key": self._manner.key}
        await self._request("POST", "/v1/chat/completions", json=body, headers=headers)

    async def _go_on(self) -> None:
        self._client.resumed += 1
        if not self._last_event:
            self._start_again()
        await self._request(
            "GET", f"/v1/chat/completions/{self._id}/events", headers={"Last-Event-ID": self._last_event}
        )

    async def _request(self, method: str, path: str, **options: Any) -> None:
        gateway = self._client.gateway()
        self._history.append(f"{method} {gateway[-5:]}{path[20:]} after {self._last_event!r}")
        headers = {**key_of(self._ask.number), **options.pop("headers", {})}
        async with self._client._http.stream(method, gateway + path, headers=headers, **options) as response:
            if response.status_code != 200:
                body = (await response.aread()).decode(errors="replace")
                if response.status_code not in LATER:
                    raise Broken(f"{response.status_code}: {body[:300]}")
                self._history.append(str(response.status_code))
            elif self._manner.leaves_after == 0:
                self._done = True
            elif self._manner.stream:
                await self._read(response)
            else:
                self._whole(json.loads(await response.aread()))

    def _whole(self, answer: dict[str, Any]) -> None:
        for choice in answer["choices"]:
            self.transcript.choices[choice["index"]].add(choice["message"], choice["logprobs"], choice["finish_reason"])
        self.transcript.usage = _counts(answer["usage"])
        self._done = True

    async def _read(self, response: httpx.Response) -> None:
        async for event_id, data in self._events_of(response):
            if data == "[DONE]":
                if not all(choice.finish for choice in self.transcript.choices):
                    raise Broken("[DONE] before the finish")
                self._done = True
                return
            event = json.loads(data)
            if event.get("error", {}).get("message") == ELSEWHERE:
                self._history.append("told to go elsewhere")
                return
            self._event(event)
            self._events += 1
            self._last_event = event_id
            if self._manner.leaves_after is not None and self._events >= self._manner.leaves_after:
                self._done = True
                return
            if self._manner.breaks_after == self._events and not self._broke:
                self._broke = True
                self._history.append("breaks")
                return
        raise Broken("the stream ended without [DONE]")

    def _start_again(self) -> None:
        self._last_event = ""
        self._events = 0
        self.transcript = Transcript([Choice() for _ in self.transcript.choices])

    def _event(self, event: dict[str, Any]) -> None:
        if "error" in event:
            raise Broken(f"error in the stream: {event['error']}")
        if self._id and self._id != event["id"]:
            raise Broken(f"an event of {event['id']} in the stream of {self._id}")
        self._id = event["id"]
        for choice in event["choices"]:
            self.transcript.choices[choice["index"]].add(choice["delta"], choice["logprobs"], choice["finish_reason"])
        if event.get("usage"):
            self.transcript.usage = _counts(event["usage"])

    async def _events_of(self, response: httpx.Response) -> AsyncIterator[tuple[str, str]]:
        """(the last id so far, data) of each event."""
        event_id, data = self._last_event, ""
        async for line in response.aiter_lines():
            if line.startswith("id:"):
                event_id = line[3:].strip()
            elif line.startswith("data:"):
                data += line[5:].strip()
            elif not line and data:
                before, self._heard = self._heard, time.monotonic()
                if before is not None:
                    self._client.longest_silence_s = max(self._client.longest_silence_s, self._heard - before)
                yield event_id, data
                data = ""


def _counts(usage: dict[str, Any]) -> dict[str, int]:
    """Return the part of the usage that depends on the request alone. (Cached tokens do not.)"""
    return {
        "prompt": usage["prompt_tokens"],
        "completion": usage["completion_tokens"],
        "reasoning": usage["completion_tokens_details"]["reasoning_tokens"],
        "image": usage["prompt_tokens_details"]["image_tokens"],
    }
