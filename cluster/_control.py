"""The wire between the allocation and its nodes: JSON messages over authenticated TCP.

A node that is gone closes its end; one whose machine is gone stops to answer, which the kernel
finds out. So each side always knows whether the other is there.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import threading
from collections.abc import Callable
from multiprocessing import AuthenticationError
from multiprocessing.connection import (
    Client,
    Connection,
    answer_challenge,
    deliver_challenge,
)
from typing import Any

Message = dict[str, Any]

_LARGEST = 1 << 16
# Seconds until the kernel gives up on a machine that does not answer: about 45.
_KEEPALIVE = {"TCP_KEEPIDLE": 15, "TCP_KEEPINTVL": 10, "TCP_KEEPCNT": 3}
_UNANSWERED_MS = 45_000


class Nodes:
    """The allocation's end. `received(node, message)` is called in threads, for each message.

    The first message of a node has its name under "node". When a node is gone, the message is
    {"kind": "gone"}.
    """

    def __init__(self, secret: bytes, received: Callable[[str, Message], None]) -> None:
        self._secret = secret
        self._received = received
        self._connections: dict[str, Connection] = {}
        self._listener = socket.create_server(("", 0), backlog=1024)
        self.port: int = self._listener.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def send(self, node: str, message: Message) -> None:
        """Send a message; one to a node that is gone is lost."""
        with contextlib.suppress(OSError, KeyError):
            send(self._connections[node], message)

    def close(self) -> None:
        """Hang up: nodes that still run, or are about to come, end by themselves."""
        # Closing alone would leave it open, while a thread waits for connections.
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        for connection in list(self._connections.values()):
            # Closing alone would not, while a thread reads from it.
            with contextlib.suppress(OSError), _socket_of(connection) as shared:
                shared.shutdown(socket.SHUT_RDWR)

    def _accept(self) -> None:
        while True:
            try:
                accepted, _ = self._listener.accept()
            except OSError:
                return  # closed
            connection = Connection(accepted.detach())
            threading.Thread(target=self._serve, args=(connection,), daemon=True).start()

    def _serve(self, connection: Connection) -> None:
        node = None
        try:
            _watch(connection)
            deliver_challenge(connection, self._secret)
            answer_challenge(connection, self._secret)
            message = receive(connection)
            node = message["node"]
            self._connections[node] = connection
            while True:
                self._received(node, message)
                message = receive(connection)
        except (OSError, EOFError, ValueError, AuthenticationError, KeyError):
            if node is not None:
                self._received(node, {"kind": "gone"})


def connect(host: str, port: int, secret: bytes) -> Connection:
    """A node's end. Raises OSError, EOFError or AuthenticationError."""
    connection = Client((host, port), authkey=secret)
    _watch(connection)
    return connection


def send(connection: Connection, message: Message) -> None:
    """Send one message. Raises OSError if the other end is gone."""
    connection.send_bytes(json.dumps(message).encode())


def receive(connection: Connection) -> Message:
    """The next message. Raises OSError or EOFError if the other end is gone."""
    return json.loads(connection.recv_bytes(_LARGEST))


def _watch(connection: Connection) -> None:
    with _socket_of(connection) as shared:
        shared.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for name, value in _KEEPALIVE.items():
            shared.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
        shared.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, _UNANSWERED_MS)


def _socket_of(connection: Connection) -> socket.socket:
    return socket.socket(fileno=os.dup(connection.fileno()))
