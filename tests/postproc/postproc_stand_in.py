"""A tokenizer whose tokens are whatever bytes a test cuts its text into, and helpers to run answers over them."""

import json
import re
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import msgspec
from hypothesis import strategies as st
from jiter import from_json

from services.postproc.text.answer import Answer, Parsers
from services.postproc.text.detokenize import Vocabulary
from shared.messages import Begin, Delta, Finish, Output, Request, Sampling, Usage

SPECIAL = "</s>"
MARKERS = ("<think>", "</think>", "<tool_call>", "</tool_call>")
EOS = 0
BEGIN = Begin("r1", 1, 0, prompt_tokens=7, cached_tokens=3, image_tokens=2, video_tokens=1)


class StandIn:
    """Token 0 is </s>; then the markers, each of them one token unless `spelled` has it; then the given pieces."""

    def __init__(self, pieces: Sequence[bytes], spelled: Sequence[str] = ()) -> None:
        names = [SPECIAL, *(marker for marker in MARKERS if marker not in spelled)]
        self._names = {name: token for token, name in enumerate(names)}
        self._bytes = [b"", *(name.encode() for name in names[1:]), *dict.fromkeys(pieces)]
        self._pieces = {piece: token for token, piece in enumerate(self._bytes) if token >= len(names)}

    @property
    def vocab_size(self) -> int:
        return len(self._bytes)

    @property
    def control(self) -> dict[str, int]:
        return dict(self._names)

    def token_id(self, text: str) -> int | None:
        return self._names.get(text)

    def token_bytes(self, token_id: int) -> bytes:
        return self._bytes[token_id]

    def tokens(self, pieces: Sequence[bytes | str]) -> list[int]:
        """Bytes are ordinary tokens, text is a marker's name."""
        return [self._names[piece] if isinstance(piece, str) else self._pieces[piece] for piece in pieces]


def cut(text: str, cuts: Sequence[int], spelled: Sequence[str] = ()) -> list[bytes | str]:
    """Marker tokens where the text spells them, unless `spelled`; between them the bytes, cut at `cuts` (modulo)."""
    markers = [marker for marker in MARKERS if marker not in spelled]
    pieces: list[bytes | str] = []
    for part in re.split(f"({'|'.join(map(re.escape, markers))})", text):
        if part in markers:
            pieces.append(part)
            continue
        data = part.encode("utf-8", "surrogatepass")
        places = sorted({0, len(data), *(place % (len(data) + 1) for place in cuts)})
        pieces += [data[a:b] for a, b in pairwise(places)]
    return pieces


def every_byte(text: str) -> list[int]:
    return list(range(len(text.encode()) + 1))


cuts = st.lists(st.integers(min_value=0, max_value=500), max_size=60)


def json_values(texts: st.SearchStrategy[str]) -> st.SearchStrategy[Any]:
    return st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | texts,
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3),
        max_leaves=8,
    )


def request(
    request_id: str = "r1", gateway: str = "g1", shard: int = 0, retain_s: float = 0.0, **output: object
) -> Request:
    options = {"thinking": True, **output}
    return Request(
        request_id,
        gateway,
        shard,
        created=0.0,
        sampling=Sampling(seed=1),
        output=Output(**options),  # type: ignore[arg-type]
        retain_s=retain_s,
    )


class Shown(msgspec.Struct):
    """A whole answer, as a client puts it together from deltas."""

    reasoning: str = ""
    content: str = ""
    calls: list[tuple[str | None, str, str]] = msgspec.field(default_factory=list)  # id, name, arguments
    finish_reason: str | None = None
    usage: Usage | None = None
    failure: object = None
    seq: int = 0
    token_ids: list[int] = msgspec.field(default_factory=list)
    logprobs: list[object] = msgspec.field(default_factory=list)

    def add(self, delta: Delta) -> None:
        assert delta.start == self.seq < delta.seq
        assert self.finish_reason is None
        assert self.failure is None
        self.seq = delta.seq
        self.reasoning += delta.reasoning
        self.content += delta.content
        self.token_ids += delta.token_ids
        self.logprobs += delta.logprobs
        for piece in delta.tool_calls:
            if piece.name is not None:
                assert piece.index == len(self.calls)
                assert piece.arguments == ""
                self.calls.append((piece.id, piece.name, ""))
            else:
                call_id, name, arguments = self.calls[piece.index]
                assert piece.id is None
                self.calls[piece.index] = (call_id, name, arguments + piece.arguments)
                # Raises if this is not the beginning of a JSON value.
                assert isinstance(from_json(self.calls[piece.index][2].encode(), partial_mode="trailing-strings"), dict)
        self.finish_reason = delta.finish_reason
        self.usage = delta.usage
        self.failure = delta.failure
        if self.finish_reason is not None:
            for _, _, arguments in self.calls:
                assert isinstance(json.loads(arguments), dict)
                assert isinstance(msgspec.json.decode(arguments.encode()), dict)  # which is stricter

    def take(self, delta: Delta) -> bool:
        """The rule of gateways: what was shown is dropped, what follows on it is added. False: neither can be, and
        what is missing has to be asked for."""
        if delta.seq > self.seq and delta.start == self.seq:
            self.add(delta)
        return delta.seq <= self.seq

    @property
    def done(self) -> bool:
        return self.finish_reason is not None or self.failure is not None

    @property
    def functions(self) -> list[tuple[str, str]]:
        return [(name, arguments) for _, name, arguments in self.calls]


def collect(deltas: Sequence[Delta | None]) -> Shown:
    shown = Shown()
    for delta in deltas:
        if delta is not None:
            shown.add(delta)
    return shown


def run(
    text: str,
    cuts: Sequence[int] = (),
    *,
    finish: str = "stop",
    spelled: Sequence[str] = (),
    takes: Sequence[int] | None = None,
    parsers: Parsers | None = None,
    **output: object,
) -> Shown:
    """Stream `text` as tokens cut at `cuts`."""
    return run_pieces(cut(text, cuts, spelled), finish=finish, spelled=spelled, takes=takes, parsers=parsers, **output)


def run_pieces(
    pieces: Sequence[bytes | str],
    *,
    finish: str = "stop",
    spelled: Sequence[str] = (),
    takes: Sequence[int] | None = None,
    parsers: Parsers | None = None,
    **output: object,
) -> Shown:
    """Stream tokens; take deltas after every one, or after those in `takes` (modulo) only."""
    tokenizer = StandIn([piece for piece in pieces if isinstance(piece, bytes)], spelled)
    answer = Answer(request(**output), Vocabulary(tokenizer), parsers or Parsers())
    answer.begin = BEGIN
    tokens = tokenizer.tokens(pieces)
    taken = None if takes is None else {place % (len(tokens) + 1) for place in takes}
    deltas = []
    for place, token in enumerate(tokens):
        answer.push_token(token)
        if taken is None or place in taken:
            deltas.append(answer.take_delta())
    if finish == "stop":
        answer.push_stop_token(EOS)
    answer.apply_finish(Finish(finish))  # type: ignore[arg-type]
    deltas.append(answer.take_delta())
    assert answer.ended
    assert answer.take_delta() is None
    return collect(deltas)
