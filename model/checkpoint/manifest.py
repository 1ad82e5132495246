"""The manifest in `COMMIT`, which checkpoints a folder holds, and whether one is as it was written.

In: the store of a folder. Out: steps, manifests, and flaws as phrases. Independent of engines and process groups.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, NamedTuple

from storage.errors import UserError
from storage.store import Store

COMMIT = "COMMIT"
FORMAT = 3
_BODY = b'"manifest": '
_PREFIX = "step-"

log = logging.getLogger(f"ringworld.{__name__}")


class DamagedError(UserError):
    """A committed checkpoint is no longer what was written. flaw: what is wrong, in one phrase that names the file."""

    def __init__(self, place: str, flaw: str) -> None:
        super().__init__(f"{place}: {flaw}; delete this folder to resume from the one before")
        self.place, self.flaw = place, flaw

    def __reduce__(self) -> tuple[Any, ...]:
        return DamagedError, (self.place, self.flaw)


class Range(NamedTuple):
    """Elements start, start + 1, ..., start + numel - 1 of a flattened parameter, by its Hugging Face name."""

    name: str
    start: int
    numel: int

    @property
    def stop(self) -> int:
        """The first element after it."""
        return self.start + self.numel


@dataclass(frozen=True)
class FileEntry:
    """One file of a checkpoint: bytes, sha256 in hex, the rank that wrote it, and what it holds of the parameters.

    header_bytes, header_sha256: of the header, whose hashes hold for each part of the rest (`tensor_file`); 0 and ""
    where the file is only hashed whole: random states, and all files before format 3.
    """

    size: int
    sha256: str
    rank: int
    ranges: tuple[Range, ...] = ()
    header_bytes: int = 0
    header_sha256: str = ""

    def to_json(self, number: Mapping[str, int] | None = None) -> list[Any]:
        """As a flat list; its ranges are one flat list of three values each, the parameter by `number` or by name."""
        flat: list[Any] = []
        for name, start, numel in self.ranges:
            flat += (name if number is None else number[name], start, numel)
        return [self.size, self.sha256, self.rank, flat, self.header_bytes, self.header_sha256]

    @classmethod
    def from_json(cls, values: Sequence[Any], names: Sequence[str] | None = None) -> FileEntry:
        """The inverse of `to_json`. names: of the parameters, by number."""
        size, sha256, rank, flat, header_bytes, header_sha256 = values
        of = flat[::3] if names is None else map(names.__getitem__, flat[::3])
        ranges = tuple(map(Range, of, flat[1::3], flat[2::3]))
        return cls(size, sha256, rank, ranges, header_bytes, header_sha256)


@dataclass(frozen=True)
class Manifest:
    """The content of `COMMIT`.

    parameters: shape and optimizer group of each, by name. adam_steps: updates that Adam has made, by group.
    client_state: the caller's plain JSON. files: by name inside the step's folder. random: each rank's file of its
    random state.
    """

    step: int
    world_size: int
    dp: int
    sp: int
    zero_stage: int
    precision: str
    parameters: Mapping[str, tuple[tuple[int, ...], int]]
    adam_steps: tuple[int, ...]
    client_state: Mapping[str, Any]
    files: Mapping[str, FileEntry] = field(default_factory=dict)
    random: tuple[str, ...] = ()

    def to_bytes(self) -> bytes:
        """As JSON that carries its own hash, so that a flipped digit in a position is noticed.

        Compact, a list for each file and numbers for the parameters' names: 512 ranks have 150,000 ranges.
        """
        number = {name: n for n, name in enumerate(self.parameters)}
        values = {entry.name: getattr(self, entry.name) for entry in fields(self)}
        values["parameters"] = [[name, shape, group] for name, (shape, group) in self.parameters.items()]
        values["files"] = {name: entry.to_json(number) for name, entry in self.files.items()}
        body = json.dumps(values).encode()
        sha256 = hashlib.sha256(body).hexdigest().encode()
        return b'{"format": %d, "sha256": "%s", %s%s}' % (FORMAT, sha256, _BODY, body)

    @classmethod
    def from_bytes(cls, data: bytes) -> Manifest:
        """Raises ValueError where these are not the bytes of a manifest of format 2 or 3 as it was written.

        Format 2 has a dict for each file, and the hash of the sorted JSON without it.
        """
        try:
            values = json.loads(data)
            version, sha256 = values.pop("format", None), values.pop("sha256", None)
            if version not in (2, FORMAT):
                raise ValueError(f"its {COMMIT} has format {version}, which this version does not know")
            if version == 2:
                body = json.dumps({"format": 2, **values}, sort_keys=True).encode()
            else:
                body = data.partition(_BODY)[2][:-1]
            if sha256 != hashlib.sha256(body).hexdigest():
                raise ValueError(f"its {COMMIT} has another sha256 than when it was written")
            return _of_format_2(values) if version == 2 else _of_format_3(values["manifest"])
        except (LookupError, TypeError, AttributeError, UnicodeDecodeError, json.JSONDecodeError) as error:
            raise ValueError(f"its {COMMIT} cannot be read") from error


def _of_format_3(values: dict[str, Any]) -> Manifest:
    names = [name for name, _, _ in values["parameters"]]
    parameters = {name: (tuple(shape), group) for name, shape, group in values["parameters"]}
    files = {name: FileEntry.from_json(entry, names) for name, entry in values["files"].items()}
    return _manifest(values, parameters, files)


def _of_format_2(values: dict[str, Any]) -> Manifest:
    parameters = {name: (tuple(shape), group) for name, (shape, group) in values["parameters"].items()}
    files = {
        name: FileEntry(**{**entry, "ranges": tuple(Range(*one) for one in entry["ranges"])})
        for name, entry in values["files"].items()
    }
    return _manifest(values, parameters, files)


def _manifest(
    values: dict[str, Any], parameters: Mapping[str, tuple[tuple[int, ...], int]], files: Mapping[str, FileEntry]
) -> Manifest:
    tuples = {name: tuple(values[name]) for name in ("adam_steps", "random")}
    return Manifest(**{**values, **tuples, "parameters": parameters, "files": files})


def step_name(step: int) -> str:
    """The folder of a step's checkpoint."""
    return f"{_PREFIX}{step:08d}"


