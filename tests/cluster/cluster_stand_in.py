"""As much of Kubernetes as the cluster tests' helpers use: objects that a test puts in, found by label; pods that run
as processes of this machine; and port-forwards to them, in the protocol of the real API server.
"""

import asyncio
import os
import ssl
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from aiohttp import WSMsgType, web

NAMESPACE = "models"
DATA, ERROR = 0, 1  # channels of the one port of a tunnel

Object = dict[str, Any]


class StandIn:
    """`objects`: by path of the list they are in ("/api/v1/namespaces/models/pods"). `groups`: kinds of the API groups,
    by group and version. `replaced`: words of a pod's command, and what this machine has instead."""

    def __init__(self) -> None:
        self.objects: dict[str, list[Object]] = {}
        self.groups: dict[tuple[str, str], list[Object]] = {}
        self.replaced: dict[str, str] = {}
        self.ports: dict[str, int] = {}  # of a pod's name and port, "name:8000", on this machine
        self.changes: list[tuple[str, str, dict[str, str], Any]] = []  # method, path, query, body
        self.denied: dict[str, int] = {}  # paths that are answered with a status
        self.url = ""
        self._processes: dict[str, subprocess.Popen[bytes]] = {}

    # --------------------------------------------------------------------------------------------------- requests

    async def answer(self, request: web.Request) -> web.StreamResponse:
        path = request.path.rstrip("/")
        if path in self.denied:
            return web.json_response({"message": "refused"}, status=self.denied[path])
        if path.endswith("/portforward"):
            return await self._tunnel(request)
        if request.method != "GET":
            body = await request.json() if request.can_read_body else None
            self.changes.append((request.method, path, dict(request.query), body))
            return self._change(request.method, path, body)
        if path == "/apis":
            return web.json_response(self._group_list())
        group_version = tuple(path.removeprefix("/apis/").split("/"))
        if group_version in self.groups:
            kinds = self.groups[group_version]
            return web.json_response({"groupVersion": "/".join(group_version), "resources": kinds})
        return self._read(path, request.query.get("labelSelector", ""))

    def _group_list(self) -> Object:
        groups = []
        for name, version in self.groups:
            known = {"groupVersion": f"{name}/{version}", "version": version}
            groups.append({"name": name, "versions": [known], "preferredVersion": known})
        return {"groups": groups}

    def _read(self, path: str, selector: str) -> web.Response:
        below = path.partition(f"/namespaces/{NAMESPACE}/")[2]
        if "/" in below:
            found = self._one(path)
            return web.json_response(found or {"message": "not found"}, status=200 if found else 404)
        wanted = dict(pair.split("=") for pair in selector.split(",") if pair).items()
        listed = self.objects.get(path, [])
        return web.json_response(
            {"metadata": {}, "items": [each for each in listed if wanted <= each["metadata"].get("labels", {}).items()]}
        )

    def _one(self, path: str) -> Object | None:
        listed, _, name = path.rpartition("/")
        return next((each for each in self.objects.get(listed, []) if each["metadata"]["name"] == name), None)

    def _change(self, method: str, path: str, body: Any) -> web.Response:
        if method == "POST" and path.endswith("/pods"):
            self._run(body)
            return web.json_response(body)
        if method == "DELETE":
            removed = self._one(path)
            if removed is None:
                return web.json_response({"message": "not found"}, status=404)
            self.objects[path.rpartition("/")[0]].remove(removed)
            self._end(removed["metadata"]["name"])
            return web.json_response(removed)
        if method == "POST":
            self.objects.setdefault(path, []).append(body)
        return web.json_response(body)

    # ------------------------------------------------------------------------------------------------------- pods

    def _run(self, pod: Object) -> None:
        name = pod["metadata"]["name"]
        _, *words = pod["spec"]["containers"][0]["command"]
        environ = {each["name"]: each["value"] for each in pod["spec"]["containers"][0].get("env", [])}
        self._processes[name] = subprocess.Popen(
            [sys.executable, *(self.replaced.get(word, word) for word in words)],
            env={"PATH": os.environ["PATH"], **environ},
        )
        pod["status"] = {"phase": "Running"}
        self.objects.setdefault(f"/api/v1/namespaces/{NAMESPACE}/pods", []).append(pod)
        threading.Thread(target=self._watch, args=(name, pod)).start()

    def _watch(self, name: str, pod: Object) -> None:
        status = self._processes[name].wait()
        pod["status"] = {"phase": "Failed" if status else "Succeeded"}

    def _end(self, name: str) -> None:
        if name in self._processes:
            self._processes[name].kill()
            self._processes[name].wait()

    def close(self) -> None:
        for name in self._processes:
            self._end(name)

    async def _tunnel(self, request: web.Request) -> web.StreamResponse:
        """v4.channel.k8s.io: a byte for the channel before all data, and first the port on each channel."""
        pod = request.path.split("/")[-2]
        number = int(request.query["ports"])
        tunnel = web.WebSocketResponse(protocols=("v4.channel.k8s.io",))
        await tunnel.prepare(request)
        for channel in (DATA, ERROR):
            await tunnel.send_bytes(bytes([channel]) + number.to_bytes(2, "little"))
        try:
            reader, writer = await asyncio.open_connection("127.0.0.1", self.ports[f"{pod}:{number}"])
        except OSError as error:
            await tunnel.send_bytes(bytes([ERROR]) + str(error).encode())
            await tunnel.close()
            return tunnel

        async def outward() -> None:
            while data := await reader.read(1 << 16):
                await tunnel.send_bytes(bytes([DATA]) + data)
            await tunnel.close()

        sending = asyncio.create_task(outward())
        try:
            async for message in tunnel:
                if message.type == WSMsgType.BINARY and message.data[0] == DATA:
                    writer.write(message.data[1:])
                    await writer.drain()
        except asyncio.CancelledError:  # the server ends first, and its loop waits for nobody who reads no more
            writer.transport.abort()
            raise
        finally:
            writer.close()
            sending.cancel()
            await asyncio.gather(sending, return_exceptions=True)
        return tunnel


@contextmanager
def standing_in(tls: ssl.SSLContext | None = None) -> Iterator[StandIn]:
    """One at `url`, in a thread with an event loop of its own."""
    made, up, end = StandIn(), threading.Event(), asyncio.Event()
    running = asyncio.Runner(loop_factory=asyncio.new_event_loop)

    async def serve() -> None:
        application = web.Application()
        application.router.add_route("*", "/{path:.*}", made.answer)
        runner = web.AppRunner(application, shutdown_timeout=1)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0, ssl_context=tls)
        await site.start()
        assert site._server is not None
        made.url = f"{'https' if tls else 'http'}://127.0.0.1:{site._server.sockets[0].getsockname()[1]}"  # type: ignore[attr-defined]
        up.set()
        await end.wait()
        await runner.cleanup()

    thread = threading.Thread(target=running.run, args=(serve(),))
    thread.start()
    up.wait()
    try:
        yield made
    finally:
        made.close()
        running.get_loop().call_soon_threadsafe(end.set)
        thread.join()
        running.close()  # also what the end of the block has begun to close
