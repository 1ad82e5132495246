"""What an object store's refusal means: whether to ask again, and the sentence that a user is told in the end.

In: an exception of `obstore`, whose text holds the status and the XML that the store answered. Out: a `StoreError`, or
FileNotFoundError where there is no such object or bucket.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from storage.errors import UserError

Kind = Literal["transient", "denied", "expired", "full", "changed", "unnamable", "unsupported", "refused"]
"""transient: the same request may succeed in a moment. expired: with fresh credentials. unnamable: the client can ask
for no object of this name. unsupported: the store has no such request. refused: whatever else."""

_REMEDIES: dict[Kind, str] = {
    "transient": "check that it is up and the credentials, and run again to carry on",
    "denied": "check the credentials and what they allow, and run again to carry on",
    "expired": "the credentials have expired: get fresh ones (storage.options, the AWS_ variables or the profile's "
    "file, whichever they are from) and run again to carry on",
    "full": "the store is full: free space or raise the quota there, or set storage.root elsewhere, and run again to "
    "carry on",
    "changed": "the object was replaced while it was read: leave sources alone during a run, and run again",
    "unnamable": "give the object another name",
    "unsupported": "the store does not know the request",
    "refused": "check the URL, the endpoint and storage.options",
}
_PREPOSITIONS = {"read": "from", "written": "to", "listed": "by", "removed": "from"}
_EXPIRED = re.compile("Expired|TokenRefreshRequired")
_FULL = re.compile("Quota|InsufficientStorage|StorageFull|StorageLimit")
_TRANSIENT = {"SlowDown", "InternalError", "RequestTimeout", "ServiceUnavailable", "Throttling", "ThrottlingException"}
_METADATA_SERVICE = "http://169.254.169.254"


def past_end(raised: Exception) -> bool:
    """Whether it is S3's answer to a range that begins at or after the end of the object."""
    return "status code: 416" in str(raised)


class StoreError(UserError, OSError):
    """A request to an object store that failed: an OSError to whoever tries again, a UserError to whoever gives up."""

    def __init__(self, message: str, reason: str = "", kind: Kind = "transient") -> None:
        super().__init__(message)
        self.reason, self.kind = reason, kind
        self.transient = kind == "transient"


@dataclass(frozen=True)
class Request:
    """What was asked, for messages. doing: read, written, listed, removed. secrets: never to be repeated."""

    url: str
    doing: str
    endpoint: str = ""
    secrets: tuple[str, ...] = ()

    def error(self, raised: Exception, attempts: int = 1) -> Exception:
        """What the exception means: FileNotFoundError or StoreError. attempts: the request's, this one included."""
        if isinstance(raised, StoreError):
            return raised
        text = str(raised).partition("Debug source:")[0]
        status = int(found[1]) if (found := re.search(r"status code: (\d{3})", text)) else None
        code = found[1] if (found := re.search(r"<Code>([^<]*)</Code>", text)) else ""
        if isinstance(raised, FileNotFoundError) or status == 404 or code in ("NoSuchKey", "NoSuchBucket"):
            return FileNotFoundError(self.url)
        kind = _kind(raised, status, code, text)
        reason = self._reason(text, status, code)
        if _METADATA_SERVICE in text:
            reason = "no credentials: none in storage.options, the environment or a profile, nor any of the machine"
        return self.failure(reason, kind, attempts)

    def failure(self, reason: str, kind: Kind, attempts: int = 1) -> StoreError:
        """The error in one sentence."""
        tried = f" in {attempts} attempts" if attempts > 1 else ""
        store = f" {_PREPOSITIONS[self.doing]} the store{f' at {self.endpoint}' if self.endpoint else ''}"
        message = f"{self.url}: cannot be {self.doing}{tried}{store} ({reason}); {_REMEDIES[kind]}"
        return StoreError(message, reason, kind)

    def _reason(self, text: str, status: int | None, code: str) -> str:
        message = found[1] if (found := re.search(r"<Message>([^<]*)</Message>", text)) else ""
        if status:
            reason = f"{status} {code}: {message}" if message else f"{status} {code}"
        else:
            reason = text.partition(" - ")[2] or text
        reason = " ".join(reason.split()).strip(" :")
        for secret in self.secrets:
            reason = reason.replace(secret, "...")
        return reason


def _kind(raised: Exception, status: int | None, code: str, text: str) -> Kind:
    if _FULL.search(code) or status == 507:
        return "full"
    if _EXPIRED.search(code):
        return "expired"
    if _METADATA_SERVICE in text or status in (401, 403):
        return "denied"
    if isinstance(raised, ValueError):
        return "unnamable"
    if status == 501 or code == "NotImplemented":
        return "unsupported"
    if type(raised).__name__ == "PreconditionError":
        return "changed"
    if code in _TRANSIENT or status in (408, 409, 429) or (status or 0) >= 500:
        return "transient"
    return "transient" if status is None and "HTTP error" in text else "refused"
