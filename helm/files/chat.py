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


def answer(url: str, model: str, keys: list[str]) -> tuple[str, bool]:
    """What was said, and whether it was a whole answer."""
    with ask(url, model, keys, stream=False) as response:
        reply = json.load(response)
    choice = reply["choices"][0]
    return text(choice["message"]), bool(choice["finish_reason"]) and reply["usage"]["completion_tokens"] > 0


def streamed(url: str, model: str, keys: list[str]) -> tuple[str, bool]:
    """The same, in pieces."""
    parts, finished, ended = [], False, False
    with ask(url, model, keys, stream=True) as response:
        for line in response:
            if line.startswith(b"data: [DONE]"):
                ended = True
            elif line.startswith(b"data: "):
                for choice in json.loads(line[6:])["choices"]:
                    parts.append(text(choice["delta"]))
                    finished = finished or bool(choice["finish_reason"])
    return "".join(parts), finished and ended


def main(url: str, model: str) -> int:
    keys = json.loads(os.environ.get("MILLRACE_API_KEYS", "[]"))
    for way in (answer, streamed):
        said, whole = way(url, model, keys)
        print(f"{way.__name__}: {said!r}{'' if whole else ', and then it broke off'}")
        if not whole:
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
