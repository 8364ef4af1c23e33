"""`helm test`: asks the gateway a question, as a stream and at once, and fails unless both are answered.

Arguments: URL of the gateway, name of the model. Environment: MILLRACE_API_KEYS, where the gateway wants a key.
"""

import json
import os
import sys
import urllib.request

PATIENCE_S = 600  # a stage that sleeps is woken by the question, and loads its weights first
QUESTION = "Say hello in one word."


def ask(url: str, model: str, keys: list[str], stream: bool):
    body = {"model": model, "stream": stream, "max_tokens": 16, "messages": [{"role": "user", "content": QUESTION}]}
    headers = {"Content-Type": "application/json", **({"Authorization": f"Bearer {keys[0]}"} if keys else {})}
    request = urllib.request.Request(f"{url}/v1/chat/completions", json.dumps(body).encode(), headers)
    return urllib.request.urlopen(request, timeout=PATIENCE_S)


def text(part: dict) -> str:
    return (part.get("reasoning_content") or "") + (part.get("content") or "")


def answer(url: str, model: str, keys: list[str]) -> str:
    with ask(url, model, keys, stream=False) as response:
        return text(json.load(response)["choices"][0]["message"])


def streamed(url: str, model: str, keys: list[str]) -> str:
    parts, ended = [], False
    with ask(url, model, keys, stream=True) as response:
        for line in response:
            if line.startswith(b"data: [DONE]"):
                ended = True
            elif line.startswith(b"data: "):
                parts += [text(choice["delta"]) for choice in json.loads(line[6:])["choices"]]
    if not ended:
        raise RuntimeError("the stream broke off")
    return "".join(parts)


def main(url: str, model: str) -> int:
    keys = json.loads(os.environ.get("MILLRACE_API_KEYS", "[]"))
    for way in (answer, streamed):
        said = way(url, model, keys)
        print(f"{way.__name__}: {said!r}")
        if not said:
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
