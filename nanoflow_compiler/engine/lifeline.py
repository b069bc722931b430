"""A pair of sockets between two processes: messages while one starts, and news of either's death.

Each holds one end for as long as it lives, so the other end reads an end of file when it is gone,
however it went.
"""

import pickle
import socket
import struct
from typing import Any

__all__ = ["Lifeline", "make_pair"]

_HEADER = struct.Struct("<Q")


class Lifeline:
    """One end."""

    def __init__(self, end: socket.socket) -> None:
        self._socket = end

    def fileno(self) -> int:
        """For whoever waits until it can be read."""
        return self._socket.fileno()

    def send(self, message: object) -> None:
        """Any object that can be pickled: both ends run the same program."""
        data = pickle.dumps(message)
        self._socket.sendall(_HEADER.pack(len(data)) + data)

    def receive(self) -> Any:
        """The next message; EOFError if the other process is gone."""
        (size,) = _HEADER.unpack(self._read(_HEADER.size))
        return pickle.loads(self._read(size))

    def close(self) -> None:
        """The other process reads the end of file."""
        self._socket.close()

    def _read(self, size: int) -> bytes:
        data = bytearray()
        while len(data) < size:
            try:
                part = self._socket.recv(min(size - len(data), 2**20))
            except ConnectionError as error:
                raise EOFError from error
            if not part:
                raise EOFError
            data += part
        return bytes(data)


def make_pair() -> tuple[Lifeline, socket.socket]:
    """This process's end, and the one to hand to a child."""
    here, there = socket.socketpair()
    return Lifeline(here), there
