"""What a failed request to an object store means: whether to repeat it, and the sentence that the user reads.

In: an exception of `obstore`, whose text holds the status and the XML that the store answered. Out: a `StoreError`, or
FileNotFoundError where there is no such object or bucket.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from storage.errors import UserError

Kind = Literal["transient", "denied", "expired", "full", "changed", "unnamable", "unsupported", "refused"]
"""transient: the same request may succeed in a moment. expired: with new credentials. unnamable: the client cannot
request an object of this name. unsupported: the store has no such request. refused: everything else."""

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
_TRANSIENT = {"SlowDown", "InternalError", "RequestTimeout", "ServiceUnavailable", "Throttling", "ThrottlingException"}
_METADATA_SERVICE = "http://169.254.169.254"


class StoreError(UserError, OSError):
    """A failed request to an object store: an OSError for code that repeats it, a UserError for code that gives up."""

    def __init__(self, message: str, reason: str = "", kind: Kind = "transient") -> None:
        super().__init__(message)
        self.reason, self.kind = reason, kind
        self.transient = kind == "transient"


@dataclass(frozen=True)
class Request:
    """A request, for messages. doing: read, written, listed, removed. secrets: blanked where the store repeats them."""

    url: str
    doing: str
    endpoint: str = ""
    secrets: tuple[str, ...] = ()

    def error(self, raised: Exception, attempts: int = 1) -> Exception:
        """What the exception means: FileNotFoundError or StoreError. attempts: the request's, this one included."""
        if isinstance(raised, StoreError):
            return raised
        text = str(raised).partition("Debug source:")[0]
        status = int((re.findall(r"status code: (\d{3})", text) or [0])[0])
        code = (re.findall("<Code>([^<]*)</Code>", text) or [""])[0]
        message = (re.findall("<Message>([^<]*)</Message>", text) or [""])[0]
        if isinstance(raised, FileNotFoundError) or status == 404 or code in ("NoSuchKey", "NoSuchBucket"):
            return FileNotFoundError(self.url)
        if _METADATA_SERVICE in text:
            reason = "no credentials: none in storage.options, the environment or a profile, nor any of the machine"
        elif status:
            reason = f"{status} {code}: {message}"
        else:
            reason = text.partition(" - ")[2] or text
        reason = " ".join(reason.split()).strip(" :")
        for secret in self.secrets:
            reason = reason.replace(secret, "...")
        return self.failure(reason, _kind(raised, status, code, text), attempts)

    def failure(self, reason: str, kind: Kind, attempts: int = 1) -> StoreError:
        """The error in one sentence."""
        tried = f" in {attempts} attempts" if attempts > 1 else ""
        store = f" {_PREPOSITIONS[self.doing]} the store{f' at {self.endpoint}' if self.endpoint else ''}"
        message = f"{self.url}: cannot be {self.doing}{tried}{store} ({reason}); {_REMEDIES[kind]}"
        return StoreError(message, reason, kind)


def _kind(raised: Exception, status: int, code: str, text: str) -> Kind:
    if status == 507 or re.search("Quota|InsufficientStorage|StorageFull|StorageLimit", code):
        return "full"
    if re.search("Expired|TokenRefreshRequired", code):
        return "expired"
    if _METADATA_SERVICE in text or status in (401, 403):
        return "denied"
    if isinstance(raised, ValueError):
        return "unnamable"
    if status == 501 or code == "NotImplemented":
        return "unsupported"
    if type(raised).__name__ == "PreconditionError":
        return "changed"
    is_transient = code in _TRANSIENT or status in (408, 409, 429) or status >= 500
    return "transient" if is_transient or (not status and "HTTP error" in text) else "refused"
