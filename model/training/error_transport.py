"""An error sent from one rank to the others, as type names and a message: plain JSON, never a pickle.

An error of a class that the other rank knows, a builtin one or a kind of `UserError` or `BadData`, is made again from
its constructor's arguments; any other becomes the nearest of its bases that is known, with its name in the message.
"""

from __future__ import annotations

import builtins
import json
from collections.abc import Iterator
from typing import Any

from storage.errors import BadData, UserError, is_transient


def encode_error(error: Exception) -> dict[str, Any]:
    """The error as plain JSON for `decode_error`."""
    reduced = error.__reduce__()
    return {
        "types": [_name(kind) for kind in type(error).__mro__],
        "words": str(error),
        "transient": is_transient(error),
        "errno": getattr(error, "errno", None),
        "arguments": list(reduced[1]) if isinstance(reduced, tuple) and _is_plain(list(reduced[1])) else None,
        "attributes": {name: value for name, value in vars(error).items() if _is_plain(value)},
    }


def decode_error(sent: dict[str, Any]) -> Exception:
    """The error again, or one of its bases; still transient where it was, an `OSError` with its errno."""
    ours = (kind for base in (UserError, BadData) for kind in _with_subclasses(base))
    builtin = (kind for kind in vars(builtins).values() if isinstance(kind, type) and issubclass(kind, Exception))
    known = {_name(kind): kind for kind in (*ours, *builtin)}
    own, *bases = sent["types"]
    error: Exception | None = None
    if own in known and sent["arguments"] is not None:
        try:
            error = known[own](*sent["arguments"])
        except Exception:  # its constructor takes other arguments than `__reduce__` gives
            error = None
    if error is None:
        kind = next(known[name] for name in (own, *bases) if name in known)
        error = _in_words(kind, own.rpartition(".")[2], sent["words"], sent["errno"])
    vars(error).update(sent["attributes"])
    if isinstance(error, UserError) and error.transient != sent["transient"]:
        error.transient = sent["transient"]
    return error


def _in_words(kind: type[Exception], name: str, words: str, errno: int | None) -> Exception:
    if issubclass(kind, UserError | BadData):
        return kind(words) if kind in (UserError, BadData) else UserError(words)
    try:
        error = OSError(errno, f"{name}: {words}") if errno is not None else kind(f"{name}: {words}")
    except TypeError:
        error = RuntimeError(f"{name}: {words}")
    return RuntimeError(str(error)) if type(error) is Exception else error


def _with_subclasses(kind: type[Exception]) -> Iterator[type[Exception]]:
    yield kind
    for one in kind.__subclasses__():
        yield from _with_subclasses(one)


def _name(kind: type) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"


def _is_plain(value: Any) -> bool:
    """Whether JSON keeps it as it is."""
    try:
        return bool(json.loads(json.dumps(value)) == value)
    except (TypeError, ValueError):
        return False
