"""Packed sequences to a shard and back: a WebDataset tar with reproducible bytes, and an index of offsets.

In: packed sequences and a binary file to write. Out: the tar and its `ShardStats`: counts, sha256 and the offset of
each sequence, by which a loader reads it with one ranged read; `webdataset` reads the file as it is. A sequence is two
consecutive members: `{name}.safetensors` (tokens int32 [S], cu_seqlens int32 [n+1], loss_weight float32 [S]) and
`{name}.json` (key, n_examples, lineage of each document). Headers are ustar, and every field that could differ between
runs is fixed: owner 0, mode 0644, time 0.
"""

from __future__ import annotations

import functools
import hashlib
import json
import operator
import re
import tarfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields, replace
from typing import Any, BinaryIO

import numpy as np
import safetensors.numpy
from isal.isal_zlib import crc32  # zlib's own takes 60 us for a sequence of 32K tokens, this one 5

from storage.errors import BadData
from tokenization.compiled import compiled
from tokenization.document import EncodedLineage, PackedSequence
from tokenization.shards.index import IndexEntry, ShardIndex, ShardStats
from tokenization.shards.tar_member import BLOCK, end, header, padding
from tokenization.vocabulary import JointVocabulary

_DTYPES = {name: np.dtype(kind) for name, kind in (("tokens", "i4"), ("cu_seqlens", "i4"), ("loss_weight", "f4"))}
_SAFETENSORS = {np.dtype("i4"): "I32", np.dtype("f4"): "F32"}
_ENCODE = json.JSONEncoder(sort_keys=True, separators=(",", ":")).encode
_SAFE_KEY = re.compile("[A-Za-z0-9-][A-Za-z0-9_-]{0,79}")
_HASH_CHUNK = 1 << 22
_COUNTS = tuple(field.name for field in fields(ShardStats) if field.name.startswith("n_"))


def write_shard(fileobj: BinaryIO, sequences: Iterable[PackedSequence], vocabulary: JointVocabulary) -> ShardStats:
    """Write `sequences` to `fileobj`, which need not seek, as a tar; one sequence at a time is in memory.

    The bytes are a pure function of the sequences. Publish the file only after this returns: an exception leaves a
    truncated tar behind. Raises ValueError on a malformed sequence, on a second key with the same member name, and on
    sequences of different lengths.
    """
    sink = _HashedFile(fileobj)
    index: list[IndexEntry] = []
    total = _Totals(vocabulary)
    names: set[str] = set()
    context = 0
    for sequence in sequences:
        context = context or len(sequence.tokens)
        problems = _problems(sequence, context)
        name = member_name(sequence.key)
        if name in names:
            problems.append(f"its member name {name} is already in this shard")
        if problems:
            raise ValueError(f"sequence {sequence.key}: {'; '.join(problems)}")
        names.add(name)
        index.append(_write_members(sink, name, sequence))
        total.add(sequence)
    sink.write(end(sink.position))
    counts = total.by_name()
    return ShardStats(
        context=context,
        **{name: counts.pop(name) for name in _COUNTS},
        targets=counts,
        bytes=sink.position,
        sha256=sink.digest.hexdigest(),
        index=ShardIndex.of(index),
    )


def _write_members(sink: _HashedFile, name: str, sequence: PackedSequence) -> IndexEntry:
    tensors, description = _encoded_tensors(sequence), _encoded_description(sequence)
    size = sum(map(len, tensors))
    checksum = functools.reduce(lambda crc, part: crc32(part, crc), tensors, 0)
    entry = (sequence.key, sink.position + BLOCK, size, len(description), sequence.n_examples, checksum)
    before = (header(f"{name}.safetensors", size), *tensors, padding(size))
    after = (header(f"{name}.json", len(description)), description, padding(len(description)))
    sink.write(b"".join(before + after))  # one copy, one write and one hash
    return IndexEntry(*entry)


def _encoded_tensors(sequence: PackedSequence) -> list[bytes | memoryview]:
    """A safetensors file of a sequence's arrays, in parts."""
    arrays = {"tokens": sequence.tokens, "cu_seqlens": sequence.cu_seqlens, "loss_weight": sequence.loss_weight}
    before, names = _tensors_header(*map(len, arrays.values()))
    return [before, *[arrays[name].data.cast("B") for name in names]]


@functools.lru_cache(maxsize=4096)
def _tensors_header(*lengths: int) -> tuple[bytes, list[str]]:
    """What comes before the tensors of so many elements in a safetensors file, and their names in its order."""
    arrays = {name: np.zeros(length, dtype) for (name, dtype), length in zip(_DTYPES.items(), lengths)}
    whole = safetensors.numpy.save(arrays)
    end = 8 + int.from_bytes(whole[:8], "little")
    offsets = {name: start for name, _, start in _layout(whole[8:end])}
    return whole[:end], sorted(offsets, key=offsets.__getitem__)


