"""One request with 100 images and 100 videos through a whole `millrace serve`, and the memory that it takes.

    python -m benchmarks.many_media [--images 100] [--videos 100] [--links] [--requests 1] [--output FILE.json]

The checkpoint is the small one with random weights, on a CPU; media are of real sizes, all different: JPEGs of 1920 x
1080 and videos of 2 s at 640 x 360, uploaded in the body, or with --links fetched from a server of ours. The launch
gives an image at most 100 tokens and a video 16 for each two of its 16 frames, so that all fit a context of 32,768.
Printed for each service: resident memory before, and the most while the requests ran, both of all its processes; the
most of Redis, by its own count, and of segments; and seconds, then again with all embeddings in the cache. Asserts
nothing.
"""

import argparse
import asyncio
import base64
import io
import json
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import av
import httpx
import numpy as np
import redis
from PIL import Image

from benchmarks.pipeline import free_port
from cli.connection import scratch_prefix

CONTEXT = 32_768
TOKEN = 28 * 28  # pixels
SIZES = {"image_max_pixels": 100 * TOKEN, "video_min_pixels": 4 * TOKEN, "video_max_pixels": 16 * TOKEN}
PARTS = ("gateway", "mm_encoder", "engine", "postproc", "redis")
LOOK_S = 0.05


