"""Text from elsewhere (names, keys, reasons) on one line of a terminal or a log."""

from __future__ import annotations


def printable(text: str) -> str:
    """The text with everything that a terminal would interpret, line breaks among it, written as an escape."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
