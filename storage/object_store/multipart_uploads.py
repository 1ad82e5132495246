"""Unfinished uploads that killed writers left in an S3 bucket: kept, and paid for, until somebody ends them.

In: a bucket's settings and a prefix. Out: how many uploads were ended. `obstore` has no call for it, so the two
requests are signed here, by AWS Signature Version 4
(https://docs.aws.amazon.com/AmazonS3/latest/API/sig-v4-header-based-auth.html).
"""

from __future__ import annotations

import datetime
import hashlib
import hmac
import urllib.request
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator
from urllib.parse import quote, unquote, urlsplit

from storage.object_store.credentials import Keys
from storage.object_store.options import Settings

_SECONDS = 30
_NOTHING = hashlib.sha256(b"").hexdigest()


def end_uploads(settings: Settings, bucket: str, prefix: str) -> int:
    """End every unfinished upload of a key below `prefix`. Raises OSError where the store does not do as asked.

    Only while no other writer works there. Without keys at hand (the client gets them from the machine) none are ended.
    """
    if (keys := settings.current_keys()) is None:
        return 0
    found = list(_unfinished(settings, keys, bucket, prefix))
    for key, upload in found:
        _request(settings, keys, "DELETE", bucket, key, {"uploadId": upload})
    return len(found)


def _unfinished(settings: Settings, keys: Keys, bucket: str, prefix: str) -> Iterator[tuple[str, str]]:
    """(key, upload id), by pages."""
    query = {"uploads": "", "prefix": prefix, "encoding-type": "url"}
    while True:
        page = ElementTree.fromstring(_request(settings, keys, "GET", bucket, "", query))
        fields = {element.tag.rpartition("}")[2]: element.text or "" for element in page}
        decoded = unquote if fields.get("EncodingType") == "url" else str
        for element in page:
            if element.tag.endswith("Upload"):
                upload = {part.tag.rpartition("}")[2]: part.text or "" for part in element}
                if (key := decoded(upload["Key"])).startswith(prefix):
                    yield key, upload["UploadId"]
        if fields.get("IsTruncated") != "true" or not fields.get("NextKeyMarker"):
            return
        query |= {"key-marker": decoded(fields["NextKeyMarker"]), "upload-id-marker": fields["NextUploadIdMarker"]}


def _request(settings: Settings, keys: Keys, method: str, bucket: str, key: str, query: dict[str, str]) -> bytes:
    now = datetime.datetime.now(datetime.UTC).strftime("%Y%m%dT%H%M%SZ")
    path = quote(f"/{bucket}/{key}" if key else f"/{bucket}", safe="/-_.~")
    asked = "&".join(f"{quote(name, safe='-_.~')}={quote(value, safe='-_.~')}" for name, value in sorted(query.items()))
    headers = {"host": urlsplit(settings.endpoint).netloc, "x-amz-content-sha256": _NOTHING, "x-amz-date": now}
    if keys.token:
        headers["x-amz-security-token"] = keys.token
    headers["authorization"] = _signed(method, path, asked, headers, keys, settings.config["region"])
    url = f"{settings.endpoint.rstrip('/')}{path}?{asked}"
    with urllib.request.urlopen(
        urllib.request.Request(url, method=method, headers=headers), timeout=_SECONDS
    ) as answer:
        return bytes(answer.read())


def _signed(method: str, path: str, query: str, headers: dict[str, str], keys: Keys, region: str) -> str:
    """The value of the authorization header over all `headers`, which are in order."""
    names = ";".join(headers)
    lines = "".join(f"{name}:{value}\n" for name, value in headers.items())
    canonical = "\n".join([method, path, query, lines, names, headers["x-amz-content-sha256"]])
    now = headers["x-amz-date"]
    scope = f"{now[:8]}/{region}/s3/aws4_request"
    text = "\n".join(["AWS4-HMAC-SHA256", now, scope, hashlib.sha256(canonical.encode()).hexdigest()])
    signing = f"AWS4{keys.secret}".encode()
    for part in scope.split("/"):
        signing = hmac.digest(signing, part.encode(), "sha256")
    signature = hmac.digest(signing, text.encode(), "sha256").hex()
    return f"AWS4-HMAC-SHA256 Credential={keys.key}/{scope}, SignedHeaders={names}, Signature={signature}"
