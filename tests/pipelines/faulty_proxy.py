"""A proxy before an S3 server that answers as told: an error status, or a body whose connection is cut inside."""

from __future__ import annotations

import re
import socket
import threading
from dataclasses import dataclass, field


@dataclass
class Faults:
    """What to do to the next GETs of objects, in turn, and what was asked. Without a fault a request passes.

    faults: an int is a status to answer with; "cut:N" cuts the connection after N bytes of the body; None passes.
    """

    upstream: tuple[str, int]
    faults: list[int | str | None] = field(default_factory=list)
    always: int | None = None
    ranges: list[str] = field(default_factory=list)
    endpoint: str = ""

    def start(self) -> None:
        """Listen, in threads that end with the process."""
        listening = socket.create_server(("127.0.0.1", 0))
        self.endpoint = f"http://127.0.0.1:{listening.getsockname()[1]}"
        threading.Thread(target=self._accept, args=(listening,), daemon=True).start()

    def _accept(self, listening: socket.socket) -> None:
        while True:
            client, _ = listening.accept()
            threading.Thread(target=self._serve, args=(client,), daemon=True).start()

    def _serve(self, client: socket.socket) -> None:
        """One request a connection."""
        with client:
            head, body = _head(client)
            found = re.search(rb"^range: bytes=(\S+)", head, re.I | re.M)
            fault: int | str | None = None
            if found:
                self.ranges.append(found[1].decode())
                fault = self.faults.pop(0) if self.faults else self.always
            if isinstance(fault, int):
                client.sendall(b"HTTP/1.1 %d Told So\r\nContent-Length: 0\r\nConnection: close\r\n\r\n" % fault)
                return
            with socket.create_connection(self.upstream) as server:
                head = re.sub(rb"\r\nconnection:[^\r]*", b"", head, flags=re.I)
                server.sendall(head.replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n") + body)
                answer, rest = _head(server)
                client.sendall(answer)
                left = int(fault.removeprefix("cut:")) if fault else None
                while rest and left != 0:
                    piece = rest if left is None else rest[:left]
                    client.sendall(piece)
                    left = None if left is None else left - len(piece)
                    rest = server.recv(2**16)


def _head(connection: socket.socket) -> tuple[bytes, bytes]:
    """Everything up to the blank line, and what came with it of the body (at least a byte, if there is a body)."""
    got = b""
    while b"\r\n\r\n" not in got:
        piece = connection.recv(2**16)
        if not piece:
            return got, b""
        got += piece
    end = got.index(b"\r\n\r\n") + 4
    head, body = got[:end], got[end:]
    if not body and re.search(rb"^content-length: *[1-9]", head, re.I | re.M):
        body = connection.recv(2**16)
    return head, body
