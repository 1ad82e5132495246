"""Packed sequences to a shard and back: a WebDataset tar with byte-identical output and an offset index.

In: packed sequences and a binary file to stream into. Out: the tar and its `ShardStats`: counts, sha256 and where each
sequence lies, so that a loader reads any one of them with one ranged read, and `webdataset` reads the file as it is.
A sequence is two neighbouring members: `{name}.safetensors` (tokens int32 [S], cu_seqlens int32 [n+1], loss_weight
float32 [S]) and `{name}.json` (key, n_examples, lineage of each document).
Headers are ustar with every field that could differ between two runs fixed: owner 0, mode 0644, time 0.
"""

from __future__ import annotations

import functools
import hashlib
import io
import json
import re
import tarfile
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import fields, replace
from typing import Any, BinaryIO, Protocol

import numpy as np
import safetensors.numpy
from isal.isal_zlib import crc32  # zlib's own takes 60 us for a sequence of 32K tokens, this one 5

from storage.errors import BadData
from tokenization.document import PackedSequence
from tokenization.shards.index import BLOCK, IndexEntry, ShardIndex, ShardSet, ShardStats
from tokenization.vocabulary import JointVocabulary

__all__ = [
    "ByteSink",
    "IndexEntry",
    "ShardIndex",
    "ShardSet",
    "ShardStats",
    "hash_file",
    "member_name",
    "read_sequence",
    "read_tensors",
    "verify_shard",
    "write_shard",
]

_DTYPES = {"tokens": np.int32, "cu_seqlens": np.int32, "loss_weight": np.float32}
_SAFETENSORS = {np.int32: "I32", np.float32: "F32"}
_HASH_CHUNK = 1 << 22
_COUNTS = tuple(field.name for field in fields(ShardStats) if field.name.startswith("n_"))


class ByteSink(Protocol):
    """What a shard is streamed into: any binary file object; it need not seek."""

    def write(self, data: bytes, /) -> Any:
        """Append bytes."""


def write_shard(fileobj: ByteSink, sequences: Iterable[PackedSequence], vocabulary: JointVocabulary) -> ShardStats:
    """Stream `sequences` into `fileobj` as a tar, hashing as it goes; one sequence at a time is in memory.

    The bytes are a pure function of the sequences. Publish the file only after this returns: an exception leaves a
    truncated tar behind. Raises ValueError on a malformed sequence, on a second key with the same member name, or on
    sequences of different lengths.
    """
    sink = _HashingSink(fileobj)
    index: list[IndexEntry] = []
    counts: list[dict[str, int]] = []
    names: set[str] = set()
    context = 0
    with tarfile.open(fileobj=sink, mode="w", format=tarfile.USTAR_FORMAT) as tar:  # type: ignore[call-overload]
        for sequence in sequences:
            context = context or len(sequence.tokens)
            problems = _problems(sequence, context)
            name = member_name(sequence.key)
            if name in names:
                problems.append(f"its member name {name} is already in this shard")
            if problems:
                raise ValueError(f"sequence {sequence.key}: {'; '.join(problems)}")
            names.add(name)
            tensors = safetensors.numpy.save({field: getattr(sequence, field) for field in _DTYPES})
            description = _description(sequence)
            offset = _add(tar, f"{name}.safetensors", tensors)
            _add(tar, f"{name}.json", description)
            entry = (sequence.key, offset, len(tensors), len(description), sequence.n_examples, crc32(tensors))
            index.append(IndexEntry(*entry))
            counts.append(_count(sequence, vocabulary))
    total = _total(counts)
    return ShardStats(
        context=context,
        **{name: total[name] for name in _COUNTS},
        targets={name: total[name] for name in vocabulary.sizes},
        bytes=sink.position,
        sha256=sink.digest.hexdigest(),
        index=ShardIndex.from_columns({name: [getattr(entry, name) for entry in index] for name in IndexEntry._fields}),
    )


def member_name(key: str) -> str:
    """A tar member's base name for a key: letters, digits, `_` and `-` only, at most 81 characters.

    webdataset splits a name at its first dot and takes slashes for folders, so other characters become `_` and a hash
    of the whole key keeps the name unique; a safe and short key is its own name. The key itself is in the JSON member.
    """
    safe = re.sub(r"[^A-Za-z0-9_-]", "_", key)
    if safe == key and 0 < len(key) <= 80 and not key.startswith("_"):
        return key
    return f"k{safe[:63]}-{hashlib.sha256(key.encode()).hexdigest()[:16]}"


def read_sequence(fileobj: BinaryIO, entry: IndexEntry) -> PackedSequence:
    """Read the sequence at `entry`, lineage included, from a seekable shard with one seek and one read.

    Raises BadData naming the key where the bytes are short, fail their CRC-32, or are not what a shard holds.
    """
    return _sequence(_read_range(fileobj, entry, entry.json_offset + entry.json_length - entry.offset), entry)


