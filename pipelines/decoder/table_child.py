"""The decoder process of records and tars: Arrow batches out, of the columns asked for."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, BinaryIO

from pipelines.decoder.child import Answer, serve
from tokenization.readers import rows
from tokenization.readers.records import column_names, read_records
from tokenization.readers.webdataset_tar import read_samples

_MAX_NAMES = 1000


def _answers(request: dict[str, Any], file: BinaryIO) -> Iterator[Answer]:
    if request["do"] == "columns":
        names, is_whole = column_names(file, request["name"])
        yield ({"is": "columns", "names": names[:_MAX_NAMES], "is_whole": is_whole and len(names) <= _MAX_NAMES},)
        return
    columns = request["columns"]
    if request["do"] == "samples":
        batches = rows.pack_samples(read_samples(file), columns)
    else:
        batches = rows.pack_records(read_records(file, request["name"], columns), columns)
    for batch in batches:
        yield {"is": "rows", "bytes": len(batch)}, batch


if __name__ == "__main__":
    serve(_answers)
