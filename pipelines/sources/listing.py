"""The listing of a recipe's raw objects: one row an object in columns, in memory and as a Parquet file.

In: `SourceObject`s, or their columns. Out: a `Listing`, a sequence of `SourceObject`s that are made as they are asked
for, and whose columns are there at once, so that whoever goes over a million objects need not make them. The bytes of
the file depend on the objects alone (for one version of pyarrow), and hold no credentials.
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, overload

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipelines.decoder.content import Content
from pipelines.recipe import Kind, Recipe
from pipelines.sources.identity import opening_urls
from storage.store import Store
from tokenization.readers.side_data import row_json

OBJECTS = "objects.parquet"
MEDIA: tuple[Kind, ...] = ("video", "image", "webdataset", "records")
"""Kinds of objects that are media or hold them."""

_ROWS = 1 << 16  # that are converted, hashed or written at a time
_IDENTITY_BYTES = 16
_TEXT = pa.large_string()  # of any number of rows
_FEW = pa.dictionary(pa.int32(), _TEXT)  # values that many rows share
_SCHEMA = pa.schema(
    [
        pa.field("key", _TEXT),
        pa.field("source", _FEW),
        pa.field("url", _TEXT),
        pa.field("size", pa.int64()),
        pa.field("etag", _TEXT),
        pa.field("kind", _FEW),
        pa.field("heldout", pa.bool_()),
        pa.field("side", _TEXT),  # JSON; null where there is none
        pa.field("start", pa.float64()),
        pa.field("end", pa.float64()),
        pa.field("media", _FEW),
        pa.field("inner_heldout", _FEW),  # a JSON list; null where it is empty
        pa.field("media_from", _FEW),  # the same
    ]
)
_IDENTITY = pa.field("identity", pa.binary(_IDENTITY_BYTES))
_IN_MEMORY = [pa.field("opens", _TEXT), pa.field("heldout_by", _FEW)]
_SHARED = [one.name for one in _SCHEMA if one.type == _FEW]


@dataclass(frozen=True, slots=True)
class SourceObject:
    """One raw object: where it is, what it is, and its side data.

    key: unique within its split, `SOURCE/PATH`, where the path is that below `storage.data`, or the whole URL. url:
    without credentials. etag: changes when the content does. side: caption, question, answer, ... by key, for media.
    part: which share of a video this is, from start to end. media: the column in which the records of a file name their
    media. inner_heldout: globs over what a tar or a file of records holds: of it, this is what they match if held out,
    else what they do not match.

    In memory only: opens, the URL that opens it where that is another; heldout_by, the patterns that hold it out.
    """

    key: str
    source: str
    url: str
    size: int
    etag: str
    kind: Kind
    heldout: bool
    side: dict[str, Any]
    part: tuple[float, float] = (0.0, 1.0)
    media: str | None = None
    inner_heldout: tuple[str, ...] = ()
    media_from: tuple[str, ...] = ()
    opens: str | None = field(default=None, compare=False, repr=False)
    heldout_by: tuple[str, ...] = field(default=(), compare=False, repr=False)

    @property
    def opening_url(self) -> str:
        """The URL that opens it, which may hold credentials: not for a log or a file."""
        return self.opens or self.url


def content_of(found: SourceObject, options: dict[str, Any]) -> Content:
    """The bytes of an object in the version that was listed. Opening it raises UserError where it has changed since."""
    return Content(found.opening_url, options, etag=found.etag)


class Listing(Sequence[SourceObject]):
    """Objects in columns: iterating makes them one by one, slices share the columns, `len` costs nothing.

    Two are equal where their objects are, in order. An index makes one object, at 20 times what it costs to iterate.
    """

    def __init__(self, table: pa.Table) -> None:
        """table: of the columns `key` to `media_from`, `opens` and `heldout_by`, and `identity` where it is known."""
        self._table = table.unify_dictionaries().combine_chunks()

    @classmethod
    def of(cls, objects: Iterable[SourceObject]) -> Listing:
        """Of these objects, in their order."""
        if isinstance(objects, Listing):
            return objects
        rows = [_row(found) for found in objects]
        return cls(pa.Table.from_pylist(rows, schema=pa.schema([*_SCHEMA, *_IN_MEMORY])))

    @classmethod
    def of_columns(cls, **columns: Any) -> Listing:
        """Of columns, as `column` says them: a list each, or one value for all rows; `key` is a list."""
        defaults = {"start": 0.0, "end": 1.0}
        rows, schema = len(columns["key"]), pa.schema([*_SCHEMA, *_IN_MEMORY])
        arrays = [_array(one, columns.get(one.name, defaults.get(one.name)), rows) for one in schema]
        return cls(pa.table(arrays, schema=schema))

    @classmethod
    def joined(cls, listings: Sequence[Listing]) -> Listing:
        """The objects of several listings, one after the other; at least one listing."""
        columns = [*_SCHEMA.names, *(one.name for one in _IN_MEMORY)]
        return cls(pa.concat_tables([one._table.select(columns) for one in listings]))

    def with_values(self, **columns: Any) -> Listing:
        """The same objects with other values in some columns, as in `of_columns`."""
        table = self._table
        if _IDENTITY.name in table.column_names:
            table = table.drop_columns([_IDENTITY.name])
        for name, values in columns.items():
            number = table.schema.get_field_index(name)
            table = table.set_column(number, name, _array(table.schema.field(number), values, len(table)))
        return Listing(table)

    def in_order(self) -> Listing:
        """The same objects, sorted by key, and those of one key by whether they are held out."""
        keys = pa.table({"key": self.column("key"), "heldout": self.column("heldout").cast(pa.int8())})
        return self.take(pc.sort_indices(keys, sort_keys=[("key", "ascending"), ("heldout", "ascending")]))

    def column(self, name: str) -> pa.Array:
        """A column: the names of `SourceObject`'s fields, but `start` and `end` in place of `part`, and `identity`.

        key, url, etag, opens: text; source, kind, media: dictionaries of text; side, inner_heldout, media_from,
        heldout_by: JSON; each null where it is absent or empty. identity: 16 bytes, a hash of all that a manifest has
        of the object, and so of what decides its documents.
        """
        if name == _IDENTITY.name and name not in self._table.column_names:
            self._table = self._table.append_column(_IDENTITY, _identities(self._table))
        (chunk,) = self._table[name].chunks or [pa.array([], self._table[name].type)]
        return chunk

    @property
    def identities(self) -> np.ndarray:
        """The column `identity`, uint8 [objects, 16]."""
        column = self.column("identity")
        data = np.frombuffer(column.buffers()[1] or b"", np.uint8)
        return data.reshape(-1, _IDENTITY_BYTES)[column.offset : column.offset + len(column)]

    def where(self, mask: pa.Array | np.ndarray) -> Listing:
        """The objects at which a boolean mask [objects] holds."""
        return Listing(self._table.filter(pa.array(mask)))

    def take(self, numbers: Any) -> Listing:
        """The objects with these numbers, an array of integers, in its order."""
        return Listing(self._table.take(pa.array(numbers, pa.int64())))

    def distinct(self, name: str) -> list[str | None]:
        """The texts that a column has, each once, in the order in which they come first."""
        return pc.unique(self.column(name).cast(_TEXT)).to_pylist()

    def where_in(self, name: str, values: Collection[str | None]) -> Listing:
        """The objects whose column has one of these texts."""
        return self.where(pc.is_in(self.column(name).cast(_TEXT), value_set=pa.array(values, _TEXT)))

    def of_source(self, name: str) -> Listing:
        """The objects of one source."""
        return self.where_in("source", [name])

    def of_split(self, heldout: bool, kinds: Collection[Kind]) -> Listing:
        """The objects of these kinds that are held out, or that are not."""
        of_kinds = self.where_in("kind", kinds)
        return of_kinds.where(pc.equal(of_kinds.column("heldout"), heldout))

    def __len__(self) -> int:
        return int(self._table.num_rows)

    def __iter__(self) -> Iterator[SourceObject]:
        for batch in self._table.to_batches(max_chunksize=_ROWS):
            yield from _objects(batch)

    @overload
    def __getitem__(self, index: int) -> SourceObject: ...
    @overload
    def __getitem__(self, index: slice) -> Listing: ...
    def __getitem__(self, index: int | slice) -> SourceObject | Listing:
        if isinstance(index, slice):
            start, stop, step = index.indices(len(self))
            if step != 1:
                return self.take(np.arange(start, stop, step))
            return Listing(self._table.slice(start, max(0, stop - start)))
        number = range(len(self))[index]  # which raises what a sequence raises
        (found,) = _objects(self._table.slice(number, 1).combine_chunks().to_batches()[0])
        return found

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Listing):
            return NotImplemented
        return bool(self.column("identity").equals(other.column("identity")))

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return f"Listing({list(self)!r})" if len(self) <= 20 else f"<Listing of {len(self)} objects>"

    def __reduce__(self) -> tuple[Any, ...]:
        sink = pa.BufferOutputStream()
        with pa.ipc.new_stream(sink, self._table.schema) as stream:  # of a slice its rows alone, unlike Arrow's pickles
            stream.write_table(self._table)
        return _unpickled, (sink.getvalue().to_pybytes(),)


def listing_digest(objects: Iterable[SourceObject]) -> dict[str, Any]:
    """Counts and a hash of a listing, by source: what identifies it in the `sources` stage's fingerprint."""
    listing = Listing.of(objects)
    listing.column(_IDENTITY.name)  # made once, for all sources and for whoever asks next
    digests = {}
    for name in sorted(filter(None, listing.distinct("source"))):
        own = listing.of_source(name)
        digests[name] = {
            "objects": len(own),
            "bytes": pc.sum(own.column("size")).as_py(),
            "digest": hashlib.sha256(own.identities.tobytes()).hexdigest(),
        }
    return digests


