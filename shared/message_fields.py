"""Fields of requests that came after the first release, and what becomes of them beside a replica of an older build.

A new field with a default is no new version of the messages (shared/message_versions.py): a process that does not know
it does as if it were not there, and leaves it out of what it hands on. Where the answer would then be another than was
asked for, the field belongs to a generation. The lease of a replica says up to which generation it heeds fields, and a
gateway refuses requests that have later ones as long as such a replica lives
(services/gateway/inflight/field_check.py).

The first field of a release that is entered with a generation raises GENERATION by one.
"""

from collections.abc import Mapping

import msgspec

from shared.messages import Encode, Generate, Media, Output, Request, Sampling

GENERATION = 1  # up to which this build heeds fields
UNHEEDED = 0  # of a field that an older build may leave out; the remark says what that does
# `param` of the grammar of calls that need not come, of `strict` tools, which 0.1.0 took without enforcing them.
OPTIONAL_CALLS = "tools"

FIELDS: Mapping[str, Mapping[str, int]] = {
    "Request": {
        "cache_salt": 1,  # a client's own; older engines share the prompts of tenants, as they always did
        "share": UNHEEDED,  # it waits among the requests without a tenant
        "http_id": UNHEEDED,  # lines of its log lack it
    },
    "Sampling": {
        "grammar": 1,
        "allowed_token_ids": 1,
        "prompt_logprobs": 1,
        "loop_repeats": UNHEEDED,  # thinking that repeats itself goes on to its budget
        "loop_tokens": UNHEEDED,
    },
    "Output": {
        "continuous_usage": UNHEEDED,  # usage comes at the end alone
        "stop_in_reasoning": UNHEEDED,  # older stages look for stop strings there, asked or not
        "include_reasoning": UNHEEDED,  # the reasoning is shown
        "tool_call_ends_reasoning": UNHEEDED,  # and `force_nonempty_content`: what the model wrote, as it was
        "force_nonempty_content": UNHEEDED,
        "named_tool": UNHEEDED,  # never without a grammar
        "separate_reasoning": UNHEEDED,  # the reasoning comes beside the content
        "special_tokens": 1,
        "complete_logprobs": UNHEEDED,  # log-probabilities lack the token that ended the answer
        "first_usage": UNHEEDED,  # usage begins with zeros
    },
    "Media": {
        "min_pixels": 1,
        "max_pixels": 1,
        "wished_max_pixels": UNHEEDED,  # the server's own bounds alone hold
        "content": UNHEEDED,  # the encoder reads and hashes the upload
    },
}

# By type: name, generation and default of each field that has one.
_HEEDED: Mapping[type[msgspec.Struct], list[tuple[str, int, object]]] = {
    kind: [
        (field.name, generation, field.default)
        for field in msgspec.structs.fields(kind)
        if (generation := FIELDS[kind.__name__].get(field.name, UNHEEDED)) > UNHEEDED
    ]
    for kind in (Request, Sampling, Output, Media)
}


def generation_of(work: Encode | Generate) -> tuple[int, list[str]]:
    """Return the generation that a request needs of those who serve it, and the fields for which it does."""
    request = work.request
    media = work.media if isinstance(work, Encode) else ()
    needs = {
        name: generation
        for part in (request, request.sampling, request.output, *media)
        for name, generation, default in _HEEDED[type(part)]
        if getattr(part, name) != default
    }
    if request.sampling.grammar is not None and request.sampling.grammar.param == OPTIONAL_CALLS:
        needs.pop("grammar")
    if _is_of_tenant_alone(request.cache_salt):
        needs.pop("cache_salt")
    return max(needs.values(), default=0), sorted(needs)


def _is_of_tenant_alone(salt: str) -> bool:
    """Return True for @NAME=, the salt of a tenant's request that states none."""
    return salt.startswith("@") and not salt.partition("=")[2]
