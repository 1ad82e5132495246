"""Which fields the records of a source have, as far as that is cheap to know before anything runs.

In: the listed objects of one source. Out: the names of fields, and whether these are all that there can be. Of lines of
JSONL and columns of Parquet a few files are looked at, of these the beginning or the footer alone; of tars none.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterable, Sequence
from typing import Any

from pipelines.sources.listing import SourceObject
from storage.urls import open_url

_FILES = 3  # of a source that are looked at, its first and last among them
_READ = 256 * 2**10  # bytes
_TAIL = 8  # bytes behind a Parquet footer: its length and "PAR1"
_MAX_FOOTER = 16 * 2**20

# Arrow aborts the process on some damaged footers.
_COLUMNS = """
import io, json, sys
import pyarrow.parquet as pq
print(json.dumps(pq.ParquetFile(io.BytesIO(sys.stdin.buffer.read())).schema_arrow.names))
"""


def known_fields(objects: Sequence[SourceObject], options: dict[str, Any]) -> tuple[set[str], bool]:
    """The fields of a source's records, and whether no record can have another. Raises OSError on a failed request."""
    known = {name for found in objects for name in found.side}
    media = [found for found in objects if found.kind != "text"]
    if media:
        known.add("vision")
    if any(found.url.lower().endswith((".txt", ".md")) for found in objects if found.kind == "text"):
        known.add("text")
    files = [found for found in objects if _is_of(found, (".jsonl", ".parquet"))]
    looked_at = [files[number] for number in sorted({0, len(files) // 2, len(files) - 1})] if files else []
    all_known = len(looked_at) == len(files) and not any(found.kind == "webdataset" for found in objects)
    for found in looked_at:
        names, is_whole = (_parquet if _is_of(found, (".parquet",)) else _json_lines)(found, options)
        known.update(names)
        all_known = all_known and is_whole
    return known, all_known


def _is_of(found: SourceObject, extensions: tuple[str, ...]) -> bool:
    return found.kind in ("text", "records") and found.url.partition("?")[0].lower().endswith(extensions)


def _json_lines(found: SourceObject, options: dict[str, Any]) -> tuple[Iterable[str], bool]:
    with open_url(found.url, options) as file:
        beginning = file.read(_READ)
    lines = beginning.split(b"\n")
    names: set[str] = set()
    is_whole = len(beginning) < _READ
    for line in lines if is_whole else lines[:-1]:
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):  # the tokenize stage puts it in quarantine
            continue
        names.update(record if isinstance(record, dict) else ())
    return names, is_whole and bool(names)


def _parquet(found: SourceObject, options: dict[str, Any]) -> tuple[Iterable[str], bool]:
    with open_url(found.url, options) as file:
        end = file.seek(0, 2)
        file.seek(max(0, end - _TAIL))
        length = int.from_bytes(file.read(4), "little")
        if not 0 < length <= min(end - _TAIL, _MAX_FOOTER):
            return (), False
        file.seek(end - _TAIL - length)
        footer = file.read(length + _TAIL)
    done = subprocess.run([sys.executable, "-c", _COLUMNS], input=b"PAR1" + footer, capture_output=True, check=False)
    return (json.loads(done.stdout), True) if done.returncode == 0 else ((), False)