def write_objects(store: Store, objects: Iterable[SourceObject]) -> None:
    """Commit the listing as `OBJECTS`."""
    listing = Listing.of(objects)
    table = pa.table({name: listing.column(name) for name in (*_SCHEMA.names, _IDENTITY.name)})
    plain = pa.schema([one.with_type(_TEXT) if one.type == _FEW else one for one in table.schema])
    with store.writing(OBJECTS) as file:
        pq.write_table(
            table.cast(plain),  # so that the order of a dictionary, which says nothing, is not in the file
            file,
            version="2.6",
            compression="zstd",
            use_dictionary=_SHARED,
            row_group_size=_ROWS,
        )


def read_objects(store: Store, recipe: Recipe | None = None) -> Listing:
    """The listing that `write_objects` committed. recipe: has the credentials in URLs that open objects, if any do."""
    with store.open(OBJECTS) as file:
        table = pq.read_table(file, read_dictionary=_SHARED)
    table = table.cast(pa.schema([*_SCHEMA, _IDENTITY]))
    opens = _opens(table, recipe) if recipe else pa.nulls(len(table), _TEXT)
    return Listing(table.append_column(_IN_MEMORY[0], opens).append_column(_IN_MEMORY[1], pa.nulls(len(table), _FEW)))


def _opens(table: pa.Table, recipe: Recipe) -> pa.Array:
    """The URL that opens each object, where it is another than the one in the file."""
    opening = {name: opening_urls(recipe.storage, source) for name, source in recipe.sources.items()}
    if not any(opening.values()):
        return pa.nulls(len(table), _TEXT)
    named = zip(table["source"].to_pylist(), table["url"].to_pylist(), strict=True)
    opens = ((url, of_source(url) if (of_source := opening.get(source)) else url) for source, url in named)
    return pa.array([None if one == url else one for url, one in opens], _TEXT)


