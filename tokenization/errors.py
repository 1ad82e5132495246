"""The two kinds of trouble that are not bugs: a user's mistake, and data that cannot be used."""

from __future__ import annotations


class UserError(Exception):
    """A mistake the user can mend. The message is one sentence that names the file, the key and the remedy."""


class BadData(Exception):  # noqa: N818 - it describes the data, not the program
    """One object or record that cannot be used. The message is the reason that goes into the quarantine list."""
