"""Web servers that are away, slow, lying or hostile: what is read of them, and what a recipe and a record are told."""

from __future__ import annotations

import base64
import gzip
import hashlib
import os
import socket
import socketserver
import threading
import time
import tracemalloc
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

import pytest

from storage import web
from storage.errors import BadData
from storage.object_store.errors import StoreError
from storage.reach import Reach
from storage.retry import Backoff
from storage.urls import fetch_file, list_objects, object_info, open_ranged, open_url
from storage.web_client import HOST_RECORDS
from storage.web_errors import failure_of_status, web_error
from testing.http_server import http_server

BODY = bytes(range(256)) * 4000  # a million bytes, some blocks
SMALL = b"some bytes"


@dataclass
class Script:
    """What the server does, by path, and the requests that it had."""

    lines: list[str] = field(default_factory=list)
    heads: list[dict[str, str]] = field(default_factory=list)
    fails: dict[str, list[int]] = field(default_factory=dict)
    after: str = ""
    elsewhere: str = ""


@pytest.fixture
def script() -> Script:
    return Script()


@pytest.fixture
def server(script: Script, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The address of a server that does as the script says."""
    monkeypatch.setattr(web, "AGAIN", Backoff(attempts=3, pause=0.01))

    class Strange(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            script.lines.append(self.path)
            script.heads.append({name.lower(): value for name, value in self.headers.items()})
            kind = self.path.strip("/").partition("/")[0].replace("-", "_")
            try:
                if fails := script.fails.get(self.path):
                    self.answer(fails.pop(0), b"", **({"Retry-After": script.after} if script.after else {}))
                elif kind.isdigit():
                    self.answer(int(kind), b"")
                else:
                    getattr(self, kind)()
            except OSError:
                self.close_connection = True

        def answer(self, status: int, body: bytes, length: int | None = None, **headers: Any) -> None:
            self.send_response(status)
            self.send_header("Content-Length", str(len(body) if length is None else length))
            for name, value in headers.items():
                self.send_header(name.replace("_", "-"), str(value))
            self.end_headers()
            self.wfile.write(body)

        def ranges(self, body: bytes = BODY, extra: bytes = b"", shift: int = 0, cut: int | None = None) -> None:
            start, end = (int(edge) for edge in self.headers["Range"].removeprefix("bytes=").split("-"))
            piece = body[start : end + 1]
            where = f"bytes {start + shift}-{start + len(piece) - 1}/{len(body)}"
            length = len(piece + extra)
            self.answer(206, (piece + extra)[:cut], length, Content_Range=where, ETag='"1"', Set_Cookie="a=b")
            self.close_connection = cut is not None

        def cut_ranges(self) -> None:
            self.ranges(cut=100_000)

        def stops(self) -> None:
            if self.headers["Range"].startswith("bytes=0-"):
                self.ranges()
            else:
                self.close_connection = True

        def other_bytes(self) -> None:
            self.ranges(shift=1)

        def more_than_asked(self) -> None:
            self.ranges(extra=bytes(100_000))

        def plain(self) -> None:
            self.answer(200, BODY)

        def short(self) -> None:
            self.answer(200, SMALL, 20)
            self.close_connection = True

        def huge(self) -> None:
            self.answer(200, SMALL, 2**50)

        def huge_ranges(self) -> None:
            self.answer(206, b"s", Content_Range=f"bytes 0-0/{2**50}")

        def unsized(self, body: bytes = BODY) -> None:
            self.send_response(200)
            self.end_headers()
            self.wfile.write(body)
            self.close_connection = True

        def endless(self) -> None:
            self.unsized(b"")
            while True:
                self.wfile.write(bytes(2**16))

        def endless_chunks(self) -> None:
            self.send_response(200)
            self.send_header("Transfer-Encoding", "chunked")
            self.end_headers()
            while True:
                self.wfile.write(b"10000\r\n" + bytes(2**16) + b"\r\n")

        def endless_ranges(self) -> None:
            start, end = self.headers["Range"].removeprefix("bytes=").split("-")
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {start}-{end}/{2**40}")
            self.end_headers()
            while True:
                self.wfile.write(bytes(2**16))

        def trickle(self) -> None:
            self.send_response(200)
            self.send_header("Content-Length", "1000000")
            self.end_headers()
            while True:
                self.wfile.write(b"x")
                time.sleep(0.02)

        def slow_head(self) -> None:
            self.wfile.write(b"HTTP/1.1 200 OK\r\nX-A: ")
            while True:
                self.wfile.write(b"b")
                time.sleep(0.02)

        def bomb(self) -> None:
            self.answer(200, gzip.compress(bytes(10_000_000)), Content_Encoding="gzip")

        def nonsense(self) -> None:
            self.wfile.write(b"hello, I am no web server\r\n\r\n")
            self.close_connection = True

        def hang_up(self) -> None:
            self.close_connection = True

        def endless_header(self) -> None:
            while True:
                self.wfile.write(b"HTTP/1.1 200 OK\r\nX-A: " + b"a" * 2**16)

        def loop(self) -> None:
            self.answer(302, b"", Location=self.path)

        def nowhere(self) -> None:
            self.answer(302, b"")

        def away(self) -> None:
            self.answer(302, b"", Location=script.elsewhere)

        def here(self) -> None:
            self.answer(302, b"", Location="/plain")

        def no_ranges(self) -> None:
            if "Range" in self.headers:
                self.answer(416, b"")
            else:
                self.answer(200, SMALL)

        def empty(self) -> None:
            if "Range" in self.headers:
                self.answer(416, b"", Content_Range="bytes */0")
            else:
                self.answer(200, b"")

        def log_message(self, *_: Any) -> None:
            pass

    with http_server(Strange) as address:
        yield address


def record(server: str) -> Reach:
    """Of a record elsewhere, whose source allows this server alone."""
    return Reach("s3://bucket/list.jsonl", (f"{server}/",))


GOOD = {
    "ranges": BODY,
    "cut-ranges": BODY,
    "more-than-asked": BODY,
    "plain": BODY,
    "unsized": BODY,
    "here": BODY,
    "no-ranges": SMALL,
    "empty": b"",
}


@pytest.mark.parametrize("kind", GOOD)
@pytest.mark.parametrize("named_by", ["recipe", "record"])
def test_an_object_is_read_whole_and_at_any_place(server: str, kind: str, named_by: str) -> None:
    body = GOOD[kind]
    with open_url(f"{server}/{kind}/a.jpg", reach=record(server) if named_by == "record" else None) as file:
        assert file.read() == body
        assert file.seek(0, os.SEEK_END) == len(body)
        file.seek(len(body) // 2)
        assert file.read(10) == body[len(body) // 2 :][:10]


@pytest.mark.parametrize("kind", ["ranges", "cut-ranges", "more-than-asked"])
def test_at_known_offsets_exactly_what_is_asked_for_is_read(server: str, script: Script, kind: str) -> None:
    file = open_ranged(f"{server}/{kind}/a.tar", backoff=Backoff(attempts=3, pause=0.01))
    file.seek(1000)
    assert file.read(300_000) == BODY[1000:301_000]
    assert file.seek(-10, os.SEEK_END) == len(BODY) - 10
    assert file.read(100) == BODY[-10:]
    assert file.read(100) == b""
    asked = [head["range"] for head in script.heads]
    assert asked[:2] == ["bytes=0-0", "bytes=1000-300999"]
    assert asked[-1] == f"bytes={len(BODY) - 10}-{len(BODY) - 1}"


@pytest.mark.parametrize("kind", ["plain", "unsized", "endless", "endless-chunks", "huge", "endless-ranges"])
def test_at_known_offsets_nothing_beyond_what_is_asked_for_is_read(server: str, kind: str) -> None:
    file = open_ranged(f"{server}/{kind}/a.tar", backoff=Backoff(attempts=1, pause=0.0))
    file.seek(1000)
    tracemalloc.start()
    try:
        if kind == "endless-ranges":
            assert file.read(3000) == bytes(3000)
        else:
            with pytest.raises(StoreError, match="its server gives no ranges of it"):
                file.read(3000)
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()


def test_an_object_that_is_not_there_has_no_offsets(server: str) -> None:
    with pytest.raises(FileNotFoundError, match="/404/a"):
        open_ranged(f"{server}/404/a.tar").read(1)


def test_an_objects_tag_is_its_servers_or_else_the_hash_of_its_bytes(server: str) -> None:
    assert object_info(f"{server}/ranges/a.jpg").etag == "1"
    assert {object_info(f"{server}/{kind}/a.jpg").etag for kind in ("plain", "unsized")} == {
        hashlib.sha256(BODY).hexdigest()
    }


BAD = {
    "404": "the server answers 404 Not Found",
    "410": "the server answers 410 Gone",
    "401": "the server answers 401 Unauthorized",
    "403": "the server answers 403 Forbidden",
    "451": "the server answers 451 Unavailable For Legal Reasons",
    "400": "the server answers 400 Bad Request",
    "418": "the server answers 418",
    "204": "the server answers 204",
    "501": "the server answers 501 Not Implemented",
    "other-bytes": "its server answers other bytes than those asked for",
    "huge": "it has 1125899906842624 bytes, over the 4 GiB that one medium may have",
    "huge-ranges": "it has 1125899906842624 bytes, over the 4 GiB that one medium may have",
    "endless": "it says no size and goes on after the 0.000976562 GiB that one medium may have",
    "endless-chunks": "it says no size and goes on after the 0.000976562 GiB that one medium may have",
    "bomb": "its server compresses it (gzip), which it was asked not to do",
    "nonsense": "no answer that can be read",
    "endless-header": "no answer that can be read",
    "loop": "it redirects more than 8 times",
    "nowhere": "it redirects to nowhere",
}
AWAY = {
    "429": "the server answers 429 Too Many Requests",
    "500": "the server answers 500 Internal Server Error",
    "503": "the server answers 503 Service Unavailable",
    "short": "the connection was cut",
    "hang-up": "the connection was cut",
    "trickle": "no answer in time",
    "slow-head": "no answer in time",
}


@pytest.mark.parametrize("kind", [*BAD, *AWAY])
def test_a_record_is_bad_for_what_its_host_does(
    server: str, script: Script, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    seconds = 0.3 if AWAY.get(kind, "").startswith("no answer") else 20.0
    monkeypatch.setattr(web, "OF_RECORDS", replace(web.OF_RECORDS, unsaid_size=2**20, seconds=seconds))
    url = f"{server}/{kind}/a.jpg"
    with pytest.raises(BadData) as caught:
        open_url(url, reach=record(server))
    reason = BAD.get(kind) or f"its host {server[7:]} does not serve it now: {AWAY[kind]}"
    assert str(caught.value).startswith(f"{url}: {reason}")
    if kind not in ("loop", "trickle", "slow-head", "hang-up"):  # of which aiohttp repeats the last at once
        assert len(script.lines) == (3 if kind in AWAY else 1), "only what may pass is asked for again"


def test_a_failure_that_passes_costs_nothing(server: str, script: Script) -> None:
    script.fails["/plain/a.jpg"] = [503, 429]
    with open_url(f"{server}/plain/a.jpg", reach=record(server)) as file:
        assert file.read() == BODY


@pytest.mark.parametrize(("after", "asked"), [("1", 2), ("3600", 1), ("Fri, 31 Dec 9999 23:59:59 GMT", 1), ("x", 2)])
def test_a_server_is_left_alone_as_long_as_it_asks_within_bounds(
    server: str, script: Script, after: str, asked: int
) -> None:
    script.fails["/plain/a.jpg"], script.after = [503], after
    began = time.monotonic()
    if asked == 1:
        with pytest.raises(BadData, match="does not serve it now"):
            object_info(f"{server}/plain/a.jpg", reach=record(server))
    else:
        object_info(f"{server}/unsized/a.jpg", reach=record(server))
        open_url(f"{server}/plain/a.jpg", reach=record(server)).close()
        assert time.monotonic() - began > (1 if after == "1" else 0)
    assert script.lines.count("/plain/a.jpg") == asked


def test_a_host_that_keeps_failing_is_left_alone_for_the_rest_of_the_file(server: str, script: Script) -> None:
    first, second = (Reach(f"s3://bucket/{name}.jsonl", (f"{server}/",)) for name in "ab")

    def fail(number: int) -> None:
        for _ in range(number):
            with pytest.raises(BadData, match="does not serve it now"):
                object_info(f"{server}/500/a.jpg", reach=first)

    fail(HOST_RECORDS - 1)
    for _ in range(4):
        object_info(f"{server}/ranges/a.jpg", reach=first)  # which is no success yet
        open_url(f"{server}/ranges/a.jpg", reach=first).close()
    fail(HOST_RECORDS)
    script.lines.clear()
    for asked in (object_info, open_url):
        with pytest.raises(BadData) as caught:
            asked(f"{server}/ranges/a.jpg", reach=first)
        assert str(caught.value) == (
            f"{server}/ranges/a.jpg: not asked for, since its host {server[7:]} keeps failing: the server answers 500 "
            f"Internal Server Error"
        )
    assert not script.lines
    object_info(f"{server}/ranges/a.jpg", reach=second)


def test_a_host_that_begins_to_serve_and_stops_each_time_is_left_alone(server: str) -> None:
    reach = record(server)
    reasons = []
    for number in range(9):
        try:
            with open_url(f"{server}/stops/{number}", reach=reach) as file:
                file.read()
        except BadData as error:
            reasons.append(str(error).partition("/stops/")[2][3:])
    assert reasons[0].startswith("its host")
    assert len(reasons) == 9
    assert reasons[-1].startswith("not asked for")
    assert sum(reason.startswith("its host") for reason in reasons) <= 2 * HOST_RECORDS


@pytest.mark.parametrize(
    ("kind", "transient"), [("500", True), ("429", True), ("short", True), ("403", False), ("401", False)]
)
def test_a_records_own_store_that_is_away_or_denies_is_no_fault_of_the_record(
    server: str, kind: str, transient: bool
) -> None:
    own = Reach(f"{server}/list.jsonl", ())
    for _ in range(HOST_RECORDS + 1):
        with pytest.raises(StoreError, match="run again to carry on") as caught:
            open_url(f"{server}/{kind}/a.jpg", reach=own)
        assert caught.value.transient == transient
    with pytest.raises(OSError, match="run again to carry on"):
        object_info(f"{server}/{kind}/a.jpg", reach=own)
    with pytest.raises(FileNotFoundError):
        object_info(f"{server}/404/a.jpg", reach=own)
    with pytest.raises(BadData, match="400 Bad Request"):
        object_info(f"{server}/400/a.jpg", reach=own)


def test_a_recipe_is_told_what_its_server_does(server: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as none:
        dead = f"http://127.0.0.1:{none.getsockname()[1]}"
    for url, said in {
        f"{dead}/a.jpg": rf"read in 3 attempts from the store at {dead} \(Connection refused\); check that it is up",
        f"{server}/503/a.jpg": r"\(the server answers 503 Service Unavailable\); check that it is up",
        f"{server}/403/a.jpg": r"\(the server answers 403 Forbidden\); check the credentials",
        "http://no-such-name.invalid/a.jpg": r"\(.*name.*\); check",
    }.items():
        with pytest.raises(StoreError, match=said):
            open_url(url)
    with pytest.raises(FileNotFoundError):
        open_url(f"{server}/404/a.jpg")


def test_every_status_has_one_meaning() -> None:
    causes = {status: failure_of_status(status).cause for status in range(400, 600)}
    assert {status for status, cause in causes.items() if cause == "absent"} == {404, 410}
    assert {status for status, cause in causes.items() if cause == "denied"} == {401, 402, 403, 407, 451}
    passing = {408, 421, 425, 429, *range(500, 600)} - {501, 505}
    assert {status for status, cause in causes.items() if cause == "transient"} == passing


def test_an_error_of_fsspecs_means_its_cause() -> None:
    away = FileNotFoundError("http://h/a")
    away.__cause__ = ConnectionResetError()
    assert isinstance(web_error("http://h/a", away), StoreError)
    assert isinstance(web_error("http://h/a", FileNotFoundError("http://h/a")), FileNotFoundError)
    assert web_error("http://h/a", KeyError("a")) is None


def test_a_name_and_password_go_to_their_server_alone(server: str, script: Script) -> None:
    secret = f"Basic {base64.b64encode(b'user:word').decode()}"
    script.elsewhere = f"{server.replace('127.0.0.1', 'localhost')}/plain"
    reach = Reach("s3://b/list.jsonl", (f"{server}/", script.elsewhere))
    named = server.replace("http://", "http://user:word@")
    for asker in (None, reach):
        script.heads.clear()
        object_info(f"{named}/here", reach=asker)
        assert {head.get("authorization") for head in script.heads} == {secret}
        script.heads.clear()
        object_info(f"{named}/away", reach=asker)
        sent = {(head["host"], head.get("authorization")) for head in script.heads}
        assert sent == {(server[7:], secret), (script.elsewhere[7:].partition("/")[0], None)}


def test_no_cookie_of_one_request_is_in_another(server: str, script: Script) -> None:
    for asker in (None, record(server)):
        open_url(f"{server}/ranges", reach=asker).read()
    assert not any("cookie" in head for head in script.heads)


def test_the_environments_proxy_and_passwords_are_for_recipes_alone(
    server: str, script: Script, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    visits = []

    class Proxy(socketserver.StreamRequestHandler):
        def handle(self) -> None:
            visits.append(self.rfile.readline().decode().split()[1])

    (tmp_path / "netrc").write_text("machine 127.0.0.1 login user password word\n")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), Proxy) as proxy:
        threading.Thread(target=proxy.serve_forever, args=(0.01,), daemon=True).start()
        for name in ("no_proxy", "NO_PROXY"):
            monkeypatch.delenv(name, raising=False)
        monkeypatch.setenv("http_proxy", f"http://127.0.0.1:{proxy.server_address[1]}")
        object_info(f"{server}/ranges/a.jpg", reach=record(server))
        object_info(f"{server}/ranges/a.jpg", reach=Reach(f"{server}/list.jsonl"))
        assert not visits
        assert not any("authorization" in head for head in script.heads)
        with pytest.raises(StoreError):
            open_url(f"{server}/ranges/a.jpg")
        assert set(visits) == {f"{server}/ranges/a.jpg"}
        proxy.shutdown()


@pytest.mark.parametrize(("kind", "body"), [("unsized", BODY), ("no-ranges", SMALL)])
def test_a_body_without_ranges_is_on_disk_and_not_in_memory(server: str, kind: str, body: bytes) -> None:
    with open_url(f"{server}/{kind}") as file:
        assert os.pread(file.fileno(), len(body) + 1, 0) == body


def test_a_recipes_object_is_listed_and_fetched(server: str) -> None:
    (found,) = list_objects(f"{server}/ranges/a.bin")
    assert (found.size, found.etag) == (len(BODY), "1")
    assert fetch_file(found.url).read_bytes() == BODY
    with pytest.raises(StoreError, match=r"\(the server answers 503 Service Unavailable\); check that it is up"):
        fetch_file(f"{server}/503/tokenizer.json")
