"""Checkpoints that are whole or do not count: engine state to any fsspec URL and back, and export to Hugging Face.

`<url>/step-00000012/` holds the files of DeepSpeed, each rank's random state, and `COMMIT`, a JSON that names every
file with its size and sha256 and carries the caller's own state (the loader's position). Ranks write and publish their
own files; `COMMIT` comes last, by one atomic write. A folder without it, or whose files do not have the sizes it names,
is a torn checkpoint: it is passed over with a warning and the one before it is used.

Optimizer states are pickles: load checkpoints only from root you trust.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import logging
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from model.engine import TrainingEngine
from model.folder import Folder
from tokenization.errors import UserError

COMMIT = "COMMIT"
FORMAT = 1
_PREFIX = "step-"
_REPLICATED = "mp_rank_00_model_states.pt"  # DeepSpeed's only file that rank 0 writes for all

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class FileEntry:
    """One file of a checkpoint: bytes, sha256 in hex, and the rank that wrote it."""

    size: int
    sha256: str
    rank: int


@dataclass(frozen=True)
class Manifest:
    """What `COMMIT` says. client_state: the caller's plain JSON. files: by name inside the step's folder."""

    step: int
    world_size: int
    dp: int
    sp: int
    zero_stage: int
    precision: str
    client_state: Mapping[str, Any]
    files: Mapping[str, FileEntry]


def save(
    engine: TrainingEngine,
    url: str,
    client_state: Mapping[str, Any],
    keep: int | None = None,
    options: Mapping[str, Any] | None = None,
) -> Manifest:
    """Write and commit the checkpoint of the engine's current step below `url`. Collective.

    client_state: plain JSON, equal on all ranks. keep: how many committed checkpoints to leave, the newest ones; None
    leaves all. options: fsspec's for the URL. Raises UserError, on every rank, where the disk is full.
    """
    root, rank, folder = Folder(url, options), engine.mesh.rank, _name(engine.step)
    if rank == 0:
        root.sweep()
        root.delete(f"{folder}/{COMMIT}")  # first: a re-made step counts again only when it is whole again
        root.delete(folder)
    dist.barrier()
    with root.workspace() as workspace:
        files = _write(engine, workspace / folder)
        entries = engine.mesh.together(lambda: {path.name: _publish(root, path, folder, rank) for path in files})
        manifest = Manifest(
            step=engine.step,
            world_size=engine.mesh.world_size,
            dp=engine.mesh.dp,
            sp=engine.mesh.sp,
            zero_stage=engine.settings.zero_stage,
            precision=engine.settings.precision,
            client_state=client_state,
            files={name: entry for of_rank in entries for name, entry in of_rank.items()},
        )
        engine.mesh.together(lambda: _commit(root, workspace, folder, manifest) if rank == 0 else None)
    if rank == 0 and keep is not None:
        _retain(root, keep)
    log.info("checkpoint of step %d committed at %s/%s", engine.step, url, folder)
    return manifest


def latest_committed(url: str, hashes: bool = False, options: Mapping[str, Any] | None = None) -> int | None:
    """The step of the newest whole checkpoint below `url`, None where there is none.

    A torn one is passed over with a warning. hashes: read all files and compare their sha256 too, not the sizes alone.
    """
    root = Folder(url, options)
    for step in sorted(_steps(root), reverse=True):
        flaw = verify(url, step, hashes, options)
        if flaw is None:
            return step
        log.warning("checkpoint %s/%s is torn and not used: %s", url, _name(step), flaw)
    return None


def verify(url: str, step: int, hashes: bool = True, options: Mapping[str, Any] | None = None) -> str | None:
    """What is wrong with a checkpoint, in one phrase, or None where it is whole."""
    root, folder = Folder(url, options), _name(step)
    try:
        manifest = read_manifest(url, step, options)
    except FileNotFoundError:
        return f"it has no {COMMIT}"
    except (ValueError, KeyError, TypeError):
        return f"its {COMMIT} cannot be read"
    sizes = root.sizes(folder)
    for name, entry in manifest.files.items():
        if sizes.get(name) != entry.size:
            found = f"{sizes[name]} bytes" if name in sizes else "missing"
            return f"{name} is {found}, not {entry.size} bytes"
        if hashes:
            with root.open(f"{folder}/{name}") as file:
                if hashlib.file_digest(file, "sha256").hexdigest() != entry.sha256:
                    return f"{name} has another sha256 than when it was written"
    return None


def read_manifest(url: str, step: int, options: Mapping[str, Any] | None = None) -> Manifest:
    """The manifest of a committed checkpoint. Raises FileNotFoundError where there is no `COMMIT`."""
    with Folder(url, options).open(f"{_name(step)}/{COMMIT}") as file:
        values = json.loads(file.read())
    if values.pop("format") != FORMAT:
        raise ValueError(f"{url}/{_name(step)}/{COMMIT} has a format that this version does not know")
    files = {name: FileEntry(**entry) for name, entry in values.pop("files").items()}
    return Manifest(**values, files=files)


def load(engine: TrainingEngine, url: str, step: int, options: Mapping[str, Any] | None = None) -> Mapping[str, Any]:
    """Restore a fresh engine, bit for bit, from a committed checkpoint; returns its client_state. Collective.

    Each rank reads its own files, and their sha256 is compared. Raises UserError, on every rank, where the checkpoint
    is of another world size, ZeRO stage or precision, or a file is damaged.
    """
    root, folder, mesh = Folder(url, options), _name(step), engine.mesh
    manifest = read_manifest(url, step, options)
    was = (manifest.world_size, manifest.zero_stage, manifest.precision)
    now = (mesh.world_size, engine.settings.zero_stage, engine.settings.precision)
    if was != now:
        raise UserError(
            f"{url}/{folder} was written by {was[0]} workers with ZeRO {was[1]} in {was[2]}, but this run has "
            f"{now[0]} with ZeRO {now[1]} in {now[2]}: resume with the same, or start a stage from an exported model"
        )
    with root.workspace() as workspace:
        local = root.local or workspace
        mesh.together(lambda: _fetch(root, local, folder, manifest, mesh.rank))
        with contextlib.redirect_stdout(io.StringIO()):  # it prints which format it found
            engine.deepspeed.load_checkpoint(str(local), tag=folder, load_lr_scheduler_states=False)
        _set_random_state(torch.load(local / folder / _random_name(mesh.rank), weights_only=True))
    engine.step = step
    return manifest.client_state


def _name(step: int) -> str:
    return f"{_PREFIX}{step:08d}"


def _steps(root: Folder) -> list[int]:
    names = [name.removeprefix(_PREFIX) for name in root.folders() if name.startswith(_PREFIX)]
    return [int(name) for name in names if name.isdigit()]


def _write(engine: TrainingEngine, folder: Path) -> list[Path]:
    """This rank's files, written to a local folder."""
    folder.mkdir()
    engine.deepspeed.save_checkpoint(str(folder.parent), tag=folder.name, save_latest=False)
    torch.save(_random_state(), folder / _random_name(engine.mesh.rank))
    return sorted(folder.iterdir())


