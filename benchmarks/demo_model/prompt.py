"""A sample as tokens: the prompt as the gateway writes it, and the answer as the model shall."""

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import sentencepiece
from jinja2 import Environment
from numpy.typing import NDArray

from benchmarks.demo_model.sample import Call, Message, Pixels, Sample
from benchmarks.demo_model.videos import stamped
from cli.demo_tokenizer import CHAT_TEMPLATE
from services.engine.schedule.positions import positions
from services.mm_encoder.media.patches import patch_rows
from shared.messages import MediaSpan

PATCH, MERGE = 14, 2
_CONTROL = re.compile(r"(<\|[^|]+\|>|</?think>|</?tool_call>)")
_PLACES = ("<|image@placeholder|>", "<|video@placeholder|>")
_environment = Environment()
_environment.filters["tojson"] = lambda value: json.dumps(value, ensure_ascii=False)
_TEMPLATE = _environment.from_string(CHAT_TEMPLATE)


@dataclass(frozen=True, slots=True)
class Media:
    """Frames of one picture or video, as patches."""

    rows: NDArray[np.uint8]  # [frames * patches, 588]
    grid: tuple[int, int, int]  # frames, patch rows, patch columns


@dataclass(frozen=True, slots=True)
class Encoded:
    """A sample as the model sees it."""

    kind: str
    ids: NDArray[np.int64]
    answer_at: int  # index of the first token to learn
    positions: NDArray[np.int32]  # [3, tokens]
    media: tuple[Media, ...]


class Encoder:
    """Encodes samples with one tokenizer."""

    def __init__(self, model: Path | bytes, added: dict[str, int]) -> None:
        proto = model.read_bytes() if isinstance(model, Path) else model
        self._pieces = sentencepiece.SentencePieceProcessor(model_proto=proto)
        self._added = added
        self.patch_id = added["<|IMAGE_PLACEHOLDER|>"]

    @classmethod
    def load(cls, directory: Path) -> "Encoder":
        """The tokenizer of a checkpoint."""
        return cls(directory / "tokenizer.model", json.loads((directory / "added_tokens.json").read_bytes()))

    def encode(self, sample: Sample) -> Encoded:
        """Tokens, positions and patches of the sample."""
        media = [_media(part) for message in sample.messages for part in message.parts if not isinstance(part, str)]
        ids: list[int] = []
        spans: list[MediaSpan] = []
        for text in filter(None, _CONTROL.split(prompt_text(sample))):
            if text in _PLACES:
                grid = media[len(spans)].grid
                count = grid[0] * grid[1] * grid[2] // MERGE**2 // (MERGE if grid[0] > 1 else 1)
                spans.append(MediaSpan("video" if "video" in text else "image", "", len(ids), count, grid))
                ids += [self.patch_id] * count
            else:
                ids += self._tokens(text)
        answer_at = len(ids)
        for text in filter(None, _CONTROL.split(answer_text(sample))):
            ids += self._tokens(text)
        ids.append(self._pieces.eos_id())
        placed, _ = positions(len(ids), spans, MERGE, MERGE)
        kind = sample.kind if sample.thinking else f"{sample.kind}, no thinking"
        return Encoded(kind, np.array(ids), answer_at, placed, tuple(media))

    def _tokens(self, text: str) -> list[int]:
        if (token := self._added.get(text)) is not None:
            return [token]
        if _CONTROL.fullmatch(text):
            return [self._pieces.piece_to_id(text)]
        tokens: list[int] = self._pieces.encode(text)
        return tokens


def prompt_text(sample: Sample) -> str:
    """The conversation as the template writes it, up to where the answer begins."""
    return _TEMPLATE.render(
        messages=[_variables(message) for message in sample.messages],
        tools=list(sample.tools) or None,
        enable_thinking=sample.thinking,
        add_generation_prompt=True,
    )


def answer_text(sample: Sample) -> str:
    """Return the text that the model shall write after the prompt."""
    thought = f"{sample.reasoning}\n</think>\n\n" if sample.thinking else ""
    calls = "\n".join(call_text(call) for call in sample.calls)
    return thought + sample.answer + (f"{calls}\n" if calls else "")


def call_text(call: Call) -> str:
    """A tool call as the template writes it."""
    arguments = json.dumps(call.arguments, ensure_ascii=False)
    return f'<tool_call>\n{{"name": {json.dumps(call.name)}, "arguments": {arguments}}}\n</tool_call>'


def _variables(message: Message) -> dict[str, Any]:
    made: dict[str, Any] = {"role": message.role, "content": [_part(part) for part in message.parts]}
    if all(isinstance(part, str) for part in message.parts):
        made["content"] = "".join(part for part in message.parts if isinstance(part, str))
    if message.calls:
        made["tool_calls"] = [{"function": {"name": call.name, "arguments": call.arguments}} for call in message.calls]
        made["reasoning_content"] = message.reasoning
    return made


def _part(part: str | Pixels | list[Pixels]) -> dict[str, str]:
    if isinstance(part, str):
        return {"type": "text", "text": part}
    return {"type": "video_url" if isinstance(part, list) else "image_url"}


def _media(part: Pixels | list[Pixels]) -> Media:
    frames = stamped(part) if isinstance(part, list) else [part]
    height, width = frames[0].shape[0] // PATCH, frames[0].shape[1] // PATCH
    rows = np.concatenate([patch_rows(frame, PATCH, MERGE) for frame in frames])
    return Media(rows, (len(frames), height, width))
