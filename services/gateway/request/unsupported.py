"""Fields that some chat API defines and this server does not support, with their neutral values.

A neutral value requests nothing, so it is accepted. Any other value is refused by name: ignoring it would answer
another question than the client's.
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
    "prompt_logprobs": (0, False),
    "use_beam_search": (False,),
    "length_penalty": (1,),
    "early_stopping": (False,),
    "allowed_token_ids": (),
    "truncate_prompt_tokens": (),
    "skip_special_tokens": (True,),
    "spaces_between_special_tokens": (True,),
    "add_generation_prompt": (True,),
    "continue_final_message": (False,),
    "add_special_tokens": (False,),
    "documents": ([],),
    "chat_template": (),
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
    "mm_processor_kwargs": ({},),
    "media_io_kwargs": ({},),
    "request_id": (),
    "disaggregate_info": (),
    "kv_transfer_params": (),
    "cache_salt": (),
    "thinking_token_budget": (),
}
