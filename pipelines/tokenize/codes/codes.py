"""The codes that one task finds in a store and adds to it.

In: media, by the object that holds them. Out: their codes, where all that are wanted are there, of one encoder; what is
added is committed in few files, each whole or not there, and first come, first served.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import itertools
import logging
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any, BinaryIO, cast

import numpy as np
import ray
from ray.exceptions import RayActorError

from pipelines.tokenize.codes.index import DATA
from pipelines.tokenize.codes.place import CodesPlace
from storage.errors import BadData, UserError
from tokenization.codecs.codes_file import CodesFile, CodesWriter, MediumCodes, object_id

log = logging.getLogger("ringworld")

_FILE_CODES = 1 << 26  # about 100 MB
_FILE_SECONDS = 600.0  # after which what has been encoded is committed, so that a task that dies loses no more
_KEPT_MEMBERS, _KEPT_ROWS, _OPEN_FILES = 64, 4, 8  # row groups, by their names and as a whole, and files of a task

Identity = tuple[str, str, str]
"""URL and etag of the object that holds a medium, and which of its media it is."""


class OvertakenError(Exception):
    """Another task has just committed codes of the same media: they are in the store now, and are the ones to use."""


class _Unwritten:
    """A file of codes that is being filled, in a temporary file without a name."""

    def __init__(self) -> None:
        self._file = cast(BinaryIO, tempfile.TemporaryFile())  # noqa: SIM115 - closed by `finished`
        self._writer, self._named = CodesWriter(self._file), hashlib.sha256()
        self._codes, self._since = 0, time.monotonic()

    def add(self, row: MediumCodes) -> None:
        """One medium more."""
        self._writer.write(row)
        self._named.update(row.object + row.member.encode() + b"\0" + row.numbers.tobytes())
        self._codes += row.codes.size

    @property
    def is_due(self) -> bool:
        """Whether it is large or old enough to be committed."""
        return self._codes >= _FILE_CODES or time.monotonic() - self._since > _FILE_SECONDS

    @contextlib.contextmanager
    def finished(self) -> Iterator[tuple[BinaryIO, str, list[bytes]]]:
        """The file, which is gone when the block ends; a name that says which frames of which media it has; and the
        objects that have them.
        """
        objects = self._writer.objects
        with self._file:
            self._writer.close()
            yield self._file, self._named.hexdigest()[:32], objects


class Codes:
    """The codes that one task finds and makes. To be closed by `commit`, before what is built of them is committed."""

    def __init__(self, place: CodesPlace) -> None:
        self._place = place
        self._file = functools.lru_cache(_OPEN_FILES)(self._open)
        self._members = functools.lru_cache(_KEPT_MEMBERS)(self._read_members)
        self._rows = functools.lru_cache(_KEPT_ROWS)(self._read_rows)
        self._files_of = functools.lru_cache(_KEPT_MEMBERS)(self._find)
        self._unwritten: _Unwritten | None = None
        self.frames_added = 0

    def find(self, identity: Identity, choose: Callable[[int], np.ndarray]) -> MediumCodes | None:
        """The codes of a medium's frames, if all are there, of one encoder.

        choose: from the samples of the whole medium to the numbers of those wanted, int64, ascending.
        """
        rows = list(self._stored(identity))
        for encoder in dict.fromkeys(row.encoder for row in rows):
            of_encoder = [row for row in rows if row.encoder == encoder]
            numbers = np.concatenate([row.numbers for row in of_encoder])
            wanted = choose(of_encoder[0].total)
            numbers, first = np.unique(numbers, return_index=True)
            at = np.searchsorted(numbers, wanted)
            if len(wanted) and at[-1] < len(numbers) and (numbers[at] == wanted).all():
                times = np.concatenate([row.times for row in of_encoder])[first[at]]
                codes = np.concatenate([row.codes for row in of_encoder])[first[at]]
                return replace(of_encoder[0], numbers=wanted, times=times, codes=codes)
        return None

    def add(
        self,
        identity: Identity,
        total: int,
        numbers: np.ndarray,
        times: np.ndarray,
        codes: np.ndarray,
        encoder: str,
    ) -> None:
        """Keep the codes of a medium that has just been encoded. Raises `OvertakenError`, as `commit`."""
        url, etag, member = identity
        self._unwritten = self._unwritten or _Unwritten()
        self._unwritten.add(MediumCodes(object_id(url, etag), member, total, numbers, times, codes, encoder))
        self.frames_added += len(codes)
        if self._unwritten.is_due:
            self.commit()

    def commit(self) -> None:
        """Make what was added visible. Raises `OvertakenError` where another task was first with the same media."""
        if self._unwritten is None:
            return
        unwritten, self._unwritten = self._unwritten, None
        with unwritten.finished() as (file, stem, objects):
            name, is_first = self._create(file, stem)
        self._ask("add", name, objects)
        if not is_first:
            raise OvertakenError(name)

    def _create(self, scratch: BinaryIO, stem: str) -> tuple[str, bool]:
        """Commit a file under a name that is free, or that of the same media; which, and whether it was free."""
        for number in itertools.count():
            name = f"{DATA}/{stem}{f'-{number}' if number else ''}.parquet"
            with contextlib.suppress(FileExistsError):
                with self._place.store.writing(name, exclusive=True) as file:
                    scratch.seek(0)
                    shutil.copyfileobj(scratch, file, 1 << 22)
                return name, True
            if self._is_whole(name):
                return name, False
        raise AssertionError("there is no last number")

    def _is_whole(self, name: str) -> bool:
        with contextlib.suppress(BadData), self._place.store.open(name) as file:
            for _ in CodesFile(file):
                pass
            return True
        return False

    def _stored(self, identity: Identity) -> Iterator[MediumCodes]:
        """What there is of a medium, in the order of the files."""
        url, etag, member = identity
        wanted = (object_id(url, etag), member)
        for name in self._files_of(wanted[0]):
            try:
                file = self._file(name)
                for group in file.groups_of(wanted[0]):
                    row = self._members(name, group).get(wanted)
                    if row is not None:
                        yield self._rows(name, group)[row]
            except (BadData, FileNotFoundError) as error:  # removed, or damaged: it is encoded again
                log.warning("tokenize: passed over the codes in %s (%s)", self._place.store.path(name), error)

    def _find(self, object: bytes) -> list[str]:
        (names,) = self._ask("find", [object])
        return cast("list[str]", names)

    def _ask(self, method: str, *arguments: Any) -> Any:
        """What a method of the index returns."""
        try:
            return ray.get(getattr(self._place.index, method).remote(*arguments))
        except RayActorError as error:
            raise UserError(
                f"tokenize: the index of the codes in {self._place.store.path()}, a process on the driver's node, died "
                f"too often ({str(error).splitlines()[0]}); look for the reason in Ray's worker logs, and run the same "
                f"command again"
            ) from error

    def _open(self, name: str) -> CodesFile:
        return CodesFile(self._place.store.open_ranged(name))

    def _read_members(self, name: str, group: int) -> dict[tuple[bytes, str], int]:
        return {one: row for row, one in enumerate(self._file(name).members(group))}

    def _read_rows(self, name: str, group: int) -> list[MediumCodes]:
        return self._file(name).rows(group)
