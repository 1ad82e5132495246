"""A checkpoint back into an engine, on any mesh and at any ZeRO stage; in place of a damaged one the one before.

Each rank reads its own partition's ranges from whichever files hold them, and compares every byte with the committed
hashes. Master weights and moments come out as they went in, to the bit.
"""

from __future__ import annotations

import bisect
import errno
import hashlib
import itertools
import logging
from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import torch
from safetensors.torch import load_file

from model.checkpoint.manifest import (
    COMMIT,
    DamagedError,
    FileEntry,
    Manifest,
    Range,
    changed,
    committed_steps,
    read_commit,
    step_name,
    steps,
)
from model.checkpoint.snapshot import tensor_key
from model.checkpoint.tensor_file import ChangedError, Header, Wanted, read_header, read_tensors, unhashed_header
from model.checkpoint.zero_state import PARTS, WEIGHT, Fragment, fragments_of, parameters, refresh, set_adam_steps
from storage.errors import UserError
from storage.store import Store

if TYPE_CHECKING:
    from model.training.engine import TrainingEngine
    from model.training.mesh import Mesh

READERS = 8
"""Files that a rank reads at once."""

log = logging.getLogger(f"ringworld.{__name__}")


def load_latest(engine: TrainingEngine, root: Store) -> Mapping[str, Any] | None:
    """Restore an engine from the newest whole checkpoint below `root`; returns its client_state. Collective.

    Where any rank finds a file damaged, every rank logs a warning, and the checkpoint before is used. None where none
    is committed. Raises UserError, on every rank, where all the committed ones are damaged.
    """
    candidates = engine.mesh.on_rank_zero(lambda: _newest_first(root))
    flaws = []
    for step, previous in itertools.zip_longest(candidates, candidates[1:]):
        try:
            return load(engine, root, step)
        except DamagedError as error:
            instead = f"that of step {previous} is used instead" if previous is not None else "there is none before it"
            log.warning("checkpoint %s is damaged and not used: %s; %s", error.place, error.flaw, instead)
            flaws.append(f"step {step}: {error.flaw}")
    if flaws:
        raise UserError(
            f"{root.path()}: every checkpoint is damaged ({'; '.join(flaws)}): restore these files, or delete the "
            "folder to train from the beginning"
        )
    return None


def load(engine: TrainingEngine, root: Store, step: int) -> Mapping[str, Any]:
    """Restore an engine, fresh or used, from a committed checkpoint; returns its client_state. Collective.

    On as many ranks as wrote it each has its random state again; on another number it is derived. Raises, on every
    rank, `DamagedError` (a UserError) where a file is not what was written, which leaves the engine with a mixture that
    only another load mends; UserError where the model is another.
    """
    manifest = _read_committed(engine, root, step, PARTS, with_random_state=True)
    groups = {group: manifest.parameters[name][1] for name, (_, group) in parameters(engine).items()}
    set_adam_steps(engine, {group: manifest.adam_steps[written] for group, written in groups.items()})
    refresh(engine)
    engine.step = step
    return manifest.client_state


def load_weights(engine: TrainingEngine, root: Store, step: int) -> None:
    """Give a fresh engine only the fp32 master weights of a committed checkpoint. Collective; raises as `load`.

    So a stage goes on from the exact weights of the stage before, of which an export in bf16 keeps 8 bits each.
    """
    _read_committed(engine, root, step, (WEIGHT,), with_random_state=False)
    refresh(engine)


@dataclass(frozen=True)
class Copy:
    """`numel` elements of a file's range `source` from its element `first` on, to needed range `target` at `place`."""

    source: Range
    first: int
    target: int
    place: int
    numel: int


def copies(needed: Sequence[Range], files: Mapping[str, FileEntry]) -> dict[str, list[Copy]]:
    """The copies from each file that fill all ranges needed. Raises ValueError where an element is in no file."""
    stored: dict[str, list[tuple[Range, str]]] = defaultdict(list)
    for file, entry in files.items():
        for source in entry.ranges:
            stored[source.name].append((source, file))
    for sources in stored.values():
        sources.sort()
    plan: dict[str, list[Copy]] = defaultdict(list)
    for target, want in enumerate(needed):
        sources = stored[want.name]
        at = want.start
        number = max(0, bisect.bisect_right(sources, at, key=lambda pair: pair[0].start) - 1)
        while at < want.stop:
            source, file = sources[number] if number < len(sources) else (Range(want.name, want.stop, 0), "")
            if not source.start <= at < source.stop:
                raise ValueError(f"no file has {want.name} from its element {at} on")
            stop = min(source.stop, want.stop)
            plan[file].append(Copy(source, at - source.start, target, at - want.start, stop - at))
            at, number = stop, number + 1
    return dict(plan)


def _newest_first(root: Store) -> list[int]:
    """The committed steps; logs a warning of each other one."""
    committed = committed_steps(root)
    for step in sorted(set(steps(root)).difference(committed), reverse=True):
        log.warning("checkpoint of step %d is torn and not used: it has no %s", step, COMMIT)
    return committed[::-1]


