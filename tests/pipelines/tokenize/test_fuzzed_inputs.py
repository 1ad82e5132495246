"""Files of every format, damaged at random: whatever comes of it, it is quarantined, or it is what others' readers see.

Each input is looked at through the door that the tokenize stage uses. What must hold of all: nothing but quarantine
comes of damage, no other exception; neither this process nor a decoder outgrows its bound or stands still; every line,
row and sample is used or quarantined; and what is used is, to the pixel, what a plain reader makes of the same bytes.

The inputs are the same in every run. HYPOTHESIS_PROFILE=explore draws new ones, `--hypothesis-seed=N` with it certain
ones, RINGWORLD_FUZZ=N so many of each format; `--hypothesis-show-statistics` says what became of them. A failure prints
the edits that made the input and its bytes; the edits belong into `KEPT`.
"""

from __future__ import annotations

import base64
import math
import os
import re
import time
import zlib
from bisect import bisect_right
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from fractions import Fraction
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow as pa
import pytest
from hypothesis import HealthCheck, event, given, note, settings

from pipelines.decoder.client import close_idle
from pipelines.recipe.data import Source, Tokenize
from pipelines.sources.list_sources import list_sources
from pipelines.sources.listing import SourceObject
from pipelines.sources.media import BadMedium, Medium, media_of, medium_frames
from pipelines.tokenize.records import Record, Tally, TokenizeJob, text_records, to_documents
from pipelines.tokenize.text_documents import stays_in_columns, text_documents
from storage.errors import BadData
from testing import plain_readers
from testing.fuzz_edits import Edit, edited, several_edits
from testing.fuzz_formats import FORMATS, RATE, SIDE, Family, file_of, neighbour
from testing.plain_readers import Film, Pending, ReferenceProcess, Refused
from testing.tiny_run import VOCABULARY, tiny_recipe
from tokenization.fields import field_names
from tokenization.media.frame_sampling import FrameRequest
from tokenization.shards.document_parquet import to_batches
from tokenization.text.tokenizer import load_text_tokenizer

pytestmark = [pytest.mark.faults, pytest.mark.slow]

