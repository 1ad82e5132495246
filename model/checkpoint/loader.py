"""A checkpoint back into an engine, on any mesh and at any ZeRO stage; a damaged one is passed over for the one before.

Each rank reads the files that hold any of its own partition's ranges, compares their sha256 with what was committed,
and copies those ranges. Master weights and moments come out as they went in, to the bit.
"""

from __future__ import annotations

import bisect
import errno
import hashlib
import itertools
import logging
from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import safe_open

from model.checkpoint.manifest import (
    COMMIT,
    DamagedError,
    FileEntry,
    Manifest,
    Range,
    changed,
    read_commit,
    step_name,
    steps,
)
from model.checkpoint.rng_state import derive_random_state, set_random_state
from model.checkpoint.snapshot import tensor_key
from model.checkpoint.zero_state import PARTS, WEIGHT, Fragment, held, parameters, refresh, set_adam_steps
from storage.errors import UserError
from storage.store import Store

if TYPE_CHECKING:
    from model.training.engine import TrainingEngine
    from model.training.mesh import Mesh

log = logging.getLogger(f"ringworld.{__name__}")


def load_latest(engine: TrainingEngine, root: Store) -> Mapping[str, Any] | None:
    """Restore an engine from the newest whole checkpoint below `root`; returns its client_state. Collective.

    Where any rank finds a file damaged, every rank says so in a warning, and the checkpoint before is used. None where
    none was ever committed. Raises UserError, on every rank, where there are some, but all are damaged.
    """
    candidates = engine.mesh.on_rank_zero(lambda: _newest_first(root))
    flaws = []
    for step, before in itertools.zip_longest(candidates, candidates[1:]):
        try:
            return load(engine, root, step)
        except DamagedError as error:
            instead = f"that of step {before} is used instead" if before is not None else "there is none before it"
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
    rank, `DamagedError` (a UserError) where a file is not what was written, and the engine's state is then a mixture:
    load another checkpoint or give up; UserError where the model is another.
    """
    manifest = _read_committed(engine, root, step, PARTS, with_random_state=True)
    groups = {group: manifest.parameters[name][1] for name, (_, group) in parameters(engine).items()}
    set_adam_steps(engine, {group: manifest.adam_steps[written] for group, written in groups.items()})
    refresh(engine)
    engine.step = step
    return manifest.client_state


def load_weights(engine: TrainingEngine, root: Store, step: int) -> None:
    """Give a fresh engine the fp32 master weights of a committed checkpoint, and nothing else of it. Collective.

    So training goes on from what a stage before ended with, of which an export in bf16 keeps 8 bits a weight. Raises as
    `load` does.
    """
    _read_committed(engine, root, step, (WEIGHT,), with_random_state=False)
    refresh(engine)


@dataclass(frozen=True)
class Copy:
    """So many elements: from an element of a range in a file, to an element of the n-th range needed."""

    source: Range
    first: int
    target: int
    place: int
    numel: int


def copies(needed: Sequence[Range], files: Mapping[str, FileEntry]) -> dict[str, list[Copy]]:
    """What to copy from which file to fill all ranges needed. Raises ValueError where an element is in no file."""
    stored: dict[str, list[tuple[Range, str]]] = defaultdict(list)
    for file, entry in files.items():
        for one in entry.ranges:
            stored[one.name].append((one, file))
    for found in stored.values():
        found.sort()
    plan: dict[str, list[Copy]] = defaultdict(list)
    for target, want in enumerate(needed):
        found = stored[want.name]
        at = want.start
        number = max(0, bisect.bisect_right(found, at, key=lambda pair: pair[0].start) - 1)
        while at < want.stop:
            source, file = found[number] if number < len(found) else (Range(want.name, want.stop, 0), "")
            if not source.start <= at < source.stop:
                raise ValueError(f"no file has {want.name} from its element {at} on")
            stop = min(source.stop, want.stop)
            plan[file].append(Copy(source, at - source.start, target, at - want.start, stop - at))
            at, number = stop, number + 1
    return dict(plan)


def _newest_first(root: Store) -> list[int]:
    """The committed steps; of the others it is said that they do not count."""
    found = []
    for step in reversed(steps(root)):
        if COMMIT in root.sizes(step_name(step)):
            found.append(step)
        else:
            log.warning("checkpoint of step %d is torn and not used: it has no %s", step, COMMIT)
    return found


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
    """Each rank's share of these parts of the optimizer's state into the engine; what was committed. Collective."""
    mesh, place = engine.mesh, root.path(step_name(step))
    with _flaws_of(place, COMMIT):
        commit = mesh.on_rank_zero(lambda: read_commit(root, step).decode("latin-1"))  # any bytes are text in it
    try:
        manifest = Manifest.from_bytes(commit.encode("latin-1"))
    except ValueError as error:
        raise DamagedError(place, str(error)) from error
    _check_same_model(engine, manifest, place)

    def read() -> None:
        _read(engine, root, manifest, place, parts)
        if with_random_state:
            _read_random_state(mesh, root, manifest, place)

    mesh.on_all_ranks(read)
    return manifest


def _read(engine: TrainingEngine, root: Store, manifest: Manifest, place: str, parts: Collection[str]) -> None:
    """This rank's share, file by file."""
    fragments = held(engine)
    try:
        plan = copies([fragment.range for fragment in fragments], manifest.files)
    except ValueError as error:
        raise DamagedError(place, f"its {COMMIT} is not whole: {error}") from error
    for name, of_file in sorted(plan.items()):
        with _checked(root, manifest, name, place) as path:
            _fill(fragments, path, of_file, parts)
        engine.mesh.on_piece(False)


def _read_random_state(mesh: Mesh, root: Store, manifest: Manifest, place: str) -> None:
    if manifest.world_size == mesh.world_size:
        with _checked(root, manifest, manifest.random[mesh.rank], place) as path:
            set_random_state(path)
    else:
        derive_random_state(manifest.files[manifest.random[0]].sha256, mesh.rank, mesh.world_size)


def _fill(fragments: Sequence[Fragment], path: Path, plan: Sequence[Copy], parts: Collection[str]) -> None:
    with safe_open(path, "pt") as tensors:
        for copy, part in itertools.product(plan, parts):
            target = fragments[copy.target].parts[part]
            stored = tensors.get_slice(tensor_key(part, copy.source))[copy.first : copy.first + copy.numel]
            target.narrow(0, copy.place, copy.numel).copy_(stored)


@contextmanager
def _checked(root: Store, manifest: Manifest, name: str, place: str) -> Iterator[Path]:
    """A local path with a file's content, its size and hash compared with what was committed."""
    entry = manifest.files[name]
    with _flaws_of(place, name), root.local_copy(f"{step_name(manifest.step)}/{name}") as path:
        if (size := path.stat().st_size) != entry.size:
            raise DamagedError(place, f"{name} is {size} bytes, not {entry.size}")
        with path.open("rb") as file:
            if hashlib.file_digest(file, "sha256").hexdigest() != entry.sha256:
                raise DamagedError(place, changed(name))
        yield path


@contextmanager
def _flaws_of(place: str, name: str) -> Iterator[None]:
    """A file that is not there, or that its disk cannot read; a store that does not answer says nothing of it."""
    try:
        yield
    except FileNotFoundError as error:
        raise DamagedError(place, f"{name} is missing") from error
    except OSError as error:
        if error.errno != errno.EIO:
            raise
        raise DamagedError(place, f"{name} cannot be read ({error})") from error
