"""HTTP server: uvicorn in our own life cycle, listening on a socket that was bound before anything started."""

import asyncio
import contextlib
import socket
from collections.abc import Iterator
from functools import partial

import uvicorn
from starlette.types import ASGIApp

from services.gateway.errors import FailureBodies
from services.gateway.http.connections import Connections
from services.gateway.http.protocol import BoundedProtocol

KEEP_ALIVE_S = 75  # longer than load balancers in front of us keep an idle connection
CLOSE_S = 5  # limit on writing the last bytes of answers that were ended


class Server(uvicorn.Server):
    """uvicorn's server. `listening` is set once it listens; signals are left to the process."""

    def __init__(self, app: ASGIApp, listener: socket.socket, connections: Connections, bodies: FailureBodies) -> None:
        super().__init__(
            uvicorn.Config(
                app,
                http=partial(BoundedProtocol, connections=connections, bodies=bodies),  # type: ignore[arg-type]
                ws="none",
                lifespan="off",
                log_config=None,
                access_log=False,
                server_header=False,
                proxy_headers=False,
                timeout_keep_alive=KEEP_ALIVE_S,
                timeout_graceful_shutdown=CLOSE_S,
            )
        )
        self.listening = asyncio.Event()
        self._listener = listener
        self._connections = connections

    async def run_until_stopped(self) -> None:
        """Serve until `should_exit`."""
        await self.serve(sockets=[self._listener])

    async def on_tick(self, counter: int) -> bool:
        self._connections.close_overdue()
        return await super().on_tick(counter)

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self.listening.set()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield
