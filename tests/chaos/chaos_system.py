"""Real processes: a Redis that keeps its data on disk, and replicas of the services that can be killed and paused."""

import asyncio
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import msgspec
from machine import PATIENCE_S, free_port
from redis.asyncio import Redis
from redis.exceptions import RedisError
from redis_proxy import Proxy
from redis_refusals import REFUSALS

from cli.redis_server import RedisServer
from cli.redis_users import sign_in
from shared.bus import leases
from shared.bus.client import command, connect
from shared.bus.keys import GENERATE, Keys
from shared.tether import tethered

ROOT = Path(__file__).resolve().parents[2]
MODEL_NAME = "chaos"
SERVICES = ("gateway", "mm_encoder", "engine", "postproc")
LOOK_S = 0.05
LEASE_MS = 1500
SHARDS = 2
RETAIN_S = 60.0
SEGMENTS = "segments"  # directory of embeddings, in that of a system which has them there
REQUEST_TIMEOUT_S = 300.0  # never reached, on however busy a machine
# Small enough that everything that happens to long answers happens to short ones.
SETTINGS: Mapping[str, Mapping[str, object]] = {
    "all": {
        "lease_ms": LEASE_MS,
        "shards": SHARDS,
        "drain_s": 15,
        "max_model_len": 512,
        "max_deliveries": 100,  # what is killed that often on purpose is not poison
    },
    "gateway": {
        "host": "127.0.0.1",
        "served_model_names": (MODEL_NAME,),
        "limit_mm_per_prompt": {"image": 2},
        "keep_alive_s": 1,
        "hold_headers_s": 2,
        "request_timeout_s": REQUEST_TIMEOUT_S,
        "retain_s": RETAIN_S,
    },
    "mm_encoder": {
        "media_allow_networks": ["127.0.0.1/32"],
        "concurrency": 4,
        # So small that even a bomb fits the context: one with more tokens would be refused before it is decoded.
        "mm_processor_kwargs": {
            "image_max_pixels": 64 * 28 * 28,
            "video_min_pixels": 4 * 28 * 28,
            "video_max_pixels": 4 * 28 * 28,
            "video_max_frames": 16,
        },
    },
    "engine": {
        "device": "cpu",
        "max_num_seqs": 8,
        "max_num_batched_tokens": 128,
        "block_size": 16,
        "num_gpu_blocks_override": 96,
    },
    "postproc": {"journal_every": 8, "trim_every": 16},
}


