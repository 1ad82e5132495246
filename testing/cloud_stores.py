"""What Google's and Azure's stores answer to the client's requests, served here: conditions, versions, parts, listings.

No emulator that a package brings answers the requests by which `obstore` puts objects on Google's store, and Azure's
needs another language's packages. Written after the reference of both (https://cloud.google.com/storage/docs/xml-api,
https://learn.microsoft.com/rest/api/storageservices). Signatures are not checked.
"""

from __future__ import annotations

import base64
import contextlib
import itertools
import json
import re
import threading
from abc import abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from email.utils import formatdate
from functools import partial
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit
from xml.sax.saxutils import escape

from testing.http_server import http_server

_VERSIONS = itertools.count(1_700_000_000_000_001)


@dataclass
class Kept:
    """An object: its bytes and its version, a number that no other object or version has."""

    data: bytes
    version: int = field(default_factory=lambda: next(_VERSIONS))
    written: str = field(default_factory=lambda: formatdate(usegmt=True))

    @property
    def etag(self) -> str:
        """As a header has it."""
        return f'"0x{self.version:X}"'


@dataclass
class CloudStore:
    """A running store. lines: the first lines of the requests so far. parts: of uploads that are not finished."""

    kind: str
    objects: dict[str, Kept] = field(default_factory=dict)
    parts: dict[str, dict[str, bytes]] = field(default_factory=dict)
    lines: list[str] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def url(self) -> str:
        """Of its one bucket."""
        return f"{self.kind}://data"


@contextlib.contextmanager
def cloud_store(kind: str, folder: Path) -> Iterator[CloudStore]:
    """Serve a store, `gs` or `az`, with a bucket `data`. folder: for a file that its client reads."""
    store = CloudStore(kind)
    with http_server(partial({"gs": _Google, "az": _Azure}[kind], store)) as address:
        if kind == "gs":
            account = {"gcs_base_url": address, "disable_oauth": True}
            file = folder / "account.json"
            file.write_text(json.dumps({**account, "client_email": "", "private_key": "", "private_key_id": ""}))
            store.options = {"token": str(file), "endpoint_url": address}
        else:
            key = base64.b64encode(b"no secret").decode()
            store.options = {"account_name": "some", "account_key": key, "account_host": f"{address}/some"}
        yield store


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    place = r"/data(?:/(.*))?"  # of an object, of which the key is the group

    def __init__(self, store: CloudStore, *arguments: Any) -> None:
        self.store = store
        super().__init__(*arguments)

    def handle_any(self) -> None:
        """Answer one request, while no other is answered."""
        url = urlsplit(self.path)
        found = re.fullmatch(self.place, unquote(url.path))
        query = {name: values[0] for name, values in parse_qs(url.query, keep_blank_values=True).items()}
        body = self.rfile.read(int(self.headers.get("content-length") or 0))
        with self.store.lock:
            self.store.lines.append(f"{self.command} {self.path}")
            if not found:
                self.answer(404, "NoSuchBucket")
            elif not found[1]:
                self.list_objects(query)
            elif self.command in ("GET", "HEAD"):
                self.read(found[1])
            else:
                self.change(found[1], query, body)

    do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = handle_any  # noqa: N815

    @abstractmethod
    def change(self, key: str, query: dict[str, str], body: bytes) -> None:
        """Answer a request that is not for reading."""

    @abstractmethod
    def list_objects(self, query: dict[str, str]) -> None:
        """Answer a request for a listing."""

    def versions(self, kept: Kept) -> dict[str, str]:
        """The headers that name an object's version."""
        return {"ETag": kept.etag}

    def read(self, key: str) -> None:
        """Answer a request for an object or some bytes of it."""
        kept = self.store.objects.get(key)
        if kept is None:
            return self.answer(404, "NoSuchKey")
        if self.headers.get("if-match", kept.etag) != kept.etag:
            return self.answer(412, "PreconditionFailed")
        first, last, status = 0, len(kept.data) - 1, 200
        more: dict[str, str] = {}
        asked = self.headers.get("range") or self.headers.get("x-ms-range") or ""
        if found := re.fullmatch(r"bytes=(\d+)-(\d+)", asked):
            if int(found[1]) > last:
                return self.answer(416, "InvalidRange")
            first, last, status = int(found[1]), min(int(found[2]), last), 206
            more = {"Content-Range": f"bytes {first}-{last}/{len(kept.data)}"}
        return self.answer(status, "", kept.data[first : last + 1], {**self.versions(kept), **more})

    def keep(self, key: str, data: bytes, status: int = 200) -> None:
        """Keep an object and answer so."""
        kept = self.store.objects[key] = Kept(data)
        self.answer(status, headers=self.versions(kept))

    def remove(self, key: str, status: int) -> None:
        """Remove an object and answer so."""
        self.answer(status if self.store.objects.pop(key, None) else 404, "NoSuchKey")

    def split(self, query: dict[str, str]) -> tuple[list[str], list[str]]:
        """The keys and the common prefixes of a listing."""
        prefix, delimiter = query.get("prefix", ""), query.get("delimiter", "")
        keys, folders = [], set()
        for key in sorted(self.store.objects):
            if key.startswith(prefix):
                inside, found, _ = key[len(prefix) :].partition(delimiter) if delimiter else (key, "", "")
                if found:
                    folders.add(prefix + inside + delimiter)
                else:
                    keys.append(key)
        return keys, sorted(folders)

    def answer(self, status: int, code: str = "", body: bytes = b"", headers: Mapping[str, str] | None = None) -> None:
        """Send an answer; with a code, one of S3's kind where the status is an error."""
        if code and status >= 400:
            body = f"<Error><Code>{code}</Code><Message>Said here</Message></Error>".encode()
        self.send_response(status)
        headers = {"Last-Modified": formatdate(usegmt=True), "Content-Length": str(len(body)), **(headers or {})}
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        """Log nothing."""


