"""Checkpoints written beside the training: a copy to host memory, then files, hashes and the commit in a thread.

The training thread spends the time of the copy, and waits where the save before is still under way. Ranks exchange
their files' entries, and their failures, over a gloo group of the writer's own: the training's collectives run
meanwhile.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import logging
import threading
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from datetime import timedelta
from functools import partial
from typing import TYPE_CHECKING, Any

import safetensors.torch
import torch
import torch.distributed as dist

from model.checkpoint.manifest import COMMIT, FileEntry, Manifest, Range, committed_steps, step_name, steps
from model.checkpoint.snapshot import Snapshot
from model.checkpoint.zero_state import adam_steps, fragments_of, parameters
from storage.retry import STORE_AWAY, retry
from storage.store import Store

if TYPE_CHECKING:
    from model.training.engine import TrainingEngine

_TIMEOUT = timedelta(hours=2)  # of a rank whose store is slow; a dead one is noticed at once
_PIECE = 2**26  # bytes hashed and written at a time

log = logging.getLogger(f"ringworld.{__name__}")


@dataclass(frozen=True)
class SaveCost:
    """What a save cost the training thread: seconds waiting for the one before and copying, and the copy's bytes."""

    waiting: float
    copying: float
    n_bytes: int

    @property
    def seconds(self) -> float:
        """Waiting and copying."""
        return self.waiting + self.copying


@dataclass(frozen=True)
class CommittedSave:
    """A committed save: the seconds its writing took in the background, and the bytes of all ranks."""

    step: int
    seconds: float
    n_bytes: int


