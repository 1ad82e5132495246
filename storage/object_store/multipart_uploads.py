"""Unfinished uploads that killed writers left in an S3 bucket: stored, and paid for, until they are aborted.

In: a bucket's settings and a prefix. Out: how many uploads were aborted. `obstore` has no call for it, so the two
requests are signed here, by AWS Signature Version 4
(https://docs.aws.amazon.com/AmazonS3/latest/API/sig-v4-header-based-auth.html).
"""

from __future__ import annotations

import datetime
import hashlib
import hmac
import urllib.error
import urllib.request
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator
from urllib.parse import quote, urlencode, urlsplit

from storage.object_store.credentials import Keys
from storage.object_store.options import Settings

_EMPTY_SHA256 = hashlib.sha256(b"").hexdigest()


def abort_uploads(settings: Settings, bucket: str, prefix: str) -> int:
    """Abort every unfinished upload of a key below `prefix`. Raises OSError where the store refuses.

    Only while no other writer works there. Where the client gets its keys from the machine, none are aborted.
    """
    if settings.current_keys is None:
        return 0
    keys = settings.current_keys()
    aborted = 0
    for key, upload in list(_unfinished(settings, keys, bucket, prefix)):
        try:
            _request(settings, keys, "DELETE", f"/{bucket}/{key}", {"uploadId": upload})
            aborted += 1
        except urllib.error.HTTPError as error:
            if error.code != 404:  # it has ended since it was listed
                raise
    return aborted


def _unfinished(settings: Settings, keys: Keys, bucket: str, prefix: str) -> Iterator[tuple[str, str]]:
    """(key, upload id), by pages."""
    # Without `encoding-type=url`, which some stores repeat in their answer and do not heed.
    query = {"uploads": "", "prefix": prefix}
    while True:
        page = ElementTree.fromstring(_request(settings, keys, "GET", f"/{bucket}", query))
        fields = _fields(page)
        for upload in (_fields(element) for element in page if element.tag.endswith("Upload")):
            if (key := upload["Key"]).startswith(prefix):
                yield key, upload["UploadId"]
        if fields.get("IsTruncated") != "true" or not fields.get("NextKeyMarker"):
            return
        query |= {"key-marker": fields["NextKeyMarker"], "upload-id-marker": fields["NextUploadIdMarker"]}


def _fields(element: ElementTree.Element) -> dict[str, str]:
    return {child.tag.rpartition("}")[2]: child.text or "" for child in element}


def _request(settings: Settings, keys: Keys, method: str, path: str, query: dict[str, str]) -> bytes:
    """The body of the answer to a signed request."""
    path, search = quote(path, safe="/-_.~"), urlencode(sorted(query.items()), quote_via=quote, safe="-_.~")
    now = datetime.datetime.now(datetime.UTC).strftime("%Y%m%dT%H%M%SZ")
    scope = f"{now[:8]}/{settings.config['region']}/s3/aws4_request"
    headers = {"host": urlsplit(settings.endpoint).netloc, "x-amz-content-sha256": _EMPTY_SHA256, "x-amz-date": now}
    if keys.token:
        headers["x-amz-security-token"] = keys.token
    names, lines = ";".join(headers), "".join(f"{name}:{value}\n" for name, value in headers.items())
    canonical = "\n".join([method, path, search, lines, names, _EMPTY_SHA256])
    text = "\n".join(["AWS4-HMAC-SHA256", now, scope, hashlib.sha256(canonical.encode()).hexdigest()])
    signature = f"AWS4{keys.secret}".encode()
    for part in [*scope.split("/"), text]:
        signature = hmac.digest(signature, part.encode(), "sha256")
    headers["authorization"] = (
        f"AWS4-HMAC-SHA256 Credential={keys.key}/{scope}, SignedHeaders={names}, Signature={signature.hex()}"
    )
    request = urllib.request.Request(f"{settings.endpoint}{path}?{search}", method=method)
    for name, value in headers.items():
        request.add_unredirected_header(name, value)  # a redirect may lead to another host
    with urllib.request.urlopen(request, timeout=30) as answer:
        return bytes(answer.read())
