"""A proxy before an S3 server that fails by rules: it answers an error, or cuts the connection inside a body."""

from __future__ import annotations

import re
import socket
import threading
import time
from dataclasses import dataclass, field
from urllib.parse import urlsplit

from botocore.auth import S3SigV4Auth
from botocore.awsrequest import AWSRequest
from botocore.credentials import Credentials

from testing.s3_server import KEY, SECRET

_HELD_SECONDS = 60.0

Fault = int | str | None
"""A status to answer with, or "STATUS:CODE" with S3's name for the error; "cut:N" cuts the connection after N bytes of
the answer's body, "cut-request:N" after N bytes of the request's; None passes."""


@dataclass
class Rule:
    """The next `times` requests whose line ("PUT /data/run/x?y") matches get the fault; others pass."""

    matching: str
    fault: Fault
    times: int = 10**9
    seen: int = 0

    def take(self, line: str) -> Fault:
        """The fault for a request of this first line, if it is one to fail and there are any left."""
        if self.seen >= self.times or not re.search(self.matching, line):
            return None
        self.seen += 1
        return self.fault


@dataclass
class Faults:
    """Faults of requests to come, and the requests so far. Without a fault a request passes.

    faults: of the next GETs of ranges, in turn. always: of the GETs of ranges after those. rules: of all requests.
    unconditional: take the conditions from puts, as before a store that ignores them. held: where a thread waits until
    the event is set before it passes on a request whose line matches. latency: seconds that every request waits.
    """

    upstream: tuple[str, int]
    faults: list[Fault] = field(default_factory=list)
    always: int | None = None
    rules: list[Rule] = field(default_factory=list)
    ranges: list[str] = field(default_factory=list)
    lines: list[str] = field(default_factory=list)
    endpoint: str = ""
    unconditional: bool = False
    held: tuple[str, threading.Event] | None = None
    latency: float = 0.0

    @classmethod
    def before(cls, endpoint: str) -> Faults:
        """A running proxy before the server at a URL, in threads that end with the process."""
        url = urlsplit(endpoint)
        proxy = cls((str(url.hostname), int(url.port or 0)))
        listening = socket.create_server(("127.0.0.1", 0))
        proxy.endpoint = f"http://127.0.0.1:{listening.getsockname()[1]}"
        threading.Thread(target=proxy._accept, args=(listening,), daemon=True).start()
        return proxy

    def set_rules(self, *rules: Rule) -> Faults:
        """Replace all faults by these rules, and forget the requests so far."""
        self.faults[:], self.always, self.ranges[:], self.lines[:], self.rules[:] = [], None, [], [], rules
        return self

    def _accept(self, listening: socket.socket) -> None:
        while True:
            client, _ = listening.accept()
            threading.Thread(target=self._serve, args=(client,), daemon=True).start()

    def _serve(self, client: socket.socket) -> None:
        """One request a connection. What either side closes early ends it."""
        with client:
            try:
                self._pass_on(client)
            except OSError:
                return

    def _fault(self, head: bytes) -> Fault:
        line = head.partition(b" HTTP/")[0].decode()
        self.lines.append(line)
        fault: Fault = None
        if found := re.search(rb"^range: bytes=(\S+)", head, re.I | re.M):
            self.ranges.append(found[1].decode())
            fault = self.faults.pop(0) if self.faults else self.always
        return fault or next((rule_fault for rule in self.rules if (rule_fault := rule.take(line))), None)

    def _pass_on(self, client: socket.socket) -> None:
        head, body = _head(client)
        if self.latency:
            time.sleep(self.latency)
        fault = self._fault(head)
        if isinstance(fault, int) or (fault and fault[0].isdigit()):
            _drain(client, head, body)
            status, _, code = str(fault).partition(":")
            said = (
                f"<Error><Code>{code}</Code><Message>By rule</Message></Error>" if code and head[:4] != b"HEAD" else ""
            )
            answer = f"HTTP/1.1 {status} By Rule\r\nContent-Length: {len(said)}\r\nConnection: close\r\n\r\n{said}"
            client.sendall(answer.encode())
            return
        if self.held and re.search(self.held[0], head.partition(b" HTTP/")[0].decode()):
            self.held[1].wait(_HELD_SECONDS)
        if self.unconditional and head.startswith(b"PUT"):
            head = _without_conditions(head)
        kind, _, count = str(fault or "").partition(":")
        with socket.create_connection(self.upstream) as server:
            length = _length(head) - len(body)
            head = re.sub(rb"\r\nconnection:[^\r]*", b"", head, flags=re.I)
            server.sendall(head.replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n") + body)
            sent = len(body)
            while length > 0 and not (kind == "cut-request" and sent >= int(count)):
                piece = client.recv(min(2**16, length))
                if not piece:
                    return
                server.sendall(piece)
                length, sent = length - len(piece), sent + len(piece)
            if kind == "cut-request":
                return
            start, rest = _head(server)
            client.sendall(start)
            left = int(count) if kind == "cut" else None
            while rest and left != 0:
                piece = rest if left is None else rest[:left]
                client.sendall(piece)
                left = None if left is None else left - len(piece)
                rest = server.recv(2**16)


def _without_conditions(head: bytes) -> bytes:
    """The head of a put without its conditions, signed again: the signature was over them too."""
    first, *lines = head.decode().split("\r\n")
    method, target, _ = first.split(" ")
    headers = {name.lower(): value for name, _, value in (line.partition(": ") for line in lines if line)}
    headers = {name: value for name, value in headers.items() if name not in ("if-match", "if-none-match")}
    region = headers.pop("authorization").split("/")[2]
    kept = {name: value for name, value in headers.items() if name in ("host", "x-amz-content-sha256")}
    request = AWSRequest(method, f"http://{headers['host']}{target}", headers=kept)
    S3SigV4Auth(Credentials(KEY, SECRET), "s3", region).add_auth(request)
    signed = {name.lower(): value for name, value in request.headers.items()}
    return "\r\n".join([first, *(f"{name}: {value}" for name, value in (headers | signed).items()), "", ""]).encode()


def _length(head: bytes) -> int:
    found = re.search(rb"^content-length: *(\d+)", head, re.I | re.M)
    return int(found[1]) if found else 0


def _drain(client: socket.socket, head: bytes, body: bytes) -> None:
    """Read the rest of a request's body, so that the client gets to read the answer."""
    left = _length(head) - len(body)
    while left > 0 and (piece := client.recv(min(2**16, left))):
        left -= len(piece)


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
    if not body and _length(head) and not head.startswith(b"HEAD"):
        body = connection.recv(2**16)
    return head, body
