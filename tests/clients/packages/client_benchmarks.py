"""The request functions of `vllm bench serve`, of SGLang's bench_serving and of GuideLLM, unmodified.

vLLM's and SGLang's come out of their wheels as single files (BENCHMARKS names the folder), since the packages import
torch. SGLang's imports modules for data sets, which no request needs and which are stand-ins here.
"""

import argparse
import asyncio
import importlib.util
import os
import sys
from pathlib import Path
from types import ModuleType
from unittest.mock import MagicMock

import aiohttp
from asks import BASE_URL, FACT, FACT_QUESTION, MODEL
from guidellm.backends.openai.http import OpenAIHTTPBackend
from guidellm.schemas import GenerationRequest, RequestInfo
from guidellm.schemas.backends import OpenAIHTTPBackendArgs

FILES = Path(os.environ["BENCHMARKS"])
CHAT_URL = f"{BASE_URL}/v1/chat/completions"
UNUSED = (
    *("sglang", "sglang.benchmark", "sglang.benchmark.datasets", "sglang.benchmark.datasets.mooncake"),
    *("sglang.benchmark.goodput", "sglang.srt", "sglang.srt.disaggregation", "sglang.srt.disaggregation.utils"),
    *("sglang.srt.utils", "sglang.srt.utils.network", "transformers"),
)


class Unused(ModuleType):
    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return MagicMock(name=name)


def load(name, path):
    spec = importlib.util.spec_from_file_location(name, FILES / path)
    sys.modules[name] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_vllm():
    vllm = load("endpoint_request_func", "vllm/benchmarks/lib/endpoint_request_func.py")
    asked = vllm.RequestFuncInput(
        prompt=FACT_QUESTION, api_url=CHAT_URL, prompt_len=1, output_len=64, model=MODEL, extra_body={"temperature": 0}
    )

    async def ask():
        async with aiohttp.ClientSession() as session:
            return await vllm.async_request_openai_chat_completions(asked, session)

    output = asyncio.run(ask())
    assert (output.success, output.generated_text) == (True, FACT), output.error
    assert len(output.itl) + 1 <= output.output_tokens
    assert output.prompt_len > 1  # the server's count, not the one that was given
    assert 0 < output.ttft < output.latency


def test_sglang(monkeypatch):
    for name in UNUSED:
        monkeypatch.setitem(sys.modules, name, Unused(name))
    load("sglang.benchmark.utils", "sglang/benchmark/utils.py")
    sglang = load("sglang.benchmark.serving", "sglang/benchmark/serving.py")
    fields = {"disable_stream": False, "disable_ignore_eos": True, "print_requests": False, "header": None}
    sglang.set_global_args(argparse.Namespace(**fields, cache_report=False))
    asked = sglang.RequestFuncInput(
        prompt=FACT_QUESTION,
        api_url=CHAT_URL,
        prompt_len=1,
        output_len=64,
        model=MODEL,
        lora_name="",
        image_data=None,
        extra_request_body={"stream_options": {"include_usage": True}},
    )
    output = asyncio.run(sglang.async_request_openai_chat_completions(asked))
    assert output.success, output.error
    assert output.generated_text.endswith(FACT)  # after the reasoning, which it counts too
    assert (output.prompt_len > 1, len(output.itl) + 1 <= output.output_len < 64) == (True, True)


def test_guidellm():
    async def ask():
        backend = OpenAIHTTPBackend(OpenAIHTTPBackendArgs(target=BASE_URL, model=MODEL))
        await backend.process_startup()
        await backend.validate()
        request = GenerationRequest(columns={"text_column": [FACT_QUESTION]})
        answers = [each async for each in backend.resolve(request, RequestInfo())]
        await backend.process_shutdown()
        return answers[-1]

    answer, info = asyncio.run(ask())
    assert answer.text == FACT
    assert answer.reasoning_text
    assert answer.input_metrics.text_tokens > 0
    assert info.timings.token_iterations <= answer.output_metrics.text_tokens
    assert info.timings.first_token_iteration < info.timings.first_output_token_iteration
