"""JSON Schema as structured output has it: which schemas compile, and which instances their grammars let pass.

    git clone https://github.com/guidance-ai/jsonschemabench
    git clone https://github.com/json-schema-org/JSON-Schema-Test-Suite
    python -m benchmarks.conformance --output FILE JSON-Schema-Test-Suite/tests/draft2020-12
    python -m benchmarks.conformance --output FILE --every 10 jsonschemabench/maskbench/data

A directory holds files of JSON: of a schema with its `tests`, or of a list of such. Each schema goes where a request's
goes: through the gateway's check, and then to the engine's compiler, over a vocabulary of the model's size. An instance
is written as json.dumps writes it. Asserts nothing. By directory:

  schemas, compiled, refused    how many; `refused` by the keyword that the message names, or the message
  unnamed                       refused schemas whose message names no keyword of theirs
  compile_ms                    of those that compiled
  instances                     of those; `invalid_accepted` and `valid_refused` are counted and listed
"""

import argparse
import asyncio
import json
import os
import re
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np

from benchmarks.vocabulary import write_tokenizer
from services.gateway.grammars.check import GrammarCheck
from shared.errors import RequestError
from shared.grammar import forms
from shared.grammar.compiler import GrammarCompiler
from shared.messages import Grammar
from shared.model.tokenizer import Tokenizer
from shared.workers.process import worker_environ

VOCABULARY = 103_424
AT_ONCE = 4  # schemas
KEYWORDS = frozenset(jsonschema.Draft202012Validator.VALIDATORS) | {
    *("$anchor", "$dynamicAnchor", "else", "then", "maxContains", "minContains", "dependencies"),
}
ENGLISH = ("not", "if", "then", "else", "contains", "items", "type", "required", "properties", "pattern", "const")
LISTED = 40  # of instances on the wrong side
SHOWN_CHARS = 200


def cases(directory: Path, every: int) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the schemas of every so-manieth file, with their tests, and a name for each."""
    for path in sorted(directory.rglob("*.json"))[::every]:
        for case in _cases_of(json.loads(path.read_bytes())):
            yield f"{path.relative_to(directory)}: {case.get('description', '')}", case


def _cases_of(content: Any) -> list[dict[str, Any]]:
    return content if isinstance(content, list) else [content]


class Suite:
    """Counts of one directory's schemas."""

    def __init__(self, tokenizer: Tokenizer, compiler: GrammarCompiler, check: GrammarCheck) -> None:
        self._tokenizer, self._compiler, self._check = tokenizer, compiler, check
        self.refused: Counter[str] = Counter()
        self.unnamed: list[str] = []
        self.compile_ms: list[float] = []
        self.instances = 0
        self.wrong: dict[bool, list[str]] = {True: [], False: []}  # by what they are: valid ones that were refused

    async def add(self, name: str, case: dict[str, Any]) -> None:
        text = forms.write(forms.json_schema(case["schema"]), thinking=False)
        try:
            await self._check.check(Grammar(text, "schema"))
        except RequestError as error:
            self._count_refusal(name, error.failure.message.removeprefix("`schema`: "))
            return
        started = time.perf_counter()
        matcher = self._compiler.compile(text)
        self.compile_ms.append(1e3 * (time.perf_counter() - started))
        for test in case.get("tests", ()):
            self.instances += 1
            ids = self._tokenizer.encode_text(json.dumps(test["data"], ensure_ascii=False))
            tried = matcher.deep_copy()
            if (tried.consume_tokens(ids) and tried.is_accepting()) is not test["valid"]:
                self.wrong[test["valid"]].append(f"{name}: {test.get('description', '')}"[:SHOWN_CHARS])

    def _count_refusal(self, name: str, message: str) -> None:
        named = _keyword(message)
        self.refused[named or re.sub(r"'.*|/.*|[-\d.]+", "", message)[:40]] += 1
        if named is None:
            self.unnamed.append(f"{name}: {message}"[:SHOWN_CHARS])

    def report(self) -> dict[str, Any]:
        p50, p99 = np.percentile(self.compile_ms or [0.0], [50, 99])
        return {
            "schemas": len(self.compile_ms) + self.refused.total(),
            "compiled": len(self.compile_ms),
            "compile_ms": {"p50": round(float(p50), 2), "p99": round(float(p99), 2)},
            "refused": dict(self.refused.most_common()),
            "unnamed": self.unnamed[:LISTED],
            "instances": self.instances,
            "invalid_accepted": len(self.wrong[False]),
            "valid_refused": len(self.wrong[True]),
            "wrong": self.wrong[False][:LISTED] + self.wrong[True][:LISTED],
        }


def _keyword(message: str) -> str | None:
    """Return the first keyword of JSON Schema that a message names: in quotes, or where it is no word of English."""
    quoted = re.findall(r'"(\$?[A-Za-z]+)"', message)
    words = [word for word in re.findall(r"\$?[A-Za-z]+", message) if word not in ENGLISH]
    return next((word for word in quoted + words if word in KEYWORDS), None)


async def measure(directory: Path, every: int, model: Path) -> dict[str, Any]:
    tokenizer = Tokenizer.load(model)
    check = GrammarCheck(model, worker_environ(os.environ))
    suite = Suite(tokenizer, GrammarCompiler(tokenizer, VOCABULARY, (2,)), check)
    room = asyncio.Semaphore(AT_ONCE)

    async def add(name: str, case: dict[str, Any]) -> None:
        async with room:
            await suite.add(name, case)

    try:
        await asyncio.gather(*(add(name, case) for name, case in cases(directory, every)))
    finally:
        await check.close()
    return suite.report()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directories", type=Path, nargs="+")
    parser.add_argument("--every", type=int, default=1, help="files: one of so many (%(default)s)")
    parser.add_argument("--output", type=Path, help="the JSON file")
    args = parser.parse_args()
    result: dict[str, Any] = {"every": args.every}
    with tempfile.TemporaryDirectory(prefix="millrace-") as scratch:
        write_tokenizer(Path(scratch), VOCABULARY)
        for directory in args.directories:
            found = result["/".join(directory.parts[-2:])] = asyncio.run(measure(directory, args.every, Path(scratch)))
            print(directory, json.dumps(found, indent=1), flush=True)
            if args.output is not None:
                args.output.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
