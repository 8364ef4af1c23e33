"""Inspection of a model directory by the services' own readers, from configuration and headers only."""

import asyncio
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

import msgspec

from services.engine.model.integers import rounded_scales
from services.engine.run.footprint import cache_bytes, decoder_shapes, weight_bytes
from services.gateway.request.chat import ChatFormat, Rendering, template_variables
from services.gateway.request.media import MediaItem
from services.gateway.request.schemas import ChatRequest
from services.gateway.request.template import BUILT_IN, TemplateSource
from services.gateway.templates.renderer import TemplateRenderer
from services.mm_encoder.media.normalisation import load_normalisation
from services.mm_encoder.media.timestamps import FONT, font_file
from services.mm_encoder.vision.memory import weight_bytes as vision_bytes
from services.mm_encoder.vision.weights import load_weights as load_vision
from shared.errors import CheckpointError, RequestError
from shared.model.checkpoint import Checkpoint
from shared.model.config import ModelConfig, load_model_config
from shared.model.config_file import Quantization
from shared.model.foreign_checkpoints import refuse_foreign
from shared.model.generation import GenerationDefaults, load_generation_defaults
from shared.model.tokenizer import REQUIRED, Tokenizer
from shared.model.vocabulary import check_vocabulary
from shared.workers.process import worker_environ

MAX_SAMPLE_CHARS = 1 << 20
SAMPLE = msgspec.convert(
    {
        "messages": [
            {"role": "system", "content": "Answer briefly."},
            {
                "role": "user",
                "content": [
                    {"type": "image_url", "image_url": {"url": "https://example.com/street.jpg"}},
                    {"type": "text", "text": "What does the sign say?"},
                ],
            },
        ]
    },
    ChatRequest,
)
SAMPLE_MEDIA = [MediaItem("image", "messages[1].content[0]", "image_url", url="https://example.com/street.jpg")]
TOOL_TOKENS = ("<tool_call>", "</tool_call>")

T = TypeVar("T")


class Memory(msgspec.Struct, frozen=True):
    """Bytes on a device, of the weights and the cache."""

    decoder: dict[str, int]  # weights, by format: as stored, and where that is not quantised, wint8 and wint4
    decoder_large_card: dict[str, int]  # the same on a card of 64 GiB or more, with dense projections in both forms
    head: int  # of these, an lm_head that is dropped if it equals the embedding: headers do not tell
    vision: int  # the vision model's weights
    cache_per_token: int
    cache_per_context: int  # of the longest sequence


class Tokens(msgspec.Struct, frozen=True):
    """Facts of the vocabulary."""

    count: int  # one more than the largest id
    special: dict[str, int | None]  # those that prompts and parsers use
    end: dict[int, str]  # ids that end an answer, each with its text if it is a control token


class Chat(msgspec.Struct, frozen=True):
    """Chat template, and the prompt that it renders from a system message, a picture and a question."""

    template: str  # the file it comes from
    rendered: str
    tokens: int  # without the picture's own
    thinking: bool  # True: the answer begins inside <think>


class Report(msgspec.Struct, kw_only=True):
    """Result of `millrace check`. A part that could not be read is None, and an error says why."""

    directory: str
    served: bool = False
    errors: list[str] = []
    warnings: list[str] = []
    model: ModelConfig | None = None
    sampling: GenerationDefaults | None = None
    weight_files: dict[str, int] = {}  # bytes by name
    memory: Memory | None = None
    tokens: Tokens | None = None
    chat: Chat | None = None


