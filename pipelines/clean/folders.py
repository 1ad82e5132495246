"""Which folders of a run's stages are needed.

Needed are the latest of each stage, every training, and all that these were made from. In: the folders as their
`started.json` and `manifest.json` declare them. Out: the keys, `STAGE/FINGERPRINT`, of those that are needed. Pure, but
for `read_folders`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass

import pyarrow as pa

from pipelines.dag.kept import begun
from pipelines.dag.manifest import (
    MANIFEST,
    STARTED,
    Declaration,
    Manifest,
    PlainRecord,
    is_fingerprint,
    read_manifest,
    refuse_newer,
)
from pipelines.train.stage import TrainStage
from storage.errors import UserError
from storage.store import Store
from storage.threads import in_threads

STAGES = "stages"


@dataclass(frozen=True)
class StageFolder:
    """The folder of one fingerprint of a stage.

    key: `STAGE/FINGERPRINT`. declaration: None where only leftovers of the folder are there. began: UTC, ISO 8601.
    manifest: None where the stage is not finished. is_adoptable: whether hashes of code name it, so that a later stage
    knows it by another fingerprint.
    """

    key: str
    declaration: Declaration | None = None
    began: str = ""
    manifest: Manifest[PlainRecord] | None = None
    is_adoptable: bool = False

    @property
    def stage(self) -> str:
        """The stage's name."""
        return self.key.partition("/")[0]

    @property
    def kind(self) -> str:
        """Of the stage; "" where it is not known."""
        return self.declaration.kind if self.declaration else ""

    @property
    def is_training(self) -> bool:
        """Whether it is, or by its stage's name was, of a train stage."""
        return self.kind == TrainStage.kind or self.stage.startswith(TrainStage.named(""))

    @property
    def finished(self) -> str:
        """When, UTC, ISO 8601; "" where it is not."""
        return self.manifest.finished if self.manifest else ""

    @property
    def inputs(self) -> dict[str, str]:
        """By stage, the keys of the folders that it is made from."""
        declared = self.declaration.inputs if self.declaration else {}
        read = self.manifest.input_folders if self.manifest else {}
        keys = {stage: f"{stage}/{fingerprint[:16]}" for stage, fingerprint in declared.items()}
        return keys | {stage: folder.removeprefix(f"{STAGES}/") for stage, folder in read.items()}


def parts(name: str) -> tuple[str, str, str]:
    """Of a file below `STAGES` the stage, the folder in that, and the name in that; "" for what it does not have."""
    _, stage, folder, below = (*name.split("/", 3), "", "", "")[:4]
    return (stage, folder, below) if below else (stage, "", "")


def read_folders(root: Store, names: Iterable[str]) -> dict[str, StageFolder]:
    """The folders of a run, by key. names: of all its files below `STAGES`.

    Raises UserError where one was made by a later version, or cannot be read.
    """
    files: dict[str, set[str]] = {}
    for name in names:
        stage, folder, below = parts(name)
        if is_fingerprint(folder):
            files.setdefault(f"{stage}/{folder}", set()).add(below)
    folders = in_threads(lambda key: _read_folder(root.at(STAGES, key), key, files[key]), sorted(files))
    return {folder.key: folder for folder in folders}


def _read_folder(store: Store, key: str, files: Collection[str]) -> StageFolder:
    started = (store.read_json(STARTED) if STARTED in files else None) or {}
    manifest = read_manifest(store, PlainRecord) if MANIFEST in files else None
    if started:
        refuse_newer(started, store.path(STARTED))
    if manifest:
        return StageFolder(key, manifest.declaration, "", manifest, "code" in started)
    if not started:
        return StageFolder(key)
    return StageFolder(key, Declaration.from_json(started), begun(store), None, "code" in started)


@contextlib.contextmanager
def refusing_damage(store: Store) -> Iterator[None]:
    """Turns what is raised in the block, where a stage's folder has not what it names, into a UserError."""
    try:
        yield
    except (FileNotFoundError, KeyError, ValueError, TypeError, pa.ArrowException) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise UserError(
            f"{store.path()}: what it names cannot be read ({reason}), so that nothing tells what is needed; "
            f"`ringworld inspect --verify` says what is damaged"
        ) from None


def latest(folders: Iterable[StageFolder]) -> list[StageFolder]:
    """Of the folders of one stage the last that was finished, and the last that was begun since and is not.

    Of those finished in the same second, all.
    """
    folders = [one for one in folders if one.declaration]
    when = max((one.finished for one in folders if one.manifest), default="")
    found = [one for one in folders if one.manifest and one.finished == when]
    unfinished = max((one for one in folders if not one.manifest), key=lambda one: one.began, default=None)
    return [*found, unfinished] if unfinished and unfinished.began >= when else found


def needed_keys(folders: Mapping[str, StageFolder], wanted: Collection[str] = ()) -> set[str]:
    """The keys of the folders that are needed. wanted: of those that recipes would use today."""
    by_stage: dict[str, list[StageFolder]] = {}
    for folder in folders.values():
        by_stage.setdefault(folder.stage, []).append(folder)
    waiting = [folders[key] for key in wanted if key in folders]
    waiting += [folder for of_stage in by_stage.values() for folder in latest(of_stage)]
    waiting += [folder for folder in folders.values() if folder.is_training]
    needed: set[str] = set()
    while waiting:
        folder = waiting.pop()
        if folder.key in needed:
            continue
        needed.add(folder.key)
        for stage, key in folder.inputs.items():
            # What was adopted goes by a name of today, which no folder has: any of those may be meant.
            adopted = [one for one in by_stage.get(stage, ()) if one.is_adoptable]
            waiting += [folders[key]] if key in folders else adopted
    return needed


def why_not_needed(folder: StageFolder, folders: Mapping[str, StageFolder]) -> str:
    """Why a folder is not needed, in a few words."""
    if folder.declaration is None:
        return "left of a folder that was being removed"
    after = latest(one for one in folders.values() if one.stage == folder.stage)[0]
    begun = "" if folder.manifest else f"begun on {folder.began[:10]}, never finished; "
    return f"{begun}superseded by {after.key.partition('/')[2]} of {(after.finished or after.began)[:10]}"
