"""Test of `helm test`: asks the gateway a question, streamed and not streamed, and fails unless both are answered.

Arguments: URL of the gateway, name of the model. Environment: MILLRACE_API_KEYS, if the gateway needs a key.
"""

import json
import os
import signal
import sys
import urllib.request

TIMEOUT_S = 600  # a stage with no replica is started by the question, and loads its weights first
QUESTION = "Say hello in one word."


def ask(url: str, model: str, keys: list[str], stream: bool):
    body = {"model": model, "stream": stream, "max_tokens": 16, "messages": [{"role": "user", "content": QUESTION}]}
    headers = {"Content-Type": "application/json", **({"Authorization": f"Bearer {keys[0]}"} if keys else {})}
    request = urllib.request.Request(f"{url}/v1/chat/completions", json.dumps(body).encode(), headers)
    return urllib.request.urlopen(request, timeout=TIMEOUT_S)


def text(part: dict) -> str:
    return (part.get("reasoning_content") or "") + (part.get("content") or "")


def answer(url: str, model: str, keys: list[str]) -> tuple[str, bool]:
    """Ask without streaming; return the answer's text, and True if it is complete."""
    with ask(url, model, keys, stream=False) as response:
        reply = json.load(response)
    choice = reply["choices"][0]
    return text(choice["message"]), bool(choice["finish_reason"]) and reply["usage"]["completion_tokens"] > 0


def streamed(url: str, model: str, keys: list[str]) -> tuple[str, bool]:
    """Ask with streaming; return the answer's text, and True if it is complete."""
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
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # a container's first process would ignore it otherwise
    keys = json.loads(os.environ.get("MILLRACE_API_KEYS", "[]"))
    for ask_one_way in (answer, streamed):
        said, complete = ask_one_way(url, model, keys)
        print(f"{ask_one_way.__name__}: {said!r}{'' if complete else ' is incomplete: the answer ended early'}")
        if not complete:
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
