"""Which objects the patterns of `heldout` name, and what of them is about the insides of tars and files of records.

In: the patterns of a source, and all that each of its objects is called. Out: the patterns that name each object.
"""

from __future__ import annotations

import contextlib
import fnmatch
import os
from collections.abc import Mapping, Sequence

import numpy as np

from pipelines.recipe.data import Source, Storage
from pipelines.sources.identity import Names
from pipelines.sources.matching import matches_any
from storage.errors import UserError
from storage.globs import any_case_extension, compiled, expand_braces, has_magic, is_malformed, literal_brackets
from storage.public_url import object_url
from storage.urls import canonical_url, join_url

_GLOBS_AT_ONCE = 64  # regular expressions that are compiled into one


def heldout_by(source: Source, storage: Storage, names: Names) -> dict[int, tuple[str, ...]]:
    """The patterns of `heldout` that name each object, by its number, where there are any.

    A pattern is written as those of `urls` are, or as globs over whole URLs and keys, in which `*` stands for `/` too.
    It names all that is in a folder. What exists by exactly its name is meant before what its brackets stand for.
    """
    # Few names match any pattern at all, and only those are matched with each.
    near = _near(source.heldout, storage, names)
    patterns: dict[int, tuple[str, ...]] = {}
    for pattern in source.heldout:
        for number in _named(pattern, storage, names, near).tolist():
            patterns[number] = (*patterns.get(number, ()), pattern)
    return patterns


def first_idle_name(pattern: str, storage: Storage, names: Names) -> str | None:
    """The first plain name for which the braces of a `heldout` pattern stand, and which names no object."""
    expanded = expand_braces(pattern)
    if len(expanded) == 1 or len(_literally(pattern, storage, names)):
        return None
    plain = (name for name in expanded if not has_magic(name))
    return next((name for name in plain if not len(_named(name, storage, names, names))), None)


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


def _near(patterns: Sequence[str], storage: Storage, names: Names) -> Names:
    """The names that match some pattern as globs, with its brackets as globs or as characters."""
    globs = []
    for pattern in patterns:
        for given in expand_braces(pattern):
            globs += _globs(given, storage)
            globs += _globs(literal_brackets(given), storage) if "[" in pattern else []
    mask = np.zeros(len(names.names), bool)
    for start in range(0, len(globs), _GLOBS_AT_ONCE):
        mask |= matches_any(globs[start : start + _GLOBS_AT_ONCE], names.column)
    return names.where(mask)


def _named(pattern: str, storage: Storage, names: Names, near: Names) -> np.ndarray:
    """The numbers of the objects that a pattern names, sorted. near: all names that may match it as globs."""
    given = expand_braces(pattern)
    found = np.concatenate([_literally(one, storage, names) for one in dict.fromkeys((pattern, *given))])
    if not len(found):
        found = _matching(given, storage, near)
    if not len(found) and "[" in pattern:
        found = _matching([literal_brackets(one) for one in given], storage, near)
    return np.unique(found)


def _literally(pattern: str, storage: Storage, names: Names) -> np.ndarray:
    """The objects that have exactly this name, and those in a folder of it."""
    return np.concatenate([names.called(name) for name in dict.fromkeys((pattern, _whole(pattern, storage)))])


def _matching(patterns: Sequence[str], storage: Storage, names: Names) -> np.ndarray:
    found = [names.numbers[:0]]
    for pattern in patterns:
        found.append(names.numbers[matches_any(_globs(pattern, storage), names.column)])
    return np.concatenate(found)


def _globs(pattern: str, storage: Storage) -> list[str]:
    """Regular expressions of what a pattern stands for: over any names, and over URLs of a listing."""
    whole = _whole(pattern, storage)
    anywhere = fnmatch.translate(any_case_extension(pattern))
    return [anywhere, compiled(whole).pattern] if has_magic(whole) and not is_malformed(whole) else [anywhere]


def _whole(pattern: str, storage: Storage) -> str:
    """The pattern as one over URLs of a listing."""
    url = join_url(storage.data, pattern)
    if "://" not in url:
        return os.path.normpath(url)
    with contextlib.suppress(UserError):  # a scheme that nothing reads, which names no object
        url = canonical_url(url, storage.options)
    return object_url(url)