def steps(root: Store) -> list[int]:
    """The steps that have a folder, committed or not, in order."""
    names = [name.removeprefix(_PREFIX) for name in root.folders() if name.startswith(_PREFIX)]
    return sorted(int(name) for name in names if name.isdigit())


def committed_steps(root: Store) -> list[int]:
    """The steps whose folder has a `COMMIT`, damaged or not, in order."""
    return [step for step in steps(root) if COMMIT in root.sizes(step_name(step))]


def read_manifest(root: Store, step: int) -> Manifest:
    """Of a committed checkpoint. Raises FileNotFoundError without a `COMMIT`, ValueError where it has changed."""
    return Manifest.from_bytes(read_commit(root, step))


def read_commit(root: Store, step: int) -> bytes:
    """The bytes of `COMMIT`. Raises FileNotFoundError where there is none."""
    with root.open(f"{step_name(step)}/{COMMIT}") as file:
        return file.read()


def latest_committed(root: Store, hashes: bool = False) -> int | None:
    """The step of the newest whole checkpoint below `root`, None where there is none.

    A torn one is skipped with a warning. hashes: read all files and compare their sha256 too, not the sizes alone.
    """
    for step in reversed(steps(root)):
        flaw = verify(root, step, hashes)
        if flaw is None:
            return step
        log.warning("checkpoint %s is torn and not used: %s", root.path(step_name(step)), flaw)
    return None


def verify(root: Store, step: int, hashes: bool = True) -> str | None:
    """What is wrong with a checkpoint, as a phrase, or None where it is whole. hashes: as of `latest_committed`."""
    folder = step_name(step)
    try:
        manifest = read_manifest(root, step)
    except FileNotFoundError:
        return f"it has no {COMMIT}"
    except ValueError as error:
        return str(error)
    sizes = root.sizes(folder)
    for name, entry in manifest.files.items():
        if sizes.get(name) != entry.size:
            found = f"{sizes[name]} bytes" if name in sizes else "missing"
            return f"{name} is {found}, not {entry.size} bytes"
        if hashes and root.sha256(f"{folder}/{name}") != entry.sha256:
            return changed(name)
    return None


def changed(name: str) -> str:
    """The flaw of a file that has its size but not its hash."""
    return f"{name} has another sha256 than when it was written"