class _Google(_Handler):
    """The XML API: generations are versions, and a condition names one, 0 where there must be none."""

    def versions(self, kept: Kept) -> dict[str, str]:
        """The headers that name an object's version."""
        return {"ETag": kept.etag, "x-goog-generation": str(kept.version)}

    def change(self, key: str, query: dict[str, str], body: bytes) -> None:
        """Answer a request that is not for reading."""
        upload = query.get("uploadId", "")
        if "uploads" in query:
            upload = str(next(_VERSIONS))
            self.store.parts[upload] = {}
            fields = f"<Bucket>data</Bucket><Key>{escape(key)}</Key><UploadId>{upload}</UploadId>"
            self.answer(200, body=f"<InitiateMultipartUploadResult>{fields}</InitiateMultipartUploadResult>".encode())
        elif upload and self.command == "PUT":
            self.store.parts[upload][query["partNumber"]] = body
            self.answer(200, headers={"ETag": f'"{query["partNumber"]}"'})
        elif upload and self.command == "DELETE":
            self.answer(204 if self.store.parts.pop(upload, None) else 404)
        elif upload:
            parts = self.store.parts.pop(upload)
            self.store.objects[key] = Kept(b"".join(parts[number] for number in sorted(parts, key=int)))
            fields = f"<ETag>{escape(self.store.objects[key].etag)}</ETag>"
            done = f"<CompleteMultipartUploadResult>{fields}</CompleteMultipartUploadResult>"
            self.answer(200, "", done.encode(), self.versions(self.store.objects[key]))
        elif self.command == "DELETE":
            self.remove(key, 204)
        else:
            now = self.store.objects.get(key)
            wanted = self.headers.get("x-goog-if-generation-match")
            if wanted is not None and int(wanted) != (now.version if now else 0):
                self.answer(412, "PreconditionFailed")
            else:
                self.keep(key, body)

    def list_objects(self, query: dict[str, str]) -> None:
        """Answer a request for a listing."""
        keys, folders = self.split(query)
        entries = "".join(
            f"<Contents><Key>{escape(key)}</Key><Size>{len(self.store.objects[key].data)}</Size>"
            f"<LastModified>2026-01-01T00:00:00.000Z</LastModified>"
            f"<ETag>{escape(self.store.objects[key].etag)}</ETag></Contents>"
            for key in keys
        )
        entries += "".join(f"<CommonPrefixes><Prefix>{escape(folder)}</Prefix></CommonPrefixes>" for folder in folders)
        self.answer(200, body=f"<ListBucketResult>{entries}</ListBucketResult>".encode())


class _Azure(_Handler):
    """Blobs: ETags are versions."""

    place = r"/some/data(?:/(.*))?"

    def change(self, key: str, query: dict[str, str], body: bytes) -> None:
        """Answer a request that is not for reading."""
        now = self.store.objects.get(key)
        if query.get("comp") == "block":
            self.store.parts.setdefault(key, {})[query["blockid"]] = body
            self.answer(201)
        elif query.get("comp") == "blocklist":
            parts = self.store.parts.pop(key)
            named = re.findall(r"<(?:Latest|Uncommitted)>([^<]*)</", body.decode())
            self.keep(key, b"".join(parts[name] for name in named), 201)
        elif self.command == "DELETE":
            self.remove(key, 202)
        elif self.headers.get("if-none-match") == "*" and now:
            self.answer(409, "BlobAlreadyExists")
        elif "if-match" in self.headers and (now is None or self.headers["if-match"] != now.etag):
            self.answer(412, "ConditionNotMet")
        else:
            self.keep(key, body, 201)

    def list_objects(self, query: dict[str, str]) -> None:
        """Answer a request for a listing."""
        keys, folders = self.split(query)
        entries = "".join(
            f"<Blob><Name>{escape(key)}</Name><Properties><Last-Modified>{self.store.objects[key].written}"
            f"</Last-Modified><Etag>{self.store.objects[key].etag.strip(chr(34))}</Etag>"
            f"<Content-Length>{len(self.store.objects[key].data)}</Content-Length>"
            f"<Content-Type>application/octet-stream</Content-Type></Properties></Blob>"
            for key in keys
        )
        entries += "".join(f"<BlobPrefix><Name>{escape(folder)}</Name></BlobPrefix>" for folder in folders)
        self.answer(200, body=f"<EnumerationResults><Blobs>{entries}</Blobs></EnumerationResults>".encode())