def picture(seed: int, width: int, height: int) -> Image.Image:
    """Return soft noise, which is about as large in a file as a photograph."""
    small = np.random.default_rng(seed).integers(0, 256, (height // 12, width // 12, 3), np.uint8)
    return Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)


def jpeg(seed: int) -> bytes:
    file = io.BytesIO()
    picture(seed, 1920, 1080).save(file, "JPEG", quality=90)
    return file.getvalue()


def video(seed: int) -> bytes:
    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as container:
        stream = container.add_stream("mpeg4", rate=24)
        stream.width, stream.height, stream.pix_fmt = 640, 360, "yuv420p"
        still = np.asarray(picture(seed, 640, 360))
        for frame in range(48):
            moved = np.ascontiguousarray(np.roll(still, 4 * frame, axis=1))
            container.mux(stream.encode(av.VideoFrame.from_ndarray(moved, format="rgb24")))
        container.mux(stream.encode())
    return file.getvalue()


class Memory:
    """Most resident memory of each part of a system, looked at again and again."""

    def __init__(self, supervisor: int, redis_url: str, segments: Path) -> None:
        self._supervisor = supervisor
        self._redis = redis.Redis.from_url(redis_url)
        self._segments = segments
        self.most: Counter[str] = Counter()

    def look(self) -> Counter[str]:
        """Return the bytes of each part now."""
        found: Counter[str] = Counter()
        for pid, command in _processes(self._supervisor):
            part = next((name for name in PARTS if f"services.{name}" in command), "redis")
            with suppress(OSError, StopIteration):
                lines = Path(f"/proc/{pid}/status").read_text().splitlines()
                anonymous = sum(int(line.split()[1]) for line in lines if line.startswith(("RssAnon", "RssShmem")))
                found[part] += anonymous * 1024
        found["redis' data"] = int(self._redis.info("memory")["used_memory"])
        found["segments"] = sum(file.stat().st_size for file in self._segments.glob("*") if file.is_file())
        return found

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Look again and again within the block."""
        over = threading.Event()

        def watch() -> None:
            while not over.wait(LOOK_S):
                self.most |= self.look()

        thread = threading.Thread(target=watch, daemon=True)
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join()


def _processes(parent: int) -> Iterator[tuple[int, str]]:
    """Yield id and command of all processes below one."""
    with suppress(OSError):
        for children in Path(f"/proc/{parent}/task").glob("*/children"):
            for pid in map(int, children.read_text().split()):
                with suppress(OSError):
                    yield pid, Path(f"/proc/{pid}/cmdline").read_bytes().decode()
                yield from _processes(pid)


@contextmanager
def links(files: dict[str, bytes]) -> Iterator[str]:
    """Serve files, and yield the URL before their names."""
    with tempfile.TemporaryDirectory() as directory:
        for name, data in files.items():
            (Path(directory) / name).write_bytes(data)

        class Handler(SimpleHTTPRequestHandler):
            def log_message(self, *words: Any) -> None:
                pass

        server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=directory))
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_address[1]}/"
        finally:
            server.shutdown()
            server.server_close()
            thread.join()


def body(files: dict[str, bytes], base: str) -> bytes:
    """Return the request: links if there is a `base`, else data URLs."""
    parts: list[dict[str, Any]] = []
    for name, data in files.items():
        kind, mime = ("image_url", "image/jpeg") if name.endswith("jpg") else ("video_url", "video/mp4")
        url = base + name if base else f"data:{mime};base64,{base64.b64encode(data).decode()}"
        parts.append({"type": kind, kind: {"url": url}})
    parts.append({"type": "text", "text": "What do they have in common?"})
    messages = [{"role": "user", "content": parts}]
    return json.dumps({"model": "demo", "messages": messages, "max_tokens": 8}).encode()


def files(images: int, videos: int, first: int = 0) -> dict[str, bytes]:
    """Make the media."""
    with ThreadPoolExecutor(2) as pool:
        pictures = pool.map(jpeg, range(first, first + images))
        films = pool.map(video, range(first, first + videos))
        named = {f"{first + n}.jpg": data for n, data in enumerate(pictures)}
        return named | {f"{first + n}.mp4": data for n, data in enumerate(films)}


@contextmanager
def serving(directory: Path) -> Iterator[tuple[str, str, Memory]]:
    """Run `millrace serve`; yield its URL, that of its metrics, and its memory."""
    port, metrics_port = free_port(), free_port()
    segments = Path(tempfile.mkdtemp(prefix="bench-", dir="/dev/shm"))
    command = [str(Path(sys.executable).with_name("millrace")), "serve", "--demo", "--host", "127.0.0.1"]
    command += ["--port", str(port), "--metrics-port", str(metrics_port), "--max-model-len", str(CONTEXT)]
    command += ["--served-model-name", "demo"]
    command += ["--limit-mm-per-prompt", '{"image": 100, "video": 100}', "--mm-processor-kwargs", json.dumps(SIZES)]
    settings = {"MILLRACE_MEDIA_ALLOW_NETWORKS": '["127.0.0.0/8"]', "MILLRACE_SEGMENTS_DIR": str(segments)}
    environ = {"PATH": "/usr/bin:/bin", "OMP_NUM_THREADS": "1", "TMPDIR": str(directory), **settings}
    with (directory / "log").open("wb") as log:
        process = subprocess.Popen(command, cwd=directory, env=environ, stdout=log, stderr=log)
    url = f"http://127.0.0.1:{port}"
    try:
        while process.poll() is None:
            with suppress(httpx.HTTPError):
                if httpx.get(f"{url}/health/ready").status_code == 200:
                    break
            time.sleep(0.2)
        metrics = f"http://127.0.0.1:{metrics_port}/metrics"
        (redis_socket,) = directory.glob(f"{scratch_prefix(port)}*/redis.sock")
        yield url, metrics, Memory(process.pid, f"unix://{redis_socket}", segments)
    finally:
        process.terminate()
        process.wait()
        shutil.rmtree(segments)


def stage_seconds(metrics: str) -> dict[str, float]:
    """Return the seconds of each stage of the encoder, all items and batches together."""
    lines = httpx.get(metrics).text.splitlines()
    found = [line for line in lines if line.startswith("millrace_mm_stage_seconds_sum")]
    return {line.split('"')[1]: float(line.split()[-1]) for line in found}


async def ask(url: str, bodies: list[bytes]) -> list[dict[str, Any]]:
    """Send all at once."""
    async with httpx.AsyncClient(timeout=600) as client:
        post = partial(client.post, f"{url}/v1/chat/completions", headers={"Content-Type": "application/json"})
        replies = await asyncio.gather(*(post(content=each) for each in bodies))
    for reply in replies:
        if reply.status_code != 200:
            raise SystemExit(f"{reply.status_code}: {reply.text[:500]}")
    return [reply.json() for reply in replies]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=100)
    parser.add_argument("--videos", type=int, default=100)
    parser.add_argument("--links", action="store_true")
    parser.add_argument("--requests", type=int, default=1)
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    made = [files(args.images, args.videos, 1000 * number) for number in range(args.requests)]
    with ExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        bases = [stack.enter_context(links(each)) if args.links else "" for each in made]
        bodies = [body(each, base) for each, base in zip(made, bases, strict=True)]
        url, metrics, memory = stack.enter_context(serving(directory))
        before = memory.look()
        with memory.watched():
            started = time.perf_counter()
            answers = asyncio.run(ask(url, bodies))
            seconds = time.perf_counter() - started
            stages = stage_seconds(metrics)
            started = time.perf_counter()
            asyncio.run(ask(url, bodies))
            again = time.perf_counter() - started
    tokens = [answer["usage"]["prompt_tokens"] for answer in answers]
    media = [answer["usage"]["prompt_tokens_details"] for answer in answers]
    megabytes = sum(len(each) for each in bodies) / 1e6
    print(f"{args.requests} requests, bodies of {megabytes:.1f} MB, prompts of {tokens} tokens, {media}")
    print(f"{seconds:.1f} s; again, with all in the cache, {again:.1f} s")
    print("encoder:", ", ".join(f"{stage} {sum_:.1f} s" for stage, sum_ in stages.items()), "(items together)")
    rows = {part: (before[part] / 1e6, memory.most[part] / 1e6) for part in (*PARTS, "redis' data", "segments")}
    for part, (idle, most) in rows.items():
        print(f"{part:14} {idle:8.0f} MB before, {most:8.0f} MB at most")
    if args.output:
        result = {
            "body_mb": megabytes,
            "tokens": tokens,
            "seconds": seconds,
            "again": again,
            "stages": stages,
            "mb": rows,
        }
        args.output.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
