"""What a pattern with globs stands for, on any file system.

`*`, `?` and `[...]` stand for characters of one name, `**` for any folders. The letters of an extension are of either
case.
"""

from __future__ import annotations

import re
from typing import Any

import braceexpand
from fsspec.utils import glob_translate

_MAGIC = re.compile(r"[*?\[]")
_EXTENSION = re.compile(r"\.(\w+)$")


def has_magic(path: str) -> bool:
    """Whether a path or URL has globs. In a web address `?` begins the query, which has none."""
    if path.startswith(("http://", "https://")):
        return bool(re.search(r"[*\[]", path.partition("?")[0]))
    return bool(_MAGIC.search(path))


def is_malformed(pattern: str) -> bool:
    """Whether `**`, which stands for folders, is not a whole part of the pattern."""
    return bool(re.search(r"\*\*[^/]|[^/]\*\*", pattern))


def is_web(fs: Any) -> bool:
    """Whether it is fsspec's file system of web servers, whose class costs a third of a second to import."""
    return "http" in fs.protocol


def fixed_folder(pattern: str) -> str:
    """The part of a pattern before its first glob, up to the last `/` in it and with that."""
    head = _MAGIC.split(pattern, maxsplit=1)[0]
    return head[: head.rfind("/") + 1]


def expand_braces(pattern: str) -> list[str]:
    """`{a,b}` and `{00..07}` written out, as a shell does; a brace without its partner is a character."""
    try:
        return list(dict.fromkeys(braceexpand.braceexpand(pattern, escape=False)))
    except ValueError:  # unbalanced
        return [pattern]


def literal_brackets(pattern: str) -> str:
    """The pattern whose `[` are characters of names."""
    return pattern.replace("[", "[[]")


def any_case_extension(pattern: str) -> str:
    """The pattern with an extension in which letters are of either case."""
    return _EXTENSION.sub(lambda found: "." + "".join(map(_either_case, found[1])), pattern)


def compiled(pattern: str) -> re.Pattern[str]:
    """What matches exactly the names that the pattern stands for. The pattern is not malformed."""
    return re.compile(glob_translate(any_case_extension(pattern)))


def _either_case(letter: str) -> str:
    return f"[{letter.lower()}{letter.upper()}]" if letter.isascii() and letter.isalpha() else letter
