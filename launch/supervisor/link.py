"""Connections between the supervisors of several nodes: messages of JSON, one a line."""

import json
import socket
import time
from contextlib import suppress
from dataclasses import asdict, fields
from typing import Any, get_origin

LOST_S = 30.0
"""Silence after which the other side counts as lost. Time in which nobody looked does not count: the job was suspended."""
BEAT_S = 1.0
"""Longest time between two messages of a supervisor."""
_MOST_BYTES = 1 << 16  # of a message; longer ones are none of ours


class Link:
    """One end of a connection, whose methods never wait. `lost` turns True when it is closed, silent, or tells nonsense."""

    def __init__(self, connection: socket.socket) -> None:
        connection.setblocking(False)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.socket = connection
        self._received = b""
        self._sent, self._sent_s = b"", 0.0
        self._looked_s, self._silent_s = time.monotonic(), 0.0
        self._closed = False

    @property
    def lost(self) -> bool:
        return self._closed or self._silent_s > LOST_S

    def close(self) -> None:
        self._closed = True
        self.socket.close()

    def send(self, message: Any) -> None:
        """Send a dataclass, if it is another than the last one, or a second old."""
        data = json.dumps(asdict(message)).encode() + b"\n"
        now_s = time.monotonic()
        if self._closed or (data == self._sent and now_s - self._sent_s < BEAT_S):
            return
        self._sent, self._sent_s = data, now_s
        try:
            if self.socket.send(data) < len(data):  # its buffer has room for a thousand: nobody reads
                self.close()
        except OSError:
            self.close()

    def receive(self, kind: type) -> Any:
        """Return the last message that has arrived, made a `kind`; None where there is none."""
        before_s, self._looked_s = self._looked_s, time.monotonic()
        self._silent_s += min(self._looked_s - before_s, BEAT_S)
        with suppress(BlockingIOError):
            try:
                while not self._closed:
                    data = self.socket.recv(_MOST_BYTES)
                    self._received += data
                    if not data:
                        self.close()
            except ConnectionError:
                self.close()
        *lines, self._received = self._received.split(b"\n")
        if len(self._received) > _MOST_BYTES:
            self.close()
        if not lines:
            return None
        try:
            message = _message(kind, json.loads(lines[-1]))
        except (ValueError, TypeError, AttributeError):
            self.close()
            return None
        self._silent_s = 0.0
        return message


def _message(kind: type, values: dict[str, Any]) -> Any:
    """Make a `kind` of what JSON has. Raises TypeError and ValueError where it has other fields or types."""
    message = kind(**{name: tuple(value) if isinstance(value, list) else value for name, value in values.items()})
    for one in fields(message):
        wanted = one.type if one.type in (int, str) else get_origin(one.type)
        if not isinstance(getattr(message, one.name), wanted if isinstance(wanted, type) else str):
            raise TypeError(one.name)
    return message


def listen(port: int) -> socket.socket:
    """Open a port for the other nodes. Raises OSError."""
    both = socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if both else socket.AF_INET
    listener = socket.create_server(("", port), family=family, backlog=1024, dualstack_ipv6=both)
    listener.setblocking(False)
    return listener


def connect(address: str, port: int, patience_s: float) -> Link:
    """Connect to the deciding supervisor, which may have to start first. Raises OSError."""
    end_s = time.monotonic() + patience_s
    while True:
        try:
            connection = socket.create_connection((address, port), timeout=5)
        except OSError:
            if time.monotonic() > end_s:
                raise
            time.sleep(0.2)
        else:
            return Link(connection)