def _sequence(body: memoryview, entry: IndexEntry) -> PackedSequence:
    """The sequence of a range that begins with its tensors and ends with its JSON."""
    json_start = entry.json_offset - entry.offset
    sequence = _tensors(body[: entry.length], entry)
    try:
        description = json.loads(bytes(body[json_start:]))
        key, n_examples, lineage = description["key"], description["n_examples"], tuple(description["lineage"])
    except (ValueError, KeyError, TypeError) as error:
        raise BadData(f"sequence {entry.key} is corrupt: {error}") from error
    if (key, n_examples) != (entry.key, entry.n_examples):
        raise BadData(f"sequence {entry.key} is not where the index says: found {key}")
    return replace(sequence, lineage=lineage)


def read_tensors(fileobj: BinaryIO, entry: IndexEntry) -> PackedSequence:
    """What training needs of the sequence at `entry`: as `read_sequence`, without its JSON, so without lineage.

    The checksum of the index ties the tensors to their key. Nothing is copied: the arrays are read-only views of the
    one buffer that was read.
    """
    return _tensors(_read_range(fileobj, entry, entry.length), entry)


def _read_range(fileobj: BinaryIO, entry: IndexEntry, size: int) -> memoryview:
    fileobj.seek(entry.offset)
    body = _read_exactly(fileobj, size)
    if len(body) < size:
        raise BadData(f"sequence {entry.key} is cut short: the shard ends inside it")
    return memoryview(body)


def _tensors(body: memoryview, entry: IndexEntry) -> PackedSequence:
    if crc32(body) != entry.crc32:
        raise BadData(f"sequence {entry.key} is corrupt: its tensors do not match their checksum")
    try:
        end = 8 + int.from_bytes(body[:8], "little")
        arrays: dict[str, Any] = {
            name: np.frombuffer(body, _DTYPES[name], count, end + start)
            for name, count, start in _layout(bytes(body[8:end]))
        }
        return PackedSequence(entry.key, n_examples=entry.n_examples, **arrays)
    except (ValueError, KeyError, TypeError) as error:
        raise BadData(f"sequence {entry.key} is corrupt: {error}") from error


@functools.lru_cache(maxsize=4096)
def _layout(header: bytes) -> tuple[tuple[str, int, int], ...]:
    """(name, number of elements, first byte after the header) of a sequence's tensors, from a safetensors header.

    The format is 8 bytes of header length, the header as JSON, and the tensors one after another. Sequences of as many
    documents share a header, hence the cache. Raises ValueError, KeyError or TypeError on what is not a sequence's.
    """
    described = json.loads(header)
    layout = []
    for name, dtype in _DTYPES.items():
        tensor = described[name]
        (count,), (start, stop) = tensor["shape"], tensor["data_offsets"]
        if tensor["dtype"] != _SAFETENSORS[dtype] or stop - start != count * np.dtype(dtype).itemsize or start < 0:
            raise ValueError(f"{name} is described as {tensor}")
        layout.append((name, count, start))
    return tuple(layout)


def verify_shard(fileobj: BinaryIO, stats: ShardStats, vocabulary: JointVocabulary) -> list[str]:
    """Re-hash a shard, compare its members with the index and recount; the problems found, none if whole.

    The file is read once, from its beginning to its end; one sequence at a time is in memory.
    """
    source = _HashingSource(fileobj)
    problems: list[str] = []
    counts = []
    for entry in stats.index:
        start = entry.offset - BLOCK
        if start < source.position:
            problems.append(f"sequence {entry.key} lies before the end of another in the index")
            continue
        source.skip_to(start)
        size = entry.json_offset + entry.json_length - start
        body = source.read(size)
        if len(body) < size:
            problems.append(f"sequence {entry.key} is cut short: the shard ends inside it")
            continue
        name, json_header = member_name(entry.key), entry.json_offset - BLOCK - start
        problems += _strange_member(body[:BLOCK], f"{name}.safetensors", entry.length)
        problems += _strange_member(body[json_header : json_header + BLOCK], f"{name}.json", entry.json_length)
        try:
            sequence = _sequence(body[BLOCK:], entry)
        except BadData as error:
            problems.append(str(error))
            continue
        if unfit := _problems(sequence, stats.context):
            problems += [f"sequence {entry.key}: {problem}" for problem in unfit]
            continue
        counts.append(_count(sequence, vocabulary))
    if not problems:
        total = _total(counts)
        for name, said in {**{name: getattr(stats, name) for name in _COUNTS}, **stats.targets}.items():
            if total[name] != said:
                what = name if name in _COUNTS else f"the number of {name} targets"
                problems.append(f"{what} is {total[name]}, the manifest says {said}")
    source.skip_to(None)
    if source.position != stats.bytes:
        problems.insert(0, f"{source.position} bytes, the manifest says {stats.bytes}")
    if (digest := source.digest.hexdigest()) != stats.sha256:
        problems.insert(0, f"sha256 is {digest}, the manifest says {stats.sha256}")
    return problems


def _strange_member(header: memoryview, name: str, size: int) -> list[str]:
    """What is wrong with a member's header, if anything."""
    try:
        member = tarfile.TarInfo.frombuf(bytes(header), "utf-8", "surrogateescape")
    except tarfile.HeaderError as error:
        return [f"where member {name} is in the index there is none ({error})"]
    if (member.name, member.size, member.isreg()) != (name, size, True):
        return [f"member {member.name} of {member.size} bytes is {name} of {size} in the index"]
    return []


