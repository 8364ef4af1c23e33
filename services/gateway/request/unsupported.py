"""Fields that some chat API defines and this server does not support.

Those that would change the answer have neutral values, which request nothing and are accepted. Any other value is
refused by name: ignoring it would answer another question than the client's.
"""

from typing import Any

NEUTRAL_VALUES: dict[str, tuple[Any, ...]] = {
    "guided_decoding_backend": ("auto", "guidance", "llguidance"),
    "functions": ([],),
    "function_call": ("none",),
    "audio": (),
    "modalities": (["text"],),
    "web_search_options": (),
    "best_of": (1,),
    "echo": (False,),
    "suffix": ("",),
    "prompt": (),
    "use_beam_search": (False,),
    "length_penalty": (1,),
    "early_stopping": (False,),
    "truncate_prompt_tokens": (),
    "spaces_between_special_tokens": (True,),
    "add_special_tokens": (False,),
    "documents": ([],),
    "disable_chat_template": (False,),
    "prompt_token_ids": (),
    "completion_token_ids": ([],),
    "prompt_embeds": (),
    "logits_processors": ([],),
    "logits_processors_args": ({},),
    "include_draft_logprobs": (False,),
    "temp_scaled_logprobs": (False,),
    "top_p_normalized_logprobs": (False,),
    "max_streaming_response_tokens": (1,),
    "mm_hashes": ([],),
    "media_io_kwargs": ({},),
    "disaggregate_info": (),
    "kv_transfer_params": (),
    # FastDeploy
    "include_logprobs_decode_token": (True,),
    "collect_metrics": (False,),
    "response_max_tokens": (),
    # vLLM
    "priority": (0,),
    "return_tokens_as_token_ids": (False,),
    "vllm_xargs": ({},),
    "watermarking": (False,),
    "logprob_token_ids": (),
    "repetition_detection": (),
    "return_prompt_text": (False,),
    "routed_experts_prompt_start": (0,),
    "ec_transfer_params": (),
    # SGLang
    "stop_regex": ([], ""),
    "no_stop_trim": (False,),
    "stream_reasoning": (True,),
    "lora_path": ("",),
    "custom_logit_processor": (),
    "custom_params": ({},),
    "return_hidden_states": (False,),
    "return_routed_experts": (False,),
    "routed_experts_start_len": (0,),
    "return_prompt_token_ids": (False,),
    "return_meta_info": (False,),
    "session_params": ({},),
    "use_audio_in_video": (False,),
    "images_config": ({},),
    "input_ids": ([],),
    "bootstrap_host": (),
    "bootstrap_port": (),
    "bootstrap_room": (),
    "watermark": ({}, {"enabled": False}),
    "return_input_ids_in_sglext": (False,),
    "return_output_ids_in_sglext": (False,),
    "return_sampling_mask": (False,),
    "sampling_logprobs_mode": (),
    "return_flat_raw_output_top_logprobs": (False,),
    "task": (),
    "video_config": ({},),
    "min_dynamic_patch": (),
    "max_dynamic_patch": (),
    # LMDeploy
    "do_preprocess": (True,),
    "repetition_ngram_size": (0,),
    "repetition_ngram_threshold": (0,),
    "return_logprob": (False,),
    "image_data": ([],),
    # OpenAI, OpenRouter, Groq and xAI
    "verbosity": ("medium",),
    "moderation": (),
    "reasoning_format": ("parsed", "auto", "deepseek"),  # Groq's, then llama.cpp's: apart from the content, as here
    "search_settings": (),
    "search_parameters": ({}, {"mode": "off"}),
    "preset": (),
    "models": ([],),
    "plugins": ([],),
    "transforms": ([],),
    "top_a": (0,),
    # samplers, limits and prompts of other servers
    "do_sample": (True,),
    "typical_p": (1,),
    "tfs_z": (1,),
    "mirostat": (0,),
    "dry_multiplier": (0,),
    "xtc_probability": (0,),
    "dynatemp_range": (0,),
    "max_new_tokens": (),
    "min_new_tokens": (0,),
    "n_predict": (),
    "stop_sequences": ([],),
    "random_seed": (),
    "system": ("",),
    "safe_prompt": (False,),
}

# The same of POST /v1/completions, besides the fields of a conversation, which are refused there.
COMPLETION_NEUTRAL_VALUES: dict[str, tuple[Any, ...]] = {
    name: neutral for name, neutral in NEUTRAL_VALUES.items() if name not in ("best_of", "echo", "prompt")
} | {
    # The model's tokenizer adds no tokens to a text, so both ask for the same.
    "add_special_tokens": (True, False),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "include_reasoning": (True, False),
    "separate_reasoning": (True, False),
}

# Fields that are accepted whatever they say, since they do not change an answer: for storage, billing, routing, caching
# and metrics, and the number of tokens in a chunk. Some only say how another field is answered, which is refused.
NO_EFFECT = frozenset(
    {"store", "user", "service_tier", "prediction", "safety_identifier", "prompt_cache_key", "prompt_cache_retention"}
    | {"provider", "route", "usage", "session_id", "rid", "cache_prompt", "return_cached_tokens_details"}
    | {"prompt_cache_options", "truncation_side", "return_token_offsets", "return_mm_kwargs", "ngram_corpus_id"}
    | {"routed_dp_rank", "data_parallel_rank", "disagg_prefill_dp_rank", "stream_interval", "trace_context"}
    | {"custom_labels", "return_spec_tokens_details", "return_flat_raw_top_logprobs_b64", "mm_payload"}
)

# Types of parts and tools that others define: OpenAI's, vLLM's and Qwen's.
UNSUPPORTED_TYPES = frozenset(
    {"input_audio", "audio_url", "audio", "audio_embeds", "image_embeds", "video_embeds", "prompt_embeds", "image_pil"}
    | {"custom", "web_search", "code_interpreter", "file_search", "mcp"}
)
