"""Which files a pattern with globs names, on any fsspec file system.

`*`, `?` and `[...]` stand for characters of one name, `**` for any folders. The letters of an extension are of either
case. On a local disk links to folders are followed; a folder inside itself is not entered again.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from typing import Any

import braceexpand
from fsspec.implementations.local import LocalFileSystem
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


def find_files(fs: Any, pattern: str) -> dict[str, dict[str, Any]]:
    """What fsspec knows of each name that the pattern stands for, folders among them on remote file systems.

    The pattern is not malformed. Raises OSError on a folder that cannot be read.
    """
    if isinstance(fs, LocalFileSystem):
        match = compiled(pattern).match
        root = fixed_folder(pattern)
        depth = -1 if "**" in pattern else pattern[len(root) :].count("/")
        entries = _walk(root, depth, (os.path.realpath(root),))
        return {entry.path: _info(entry) for entry in entries if match(entry.path)}
    if is_web(fs):
        fs.ls(fixed_folder(pattern), detail=False)  # a glob finds nothing where a server does not answer
    return dict(fs.glob(any_case_extension(pattern), detail=True))


def _either_case(letter: str) -> str:
    return f"[{letter.lower()}{letter.upper()}]" if letter.isascii() and letter.isalpha() else letter


def _walk(folder: str, depth: int, above: tuple[str, ...]) -> Iterator[os.DirEntry[str]]:
    """The files of a folder, and of those in it down to a depth; -1: of all.

    above: the real paths of this folder and of those that it was reached through.
    """
    with os.scandir(folder) as entries:
        listed = sorted(entries, key=lambda entry: entry.name)
    for entry in listed:
        if entry.is_file():  # no device or pipe, which may never end, nor a link to a missing file
            yield entry
        elif depth and entry.is_dir():
            real = os.path.realpath(entry.path) if entry.is_symlink() else os.path.join(above[-1], entry.name)
            if real not in above:
                yield from _walk(entry.path + "/", depth - 1, (*above, real))


def _info(entry: os.DirEntry[str]) -> dict[str, Any]:
    stat = entry.stat()
    return {"name": entry.path, "size": stat.st_size, "mtime": stat.st_mtime, "type": "file"}
