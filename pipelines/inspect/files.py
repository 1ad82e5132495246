"""What a single file of a run holds, for `ringworld inspect`: a shard, or a file of documents or of codes.

In: the URL of a file, wherever it lies. Out: plain JSON. Of a shard the headers of its members and their JSON are read,
of Parquet the footer and the columns that name documents. Kinds of Parquet are told by their schemas, in `_TABLES`.
"""

from __future__ import annotations

import io
import json
import tarfile
from collections import Counter
from collections.abc import Callable
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq

from storage.errors import UserError
from storage.public_url import path_of, public_url
from storage.urls import first_contact, open_url
from tokenization.codecs.codes_file import SCHEMA as CODES_SCHEMA
from tokenization.shards.document_parquet import SCHEMA

_PARQUET = b"PAR1"
_HEADER_BYTES = 1 << 16  # of safetensors with three tensors, by far


def is_file(url: str) -> bool:
    """Whether a place is a file of a run, by its name."""
    return path_of(url).endswith((".tar", ".parquet"))


def describe_file(url: str) -> dict[str, Any]:
    """What a file holds. Raises UserError where it is absent, of another kind, or damaged."""
    try:
        with first_contact(url):
            opened = open_url(url)
        with opened as file:
            size = file.seek(0, io.SEEK_END)
            file.seek(0)
            is_table = file.read(len(_PARQUET)) == _PARQUET
            file.seek(0)
            found = _table(file) if is_table else _shard(file)
    except FileNotFoundError:
        raise UserError(f"{public_url(url)}: no such file; give the path of a file or folder of a run") from None
    except (tarfile.TarError, pa.ArrowException, ValueError, KeyError, TypeError, EOFError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"{public_url(url)}: not a whole shard of packed sequences, nor a file of documents or codes ({reason}); "
            f"give the path of one, or of a folder of a run"
        ) from None
    return {**found, "bytes": size}


def _shard(file: BinaryIO) -> dict[str, Any]:
    sequences: list[str] = []
    sources, totals = Counter[str](), Counter[str]()
    tensors: dict[str, Any] = {}
    with tarfile.open(fileobj=file, mode="r:") as tar:
        for member in tar:
            content = tar.extractfile(member)
            extension = member.name.partition(".")[2]
            if content is None or extension not in ("safetensors", "json"):
                raise ValueError(f"the tar has the member {member.name}")
            if extension == "safetensors":
                tensors = tensors or _tensors(content.read(_HEADER_BYTES))
                continue
            plain = json.load(content)
            sequences.append(plain["key"])
            sources.update(one["source"] for one in plain["lineage"])
            totals["examples"] += plain["n_examples"]
            totals["documents"] += sum(not one["provenance"].get("document_range", [0])[0] for one in plain["lineage"])
            totals["filled"] += sum(one["length"] for one in plain["lineage"])
    if not sequences:
        raise ValueError("the tar holds no packed sequence")
    (context,) = tensors["tokens"]["shape"]
    return {
        "kind": "shard",
        "sequences": len(sequences),
        "context": context,
        "filled": f"{totals['filled'] / (context * len(sequences)):.2%}",
        "documents": totals["documents"],
        "examples": totals["examples"],
        "examples_by_source": dict(sorted(sources.items())),
        "keys": f"{sequences[0]} to {sequences[-1]}",
        "tensors": {name: one["dtype"] for name, one in tensors.items() if name != "__metadata__"},
    }


def _tensors(start: bytes) -> dict[str, Any]:
    """The header of safetensors: dtype and shape by name."""
    header: dict[str, Any] = json.loads(start[8 : 8 + int.from_bytes(start[:8], "little")])
    return header


def _table(file: BinaryIO) -> dict[str, Any]:
    parquet = pq.ParquetFile(file, pre_buffer=False)
    describe = next((one for schema, one in _TABLES if parquet.schema_arrow.equals(schema)), None)
    if describe is None:
        raise ValueError(f"its columns are {', '.join(parquet.schema_arrow.names)}")
    return describe(parquet)


def _documents(parquet: pq.ParquetFile) -> dict[str, Any]:
    groups = [parquet.metadata.row_group(number) for number in range(parquet.num_row_groups)]
    columns = [group.column(number) for group in groups for number in range(group.num_columns)]
    sources, keys = Counter[str](), list[str]()
    for batch in parquet.iter_batches(columns=["key", "source"], use_threads=False):
        sources.update(batch["source"].to_pylist())
        keys = [*keys[:1], batch["key"][0].as_py(), batch["key"][-1].as_py()]
    return {
        "kind": "documents",
        "documents": parquet.metadata.num_rows,
        "tokens": sum(column.num_values for column in columns if column.path_in_schema.startswith("tokens.")),
        "documents_by_source": dict(sorted(sources.items())),
        "keys": f"{keys[0]} to {keys[-1]}" if keys else None,
        "row_groups": len(groups),
    }


def _codes(parquet: pq.ParquetFile) -> dict[str, Any]:
    groups = [parquet.metadata.row_group(number) for number in range(parquet.num_row_groups)]
    columns = [group.column(number) for group in groups for number in range(group.num_columns)]
    frames, codes = (
        sum(one.num_values for one in columns if one.path_in_schema.startswith(f"{name}."))
        for name in ("numbers", "codes")
    )
    objects, encoders = set[bytes](), Counter[str]()
    for batch in parquet.iter_batches(columns=["object", "encoder"], use_threads=False):
        objects.update(batch["object"].to_pylist())
        encoders.update(batch["encoder"].to_pylist())
    return {
        "kind": "codes",
        "media": parquet.metadata.num_rows,
        "objects": len(objects),
        "frames": frames,
        "codes": codes,
        "media_by_encoder": dict(sorted(encoders.items())),
        "row_groups": len(groups),
    }


_TABLES: list[tuple[pa.Schema, Callable[[pq.ParquetFile], dict[str, Any]]]] = [
    (SCHEMA, _documents),
    (CODES_SCHEMA, _codes),
]