def _unpickled(data: bytes) -> Listing:
    return Listing(pa.ipc.open_stream(data).read_all())


def _row(found: SourceObject) -> dict[str, Any]:
    row: dict[str, Any] = {one.name: getattr(found, one.name, None) for one in (*_SCHEMA, *_IN_MEMORY)}
    lists = {name: json_list(row[name]) for name in ("inner_heldout", "media_from", "heldout_by")}
    return row | lists | {"side": row_json(found.side), "start": found.part[0], "end": found.part[1]}


def json_list(names: Sequence[str]) -> str | None:
    """Names as a listing holds them."""
    return json.dumps(names) if names else None


def _array(like: pa.Field, values: Any, rows: int) -> pa.Array:
    """A column of a list, or of one value in all rows."""
    values = values if isinstance(values, list) else [values] * rows
    return pa.array(values, _TEXT).dictionary_encode() if like.type == _FEW else pa.array(values, like.type)


def _objects(batch: pa.RecordBatch) -> Iterator[SourceObject]:
    columns = {name: _values(batch.column(name)) for name in (*_SCHEMA.names, "opens", "heldout_by")}
    side, start, end = columns.pop("side"), columns.pop("start"), columns.pop("end")
    inner, media_from, heldout_by = (columns.pop(name) for name in ("inner_heldout", "media_from", "heldout_by"))
    key, source, url, size, etag, kind, heldout, media, opens = columns.values()
    for row in zip(
        key,
        source,
        url,
        size,
        etag,
        kind,
        heldout,
        (json.loads(one) if one else {} for one in side),
        zip(start, end, strict=True),
        media,
        map(json_names, inner),
        map(json_names, media_from),
        opens,
        map(json_names, heldout_by),
        strict=True,
    ):
        yield SourceObject(*row)


def _values(column: pa.Array) -> list[Any]:
    """What `to_pylist` gives, without making each shared value anew."""
    if column.null_count == len(column):
        return [None] * len(column)
    if not pa.types.is_dictionary(column.type):
        return column.to_pylist()
    values = column.dictionary.to_pylist()
    return [None if number is None else values[number] for number in column.indices.to_pylist()]


@functools.lru_cache(maxsize=1024)
def json_names(text: str | None) -> tuple[str, ...]:
    """The names of a column of JSON lists."""
    return tuple(json.loads(text)) if text else ()


def _identities(table: pa.Table) -> pa.Array:
    """A hash of each row but for what is in memory only."""
    found: list[bytes] = []
    for batch in table.select(_SCHEMA.names).to_batches(max_chunksize=_ROWS):
        # No field can hold a NUL: neither a URL, nor JSON, nor what a store says in a header.
        texts = [column.cast(_TEXT) for column in batch.columns]
        joined = pc.binary_join_element_wise(*texts, pa.scalar("\0", _TEXT), null_handling="replace")
        rows = joined.cast(pa.large_binary()).to_pylist()
        found += [hashlib.blake2b(row, digest_size=_IDENTITY_BYTES).digest() for row in rows]
    return pa.array(found, _IDENTITY.type)
