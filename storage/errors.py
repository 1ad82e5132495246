"""The two kinds of errors that are not bugs: a user's mistake, and data that cannot be used."""

from __future__ import annotations

import errno


class UserError(Exception):
    """A mistake the user can mend. The message is one sentence that names the file, the key and the remedy."""

    transient = False
    """Whether the same call may succeed later without a change, as when a store does not answer."""


class BadData(Exception):  # noqa: N818 - it describes the data, not the program
    """One object or record that cannot be used. The message is the reason that goes into the quarantine list."""


def is_transient(error: BaseException) -> bool:
    """Whether the same call may succeed later without a change: a store or a network disk does not answer."""
    if isinstance(error, UserError):
        return error.transient
    return isinstance(error, ConnectionError | TimeoutError) or (
        isinstance(error, OSError) and error.errno in (errno.EIO, errno.ESTALE)
    )
