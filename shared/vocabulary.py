"""Whether a model and a tokenizer belong to each other."""

from shared.errors import CheckpointError
from shared.model_config import ModelConfig
from shared.tokenizer import Tokenizer


def check_vocabulary(config: ModelConfig, tokenizer: Tokenizer) -> None:
    """
    Raises:
        CheckpointError: the tokenizer has ids that the embedding has no row for, or gives another id to a media token.
    """
    if tokenizer.vocab_size > config.vocab_size:
        raise CheckpointError(
            f"the tokenizer has ids up to {tokenizer.vocab_size - 1} and config.json's vocab_size is "
            f"{config.vocab_size}: they belong to different models"
        )
    for field, ours, text in (
        ("im_patch_id", config.image_patch_id, "<|IMAGE_PLACEHOLDER|>"),
        ("image_start_token_id", config.image_start_id, "<|IMAGE_START|>"),
        ("image_end_token_id", config.image_end_id, "<|IMAGE_END|>"),
        ("video_start_token_id", config.video_start_id, "<|VIDEO_START|>"),
        ("video_end_token_id", config.video_end_id, "<|VIDEO_END|>"),
    ):
        if (theirs := tokenizer.token_id(text)) != ours:
            raise CheckpointError(f"config.json's {field} is {ours} and the tokenizer's id of {text} is {theirs}")
