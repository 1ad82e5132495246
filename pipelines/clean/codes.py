"""Which codes are needed: those of the objects that needed `tokenize` stages list, in the encodings that they name.

In: runs, each with its needed folders. Out: by encoding the objects whose codes are needed; and the files of a store
of codes that have none of them. What is needed is so wherever it lies: a run that moved to another store of codes finds
there what its manifests say of the old one.
"""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Collection, Iterable, Iterator, Mapping

import pyarrow.parquet as pq

from pipelines.clean.folders import STAGES, StageFolder, refusing_damage
from pipelines.dag.manifest import StageOutput, is_fingerprint, read_manifest
from pipelines.sources.listing import read_objects
from pipelines.tokenize.codes.index import DATA, INDEX, CodesIndex
from pipelines.tokenize.codes.place import DESCRIPTION
from pipelines.tokenize.codes.users import Place, users
from pipelines.tokenize.record import TokenizeRecord, read_partitions
from pipelines.tokenize.stage import TokenizeStage
from storage.errors import UserError
from storage.public_url import object_url
from storage.store import Store
from storage.threads import in_threads
from tokenization.codecs.codes_file import object_id

_MEDIA = '"media"'
_OWN = re.compile(rf"({DATA}|{INDEX})/[^/]+\.parquet|{re.escape(DESCRIPTION)}")


def needed_codes(root: Store, folders: Iterable[StageFolder]) -> dict[str, set[bytes]]:
    """By encoding, the ids of the objects whose codes needed folders of a run may ask for.

    Raises UserError where a listing or documents cannot be read, without which nothing may be removed.
    """
    needed: dict[str, set[bytes]] = {}
    for folder in folders:
        if folder.kind != TokenizeStage.kind or folder.manifest is None:
            continue
        store = root.at(STAGES, folder.key)
        with refusing_damage(store):
            manifest = read_manifest(store, TokenizeRecord)
            if manifest and (used := manifest.record.outputs.codes):
                ids = _objects(StageOutput(store, manifest), root.at(STAGES, folder.inputs["sources"]))
                needed.setdefault(used.encoding, set()).update(ids)
    return needed


def _objects(tokenized: StageOutput[TokenizeRecord], sources: Store) -> Iterator[bytes]:
    """The ids of the listed objects, and of the media that listed records name."""
    by_records: set[str] = set()
    for found in read_objects(sources):
        yield object_id(found.url, found.etag)
        if found.kind == "records":
            by_records.add(found.source)
    files = [part.file for part in read_partitions(tokenized) if part.source in by_records]
    for ids in in_threads(lambda name: _named_media(tokenized.shared, name), files):
        yield from ids


def _named_media(store: Store, name: str) -> set[bytes]:
    """The ids of the media that the records behind a file of documents name."""
    with store.open_ranged(name) as file:
        lines = pq.read_table(file, columns=["provenance"], use_threads=False).column(0).to_pylist()
    media = [json.loads(line).get("media") for line in lines if _MEDIA in line]
    return {object_id(object_url(one["url"]), one["etag"]) for one in media if one}


def missing_users(codes: Store, given: Collection[Place]) -> tuple[list[Place], list[Place]]:
    """The runs that use a store of codes and are not among those given: those that are there, and those that are gone.

    A run is gone where its root can be looked at and has no stages.
    """
    there: list[Place] = []
    gone: list[Place] = []
    for place in dict.fromkeys([*users(codes), *_owner(codes)]):
        if not any(place.is_same(one) for one in given):
            (there if _may_be_there(place, codes) else gone).append(place)
    return there, gone


def _owner(codes: Store) -> Iterator[Place]:
    """The run in whose root a store of codes is, which is noted there by another name where it has been moved."""
    parent = Store(codes.path().rpartition("/")[0], codes.options)
    with contextlib.suppress(OSError, UserError):  # the credentials may be for the codes alone
        if parent.exists(STAGES):
            yield Place.of(parent)


def _may_be_there(place: Place, codes: Store) -> bool:
    try:
        return not place.is_here or Store(place.url, codes.options).exists(STAGES)
    except (OSError, UserError):  # of another store, say, for which the credentials are not these
        return True


def encodings(sizes: Mapping[str, int]) -> dict[str, dict[str, int]]:
    """The files of a store of codes by encoding, their names below its folder. sizes: of all files that are there.

    Others may have put files of their own in the folder, which are passed over.
    """
    files: dict[str, dict[str, int]] = {}
    for name, size in sizes.items():
        encoding, _, below = name.partition("/")
        if is_fingerprint(encoding) and _OWN.fullmatch(below):
            files.setdefault(encoding, {})[below] = size
    return files


def unneeded_data(encoding: Store, data: Iterable[str], needed: Collection[bytes]) -> list[str]:
    """Those files of codes of an encoding that have nothing of any needed object."""
    index = CodesIndex(encoding)
    index.load()
    keep = {name for names in index.find(list(needed)) for name in names}
    return [name for name in data if name.startswith(f"{DATA}/") and name not in keep]