def _encoded_description(sequence: PackedSequence) -> bytes:
    """Canonical JSON, in which an encoded lineage is put as it is."""
    lineage = sequence.lineage
    entries = lineage.json if isinstance(lineage, EncodedLineage) else _ENCODE(list(lineage)).encode()
    return b'{"key":%s,"lineage":%s,"n_examples":%d}' % (_ENCODE(sequence.key).encode(), entries, sequence.n_examples)


def member_name(key: str) -> str:
    """The base name of a key's tar members: letters, digits, `_` and `-` only, at most 81 characters.

    webdataset splits a name at its first dot and takes slashes for folders. Other characters therefore become `_`, and
    a hash of the whole key keeps the name unique; a safe and short key is its own name. The JSON member has the key.
    """
    if _SAFE_KEY.fullmatch(key):
        return key
    safe = re.sub(r"[^A-Za-z0-9_-]", "_", key)
    return f"k{safe[:63]}-{hashlib.sha256(key.encode()).hexdigest()[:16]}"


def read_sequence(fileobj: BinaryIO, entry: IndexEntry) -> PackedSequence:
    """Read the sequence at `entry`, with its lineage, from a seekable shard by one seek and one read.

    Raises BadData with the key on bytes that are missing, fail their CRC-32 or are no sequence.
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
    """Read the sequence at `entry` as `read_sequence` does, but without its JSON and so without lineage, for training.

    The checksum in the index ties the tensors to their key. The arrays are read-only views of the buffer that was read.
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
        end = 8 + int.from_bytes(body[:8], "little")  # of the header
        arrays: dict[str, Any] = {
            name: np.frombuffer(body, _DTYPES[name], count, end + start)
            for name, count, start in _layout(bytes(body[8:end]))
        }
        return PackedSequence(entry.key, n_examples=entry.n_examples, **arrays)
    except (ValueError, KeyError, TypeError) as error:
        raise BadData(f"sequence {entry.key} is corrupt: {error}") from error


@functools.lru_cache(maxsize=4096)
def _layout(header: bytes) -> tuple[tuple[str, int, int], ...]:
    """(name, number of elements, offset after the header) of a sequence's tensors, from a safetensors header.

    Sequences of equally many documents share a header. Raises ValueError, KeyError or TypeError on any other header.
    """
    described = json.loads(header)
    layout = []
    for name, dtype in _DTYPES.items():
        tensor = described[name]
        (count,), (start, stop) = tensor["shape"], tensor["data_offsets"]
        if tensor["dtype"] != _SAFETENSORS[dtype] or stop - start != count * dtype.itemsize or start < 0:
            raise ValueError(f"{name} is described as {tensor}")
        layout.append((name, count, start))
    return tuple(layout)


def verify_shard(fileobj: BinaryIO, stats: ShardStats, vocabulary: JointVocabulary) -> list[str]:
    """Re-hash a shard, compare its members with the index and recount; returns the problems found.

    The file is read once, from its beginning to its end; one sequence at a time is in memory.
    """
    fileobj.seek(0)
    source = _HashedFile(fileobj)
    problems: list[str] = []
    total = _Totals(vocabulary)
    for entry in stats.index:
        start = entry.offset - BLOCK
        if start < source.position:
            problems.append(f"sequence {entry.key} begins before the end of another in the index")
            continue
        source.skip_to(start)
        size = entry.json_offset + entry.json_length - start
        body = source.read(size)
        if len(body) < size:
            problems.append(f"sequence {entry.key} is cut short: the shard ends inside it")
            continue
        name, json_header = member_name(entry.key), body[entry.json_offset - BLOCK - start :]
        problems += _header_problems(body[:BLOCK], f"{name}.safetensors", entry.length)
        problems += _header_problems(json_header[:BLOCK], f"{name}.json", entry.json_length)
        try:
            sequence = _sequence(body[BLOCK:], entry)
        except BadData as error:
            problems.append(str(error))
            continue
        problems += [f"sequence {entry.key}: {problem}" for problem in _problems(sequence, stats.context)]
        if not problems:
            total.add(sequence)
    if not problems:
        counts = total.by_name()
        for name, expected in {**{name: getattr(stats, name) for name in _COUNTS}, **stats.targets}.items():
            if counts.get(name, 0) != expected:
                what = name if name in _COUNTS else f"the number of {name} targets"
                problems.append(f"{what} is {counts.get(name, 0)}, the manifest says {expected}")
    source.skip_to(None)
    if source.position != stats.bytes:
        problems.insert(0, f"{source.position} bytes, the manifest says {stats.bytes}")
    if (digest := source.digest.hexdigest()) != stats.sha256:
        problems.insert(0, f"sha256 is {digest}, the manifest says {stats.sha256}")
    return problems


def _header_problems(header: memoryview, name: str, size: int) -> list[str]:
    try:
        member = tarfile.TarInfo.frombuf(bytes(header), "utf-8", "surrogateescape")
    except tarfile.HeaderError as error:
        return [f"the index has member {name} where the shard has none ({error})"]
    if (member.name, member.size, member.isreg()) != (name, size, True):
        return [f"member {member.name} of {member.size} bytes is {name} of {size} in the index"]
    return []


