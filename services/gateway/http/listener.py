"""Listening sockets of the API: one of our own, or one that whoever started us listens on, for several gateways.

Gateways that share a socket take connections from one queue: one that is busy, or has died, leaves them to the others,
and what waits while none runs is served by the next. With sockets of their own at one port (SO_REUSEPORT) the kernel
would give each its connections by a hash, and lose those of one that dies.
"""

import socket

from shared.config import variable
from shared.errors import ConfigError

BACKLOG = 2048


def bind(host: str, port: int) -> socket.socket:
    """Return a listening socket; port 0 takes a free one.

    Raises:
        ConfigError: the address cannot be listened on.
    """
    listener = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
        listener.listen(BACKLOG)
    except OSError as error:
        listener.close()
        raise ConfigError(f"{variable('port')}: cannot listen on {host}:{port}: {error.strerror or error}") from error
    return listener


def inherited(descriptor: int) -> socket.socket:
    """Return the listening socket that the process was started with.

    Raises:
        ConfigError: the descriptor is no socket.
    """
    try:
        return socket.socket(fileno=descriptor)
    except OSError as error:
        raise ConfigError(f"{variable('listen_fd')}: {descriptor} is no socket: {error.strerror or error}") from error