INPUTS = int(os.environ.get("RINGWORLD_FUZZ", 2000 // len(FORMATS) + 1))
"""Of each format."""

LIMITS = Tokenize(decoder_memory_gib=0.5, decoder_cpu_seconds=5)
MOST_FRAMES = 100
IMPORTED = 400 << 20  # bytes of what a decoder process has imported
GROWTH = 100 << 20  # bytes by which one input may make this process grow
COLOURS = 12  # of 255, by which FFmpeg's ways to convert the colours of a damaged picture may differ in the mean
LUMA = np.array([0.299, 0.587, 0.114])
SECONDS = 60  # a decoder that takes too long is stopped after 5 of its processor time

KEPT: list[tuple[str, tuple[Edit, ...], str]] = [
    ("mjpeg.mov", (Edit("move", 17971, 3, source=65473),), "quarantined"),  # a picture without its second half
    ("mjpeg.avi", (Edit("graft", 63977, 215, source=116),), "quarantined"),
    ("mpeg4.m4v", (Edit("fill", 34754, 6, 128),), "used, some pictures not compared"),  # turned by an odd angle
    ("pax.tar", (Edit("fill", 36063, 1, 149),), "used in part"),  # a sample in three pieces
    ("gzip.parquet", (Edit("flip", 48490, value=183),), "used in part"),  # a footer that is not UTF-8
]
"""Edits that once made an input for which something did not hold, and what becomes of it."""


@dataclass
class Outcome:
    """What the stage makes of an object. used: by key or number. bad: the records in quarantine; None: the rest."""

    used: dict[Any, Any] = field(default_factory=dict)
    bad: dict[Any, str] = field(default_factory=dict)


class Door:
    """The tokenize stage's way to the objects of one format."""

    def __init__(self, name: str, folder: Path) -> None:
        self.name, self.path, self.format = name, folder / "data" / name, FORMATS[name]
        self.path.parent.mkdir()
        source = Source.model_validate({"urls": [name], "fields": ["vision"], **self.format.source})
        if self.format.family == "text" and "fields" not in self.format.source:
            source = Source(urls=[name])
        recipe = tiny_recipe(folder)
        self._recipe = recipe.model_copy(update={"sources": {"a": source}, "tokenize": LIMITS})
        self._job = TokenizeJob(self._recipe, VOCABULARY, SIDE)
        self.columns = list(dict.fromkeys(field_names(source.fields)))
        self._request = FrameRequest(fps=self.format.fps, size=SIDE, chunk=32, max_frames=MOST_FRAMES)

    def outcome(self, content: bytes) -> Outcome:
        self.path.write_bytes(content)
        (found,) = list_sources(self._recipe)
        return self._texts(found) if self.format.family == "text" else self._media(found)

    def _texts(self, found: SourceObject) -> Outcome:
        outcome, tally, later = Outcome(), Tally(), Tally()

        def seen() -> Iterator[Record]:
            for record in text_records(found, self._job, tally):
                assert record.number not in outcome.used
                outcome.used[record.number] = record.fields
                yield record

        one_by_one = list(to_batches(to_documents(seen(), self._job, load_text_tokenizer(), later)))
        outcome.bad = {line["record"]: line["reason"] for line in tally.quarantine}
        assert len(outcome.bad) == len(tally.quarantine)
        if stays_in_columns(found, self._job):
            whole = Tally()
            in_columns = list(text_documents(found, self._job, load_text_tokenizer(), whole))
            assert rows_of(in_columns) == rows_of(one_by_one)
            assert (whole.units, whole.tokens) == (tally.units, later.tokens)
            reasons = {line["record"]: line["reason"] for line in tally.quarantine + later.quarantine}
            assert {line["record"]: line["reason"] for line in whole.quarantine} == reasons
        return outcome

    def _media(self, found: SourceObject) -> Outcome:
        outcome = Outcome()
        for medium in media_of(found, {}, self._job.columns(found), LIMITS.decoder_limits):
            key = medium.origin.key.removeprefix(found.key).removeprefix("/") or None
            if isinstance(medium, BadMedium):
                outcome.bad[key] = medium.reason
                continue
            assert key not in outcome.used
            try:
                chunks = list(medium_frames(medium, self._request, LIMITS.decoder_limits))
            except BadData as error:
                outcome.bad[key] = str(error)
            else:
                if not chunks:
                    outcome.bad[key] = "no frame in it"  # as `media_records` has it
                    continue
                frames, times = zip(*((chunk.frames, chunk.times) for chunk in chunks))
                outcome.used[key] = Shown(medium, np.concatenate(frames), np.concatenate(times))
        return outcome


def rows_of(batches: list[pa.RecordBatch]) -> list[dict[str, Any]]:
    return [row for batch in batches for row in batch.to_pylist()]


@dataclass
class Shown:
    """A medium that is used, its frames and their times."""

    medium: Medium
    frames: np.ndarray
    times: np.ndarray


@pytest.fixture(scope="module")
def reference() -> Iterator[ReferenceProcess]:
    process = ReferenceProcess()
    yield process
    process.close()
    close_idle()


@pytest.fixture(scope="module")
def door(tmp_path_factory: pytest.TempPathFactory, reference: ReferenceProcess) -> Callable[[str], Door]:
    @cache
    def opened(name: str) -> Door:
        door = Door(name, tmp_path_factory.mktemp("door"))
        assert _verdict(door, file_of(name), reference) == "used"  # and what it takes is imported
        return door

    return opened


@pytest.mark.parametrize("name", FORMATS)
@settings(max_examples=INPUTS, suppress_health_check=list(HealthCheck), database=None)
@given(edits=several_edits())
def test_damage_is_quarantined_or_seen_as_others_see_it(
    name: str, edits: tuple[Edit, ...], door: Callable[[str], Door], reference: ReferenceProcess
) -> None:
    content = edited(file_of(name), edits, neighbour(name))
    note(f"{name}: {edits}; by zlib and base64: {base64.b64encode(zlib.compress(content)).decode()}")
    event(_verdict(door(name), content, reference))


@pytest.mark.parametrize(("name", "edits", "verdict"), KEPT)
def test_what_once_failed_holds(
    name: str, edits: tuple[Edit, ...], verdict: str, door: Callable[[str], Door], reference: ReferenceProcess
) -> None:
    assert _verdict(door(name), edited(file_of(name), edits, neighbour(name)), reference) == verdict


def _verdict(door: Door, content: bytes, reference: ReferenceProcess) -> str:
    """What becomes of a file, once all that must hold of it does."""
    reader, agree = FAMILIES[door.format.family]
    expected = reader(door, content, reference)
    before = psutil.Process().memory_info().rss
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    began = time.monotonic()
    outcome = door.outcome(content)
    assert time.monotonic() - began < SECONDS
    assert _peak("self") - before < GROWTH
    _check_decoders()
    theirs = expected.result()
    if not outcome.used:
        return "quarantined, as the reference refuses it" if isinstance(theirs, Refused) else "quarantined"
    assert not isinstance(theirs, Refused), theirs.reason
    return agree(door, outcome, theirs, reference) + (" in part" if outcome.bad else "")


def _read_text(door: Door, content: bytes, reference: ReferenceProcess) -> Pending[list[dict[str, Any] | None]]:
    if door.name.endswith(".parquet"):
        return reference.begin(plain_readers.parquet_rows, content, door.columns)
    return reference.begin(plain_readers.text_table, content, door.name)


def _read_pictures(_: Door, content: bytes, reference: ReferenceProcess) -> Pending[list[dict[str, Any] | None]]:
    return reference.begin(plain_readers.parquet_rows, content, ["image"])


def _read_film(_: Door, content: bytes, reference: ReferenceProcess) -> Pending[Film]:
    return reference.begin(plain_readers.film, content, SIDE)


def _read_picture(_: Door, content: bytes, reference: ReferenceProcess) -> Pending[np.ndarray]:
    return reference.begin(plain_readers.picture, content, SIDE)


def _read_tar(_: Door, content: bytes, reference: ReferenceProcess) -> Pending[list[dict[str, Any]]]:
    return reference.begin(plain_readers.tar_samples, content)


def _check_decoders() -> None:
    for child in psutil.Process().children():
        with suppress(FileNotFoundError, ProcessLookupError):  # one that has ended
            if b"pipelines.decoder" in Path(f"/proc/{child.pid}/cmdline").read_bytes():
                assert _peak(child.pid) < LIMITS.decoder_limits.memory + IMPORTED


def _peak(process: int | str) -> int:
    """The most bytes of memory that a process has had; 0 of one that has ended."""
    lines = Path(f"/proc/{process}/status").read_text().splitlines()
    return next((int(line.split()[1]) << 10 for line in lines if line.startswith("VmHWM:")), 0)


def _agree_on_texts(door: Door, outcome: Outcome, theirs: list[dict[str, Any] | None], _: ReferenceProcess) -> str:
    rows = [row and {name: _normal(row.get(name)) for name in door.columns if name in row} for row in theirs]
    for number, fields in outcome.used.items():
        assert {name: _normal(value) for name, value in fields.items()} == rows[number], number
    if None not in outcome.bad:
        used_or_bad = (row is None or n in outcome.used or _covers(outcome.bad, n) for n, row in enumerate(rows))
        assert all(used_or_bad)
    return "used"


def _normal(value: Any) -> Any:
    return value if isinstance(value, str | bytes) else getattr(value, "type_name", type(value).__name__)


def _covers(bad: dict[Any, str], number: int) -> bool:
    """Whether the record is in quarantine, by itself or in a row group of Parquet."""
    groups = (re.match(r"rows (\d+) to (\d+) are unreadable", reason) for reason in bad.values())
    return number in bad or any(int(group[1]) <= number <= int(group[2]) for group in groups if group)


def _agree_on_a_picture(_: Door, outcome: Outcome, theirs: np.ndarray, __: ReferenceProcess) -> str:
    _same_pictures(outcome.used[None].frames[0], theirs)
    return "used"


def _same_pictures(ours: np.ndarray, theirs: np.ndarray) -> None:
    assert int(np.abs(ours.astype(int) - theirs.astype(int)).max()) <= 2


def _agree_on_a_film(door: Door, outcome: Outcome, theirs: Film, _: ReferenceProcess) -> str:
    assert theirs.failed is None
    shown, fps, begins = outcome.used[None], Fraction(door.format.fps), _begins(theirs)
    numbers = [round(time * fps) for time in shown.times]
    assert numbers == sorted(set(numbers))
    assert numbers[-1] >= math.ceil(begins[-1] * fps) - 1, "its last frames are missing"
    compared = 0
    for number, frame in zip(numbers, shown.frames):
        place = bisect_right(begins, number / fps) - 1
        near = [picture for *_, picture in theirs.frames[max(0, place - 1) : place + 2]]
        if (right := theirs.frames[place][2]) is not None:
            compared += 1
            error = _difference(frame, right)
            nearest = min(_difference(frame, picture) for picture in near if picture is not None)
            assert error < COLOURS, number
            assert error < 1 + 1.5 * nearest, (number, "the frame before or after is nearer")
    return "used" if compared == len(numbers) else "used, some pictures not compared"


def _difference(ours: np.ndarray, theirs: np.ndarray) -> float:
    """Of the brightness of two pictures, in the mean: where colours end, each way to convert them differs."""
    return float(np.abs(ours @ LUMA - theirs @ LUMA).mean())


def _begins(film: Film) -> list[Fraction]:
    """The seconds from which each frame is shown, a half tick early, as containers round."""
    first, at, until = film.frames[0][0] or 0, Fraction(0), Fraction(0)
    begins = []
    for pts, duration, _ in film.frames:
        at = until if pts is None else max(at, (pts - first) * film.tick)
        until = at + (duration * film.tick or Fraction(1, RATE))
        begins.append(at - film.tick / 2)
    return begins


def _agree_on_samples(door: Door, outcome: Outcome, theirs: list[dict[str, Any]], reference: ReferenceProcess) -> str:
    samples = {sample["__key__"]: sample for sample in reversed(theirs)}  # of a key that occurs twice the first
    content = door.path.read_bytes()
    for key, shown in outcome.used.items():
        origin, (offset, size) = shown.medium.origin, shown.medium.content.window or (0, 0)
        extension = origin.provenance["member"].rpartition("/")[2].partition(".")[2].lower()
        member = samples[key][extension]
        assert content[offset : offset + size] == member
        if "txt" in samples[key]:
            assert origin.side["caption"] == samples[key]["txt"].decode("utf-8-sig").strip("\r\n")
        _same_as_the_reference(shown, member, reference)
    return "used"


def _agree_on_named_pictures(
    _: Door, outcome: Outcome, theirs: list[dict[str, Any] | None], reference: ReferenceProcess
) -> str:
    for key, shown in outcome.used.items():
        row = theirs[int(key)]
        assert row is not None
        _same_as_the_reference(shown, row["image"]["bytes"], reference)
    return "used"


def _same_as_the_reference(shown: Shown, content: bytes, reference: ReferenceProcess) -> None:
    picture = reference.begin(plain_readers.picture, content, SIDE).result()
    assert not isinstance(picture, Refused), picture.reason
    _same_pictures(shown.frames[0], picture)


FAMILIES: dict[Family, tuple[Callable[..., Pending[Any]], Callable[..., str]]] = {
    "text": (_read_text, _agree_on_texts),
    "film": (_read_film, _agree_on_a_film),
    "picture": (_read_picture, _agree_on_a_picture),
    "tar": (_read_tar, _agree_on_samples),
    "pictures": (_read_pictures, _agree_on_named_pictures),
}
"""Of each the reference, and what it must have in common with what is used."""
