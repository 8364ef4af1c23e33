"""The shape of the trained demo, in the hub's flat form of config.json."""

from typing import Any

from benchmarks.demo_model.tokenizer import NUM_PIECES
from cli import demo
from cli.demo_tokenizer import ADDED_TOKENS

HIDDEN, LAYERS, HEADS, KV_HEADS = 256, 6, 8, 2
DENSE, EXPERTS, TEXT_EXPERT, VISION_EXPERT = 768, 8, 96, 32
VISION_DEPTH, VISION_HIDDEN, VISION_HEADS = 4, 128, 4
VOCAB = 2048
assert NUM_PIECES + len(ADDED_TOKENS) < VOCAB


def hub_config() -> dict[str, Any]:
    """The random demo's config.json with other sizes and ids."""
    ids = {text: NUM_PIECES + i for i, text in enumerate(ADDED_TOKENS)}
    config = demo.hub_config("bfloat16")
    config |= {
        "vocab_size": VOCAB,
        "hidden_size": HIDDEN,
        "intermediate_size": DENSE,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "freq_allocation": HIDDEN // HEADS // 2 // 4,
        "moe_num_experts": [EXPERTS, EXPERTS],
        "moe_intermediate_size": [TEXT_EXPERT, VISION_EXPERT],
        "moe_layer_end_index": [LAYERS + 1, LAYERS],
        "im_patch_id": ids["<|IMAGE_PLACEHOLDER|>"],
        "image_start_token_id": ids["<|IMAGE_START|>"],
        "image_end_token_id": ids["<|IMAGE_END|>"],
        "video_start_token_id": ids["<|VIDEO_START|>"],
        "video_end_token_id": ids["<|VIDEO_END|>"],
        "pixel_hidden_size": VISION_HIDDEN,
    }
    config["vision_config"] |= {
        "depth": VISION_DEPTH,
        "embed_dim": VISION_HIDDEN,
        "hidden_size": VISION_HIDDEN,
        "num_heads": VISION_HEADS,
    }
    return config
