"""A port of a pod on this machine, through the API server: as `kubectl port-forward`, which need not be there."""

import select
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from socketserver import BaseRequestHandler, ThreadingTCPServer

from kubernetes import client
from kubernetes.stream import portforward
from kubernetes.stream.ws_client import PortForward

CHUNK = 1 << 16
END_S = 5.0
POLL_S = 0.01


@contextmanager
def forwarded(settings: client.Configuration, namespace: str, pod: str, port: int) -> Iterator[str]:
    """The URL at which the port answers. Network policies do not apply to it. Its tunnels end with the block."""
    carried: dict[socket.socket, threading.Thread] = {}

    class Handler(BaseRequestHandler):
        def handle(self) -> None:
            # A client of its own: the library changes the one it is given while it asks for the tunnel.
            api = client.ApiClient(settings)
            try:
                ask = client.CoreV1Api(api).connect_get_namespaced_pod_portforward
                tunnel = portforward(ask, pod, namespace, ports=str(port))
                _carry(self.request, tunnel.socket(port))
                _end(tunnel)
            finally:
                api.close()  # type: ignore[no-untyped-call]

    class Server(ThreadingTCPServer):
        def process_request(self, request: socket.socket, client_address: object) -> None:  # type: ignore[override]
            arguments = (request, client_address)
            carried[request] = threading.Thread(target=self.process_request_thread, args=arguments, daemon=True)
            carried[request].start()

        def shutdown_request(self, request: socket.socket) -> None:  # type: ignore[override]
            super().shutdown_request(request)
            del carried[request]

        def handle_error(self, request: object, client_address: object) -> None:
            """The client sees a broken connection, and says what it was for."""

    with Server(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_address[1]}"
        finally:
            server.shutdown()
            thread.join()
            for near, carrying in list(carried.items()):
                with suppress(OSError):
                    near.shutdown(socket.SHUT_RDWR)  # else a client that keeps its connection keeps its tunnel
                carrying.join(END_S)  # a pod that reads no more keeps its tunnel until the API server ends it


def _end(tunnel: PortForward) -> None:
    """Close what the library leaves open where the far end closed first, once it has seen that.

    It has when the socket is gone. `connected` is false before that: websocket-client clears it and then sends its
    close frame, and breaks the request if it finds no socket any more.
    """
    deadline = time.monotonic() + END_S
    while tunnel.websocket.sock is not None and time.monotonic() < deadline:
        time.sleep(POLL_S)
    tunnel.websocket.shutdown()


def _carry(near: socket.socket, far: socket.socket) -> None:
    """Bytes both ways until either end closes."""
    try:
        while True:
            readable, _, _ = select.select([near, far], [], [])
            for source, target in ((near, far), (far, near)):
                if source in readable:
                    data = source.recv(CHUNK)
                    if not data:
                        return
                    target.sendall(data)
    finally:
        # The library's thread bears the end of what it reads, but not the loss of what it has written.
        with suppress(OSError):
            far.shutdown(socket.SHUT_WR)
            while far.recv(CHUNK):
                pass
        far.close()
