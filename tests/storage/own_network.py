"""A network of its own with hostile names and addresses, and what becomes of URLs in it.

Run by `unshare -rnm`, so that the addresses below are this process's and nothing leaves it. In: JSON by standard input,
`ask` (what to ask for, as a record or as a recipe does, in turn). Out: JSON, for each what came of it, and the
addresses on which the web server was called meanwhile.
"""

from __future__ import annotations

import json
import logging
import os
import socket
import struct
import subprocess
import sys
import tempfile
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

PUBLIC, PUBLIC_V6 = "93.184.216.34", "2606:4700::1111"
PRIVATE = [
    *("169.254.169.254", "10.1.2.3", "172.16.0.1", "192.168.1.1", "100.64.0.1", "100.100.100.200", "192.0.0.192"),
    *("168.63.129.16", "198.18.0.1", "fd00:ec2::254", "64:ff9b::a9fe:a9fe", "2002:a9fe:a9fe::1"),
]
NAMES = {
    "public.test": [PUBLIC],
    "private.test": ["10.1.2.3"],
    "localhost": ["127.0.0.1"],  # which is asked for localhost.
    "mixed.test": ["169.254.169.254", PUBLIC],
    "rebind.test": [PUBLIC],  # for the first who asks
}
REBOUND = ["169.254.169.254"]
SERVER_FAILURE, NO_SUCH_NAME = 2, 3

visits: list[str] = []


class Web(BaseHTTPRequestHandler):
    """A picture everywhere, and redirects to wherever the query says. Port 80 of every address."""

    def do_GET(self) -> None:
        visits.append(self.connection.getsockname()[0].removeprefix("::ffff:"))
        _, mark, target = self.path.partition("?")
        self.send_response(302 if mark else 200)
        self.send_header("Location" if mark else "ETag", target or '"1"')
        self.send_header("Content-Length", "1")
        self.end_headers()
        self.wfile.write(b"x")

    def log_message(self, *_: Any) -> None:
        pass


class Server(ThreadingHTTPServer):
    address_family = socket.AF_INET6

    def handle_error(self, *_: Any) -> None:
        pass


def answer_names(server: socket.socket) -> None:
    """A name server: A records of `NAMES`; a failure for `down.test`; nothing of any other name."""
    while True:
        query, client = server.recvfrom(512)
        labels, at = [], 12
        while length := query[at]:
            labels.append(query[at + 1 : at + 1 + length].decode())
            at += length + 1
        name, (kind,) = ".".join(labels), struct.unpack(">H", query[at + 1 : at + 3])
        addresses = NAMES.get(name, []) if kind == 1 else []
        if name == "rebind.test" and kind == 1:
            NAMES[name] = REBOUND
        code = SERVER_FAILURE if name == "down.test" else 0 if name in NAMES else NO_SUCH_NAME
        head = query[:2] + struct.pack(">HHHHH", 0x8180 | code, 1, len(addresses), 0, 0)
        records = b"".join(b"\xc0\x0c" + struct.pack(">HHIH", 1, 1, 0, 4) + socket.inet_aton(one) for one in addresses)
        server.sendto(head + query[12 : at + 5] + records, client)


def begin() -> None:
    """Raises where the machine does not let it: OSError, CalledProcessError."""
    subprocess.run(["ip", "link", "set", "lo", "up"], check=True)
    for address in (PUBLIC, PUBLIC_V6, *PRIVATE):
        width = 128 if ":" in address else 32
        subprocess.run(["ip", "addr", "add", f"{address}/{width}", "dev", "lo"], check=True)
    for path, text in {
        "/etc/resolv.conf": "nameserver 127.0.0.1\noptions timeout:1 attempts:1\n",
        "/etc/hosts": "127.0.0.1 localhost\n::1 localhost\n",
        "/etc/nsswitch.conf": "hosts: files dns\n",
    }.items():
        with tempfile.NamedTemporaryFile("w", delete=False) as file:
            file.write(text)
        os.chmod(file.name, 0o644)
        subprocess.run(["mount", "--bind", file.name, os.path.realpath(path)], check=True)
        os.unlink(file.name)
    names = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    names.bind(("127.0.0.1", 53))
    threading.Thread(target=answer_names, args=(names,), daemon=True).start()
    threading.Thread(target=Server(("::", 80), Web).serve_forever, daemon=True).start()


def outcome(url: str, is_recipes: bool) -> str:
    """How an object is described, and opened, in a process that has a fresh client."""
    from storage import web, web_client
    from storage.reach import Reach
    from storage.retry import Backoff

    web.AGAIN = Backoff(attempts=2, pause=0.01)
    web_client._sessions.clear()  # their connections and the addresses that they remember
    reach = None if is_recipes else Reach("s3://bucket/list.jsonl")
    try:
        web.WebObject(url, reach).info()
        web_client._sessions.clear()
        with web.WebObject(url, reach).open() as file:
            return f"read {file.read()!r}"
    except Exception as error:
        return f"{type(error).__name__}: {error}"


def main() -> None:
    """What this file is for."""
    try:
        begin()
    except (OSError, subprocess.CalledProcessError) as error:
        sys.exit(f"no network of its own: {error}")
    logging.disable()
    outcomes = []
    for url, is_recipes in json.load(sys.stdin):
        visits.clear()
        outcomes.append([outcome(url, is_recipes), sorted(set(visits))])
    json.dump(outcomes, sys.stdout)
    sys.stdout.flush()
    os._exit(0)  # the clients that were forgotten have connections open


if __name__ == "__main__":
    main()