class Writer:
    """Saves an engine below `root`, one checkpoint at a time. Every method is collective.

    keep: how many of the newest committed checkpoints to keep; None keeps all. As a context manager it closes at the
    end, but after an error within it does not wait for the save under way. cost, committed: of the last save, and the
    last save that was committed.
    """

    def __init__(self, engine: TrainingEngine, root: Store, keep: int | None = None) -> None:
        self.root, self.keep = root, keep
        self.cost: SaveCost | None = None
        self.committed: CommittedSave | None = None
        self._engine = engine
        self._group = dist.new_group(backend="gloo", timeout=_TIMEOUT)
        self._snapshot = Snapshot()
        self._thread: threading.Thread | None = None
        self._failure: BaseException | None = None

    def save(
        self,
        client_state: Mapping[str, Any],
        before_commit: Callable[[], None] | None = None,
        exempt: Collection[int] = (),
    ) -> SaveCost:
        """Begin to write the checkpoint of the engine's current step.

        client_state: plain JSON, equal on all ranks. before_commit: called by rank 0, in the thread, once all files are
        written and before the commit; again where these are retried. exempt: steps whose committed checkpoints are kept
        beside the newest. Raises, on every rank, the error that finally failed the save before on any rank: UserError
        where a disk is full.
        """
        started = time.perf_counter()
        self.wait()
        waited = time.perf_counter()
        manifest = self._take(client_state)
        arguments = (manifest, _random_state(), before_commit, frozenset(exempt))
        self.cost = SaveCost(waited - started, time.perf_counter() - waited, self._snapshot.n_bytes)
        # A daemon, so that a worker that has failed elsewhere ends at once; the checkpoint is then torn.
        self._thread = threading.Thread(target=self._run, args=arguments, name="checkpoint", daemon=True)
        self._thread.start()
        return self.cost

    def wait(self) -> CommittedSave | None:
        """Wait until the save under way is committed, and return the last one. Raises as `save` does."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._failure is not None:
            failure, self._failure = self._failure, None
            raise failure
        return self.committed

    def close(self) -> None:
        """Wait, and release the memory and the process group."""
        self.wait()
        self._snapshot = Snapshot()
        dist.destroy_process_group(self._group)

    def __enter__(self) -> Writer:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self.close()

    def _take(self, client_state: Mapping[str, Any]) -> Manifest:
        engine, mesh = self._engine, self._engine.mesh
        fragments = fragments_of(engine)
        if engine.settings.zero == 0:  # all ranks hold the same: each writes a share
            fragments = [fragment.share(mesh.rank, mesh.world_size) for fragment in fragments]
        self._snapshot.take([fragment for fragment in fragments if fragment.range.numel])
        return Manifest(
            step=engine.step,
            world_size=mesh.world_size,
            dp=mesh.dp,
            sp=mesh.sp,
            zero_stage=engine.settings.zero,
            precision=engine.settings.precision,
            parameters=parameters(engine),
            adam_steps=adam_steps(engine),
            client_state=json.loads(json.dumps(client_state)),  # as it is now, whatever its owner does meanwhile
        )

    def _run(
        self, manifest: Manifest, random: bytes, before_commit: Callable[[], None] | None, exempt: Collection[int]
    ) -> None:
        started, what = time.perf_counter(), f"checkpoint of step {manifest.step}"
        try:
            # This is the only copy of these steps. All ranks raise the same error, so all of them try again; the
            # training waits for them at its next save.
            write = partial(self._write, manifest, random, before_commit, exempt)
            n_bytes = retry(write, f"{what}: cannot be written just now", STORE_AWAY, warn=self._engine.mesh.rank == 0)
        except BaseException as error:  # raised where the training thread next looks
            self._failure = error
            return
        self.committed = CommittedSave(manifest.step, time.perf_counter() - started, n_bytes)
        log.info("%s committed at %s", what, self.root.path(step_name(manifest.step)))

    def _write(
        self, manifest: Manifest, random: bytes, before_commit: Callable[[], None] | None, exempt: Collection[int]
    ) -> int:
        mesh = self._engine.mesh
        suffix = mesh.on_rank_zero(lambda: self._make_room(manifest.step), self._group)
        of_ranks = mesh.on_all_ranks(lambda: self._put_files(manifest.step, random, suffix), self._group)
        names = tuple(random_name(rank, suffix) for rank in range(manifest.world_size))

        def commit() -> None:
            if before_commit is not None:
                before_commit()
            files = {name: FileEntry.from_json(entry) for entries in of_ranks for name, entry in entries.items()}
            with self.root.writing(f"{step_name(manifest.step)}/{COMMIT}") as file:
                file.write(replace(manifest, files=files, random=names).to_bytes())
            try:
                retain(self.root, manifest.step, self.keep, files, exempt)
            except OSError as error:  # the checkpoint counts; the next save removes what is left
                log.warning("checkpoint of step %d: older ones could not be removed: %s", manifest.step, error)

        mesh.on_rank_zero(commit, self._group)
        return sum(size for entries in of_ranks for size, *_ in entries.values())

    def _make_room(self, step: int) -> str:
        """Remove what killed writers left; returns the suffix of this step's file names.

        Where the step is already committed the suffix is a new one: the old `COMMIT` and its files count until the new
        `COMMIT` replaces it.
        """
        self.root.sweep_temporaries()
        names = self.root.sizes(step_name(step))
        if COMMIT not in names:
            forget(self.root, step)
            return ".safetensors"
        suffixes = (f".{take}.safetensors" for take in itertools.count(1))
        return next(suffix for suffix in suffixes if not any(name.endswith(suffix) for name in names))

    def _put_files(self, step: int, random: bytes, suffix: str) -> dict[str, list[Any]]:
        rank = self._engine.mesh.rank
        files = {f"rank-{rank:05d}-{n:04d}{suffix}": file for n, file in enumerate(self._snapshot.files())}
        files[random_name(rank, suffix)] = (memoryview(random), 0, ())
        return {name: self._put(f"{step_name(step)}/{name}", *file).to_json() for name, file in files.items()}

    def _put(self, name: str, data: memoryview, header_bytes: int, ranges: tuple[Range, ...]) -> FileEntry:
        """Publish a file. The hash is of the memory, so that a reader notices what the disk has changed."""
        digest = hashlib.sha256()
        with self.root.writing(name) as file:
            for start in range(0, len(data), _PIECE):
                piece = data[start : start + _PIECE]
                digest.update(piece)
                file.write(piece)
        self._engine.mesh.on_progress(False)
        header = hashlib.sha256(data[:header_bytes]).hexdigest() if header_bytes else ""
        return FileEntry(len(data), digest.hexdigest(), self._engine.mesh.rank, ranges, header_bytes, header)


def _random_state() -> bytes:
    """This rank's random state as a safetensors file: torch's own, and the device's where there is one."""
    states = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    return safetensors.torch.save(states)


def random_name(rank: int, suffix: str) -> str:
    """The file of a rank's random state."""
    return f"rank-{rank:05d}-random{suffix}"


def retain(
    root: Store, step: int, keep: int | None, files: Collection[str], exempt: Collection[int] = frozenset()
) -> None:
    """Remove other checkpoints from a folder in which `step` has just been committed with these files.

    keep: how many of the newest committed checkpoints up to `step` to keep; None keeps all. exempt: steps up to `step`
    whose committed checkpoints are kept as well. Torn ones are removed, and those of later steps: the run has gone back
    behind them, as they were damaged or the training had diverged.
    """
    committed = [number for number in committed_steps(root) if number <= step]
    newest = committed if keep is None else committed[-max(1, keep) :]
    kept = {*newest, *(number for number in committed if number in exempt)}
    for number in steps(root):
        if number not in kept:
            forget(root, number)
    for name in root.sizes(step_name(step)):
        if name != COMMIT and name not in files:  # of an earlier commit of the same step
            root.delete(f"{step_name(step)}/{name}")


def forget(root: Store, step: int) -> None:
    """Delete a checkpoint. Its `COMMIT` goes first, so that a half-deleted one does not count."""
    root.delete(f"{step_name(step)}/{COMMIT}")
    root.delete_folder(step_name(step))
