"""Download of a checkpoint from a hub into a directory, marked complete when every file has the right size and hash.

Arguments: endpoint, repository, revision, directory. Environment: HUB_TOKEN, if the hub needs one. It needs only the
standard library. After a failure the next run resumes the files; of several on one directory one works, and the others
wait. How far it is, or why it failed, stands in the file STATE, where whoever waits for the model reads it.
"""

import fcntl
import fnmatch
import hashlib
import http.client
import json
import os
import pathlib
import signal
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
from concurrent.futures import ThreadPoolExecutor

# Files that the services read. Code and pickles of a checkpoint are never fetched.
WANTED = ("*.json", "*.safetensors", "*.model", "*.jinja", "*.ttf")
COMPLETE = ".complete"
STATE = ".state"
LOCK = ".lock"
PARALLEL = 4
TRIES = 8
TIMEOUT_S = 60
BLOCK = 1 << 20


class Broken(Exception):
    """Error of a file that differs from the hub's list, or of a list that is malformed."""


def request(url: str, start: int = 0):
    """Open a URL. The token goes to the hub only, not to hosts that it redirects to."""
    asked = urllib.request.Request(url, headers={"User-Agent": "millrace"})
    if token := os.environ.get("HUB_TOKEN"):
        asked.add_unredirected_header("Authorization", f"Bearer {token}")
    if start:
        asked.add_header("Range", f"bytes={start}-")
    return urllib.request.urlopen(asked, timeout=TIMEOUT_S)


def listing(endpoint: str, repository: str, revision: str) -> list[dict]:
    """List the wanted files, each with rfilename, size and, if it is large, lfs.sha256."""
    url = f"{endpoint}/api/models/{repository}/revision/{urllib.parse.quote(revision, safe='')}?blobs=true"
    with request(url) as response:
        files = json.load(response)["siblings"]
    wanted = [file for file in files if any(fnmatch.fnmatch(file["rfilename"], pattern) for pattern in WANTED)]
    for file in wanted:
        if not isinstance(file.get("size"), int):
            raise Broken(f"{file['rfilename']}: the hub's list has no size for it")
        path = pathlib.PurePosixPath(file["rfilename"])
        if path.is_absolute() or ".." in path.parts:
            raise Broken(f"{path}: not a path inside the repository")
    if not any(file["rfilename"] == "config.json" for file in wanted):
        raise Broken(f"{repository} has no config.json")
    return wanted


def append(url: str, part: pathlib.Path) -> None:
    """Resume the download of a partial file."""
    start = part.stat().st_size if part.exists() else 0
    with request(url, start) as response, part.open("ab") as file:
        if start and response.status != 206:
            file.truncate(0)  # a hub that ignores Range sends the file from its beginning
        while block := response.read(BLOCK):
            file.write(block)


def check(part: pathlib.Path, file: dict) -> None:
    if part.stat().st_size != file["size"]:
        raise Broken(f"{file['rfilename']}: {part.stat().st_size} bytes of {file['size']} arrived")
    if expected := (file.get("lfs") or {}).get("sha256"):
        digest = hashlib.sha256()
        with part.open("rb") as content:
            while block := content.read(BLOCK):
                digest.update(block)
        if digest.hexdigest() != expected:
            part.unlink()
            raise Broken(f"{file['rfilename']}: its SHA-256 is {digest.hexdigest()}, not the hub's {expected}; deleted")


def fetch(base: str, file: dict, directory: pathlib.Path) -> None:
    name = file["rfilename"]
    target = directory / name
    if target.exists() and target.stat().st_size == file["size"]:
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    part = target.with_name(f".{target.name}.part")
    for attempt in range(TRIES):
        try:
            if not part.exists() or part.stat().st_size != file["size"]:
                append(f"{base}/{urllib.parse.quote(name)}", part)
            check(part, file)
            break
        except (Broken, OSError, http.client.HTTPException) as error:
            refused = isinstance(error, urllib.error.HTTPError) and error.code < 500 and error.code not in (416, 429)
            if refused or attempt == TRIES - 1:
                raise
            if isinstance(error, urllib.error.HTTPError) and error.code == 416:
                part.unlink()
            print(f"{name}: {error}; trying again", flush=True)
            time.sleep(min(30, 2**attempt) * float(os.environ.get("HUB_PATIENCE", "1")))
    part.rename(target)
    print(f"{name}: {file['size']} bytes", flush=True)


def say(target: pathlib.Path, state: str) -> None:
    """Write the state, as one line, in one step: somebody may be reading it."""
    new = target / f"{STATE}.new"
    new.write_text(" ".join(state.split()) + "\n")
    new.rename(target / STATE)


def fetch_all(endpoint: str, repository: str, revision: str, target: pathlib.Path) -> None:
    """Fetch every wanted file, and say after each how far it is.

    Raises:
        Broken, OSError, ValueError, KeyError: the list or a file could not be had.
    """
    say(target, f"asking {endpoint} for the files of {repository}")
    files = listing(endpoint, repository, revision)
    base = f"{endpoint}/{repository}/resolve/{urllib.parse.quote(revision, safe='')}"
    total, done = sum(file["size"] for file in files), 0
    with ThreadPoolExecutor(PARALLEL) as pool:
        for size in pool.map(lambda file: fetch(base, file, target) or file["size"], files):
            done += size
            say(target, f"{done / 1e9:.1f} of {total / 1e9:.1f} GB are there")


def stop(number: int, frame: object) -> None:
    """End at once, though threads read: as a container's first process it would ignore SIGTERM otherwise."""
    os._exit(128 + number)


def main(endpoint: str, repository: str, revision: str, directory: str) -> int:
    signal.signal(signal.SIGTERM, stop)
    target = pathlib.Path(directory)
    target.mkdir(parents=True, exist_ok=True)
    with (target / LOCK).open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if (target / COMPLETE).exists():
            print(f"{target} is complete already")
            return 0
        try:
            fetch_all(endpoint.rstrip("/"), repository, revision, target)
        except (Broken, OSError, ValueError, KeyError) as error:
            print(f"{type(error).__name__}: {error}", file=sys.stderr)
            say(target, f"failed, and is tried again within 5 minutes: {type(error).__name__}: {error}")
            return 1
        (target / COMPLETE).write_text(f"{repository} {revision}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
