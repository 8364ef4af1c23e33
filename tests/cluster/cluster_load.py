"""The load of the cluster's tests: asks without a pause, and tells of every answer. It runs in a pod beside the
release, asks at the Service as any client, and needs nothing but Python.

Arguments: URL of the gateway, name of the model, port to tell at, how many ask at a time, a JSON list of questions.
Environment: MILLRACE_API_KEYS, where the gateway wants a key. `GET /` tells {"asking": how many still ask, "answers":
[...]}; `POST /` has them stop after the answers they wait for.
"""

import base64
import http.client
import json
import os
import random
import struct
import sys
import threading
import time
import urllib.error
import urllib.request
import uuid
import zlib
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

PICTURES = 3  # one in so many requests has a picture, another each time
TOKENS = 48
PATIENCE_S = 600.0
REPEATS = 20  # after a connection that broke; the request is the same one, by its Idempotency-Key
PAUSE_S = 0.5  # before a repetition
SIDE = 56


class Broken(Exception):
    """The stream ended before the answer did."""


class Load:
    """What is asked, and what was answered."""

    def __init__(self, url: str, model: str, keys: list[str], questions: list[str]) -> None:
        self._url, self._model, self._keys, self._questions = url, model, keys, questions
        self._count = 0
        self._lock = threading.Lock()
        self.answers: list[dict[str, Any]] = []
        self.asking = 0
        self.enough = threading.Event()

    def start(self, askers: int) -> None:
        self.asking = askers
        for _ in range(askers):
            threading.Thread(target=self._ask_on, daemon=True).start()

    def _ask_on(self) -> None:
        while not self.enough.is_set():
            with self._lock:
                self._count += 1
                number = self._count
            answer = self._ask(number)
            with self._lock:
                self.answers.append(answer)
        with self._lock:
            self.asking -= 1

    def _ask(self, number: int) -> dict[str, Any]:
        began = time.time()
        about: dict[str, Any] = {
            "question": number % len(self._questions),
            "picture": number % PICTURES == 0,
            "began": began,
        }
        key, repeats, said = uuid.uuid4().hex, 0, ""
        while repeats <= REPEATS:
            try:
                found = self._answer(number, about["question"], about["picture"], key)
                return {**about, **found, "repeats": repeats, "seconds": time.time() - began, "error": ""}
            except urllib.error.HTTPError as error:
                said = f"{error.code} {error.read()[:200]!r}"
                break
            except (OSError, http.client.HTTPException, Broken) as error:
                said = f"{type(error).__name__}: {error}"
                repeats += 1
                time.sleep(PAUSE_S)
        return {**about, "repeats": repeats, "seconds": time.time() - began, "error": said}

    def _answer(self, number: int, question: int, picture: bool, key: str) -> dict[str, Any]:
        body = asking(self._model, self._questions[question], question, number if picture else None)
        headers = {"Content-Type": "application/json", "Idempotency-Key": key}
        if self._keys:
            headers["Authorization"] = f"Bearer {self._keys[0]}"
        request = urllib.request.Request(
            f"{self._url}/v1/chat/completions", json.dumps({**body, "stream": True}).encode(), headers
        )
        with urllib.request.urlopen(request, timeout=PATIENCE_S) as response:
            return read(response)


def asking(model: str, text: str, seed: int, picture: int | None) -> dict[str, Any]:
    """The body of a request, without how it is to be sent."""
    content: list[dict[str, Any]] = [{"type": "text", "text": text}]
    if picture is not None:
        content.insert(0, {"type": "image_url", "image_url": {"url": data_url(picture)}})
    return {"model": model, "seed": seed, "max_tokens": TOKENS, "messages": [{"role": "user", "content": content}]}


def read(lines: Any) -> dict[str, Any]:
    """What a stream of events says.

    Raises:
        Broken: it does not end as it should.
    """
    parts: list[str] = []
    finish = None
    for line in lines:
        if line.startswith(b"data: [DONE]"):
            return {"text": "".join(parts), "finish": finish}
        if line.startswith(b"data: "):
            event = json.loads(line[6:])
            if "error" in event:
                return {"text": "".join(parts), "finish": f"error: {event['error']}"}
            for choice in event["choices"]:
                delta = choice["delta"]
                parts.append((delta.get("reasoning_content") or "") + (delta.get("content") or ""))
                finish = choice["finish_reason"] or finish
    raise Broken(f"after {len(parts)} events")


def data_url(seed: int) -> str:
    """A small PNG of noise that no other seed gives."""
    noise = random.Random(seed)
    rows = b"".join(b"\0" + noise.randbytes(3 * SIDE) for _ in range(SIDE))

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", SIDE, SIDE, 8, 2, 0, 0, 0)
    png = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    return f"data:image/png;base64,{base64.b64encode(png).decode()}"


def serve(load: Load, port: int) -> None:
    """Tell of the load, on this pod's loopback only, for ever."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            body = json.dumps({"asking": load.asking, "answers": load.answers}).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def do_POST(self) -> None:
            load.enough.set()
            self.do_GET()

        def log_message(self, format: str, *arguments: Any) -> None:
            pass

    ThreadingHTTPServer(("127.0.0.1", port), Handler).serve_forever()


if __name__ == "__main__":
    url, model, port, askers, questions = sys.argv[1:]
    load = Load(url, model, json.loads(os.environ.get("MILLRACE_API_KEYS", "[]")), json.loads(questions))
    load.start(int(askers))
    serve(load, int(port))
