"""Requests of our own to a store: their keys are for that store alone."""

from __future__ import annotations

from http.server import BaseHTTPRequestHandler
from typing import Any

from storage.object_store.multipart_uploads import abort_uploads
from storage.object_store.options import s3_settings
from testing.http_server import http_server

EMPTY = b"<ListMultipartUploadsResult><IsTruncated>false</IsTruncated></ListMultipartUploadsResult>"


def test_a_store_that_redirects_elsewhere_sends_no_keys_there() -> None:
    sent: list[tuple[str, set[str]]] = []

    class Redirecting(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            host, _, port = self.headers["Host"].partition(":")
            sent.append((host, {name.lower() for name in self.headers} & {"authorization", "x-amz-security-token"}))
            self.send_response(307 if host == "127.0.0.1" else 200)
            self.send_header("Location", f"http://localhost:{port}/")
            self.end_headers()
            self.wfile.write(EMPTY)

        def log_message(self, *_: Any) -> None:
            pass

    with http_server(Redirecting) as endpoint:
        options = {"key": "k", "secret": "s", "token": "t", "endpoint_url": endpoint}
        assert abort_uploads(s3_settings("b", options), "b", "run/") == 0
    assert sent == [("127.0.0.1", {"authorization", "x-amz-security-token"}), ("localhost", set())]