def hash_file(fileobj: BinaryIO) -> str:
    """sha256 (hex) of a seekable file from its beginning."""
    fileobj.seek(0)
    source = _HashedFile(fileobj)
    source.skip_to(None)
    return source.digest.hexdigest()


class _HashedFile:
    """A file that is read or written once from its beginning, and the hash of its bytes up to the position."""

    def __init__(self, fileobj: BinaryIO) -> None:
        self.fileobj = fileobj
        self.digest = hashlib.sha256()
        self.position = 0

    def write(self, data: bytes) -> int:
        self.fileobj.write(data)
        self._advance(data)
        return len(data)

    def read(self, size: int) -> memoryview:
        data = _read_exactly(self.fileobj, size)
        self._advance(data)
        return memoryview(data)

    def skip_to(self, position: int | None) -> None:
        """Read up to a position; None reads to the end."""
        while position is None or self.position < position:
            left = _HASH_CHUNK if position is None else min(_HASH_CHUNK, position - self.position)
            if not self.read(left):
                return

    def tell(self) -> int:
        return self.position

    def _advance(self, data: bytes) -> None:
        self.digest.update(data)
        self.position += len(data)


class _Totals:
    """The counts of `ShardStats`, and the targets by the name of their modality, over sequences added one by one."""

    def __init__(self, vocabulary: JointVocabulary) -> None:
        self._names = (*_COUNTS, *vocabulary.sizes)
        self._starts = np.array([one.start for one in vocabulary.modalities], np.int64)
        self._sums = [0] * len(_COUNTS)
        self._from_here = np.zeros(len(self._starts), np.int64)

    def add(self, sequence: PackedSequence) -> None:
        _add_targets(sequence.tokens, sequence.loss_weight, self._starts, self._from_here)
        n_filled = int(sequence.cu_seqlens[sequence.n_examples])
        counts = (1, len(sequence.tokens), n_filled, _n_documents(sequence.lineage), sequence.n_examples)
        self._sums = list(map(operator.add, self._sums, counts))

    def by_name(self) -> dict[str, int]:
        targets = self._from_here - np.append(self._from_here[1:], 0)
        return dict(zip(self._names, (*self._sums, *targets.tolist())))


@compiled
def _add_targets(tokens: np.ndarray, loss_weight: np.ndarray, starts: np.ndarray, sums: np.ndarray) -> None:
    """Add to int64 [M] the tokens with loss of each modality and of those whose ranges come after it."""
    for modality in range(len(starts)):
        count = 0
        for at in range(len(tokens)):
            count += (loss_weight[at] > 0) & ((modality == 0) | (tokens[at] >= starts[modality]))
        sums[modality] += count


def _n_documents(lineage: Sequence[Mapping[str, Any]]) -> int:
    if isinstance(lineage, EncodedLineage):
        return lineage.n_documents
    return sum(part.get("provenance", {}).get("document_range", [0])[0] == 0 for part in lineage)


def _problems(sequence: PackedSequence, context: int) -> list[str]:
    """Reasons why a sequence cannot be trained on: wrong dtypes, shapes or boundaries."""
    tokens, boundaries, loss_weight = arrays = (sequence.tokens, sequence.cu_seqlens, sequence.loss_weight)
    problems = [
        f"{name} is {array.dtype}, not {dtype}"
        for (name, dtype), array in zip(_DTYPES.items(), arrays)
        if array.dtype != dtype
    ]
    if len(tokens) != context or len(loss_weight) != context:
        problems.append(f"{len(tokens)} tokens and {len(loss_weight)} weights, not {context}")
    elif flaw := _flaw(loss_weight, boundaries, sequence.n_examples):
        problems.append(
            (
                f"cu_seqlens does not rise from 0 to {context}",
                f"{sequence.n_examples} examples in {len(boundaries) - 1} runs",
                "loss on the first token of a document or on padding",
            )[flaw - 1]
        )
    if len(sequence.lineage) != sequence.n_examples:
        problems.append(f"lineage of {len(sequence.lineage)} documents for {sequence.n_examples} examples")
    return problems


@compiled
def _flaw(loss_weight: np.ndarray, boundaries: np.ndarray, n_examples: int) -> int:
    """0, or which comes first: 1 boundaries that do not rise, 2 too many or few runs, 3 loss where none may be."""
    runs = len(boundaries) - 1
    if runs < 1 or boundaries[0] != 0 or boundaries[runs] != len(loss_weight):
        return 1
    for run in range(runs):
        if boundaries[run] >= boundaries[run + 1]:
            return 1
    if runs - n_examples != 0 and runs - n_examples != 1:
        return 2
    for run in range(runs):
        if loss_weight[boundaries[run]] != 0:
            return 3
    for at in range(boundaries[n_examples], len(loss_weight)):
        if loss_weight[at] != 0:
            return 3
    return 0


def _read_exactly(fileobj: BinaryIO, size: int) -> bytes:
    """`size` bytes, or fewer at the end of the file: a single read of a raw file may return fewer at any place."""
    parts = []
    while size and (part := fileobj.read(size)):
        parts.append(part)
        size -= len(part)
    return b"".join(parts)
