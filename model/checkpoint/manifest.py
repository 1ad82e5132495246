"""What `COMMIT` says of a checkpoint, which checkpoints a folder holds, and whether one is as it was written.

In: the store of a folder. Out: steps, manifests and flaws in words. Nothing here knows of engines or process groups.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any, NamedTuple

from storage.errors import UserError
from storage.store import Store

COMMIT = "COMMIT"
FORMAT = 2
_PREFIX = "step-"
_TORN = f"it has no {COMMIT}"

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
    """One file of a checkpoint: bytes, sha256 in hex, the rank that wrote it, and what it holds of the parameters."""

    size: int
    sha256: str
    rank: int
    ranges: tuple[Range, ...] = ()

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> FileEntry:
        """The entry of which `asdict` made these."""
        return cls(**{**values, "ranges": tuple(Range(*one) for one in values["ranges"])})


@dataclass(frozen=True)
class Manifest:
    """What `COMMIT` says.

    parameters: shape and optimizer group of each, by name. adam_steps: updates that Adam has made, by group.
    client_state: the caller's plain JSON. files: by name inside the step's folder. random: the one of each rank's
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

    def with_files(self, files: Mapping[str, FileEntry], random: tuple[str, ...]) -> Manifest:
        """The same of these files."""
        return replace(self, files=files, random=random)

    def to_bytes(self) -> bytes:
        """As JSON that carries its own hash: it is small, but a flipped digit in it would be a wrong position."""
        body = json.loads(json.dumps({"format": FORMAT, **asdict(self)}))
        return json.dumps({**body, "sha256": _sha256_of(body)}, sort_keys=True).encode()

    @classmethod
    def from_bytes(cls, data: bytes) -> Manifest:
        """Raises ValueError where these are not the bytes of a manifest as it was written."""
        try:
            values = json.loads(data)
            known = values.pop("sha256", None)
            if (found := values.get("format")) != FORMAT:
                raise ValueError(f"its {COMMIT} has format {found}, which this version does not know")
            if known != _sha256_of(values):
                raise ValueError(f"its {COMMIT} has another sha256 than when it was written")
            values.pop("format")
            files = {name: FileEntry.from_json(entry) for name, entry in values.pop("files").items()}
            parameters = {name: (tuple(shape), group) for name, (shape, group) in values.pop("parameters").items()}
            tuples = {name: tuple(values[name]) for name in ("adam_steps", "random")}
            return cls(**{**values, **tuples, "parameters": parameters, "files": files})
        except (KeyError, TypeError, AttributeError, UnicodeDecodeError, json.JSONDecodeError) as error:
            raise ValueError(f"its {COMMIT} cannot be read") from error


def _sha256_of(tree: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(tree, sort_keys=True).encode()).hexdigest()


def step_name(step: int) -> str:
    """The folder of a step's checkpoint."""
    return f"{_PREFIX}{step:08d}"


def steps(root: Store) -> list[int]:
    """The steps of which there is a folder, committed or not, in order."""
    names = [name.removeprefix(_PREFIX) for name in root.folders() if name.startswith(_PREFIX)]
    return sorted(int(name) for name in names if name.isdigit())


def committed_steps(root: Store) -> list[int]:
    """The steps whose folder has a `COMMIT`, in order."""
    return [step for step in steps(root) if COMMIT in root.sizes(step_name(step))]


def any_committed(root: Store) -> bool:
    """Whether a checkpoint below `root` was ever committed, be it damaged by now."""
    return bool(committed_steps(root))


def read_manifest(root: Store, step: int) -> Manifest:
    """The manifest of a committed checkpoint.

    Raises FileNotFoundError where there is no `COMMIT`, ValueError where it is not what was written.
    """
    return Manifest.from_bytes(read_commit(root, step))


def read_commit(root: Store, step: int) -> bytes:
    """The bytes of `COMMIT`. Raises FileNotFoundError where there is none."""
    with root.open(f"{step_name(step)}/{COMMIT}") as file:
        return file.read()


def latest_committed(root: Store, hashes: bool = False) -> int | None:
    """The step of the newest whole checkpoint below `root`, None where there is none.

    A torn one is passed over with a warning. hashes: read all files and compare their sha256 too, not the sizes alone.
    """
    for step in reversed(steps(root)):
        flaw = verify(root, step, hashes)
        if flaw is None:
            return step
        log.warning("checkpoint %s is torn and not used: %s", root.path(step_name(step)), flaw)
    return None


def verify(root: Store, step: int, hashes: bool = True) -> str | None:
    """What is wrong with a checkpoint, in one phrase, or None where it is whole. hashes: as of `latest_committed`."""
    folder = step_name(step)
    try:
        manifest = read_manifest(root, step)
    except FileNotFoundError:
        return _TORN
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