def _publish(root: Folder, path: Path, folder: str, rank: int) -> FileEntry:
    entry = FileEntry(path.stat().st_size, _sha256(path), rank)
    root.put(path, f"{folder}/{path.name}")
    return entry


def _commit(root: Folder, workspace: Path, folder: str, manifest: Manifest) -> None:
    path = workspace / COMMIT
    path.write_text(json.dumps({"format": FORMAT, **asdict(manifest)}, indent=1, sort_keys=True))
    root.put(path, f"{folder}/{COMMIT}")


def _fetch(root: Folder, local: Path, folder: str, manifest: Manifest, rank: int) -> None:
    """Have the files that this rank loads in `local`, as they were written."""
    for name, entry in manifest.files.items():
        if entry.rank != rank and name != _REPLICATED:
            continue
        path = local / folder / name
        if root.local is None:
            root.get(f"{folder}/{name}", path)
        if _sha256(path) != entry.sha256:
            raise UserError(f"{path}: damaged since it was written; delete its folder to resume from the one before")


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _retain(root: Folder, keep: int) -> None:
    """Delete all but the newest `keep` committed checkpoints, and the torn ones older than those."""
    committed = sorted(step for step in _steps(root) if COMMIT in root.sizes(_name(step)))
    if len(committed) < keep or keep < 1:
        return
    for step in _steps(root):
        if step < committed[-keep]:
            root.delete(f"{_name(step)}/{COMMIT}")  # first, so that a half-deleted one does not count
            root.delete(_name(step))


def _random_name(rank: int) -> str:
    return f"random_state_rank_{rank}.pt"


def _random_state() -> dict[str, torch.Tensor]:
    states = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    return states


def _set_random_state(states: Mapping[str, torch.Tensor]) -> None:
    torch.set_rng_state(states["cpu"])
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"])