def inspect(directory: Path) -> Report:
    """Read a model directory as the four services would, and collect all errors and warnings."""
    report = Report(directory=str(directory))
    try:
        refuse_foreign(directory)
    except CheckpointError as error:
        # Other errors would be consequences of this one.
        report.errors.append(str(error))
        return report
    config = _attempt(report, lambda: load_model_config(directory))
    defaults = _attempt(report, lambda: load_generation_defaults(directory))
    tokenizer = _attempt(report, lambda: Tokenizer.load(directory))
    checkpoint = _attempt(report, lambda: Checkpoint(directory, headers_only=True))
    for part in (config, defaults, tokenizer, checkpoint):
        report.warnings += part.warnings if part else ()
    report.model = config and msgspec.structs.replace(config, warnings=())
    report.sampling = defaults and msgspec.structs.replace(defaults, warnings=())
    report.weight_files = {
        path.name: path.stat().st_size for path in sorted(directory.glob("*.safetensors")) if path.is_file()
    }
    if config and checkpoint:
        report.memory = _attempt(report, lambda: _memory(checkpoint, config))
        _attempt(report, lambda: _vision(checkpoint, config))
        report.warnings += rounded_scales(checkpoint, config)
    if config and tokenizer:
        report.warnings += _attempt(report, lambda: check_vocabulary(directory, config, tokenizer)) or ()
        report.tokens = _tokens(config, tokenizer)
    if tokenizer:
        report.chat = _attempt(report, lambda: _chat(directory, tokenizer))
    _attempt(report, lambda: load_normalisation(directory))
    _attempt(report, lambda: font_file(directory))
    report.warnings += _own_warnings(directory, report.chat)
    report.served = not report.errors
    return report


def _attempt(report: Report, read: Callable[[], T]) -> T | None:
    try:
        return read()
    except CheckpointError as error:
        if str(error) not in report.errors:  # several readers may fail on one file
            report.errors.append(str(error))
        return None


def _memory(checkpoint: Checkpoint, config: ModelConfig) -> Memory:
    stored = decoder_shapes(checkpoint, config)
    token = cache_bytes(config)
    forms: dict[str, Quantization | None] = {config.stored or config.dtype: None}
    if config.stored is None:
        forms |= {"wint8": "wint8", "wint4": "wint4"}
    return Memory(
        decoder={name: weight_bytes(stored, form) for name, form in forms.items()},
        decoder_large_card={
            name: weight_bytes(stored, form, both=name != config.dtype) for name, form in forms.items()
        },
        head=0 if stored.head is stored.embedding else stored.head.nbytes,
        vision=vision_bytes(config),
        cache_per_token=token,
        cache_per_context=token * config.max_position_embeddings,
    )


def _vision(checkpoint: Checkpoint, config: ModelConfig) -> None:
    """Check names and shapes of the vision weights as loading does."""
    load_vision(checkpoint, config, "meta")


def _tokens(config: ModelConfig, tokenizer: Tokenizer) -> Tokens:
    texts = {token: text for text, token in tokenizer.control.items()}
    return Tokens(
        count=tokenizer.vocab_size,
        special={text: tokenizer.token_id(text) for text in (*REQUIRED, *TOOL_TOKENS)},
        end={token: texts.get(token, "") for token in config.eos_ids},
    )


def _chat(directory: Path, tokenizer: Tokenizer) -> Chat:
    """Render the sample conversation.

    Raises:
        CheckpointError: the template cannot be read or fails on the sample conversation.
    """
    template = TemplateSource.load(directory)
    chat = ChatFormat(template.name, tokenizer)
    try:
        rendering = chat.prepare(SAMPLE, SAMPLE_MEDIA)
        plain = msgspec.structs.replace(rendering, variables=template_variables(SAMPLE, SAMPLE_MEDIA))
        marked, rendered = asyncio.run(_render(template, [rendering, plain]))
        prompt = chat.tokenise(rendering, marked, SAMPLE_MEDIA)
    except RequestError as error:
        raise CheckpointError(f"{directory}: a question about a picture cannot be asked: {error}") from error
    return Chat(template.name, rendered, prompt.text_tokens(), prompt.thinking)


async def _render(template: TemplateSource, renderings: Sequence[Rendering]) -> list[str]:
    renderer = TemplateRenderer(template, MAX_SAMPLE_CHARS, worker_environ(os.environ))
    try:
        return [await renderer.render(rendering) for rendering in renderings]
    finally:
        await renderer.close()


def _own_warnings(directory: Path, chat: Chat | None) -> list[str]:
    warnings = []
    if chat and chat.template == BUILT_IN.name:
        warnings.append(f"{directory} has no chat template; the built-in one, {BUILT_IN.name}, is used")
    if not (directory / FONT).is_file():
        warnings.append(f"{directory / FONT} does not exist; font-roboto's is used for the time in video frames")
    return warnings
