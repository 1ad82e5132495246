"""Which objects the patterns of `heldout` name, and what of them is about the insides of tars and files of records.

In: the patterns of a source, and all that each of its objects is called. Out: the patterns that name each object.
"""

from __future__ import annotations

import contextlib
import fnmatch
import os
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from pipelines.recipe.data import Source, Storage
from pipelines.sources.identity import Names
from storage.errors import UserError
from storage.globs import any_case_extension, compiled, expand_braces, has_magic, is_malformed, literal_brackets
from storage.public_url import object_url
from storage.urls import canonical_url, join_url


def heldout_by(source: Source, storage: Storage, objects: Sequence[Names]) -> list[tuple[str, ...]]:
    """For each object the patterns of `heldout` that name it.

    A pattern is written as those of `urls` are, or as globs over whole URLs and keys, in which `*` stands for `/` too.
    It names all that is in a folder. What exists by exactly its name is meant before what its brackets stand for.
    """
    patterns: list[list[str]] = [[] for _ in objects]
    for pattern in source.heldout:
        for number in _named(pattern, storage, objects):
            patterns[number].append(pattern)
    return [tuple(found) for found in patterns]


def idle_names(pattern: str, storage: Storage, objects: Sequence[Names]) -> list[str]:
    """The plain names for which the braces of a `heldout` pattern stand, and which name no object."""
    names = expand_braces(pattern)
    if len(names) == 1 or _literally(pattern, storage, objects):
        return []
    return [name for name in names if not has_magic(name) and not _named(name, storage, objects)]


def inner_globs(source: Source, storage: Storage, containers: tuple[str, ...]) -> Mapping[str, str]:
    """Globs over what tars and files of records hold, each with the pattern of `heldout` that it is from.

    containers: extensions of patterns that name whole tars and files.
    """
    globs: dict[str, str] = {}
    for pattern in source.heldout:
        for one in expand_braces(pattern):
            if not one.lower().endswith(containers):
                globs[object_url(one)] = pattern
                if not one.startswith("*"):
                    globs[_whole(one, storage)] = pattern
    return globs


def _named(pattern: str, storage: Storage, objects: Sequence[Names]) -> list[int]:
    given = expand_braces(pattern)
    found = sorted({number for one in (pattern, *given) for number in _literally(one, storage, objects)})
    if not found:
        found = _where(objects, _matcher(given, storage))
    if not found and "[" in pattern:
        found = _where(objects, _matcher([literal_brackets(one) for one in given], storage))
    return found


def _literally(pattern: str, storage: Storage, objects: Sequence[Names]) -> list[int]:
    """The objects that have exactly this name, and those in a folder of it."""
    names = {pattern, _whole(pattern, storage)}
    folders = tuple(f"{name.rstrip('/')}/" for name in names)
    return _where(objects, lambda name: name in names or name.startswith(folders))


def _where(objects: Sequence[Names], match: Callable[[str], Any]) -> list[int]:
    return [number for number, one in enumerate(objects) if any(map(match, (*one.urls, *one.keys)))]


def _matcher(patterns: Sequence[str], storage: Storage) -> Callable[[str], bool]:
    whole = [_whole(one, storage) for one in patterns]
    matches = [re.compile(fnmatch.translate(any_case_extension(one))).match for one in patterns]
    matches += [compiled(one).match for one in whole if has_magic(one) and not is_malformed(one)]
    return lambda name: any(match(name) for match in matches)


def _whole(pattern: str, storage: Storage) -> str:
    """The pattern as one over URLs of a listing."""
    url = join_url(storage.data, pattern)
    if "://" not in url:
        return os.path.normpath(url)
    with contextlib.suppress(UserError):  # a scheme that nothing reads, which names no object
        url = canonical_url(url, storage.options)
    return object_url(url)
