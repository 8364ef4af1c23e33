"""transformers as the judge of the whole pipeline: its checkpoint, and its answers to questions."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from oracle import Model, hf_generate
from PIL import Image
from system import data_url, encoded
from transformers.models.ernie4_5_vl_moe.image_processing_pil_ernie4_5_vl_moe import Ernie4_5_VLMoeImageProcessorPil

from shared.model.tokenizer import Tokenizer

SYSTEM = "You are a multimodal AI assistant called ERNIE developed by Baidu based on the PaddlePaddle framework."
LIMITS = {"shortest_edge": 56 * 56, "longest_edge": 6177 * 28 * 28}


@dataclass(frozen=True)
class Question:
    """One user's turn: perhaps a picture, then a text."""

    text: str
    image: Image.Image | None = None

    def content(self) -> Any:
        """As OpenAI's API has it."""
        if self.image is None:
            return self.text
        url = data_url(encoded(self.image, "PNG"), "image/png")
        return [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": self.text}]


class Judge:
    """transformers' answers, from the prompt format as the model's documentation has it."""

    def __init__(self, directory: Path, model: Model) -> None:
        self.directory = directory
        self._model = model
        self._tokenizer = Tokenizer.load(directory)
        self._processor = Ernie4_5_VLMoeImageProcessorPil(size=LIMITS)

    def prompt(self, question: Question) -> tuple[list[int], dict[str, Any]]:
        """Token ids, placeholders expanded, and the media as `hf_inputs` wants them."""
        head, tail = f"<|begin_of_sentence|>{SYSTEM}\nUser: ", f"{question.text}\nAssistant: \n<think>\n"
        if question.image is None:
            return self._tokenizer.encode_template(head + tail), {}
        pixels = self._processor(images=[question.image], return_tensors="pt")
        patches, grid = pixels["pixel_values"], pixels["image_grid_thw"]
        before = self._tokenizer.encode_template(f"{head} Picture 1:<|IMAGE_START|>")
        after = self._tokenizer.encode_template(f"<|IMAGE_END|>{tail}")
        place = [self._model.config.image_token_id] * (int(grid.prod()) // 4)
        return before + place + after, {"images": (patches, grid)}

    def answer(self, question: Question, max_tokens: int) -> list[int]:
        """The greedy tokens, the end token included if it came."""
        ids, media = self.prompt(question)
        return hf_generate(self._model, ids, max_tokens, **media)
