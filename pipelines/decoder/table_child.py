"""The decoder process of records and tars: Arrow batches out, of the columns asked for."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, BinaryIO

from pipelines.decoder.child import Answer, serve
from tokenization.readers import rows
from tokenization.readers.records import read_records
from tokenization.readers.webdataset_tar import read_samples


def _answers(request: dict[str, Any], file: BinaryIO) -> Iterator[Answer]:
    columns = request["columns"]
    if request["do"] == "samples":
        batches = rows.pack_samples(read_samples(file), columns)
    else:
        batches = rows.pack_records(read_records(file, request["name"], columns), columns)
    for batch in batches:
        yield {"is": "rows", "bytes": len(batch)}, batch


if __name__ == "__main__":
    serve(_answers)
