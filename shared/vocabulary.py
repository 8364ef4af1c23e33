"""Checks that a model and a tokenizer belong to each other."""

from pathlib import Path

from shared.errors import CheckpointError
from shared.model_config import ModelConfig
from shared.tokenizer import REQUIRED, Tokenizer


def check_vocabulary(directory: Path, config: ModelConfig, tokenizer: Tokenizer) -> tuple[str, ...]:
    """Check the tokenizer's ids against the model's.

    Returns:
        Warnings of control tokens without a row in the embedding, which only a template that writes them would miss.

    Raises:
        CheckpointError: text or a prompt's own tokens can have ids without a row, or the tokenizer gives another id to
            a media token.
    """
    _check_media(directory, config, tokenizer)
    rows, control = config.vocab_size, tokenizer.control
    texts = {token: text for text, token in control.items()}
    beyond = [token for token in range(rows, tokenizer.vocab_size) if token in texts or tokenizer.token_bytes(token)]
    needed = [token for token in beyond if texts.get(token) in REQUIRED or token not in texts]
    if needed:
        raise CheckpointError(
            f"{directory}: the tokenizer has the id {needed[0]}, for which the embedding has no row: config.json's "
            f"vocab_size is {rows}. They belong to different models"
        )
    if not beyond:
        return ()
    names = ", ".join(texts[token] for token in beyond)
    return (f"{directory}: the tokenizer's {names}: no row in the embedding of {rows}",)


def _check_media(directory: Path, config: ModelConfig, tokenizer: Tokenizer) -> None:
    for field, ours, text in (
        ("im_patch_id", config.image_patch_id, "<|IMAGE_PLACEHOLDER|>"),
        ("image_start_token_id", config.image_start_id, "<|IMAGE_START|>"),
        ("image_end_token_id", config.image_end_id, "<|IMAGE_END|>"),
        ("video_start_token_id", config.video_start_id, "<|VIDEO_START|>"),
        ("video_end_token_id", config.video_end_id, "<|VIDEO_END|>"),
    ):
        if (theirs := tokenizer.token_id(text)) != ours:
            raise CheckpointError(
                f"{directory}: config.json's {field} is {ours} and the tokenizer's id of {text} is {theirs}"
            )
