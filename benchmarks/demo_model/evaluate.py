"""Asks a server held-out questions of each kind: python -m benchmarks.demo_model.evaluate (--url URL | --model DIR).

With `--model` it serves the checkpoint itself, once for each of `--formats`, and prints the table of them all. In bf16
it asks in other ways, too: without thinking, and with pictures of other sizes.
"""

import argparse
import asyncio
import json
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import torch
from safetensors.torch import load_file, save_file

from benchmarks.demo_model import card
from benchmarks.demo_model.questions import SETS, Question, questions
from cli.demo_tokenizer import write_json

FORMATS = ("float32", "bf16", "wint8", "wint4")
WAYS: tuple[dict[str, Any], ...] = ({"thinking": False}, {"own_size": True})  # each is one of card.WAYS
# Pictures as large as those of training: 18 blocks of 28 x 28 pixels.
PROCESSOR = {"image_max_pixels": 14112, "video_min_pixels": 3136, "video_max_pixels": 14112}
CONCURRENT = 32


def main(arguments: list[str]) -> int:
    """Evaluate."""
    parser = argparse.ArgumentParser(prog="evaluate")
    where = parser.add_mutually_exclusive_group(required=True)
    where.add_argument("--url", help="of a running server, http://HOST:PORT/v1")
    where.add_argument("--model", type=Path, help="a checkpoint to serve")
    parser.add_argument("--formats", nargs="+", choices=FORMATS, default=FORMATS)
    parser.add_argument("--port", type=int, default=9480)
    parser.add_argument("--questions", type=int, default=100, help="of each kind")
    parser.add_argument("--only", choices=SETS)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--no-thinking", action="store_true")
    parser.add_argument("--out", type=Path, help="JSON lines of every answer")
    parser.add_argument("--card", type=Path, help="a checkpoint into whose card to write the figures")
    options = parser.parse_args(arguments)
    asked = list(questions(options.questions, options.seed, thinking=not options.no_thinking, only=options.only))
    counts: card.Counts = {}
    if options.url:
        counts["server"] = asyncio.run(ask_all(options.url, asked, options.out, "server"))
    for name in () if options.url else options.formats:
        with served(options.model, name, options.port) as url:
            counts[name] = asyncio.run(ask_all(url, asked, options.out, name))
            for way, how in zip(card.WAYS, WAYS, strict=True) if name == "bf16" and not options.no_thinking else ():
                if others := list(questions(options.questions, options.seed, only=options.only, **how)):
                    counts[way] = asyncio.run(ask_all(url, others, options.out, way))
        print(f"{name} is done", flush=True)
    print(card.figures(counts))
    if options.card:
        card.write(options.card, counts)
    return 0


@contextmanager
def served(model: Path, form: str, port: int) -> Iterator[str]:
    """Serve the checkpoint in a format; yields the URL."""
    with tempfile.TemporaryDirectory() as scratch:
        directory = widened(model, Path(scratch, "float32")) if form == "float32" else model
        millrace = Path(sys.executable).with_name("millrace")
        command = [str(millrace), "serve", "--model", str(directory), "--port", str(port)]
        command += ["--metrics-port", str(port + 1)]
        command += ["--mm-processor-kwargs", json.dumps(PROCESSOR)]
        command += ["--limit-mm-per-prompt", '{"image": 4}']
        command += ["--quantization", form] if form.startswith("wint") else []
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            url = f"http://127.0.0.1:{port}"
            wait_until_ready(url, process)
            yield f"{url}/v1"
        finally:
            process.terminate()
            process.wait(60)


def wait_until_ready(url: str, process: subprocess.Popen[bytes]) -> None:
    """Return when every stage is ready.

    Raises:
        SystemExit: the server ended, or is not ready within three minutes.
    """
    deadline = time.monotonic() + 180
    while time.monotonic() < deadline and process.poll() is None:
        try:
            if httpx.get(f"{url}/health/ready").status_code == 200:
                return
        except httpx.TransportError:
            pass
        time.sleep(0.5)
    raise SystemExit(f"the server at {url} does not become ready")


def widened(model: Path, directory: Path) -> Path:
    """The same checkpoint with its weights in float32."""
    directory.mkdir()
    for file in model.iterdir():
        if file.name not in ("config.json", "model.safetensors"):
            (directory / file.name).symlink_to(file.absolute())
    config = json.loads((model / "config.json").read_bytes())
    write_json(directory / "config.json", config | {"torch_dtype": "float32"})
    tensors = {name: tensor.to(torch.float32) for name, tensor in load_file(model / "model.safetensors").items()}
    save_file(tensors, directory / "model.safetensors")
    return directory


async def ask_all(url: str, asked: list[Question], out: Path | None, name: str) -> dict[str, list[int]]:
    """Return for each set how many of its questions were answered right, and how many there were."""
    gate = asyncio.Semaphore(CONCURRENT)
    async with httpx.AsyncClient(timeout=600, limits=httpx.Limits(max_connections=CONCURRENT)) as client:
        (model,) = (await client.get(f"{url}/models")).json()["data"]

        async def ask(question: Question) -> dict[str, Any]:
            async with gate:
                response = await client.post(f"{url}/chat/completions", json=question.body | {"model": model["id"]})
            if response.status_code != 200:
                raise RuntimeError(f"the server answered {response.status_code}: {response.text}")
            message: dict[str, Any] = response.json()["choices"][0]["message"]
            return message

        messages = await asyncio.gather(*(ask(question) for question in asked))
    right: dict[str, list[bool]] = defaultdict(list)
    for question, message in zip(asked, messages, strict=True):
        right[question.set_name].append(question.is_right(message))
    if out:
        with out.open("a") as lines:
            for question, message in zip(asked, messages, strict=True):
                lines.write(json.dumps(_line(name, question, message), ensure_ascii=False) + "\n")
    return {name: [sum(hits), len(hits)] for name, hits in right.items()}


def _line(name: str, question: Question, message: dict[str, Any]) -> dict[str, Any]:
    sample = question.sample
    texts = [part for part in sample.messages[-1].parts if isinstance(part, str)]
    return {
        "format": name,
        "set": question.set_name,
        "kind": sample.kind,
        "right": question.is_right(message),
        "question": " ".join(texts),
        "wanted": sample.answer or [(call.name, call.arguments) for call in sample.calls],
        "wanted_reasoning": sample.reasoning,
        "reasoning": message.get("reasoning_content"),
        "content": message.get("content"),
        "calls": [call["function"] for call in message.get("tool_calls") or ()],
    }


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