class Replica:
    """One place for a process of a service: what is started after a crash takes it."""

    def __init__(self, service: str, module: str, number: int, environ: Mapping[str, str], log: Path) -> None:
        self.service = service
        self.module = module
        self.number = number
        self.name = ""
        self.paused = False
        self.started = 0.0  # unix seconds
        self.log = log
        self.root = ROOT  # whose sources it runs
        self.port = free_port() if service == "gateway" else 0
        self._environ = environ
        self._starts = 0
        self._process: subprocess.Popen[bytes] | None = None

    def __str__(self) -> str:
        return f"{self.service}-{self.number}"

    @property
    def url(self) -> str:
        """Of a gateway."""
        return f"http://127.0.0.1:{self.port}"

    @property
    def running(self) -> bool:
        return self._process is not None and self._process.poll() is None

    @property
    def halted(self) -> bool:
        """True if it is stopped, by whichever signal."""
        if not self.running or self._process is None:
            return False
        stat = Path(f"/proc/{self._process.pid}/stat").read_text()
        return stat.rpartition(")")[2].split()[0] == "T"

    @property
    def status(self) -> int | None:
        """Exit status of the last process; None while it runs."""
        return None if self._process is None else self._process.poll()

    @property
    def ranks(self) -> list[int]:
        """Processes that an engine of several ranks has started, by rank."""
        if not self.running or self._process is None:
            return []
        found = [path.read_text().split() for path in Path(f"/proc/{self._process.pid}/task").glob("*/children")]
        return sorted(int(pid) for pids in found for pid in pids)

    def start(self, *, crash_at: str = "", same_name: bool = False, **settings: object) -> None:
        """Start a process, under the name of the last one (a container that starts again) or a new one (a new pod)."""
        assert not self.running
        if not (same_name and self.name):
            self._starts += 1
            self.name = f"{self}-{self._starts}"
        told = {"name": self.name, "crash_at": crash_at, **settings}
        told |= {"port": self.port} if self.service == "gateway" else {}
        self.paused, self.started = False, time.time()
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(
                tethered([sys.executable, "-m", self.module]),  # it ends with a run that is killed
                cwd=self.root,
                env={**self._environ, **_variables(told)},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def kill(self) -> None:
        self._signal(signal.SIGKILL)
        self.paused = False
        if self._process is not None:
            self._process.wait()

    def pause(self) -> None:
        self._signal(signal.SIGSTOP)
        self.paused = self.running

    def wake(self) -> None:
        self._signal(signal.SIGCONT)
        self.paused = False

    def terminate(self) -> None:
        """Ask it to drain and end."""
        self._signal(signal.SIGTERM)

    async def ended(self, seconds: float) -> int | None:
        """Its exit status; None if it still runs after `seconds`."""
        for _ in range(int(seconds / LOOK_S)):
            if not self.running:
                break
            await asyncio.sleep(LOOK_S)
        return self.status

    def tail(self) -> str:
        lines = self.log.read_text(errors="replace").splitlines() if self.log.exists() else []
        return "\n".join([f"--- {self}", *lines[-40:]])

    def _signal(self, number: signal.Signals) -> None:
        if self._process is not None and self._process.poll() is None:
            self._process.send_signal(number)


class System:
    """Redis and all replicas."""

    def __init__(
        self,
        directory: Path,
        model: Path,
        replicas: Mapping[str, int],
        *,
        persistence: bool = True,
        judged: bool = False,
        **settings: Mapping[str, object],
    ) -> None:
        """`replicas`: how many of each service. `judged`: engines tell of near ties (near_ties.py). `settings`: by
        service or "all", over SETTINGS."""
        self.directory = directory
        self.ranks = int(str(settings.get("engine", {}).get("tensor_parallel_size", 1)))  # processes of an engine
        self._judged = judged
        self.keys = Keys("chaos")
        # Its own directory's path may be too long for a socket.
        self._sockets = Path(tempfile.mkdtemp(prefix="chaos-"))
        self._persistence = persistence
        self._servers: list[RedisServer] = []
        self.server = self._another_server()
        self.proxy = Proxy(self._sockets / "proxy.sock", self.server.unix_socket)
        plain = {name: value for name, value in os.environ.items() if not name.startswith("MILLRACE_")}
        plain |= {"OMP_NUM_THREADS": "1", "PYTHONFAULTHANDLER": "1"}
        plain |= {"PYTHONPATH": str(ROOT / "tests")} if judged else {}
        common = {"model": str(model), "namespace": self.keys.ns}
        self._environs = {}
        for service in SERVICES:
            told = common | dict(SETTINGS["all"]) | dict(settings.get("all", {}))
            told["redis_url"] = sign_in(self.proxy.url, service)
            told |= dict(SETTINGS[service]) | dict(settings.get(service, {}))
            self._environs[service] = plain | _variables(told)
        self.replicas: list[Replica] = []
        for service in SERVICES:
            for _ in range(replicas[service]):
                self.add(service)
        self.redis: Redis = connect(self.proxy.url)

    def _another_server(self) -> RedisServer:
        name = f"redis-{len(self._servers)}"
        server = RedisServer(
            self.directory / name,
            namespace=self.keys.ns,
            port=free_port(),
            unix_socket=self._sockets / f"{name}.sock",
            persistence=self._persistence,
            dies_with_us=True,
        )
        self._servers.append(server)
        return server

    def add(self, service: str) -> Replica:
        """A place for one more, with nothing in it yet."""
        number = 1 + max((replica.number for replica in self.of(service)), default=-1)
        log = self.directory / f"{service}-{number}.log"
        module = "near_ties" if self._judged and service == "engine" else f"services.{service}"
        self.replicas.append(Replica(service, module, number, self._environs[service], log))
        return self.replicas[-1]

    def of(self, service: str) -> list[Replica]:
        return [replica for replica in self.replicas if replica.service == service]

    async def start(self) -> None:
        self.directory.mkdir(parents=True, exist_ok=True)
        await asyncio.to_thread(self.server.start)
        await self.proxy.start()
        for replica in self.replicas:
            replica.start()
        await self.ready(self.replicas)

    async def make_whole(self) -> None:
        """One replica of each service and an empty Redis, whatever a test that failed has left."""
        if any(len(self.of(service)) != 1 or not self.of(service)[0].running for service in SERVICES):
            for replica in self.replicas:
                replica.kill()
            self.replicas = [self.of(service)[0] for service in SERVICES]
            await self.redis.flushall()
            for replica in self.replicas:
                replica.start()
        # A gateway that died before it submitted leaves its uploads to expire.
        uploads = [key async for key in self.redis.scan_iter(match=self.keys.blob("media", "*"), count=1000)]
        if uploads:
            await self.redis.unlink(*uploads)
        await self.ready(self.replicas)

    async def ready(self, replicas: list[Replica]) -> None:
        """Return when these say in their leases that they take work.

        Raises:
            AssertionError: one ended, or was not ready in time.
        """
        deadline = time.monotonic() + PATIENCE_S
        for replica in replicas:
            while await self.state(replica) != "ready":
                assert replica.running, f"{replica} ended with status {replica.status}\n{replica.tail()}"
                assert time.monotonic() < deadline, f"{replica} was not ready in time\n{replica.tail()}"
                await asyncio.sleep(LOOK_S)

    async def state(self, replica: Replica) -> str:
        """Return the state in its lease; "" if it has none or Redis cannot be asked."""
        with suppress(RedisError):
            for one in await leases.live(self.redis, self.keys, replica.service):
                # A predecessor of the same name may have left a lease behind.
                if one.name == replica.name and one.started >= replica.started:
                    return one.state
        return ""

    async def generating(self) -> None:
        """Return when engines have sent some more steps.

        Raises:
            AssertionError: they do not.
        """
        before = await self._newest_steps()
        for _ in range(int(PATIENCE_S / LOOK_S)):
            await asyncio.sleep(LOOK_S)
            if (now := await self._newest_steps()) != before and await self.redis.xlen(self.keys.stream(GENERATE)):
                return
        raise AssertionError(f"no tokens came: {now}\n{self.tails()}")

    async def _newest_steps(self) -> list[object]:
        return [await self.redis.xrevrange(self.keys.tokens(shard), count=1) for shard in range(SHARDS)]

    async def restart_redis(self, down_s: float, *, orderly: bool = False) -> None:
        """Kill Redis and start it again on the same data."""
        await asyncio.to_thread(self.server.stop if orderly else self.server.kill)
        await asyncio.sleep(down_s)
        await asyncio.to_thread(self.server.start)

    async def refuse(self, code: str, seconds: float) -> None:
        """Have Redis refuse what it is asked, in the way that `code` stands for."""
        operator = connect(self.server.url)
        async with REFUSALS[code](self.server, operator):
            await asyncio.sleep(seconds)
        await operator.aclose()

    async def fail_over(self) -> None:
        """Move to another server, which has all data; the address then leads there, and open links to the old one."""
        old, new = self.server, await self.replicated()
        before, after = connect(old.url), connect(new.url)
        await command(before, "FAILOVER", "TO", "127.0.0.1", new.port or 0)
        while (await after.info("replication"))["role"] != "master":  # noqa: ASYNC110
            await asyncio.sleep(LOOK_S)
        self.server, self.proxy.target = new, new.unix_socket
        await asyncio.sleep(1)
        for client in (before, after):
            await client.aclose()
        await asyncio.to_thread(old.kill)

    async def fail_over_late(self, new: RedisServer) -> float:
        """Move to a replica, which lacks steps of engines that the old one had acknowledged, and nobody had read.

        Returns the seconds for which it lacks them.
        """
        old = self.server
        after = connect(new.url)
        for postproc in self.of("postproc"):
            postproc.pause()
        await after.replicaof("NO", "ONE")
        began = time.monotonic()
        await after.aclose()
        await self.generating()
        await asyncio.to_thread(old.kill)
        lost_s = time.monotonic() - began
        self.server, self.proxy.target = new, new.unix_socket
        for postproc in self.of("postproc"):
            postproc.wake()
        return lost_s

    async def replicated(self) -> RedisServer:
        """Start another server that has what ours has, and follows it."""
        new = self._another_server()
        await asyncio.to_thread(new.start)
        after = connect(new.url)
        await after.replicaof("127.0.0.1", self.server.port or 0)
        while (await after.info("replication"))["master_link_status"] != "up":  # noqa: ASYNC110
            await asyncio.sleep(LOOK_S)
        await after.aclose()
        return new

    async def pause_redis(self, seconds: float) -> None:
        """As a host that swaps, or a snapshot that forks, would."""
        pid = self.server.pid
        assert pid is not None
        os.kill(pid, signal.SIGSTOP)
        await asyncio.sleep(seconds)
        os.kill(pid, signal.SIGCONT)

    async def close(self) -> None:
        """End everything at once."""
        for replica in self.replicas:
            replica.kill()
        await self.redis.aclose()
        await self.proxy.close()
        for server in self._servers:
            await asyncio.to_thread(server.kill)
        shutil.rmtree(self._sockets, ignore_errors=True)

    def tails(self) -> str:
        return "\n".join(replica.tail() for replica in self.replicas)


@asynccontextmanager
async def running(
    directory: Path,
    model: Path,
    replicas: Mapping[str, int],
    *,
    persistence: bool = True,
    judged: bool = False,
    root: Path = ROOT,
    **settings: Mapping[str, object],
) -> AsyncIterator[System]:
    """A system from ready to killed, of the sources in `root`."""
    system = System(directory, model, replicas, persistence=persistence, judged=judged, **settings)
    for replica in system.replicas:
        replica.root = root
    try:
        await system.start()
        yield system
    finally:
        await system.close()


def _variables(settings: Mapping[str, object]) -> dict[str, str]:
    return {
        f"MILLRACE_{name.upper()}": value if isinstance(value, str) else msgspec.json.encode(value).decode()
        for name, value in settings.items()
    }