def hash_file(fileobj: BinaryIO) -> str:
    """sha256 (hex) of a seekable file from its beginning."""
    fileobj.seek(0)
    digest = hashlib.sha256()
    while chunk := fileobj.read(_HASH_CHUNK):
        digest.update(chunk)
    return digest.hexdigest()


class _HashingSource:
    """Reads a file from its beginning on and hashes all that it passes."""

    def __init__(self, fileobj: BinaryIO) -> None:
        fileobj.seek(0)
        self.fileobj = fileobj
        self.digest = hashlib.sha256()
        self.position = 0

    def read(self, size: int) -> memoryview:
        body = _read_exactly(self.fileobj, size)
        self.digest.update(body)
        self.position += len(body)
        return memoryview(body)

    def skip_to(self, position: int | None) -> None:
        """Go on to a position, or to the end."""
        while position is None or self.position < position:
            left = _HASH_CHUNK if position is None else min(_HASH_CHUNK, position - self.position)
            if not self.read(left):
                return


class _HashingSink:
    def __init__(self, fileobj: ByteSink) -> None:
        self.fileobj = fileobj
        self.digest = hashlib.sha256()
        self.position = 0

    def write(self, data: bytes) -> int:
        self.fileobj.write(data)
        self.digest.update(data)
        self.position += len(data)
        return len(data)

    def tell(self) -> int:
        return self.position


def _count(sequence: PackedSequence, vocabulary: JointVocabulary) -> dict[str, int]:
    """The counts of `ShardStats`; those of targets by the bare name of their modality."""
    target = sequence.loss_weight > 0
    ranges = vocabulary.modalities
    from_here = [
        int(np.count_nonzero(target & (sequence.tokens >= one.start) if one.start else target)) for one in ranges
    ]
    begins = sum(part.get("provenance", {}).get("document_range", [0])[0] == 0 for part in sequence.lineage)
    return {
        "n_sequences": 1,
        "n_tokens": len(sequence.tokens),
        "n_filled": int(sequence.cu_seqlens[sequence.n_examples]),
        "n_documents": begins,
        "n_examples": sequence.n_examples,
        **{one.name: n - further for one, n, further in zip(ranges, from_here, [*from_here[1:], 0])},
    }


def _total(counts: Iterable[Mapping[str, int]]) -> Counter[str]:
    total = Counter[str]()
    for one in counts:
        total.update(one)
    return total


def _problems(sequence: PackedSequence, context: int) -> list[str]:
    """What makes a sequence unusable for training: wrong dtypes, shapes or boundaries."""
    problems = [
        f"{name} is {getattr(sequence, name).dtype}, not {np.dtype(dtype)}"
        for name, dtype in _DTYPES.items()
        if getattr(sequence, name).dtype != dtype
    ]
    boundaries = sequence.cu_seqlens
    if len(sequence.tokens) != context or len(sequence.loss_weight) != context:
        problems.append(f"{len(sequence.tokens)} tokens and {len(sequence.loss_weight)} weights, not {context}")
    elif len(boundaries) < 2 or boundaries[0] != 0 or boundaries[-1] != context or (np.diff(boundaries) <= 0).any():
        problems.append(f"cu_seqlens does not rise from 0 to {context}")
    elif len(boundaries) - 1 - sequence.n_examples not in (0, 1):
        problems.append(f"{sequence.n_examples} examples in {len(boundaries) - 1} runs")
    elif sequence.loss_weight[boundaries[:-1]].any() or sequence.loss_weight[boundaries[sequence.n_examples] :].any():
        problems.append("loss on the first token of a document or on padding")
    if len(sequence.lineage) != sequence.n_examples:
        problems.append(f"lineage of {len(sequence.lineage)} documents for {sequence.n_examples} examples")
    return problems


def _description(sequence: PackedSequence) -> bytes:
    plain = {"key": sequence.key, "n_examples": sequence.n_examples, "lineage": list(sequence.lineage)}
    return json.dumps(plain, sort_keys=True, separators=(",", ":")).encode()


def _add(tar: tarfile.TarFile, name: str, body: bytes) -> int:
    info = tarfile.TarInfo(name)  # owner 0, mode 0644 and time 0 by default
    info.size = len(body)
    tar.addfile(info, io.BytesIO(body))
    tar.members = []  # type: ignore[attr-defined]  # tarfile remembers every member; a shard need not
    return tar.offset - -(-len(body) // BLOCK) * BLOCK


def _members(index: Iterable[IndexEntry]) -> Iterator[tuple[str, int, int]]:
    for entry in index:
        name = member_name(entry.key)
        yield f"{name}.safetensors", entry.offset, entry.length
        yield f"{name}.json", entry.json_offset, entry.json_length


def _read_exactly(fileobj: BinaryIO, size: int) -> bytes:
    """Up to `size` bytes: a raw file may return fewer than asked before its end."""
    parts = []
    while size and (part := fileobj.read(size)):
        parts.append(part)
        size -= len(part)
    return b"".join(parts)
