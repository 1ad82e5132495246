"""An S3 bucket of any number of objects that are only listed: what a million objects cost, without putting them first.

In: how many objects, how many to a folder, and how long each request takes to be answered. Out: an address at which the
bucket `data` answers ListObjectsV2 over HTTP, from a process of its own; nothing in it can be read. Object n is
`clips/FOLDER/clip-N.mp4`, or `clips/clip-N.mp4` where all are in one folder.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from http.server import BaseHTTPRequestHandler
from multiprocessing.connection import Connection
from typing import Any
from urllib.parse import parse_qs, urlsplit

from testing.http_server import http_server

_PAGE = 1000  # keys of an answer, as S3 gives
_START_SECONDS = 60.0


@dataclass(frozen=True)
class ListedBucket:
    """What the bucket holds. objects_per_folder: 0 where all are in one folder. latency: seconds before each answer."""

    objects: int
    objects_per_folder: int = 1000
    latency: float = 0.0

    def key(self, number: int) -> str:
        """Of an object, in the order of the numbers."""
        return f"{self.folder(number)}clip-{number:08d}.mp4"

    def folder(self, number: int) -> str:
        """In which an object is."""
        return f"clips/{number // self.objects_per_folder:06d}/" if self.objects_per_folder else "clips/"

    def first_from(self, key: str) -> int:
        """The number of the first object whose key is `key` or comes after it."""
        low, high = 0, self.objects
        while low < high:
            middle = (low + high) // 2
            low, high = (middle + 1, high) if self.key(middle) < key else (low, middle)
        return low

    def page(self, query: dict[str, str]) -> bytes:
        """The answer to ListObjectsV2."""
        prefix, delimiter = query.get("prefix", ""), query.get("delimiter", "")
        start = max(self.first_from(prefix), self.first_from(query.get("start-after", "") + "\0"))
        number, end = int(query.get("continuation-token", start)), self.first_from(prefix + "\U0010ffff")
        entries: list[str] = []
        while number < end and len(entries) < _PAGE:
            key = self.key(number)
            inside, found, _ = key[len(prefix) :].partition(delimiter) if delimiter else (key, "", "")
            if found:
                folder = prefix + inside + delimiter
                entries.append(f"<CommonPrefixes><Prefix>{folder}</Prefix></CommonPrefixes>")
                number = self.first_from(folder + "\U0010ffff")
            else:
                about = f"<Size>{number % 977 + 1}</Size><ETag>&quot;{number * 0x9E3779B97F4A7C15:032x}&quot;</ETag>"
                about += "<LastModified>2026-01-01T00:00:00.000Z</LastModified><StorageClass>STANDARD</StorageClass>"
                entries.append(f"<Contents><Key>{key}</Key>{about}</Contents>")
                number += 1
        more = f"<NextContinuationToken>{number}</NextContinuationToken>" if number < end else ""
        head = f"<IsTruncated>{'true' if more else 'false'}</IsTruncated><KeyCount>{len(entries)}</KeyCount>"
        return f"<ListBucketResult><Name>data</Name>{head}{more}{''.join(entries)}</ListBucketResult>".encode()


@contextlib.contextmanager
def listed_bucket(bucket: ListedBucket) -> Iterator[dict[str, Any]]:
    """Serve the bucket; the options with which `s3://data` is listed."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    server = context.Process(target=_serve, args=(bucket, theirs), daemon=True)
    server.start()
    try:
        if not ours.poll(_START_SECONDS):
            raise TimeoutError("the server of the listed bucket did not start")
        yield {"endpoint_url": ours.recv(), "anon": True}
    finally:
        server.kill()
        server.join()


def _serve(bucket: ListedBucket, told: Connection) -> None:
    with http_server(partial(BucketHandler, bucket)) as address:
        told.send(address)
        with contextlib.suppress(EOFError):
            told.recv()  # until whoever asked for it is gone


class BucketHandler(BaseHTTPRequestHandler):
    """Answers the requests for a bucket."""

    protocol_version = "HTTP/1.1"

    def __init__(self, bucket: ListedBucket, *arguments: Any) -> None:
        self.bucket = bucket
        super().__init__(*arguments)

    def do_GET(self) -> None:
        """Answer a listing, and a request for an object with its absence."""
        time.sleep(self.bucket.latency)
        url = urlsplit(self.path)
        query = {name: values[0] for name, values in parse_qs(url.query).items()}
        is_listing = "list-type" in query
        body = self.bucket.page(query) if is_listing else b"<Error><Code>NoSuchKey</Code></Error>"
        self.send_response(200 if is_listing else 404)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    do_HEAD = do_GET  # noqa: N815

    def log_message(self, format: str, *args: Any) -> None:
        """Log nothing."""