def _check_same_model(engine: TrainingEngine, manifest: Manifest, place: str) -> None:
    shapes = {name: shape for name, (shape, _) in parameters(engine).items()}
    written = {name: shape for name, (shape, _) in manifest.parameters.items()}
    for name in sorted(shapes.keys() | written.keys()):
        if shapes.get(name) != written.get(name):
            raise UserError(
                f"{place} is of another model: {name} is {_in_words(written.get(name))} in it and "
                f"{_in_words(shapes.get(name))} in this run; resume with the same model, or use another folder"
            )


def _in_words(shape: tuple[int, ...] | None) -> str:
    return "missing" if shape is None else "x".join(map(str, shape))


def _read_committed(
    engine: TrainingEngine, root: Store, step: int, parts: Collection[str], with_random_state: bool
) -> Manifest:
    """Read each rank's share of these parts of the optimizer's state into the engine; the manifest. Collective."""
    mesh, folder = engine.mesh, root.at(step_name(step))
    with _flaws_of(folder, COMMIT):
        commit = mesh.on_rank_zero(lambda: read_commit(root, step).decode("latin-1"))  # any bytes are text in it
    try:
        manifest = Manifest.from_bytes(commit.encode("latin-1"))
    except ValueError as error:
        raise DamagedError(folder.path(), str(error)) from error
    _check_same_model(engine, manifest, folder.path())

    def read() -> None:
        _read(engine, folder, manifest, parts)
        if with_random_state:
            _read_random_state(mesh, folder, manifest)

    mesh.on_all_ranks(read)
    return manifest


def _read(engine: TrainingEngine, folder: Store, manifest: Manifest, parts: Collection[str]) -> None:
    """Read this rank's share, several files at a time: hashing and waiting for a store release Python's lock."""

    def read(name: str) -> None:
        fill(fragments, plan[name], parts, folder, name, manifest.files[name])
        engine.mesh.on_progress(False)

    fragments = fragments_of(engine)
    try:
        plan = copies([fragment.range for fragment in fragments], manifest.files)
    except ValueError as error:
        raise DamagedError(folder.path(), f"its {COMMIT} is not whole: {error}") from error
    with ThreadPoolExecutor(READERS) as pool:
        list(pool.map(read, sorted(plan)))


def fill(
    fragments: Sequence[Fragment],
    plan: Sequence[Copy],
    parts: Collection[str],
    folder: Store,
    name: str,
    entry: FileEntry,
) -> None:
    """Carry out the copies from one file. Raises DamagedError where what is read is not what was committed."""

    def read(file: BinaryIO, header: Header) -> None:
        wanted = []
        for copy, part in itertools.product(plan, parts):
            start = header.start[tensor_key(part, copy.source)] + 4 * copy.first
            wanted.append(Wanted(start, fragments[copy.target].parts[part].narrow(0, copy.place, copy.numel)))
        read_tensors(file, header, wanted)

    if not entry.header_sha256:
        with _checked(folder, name, entry) as path, path.open("rb") as whole:
            read(whole, unhashed_header(whole))
        return
    with _flaws_of(folder, name), folder.open_ranged(name) as file:
        try:
            read(file, read_header(file, entry.header_bytes, entry.header_sha256))
        except ChangedError:
            size = folder.sizes().get(name)
            flaw = changed(name) if size == entry.size else f"{name} is {size} bytes, not {entry.size}"
            raise DamagedError(folder.path(), flaw) from None


def _read_random_state(mesh: Mesh, folder: Store, manifest: Manifest) -> None:
    """Restore this rank's random state; on another number of ranks seed by rank 0's hash, the rank and their number."""
    if manifest.world_size == mesh.world_size:
        name = manifest.random[mesh.rank]
        with _checked(folder, name, manifest.files[name]) as path:
            states = load_file(path)
            torch.set_rng_state(states["cpu"])
            if "cuda" in states and torch.cuda.is_available():
                torch.cuda.set_rng_state(states["cuda"])
    else:
        origin = manifest.files[manifest.random[0]].sha256
        digest = hashlib.sha256(f"{origin} {mesh.rank} of {mesh.world_size}".encode()).digest()
        torch.manual_seed(int.from_bytes(digest[:8]) >> 1)


@contextmanager
def _checked(folder: Store, name: str, entry: FileEntry) -> Iterator[Path]:
    """A local path with a file's content, its size and hash compared with what was committed."""
    with _flaws_of(folder, name), folder.local_copy(name) as path:
        if (size := path.stat().st_size) != entry.size:
            raise DamagedError(folder.path(), f"{name} is {size} bytes, not {entry.size}")
        with path.open("rb") as file:
            if hashlib.file_digest(file, "sha256").hexdigest() != entry.sha256:
                raise DamagedError(folder.path(), changed(name))
        yield path


@contextmanager
def _flaws_of(folder: Store, name: str) -> Iterator[None]:
    """Raise DamagedError for a file that is missing or that its disk cannot read; other errors are the store's."""
    try:
        yield
    except FileNotFoundError as error:
        raise DamagedError(folder.path(), f"{name} is missing") from error
    except OSError as error:
        if error.errno != errno.EIO:
            raise
        raise DamagedError(folder.path(), f"{name} cannot be read ({error})") from error
