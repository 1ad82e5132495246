"""What a stage declares before it runs, and the manifest that it commits when it is done.

A declaration determines the stage's output. Its hash, the fingerprint, names the stage's folder. `started.json` holds
the declaration while the stage runs; `manifest.json`, committed last by one atomic put, adds what was made: a record
whose type each stage declares, the quarantine, and, for information only, which code and libraries made it.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Generic, TypeVar

from pydantic import TypeAdapter, ValidationError

from storage.errors import UserError
from storage.public_url import object_url, public_url
from storage.store import Store
from storage.urls import NothingFoundError, ObjectInfo, list_objects

MANIFEST = "manifest.json"
STARTED = "started.json"
FORMAT = 3
"""Of both files. Format 1 had hashes of code in place of an output version; up to format 2, the files of partitions
were in the folder of the fingerprint that made them. Both are read."""

R = TypeVar("R")


def digest(value: Any) -> str:
    """sha256 of a value's canonical JSON, as hex."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def url_digest(key: str, url: str, options: dict[str, Any]) -> str:
    """What identifies a file or the files of a folder: a hash of their listing.

    key: of the recipe, which names it. Raises UserError when nothing is there.
    """
    listed: Sequence[ObjectInfo] = []
    for place in (url, f"{url.rstrip('/')}/*"):
        with contextlib.suppress(NothingFoundError):
            listed = listed or list_objects(place, options)
    if not listed:
        raise UserError(f"{public_url(url)}: no such file or folder; check {key}")
    return digest([asdict(info) | {"url": object_url(info.url)} for info in listed])


@dataclass(frozen=True)
class Declaration:
    """What determines a stage's output.

    settings: plain JSON. inputs: fingerprints by stage name. rebuild: how often `--rebuild` asked for it.
    """

    stage: str
    kind: str
    settings: Mapping[str, Any]
    output_version: int
    inputs: Mapping[str, str]
    rebuild: int = 0

    @property
    def fingerprint(self) -> str:
        """sha256, as hex. The first 16 digits name the stage's folder."""
        return digest(self.to_json())

    def to_json(self) -> dict[str, Any]:
        """Plain JSON."""
        tree = asdict(self)
        return tree if self.rebuild else {key: value for key, value in tree.items() if key != "rebuild"}

    @classmethod
    def from_json(cls, tree: Mapping[str, Any]) -> Declaration:
        """Of `started.json` or `manifest.json`, whichever format they have."""
        kind = tree.get("kind") or tree["stage"].partition("-")[0]
        output_version, rebuild = tree.get("output_version", 1), tree.get("rebuild", 0)
        return cls(tree["stage"], kind, tree["settings"], output_version, tree["inputs"], rebuild)


@dataclass(frozen=True)
class Manifest(Generic[R]):
    """What a stage made, from what, by which settings and versions.

    record: of the stage's own type: `outputs`, which later stages read, and `figures`, for people. quarantined: how
    many entries there are, of which `quarantine` has the first. fingerprint: of the declaration. input_folders: where
    the inputs were read, below the run's root. made_by: versions of the code and of libraries. seconds: of work in the
    driver that committed it. finished: UTC, ISO 8601. format: of its file.
    """

    declaration: Declaration
    record: R
    quarantine: tuple[Mapping[str, Any], ...] = ()
    quarantined: int = 0
    fingerprint: str = ""
    input_folders: Mapping[str, str] = field(default_factory=dict)
    made_by: Mapping[str, str] = field(default_factory=dict)
    seconds: float = 0.0
    finished: str = ""
    format: int = FORMAT

    def to_json(self) -> dict[str, Any]:
        """Plain JSON."""
        facts = {name: value for name, value in vars(self).items() if name not in ("declaration", "record")}
        return {**self.declaration.to_json(), **facts, **record_json(self.record)}

    @classmethod
    def from_json(cls, tree: Mapping[str, Any], record: type[R]) -> Manifest[R]:
        """A manifest whose record has this type. pydantic's ValidationError where it has another."""
        return cls(
            declaration=Declaration.from_json(tree),
            record=TypeAdapter(record).validate_python({key: tree.get(key) or {} for key in ("outputs", "figures")}),
            quarantine=tuple(tree.get("quarantine", ())),
            quarantined=tree.get("quarantined", len(tree.get("quarantine", ()))),
            fingerprint=tree["fingerprint"],
            input_folders=tree.get("input_folders", {}),
            made_by=tree.get("made_by", {}),
            seconds=tree["seconds"],
            finished=tree["finished"],
            format=tree.get("format", 1),
        )


@dataclass(frozen=True)
class PlainRecord:
    """The record of a stage whose own type is not needed, as its JSON has it."""

    outputs: Mapping[str, Any] = field(default_factory=dict)
    figures: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class StageOutput(Generic[R]):
    """A stage that is done: its folder and its manifest."""

    store: Store
    manifest: Manifest[R]

    @property
    def record(self) -> R:
        """What the stage made."""
        return self.manifest.record

    @property
    def shared(self) -> Store:
        """Where the files of partitions are that its record names: with those of all that the stage made in the run."""
        return shared_folder(self.store) if self.manifest.format >= 3 else self.store


def shared_folder(store: Store) -> Store:
    """The folder of a stage in its run, in which are those of fingerprints, as `store` is, and partitions' files."""
    return replace(store, url=store.url.rstrip("/").rpartition("/")[0])


def place_in_run(store: Store) -> str:
    """Where the folder of a stage's fingerprint is below the run's root: `stages/NAME/FINGERPRINT`."""
    return "/".join(store.url.split("/")[-3:])


def is_fingerprint(folder: str) -> bool:
    """Whether a folder of a stage is that of a fingerprint, not one of partitions' files."""
    return re.fullmatch("[0-9a-f]{16}", folder) is not None


def read_manifest(store: Store, record: type[R]) -> Manifest[R] | None:
    """The manifest of a stage's folder, or None where the stage is not done. UserError where it cannot be read."""
    tree = store.read_json(MANIFEST)
    if tree is None:
        return None
    refuse_newer(tree, store.path(MANIFEST))
    try:
        return Manifest.from_json(tree, record)
    except (KeyError, TypeError, AttributeError, ValidationError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"{store.path(MANIFEST)}: not a manifest that this version can read ({reason}); remove its folder, and the "
            f"stage is made again"
        ) from None


def refuse_newer(tree: Mapping[str, Any], path: str) -> None:
    """Raise UserError where a JSON file has a later format than this version knows."""
    if tree.get("format", 1) > FORMAT:
        raise UserError(f"{path}: has format {tree['format']}, this version reads up to {FORMAT}; upgrade ringworld")


def record_json(record: Any) -> dict[str, dict[str, Any]]:
    """A record as plain JSON: outputs and figures that are None are left out."""
    parts = TypeAdapter(type(record)).dump_python(record, mode="json")
    return {name: {key: value for key, value in part.items() if value is not None} for name, part in parts.items()}
