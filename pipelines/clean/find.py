"""What can be removed of runs, and of the stores of codes that they use. Nothing is written.

In: the roots of runs, and recipes whose outputs of today are to stay. Out: files in groups, each with the reason why
nothing needs them, and sentences about what stays for want of knowledge.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from pipelines.clean.codes import encodings, missing_users, needed_codes, unneeded_data
from pipelines.clean.folders import STAGES, StageFolder, needed_keys, parts, read_folders, why_not_needed
from pipelines.clean.partition_files import FOLDERS, needed_files
from pipelines.dag.manifest import is_fingerprint
from pipelines.recipe import Recipe
from pipelines.run import plan_recipe, root_store
from pipelines.tokenize.codes.users import RUNS, Place
from pipelines.tokenize.stage import CODES, TokenizeStage, codes_store
from storage.errors import UserError
from storage.store import Store
from storage.urls import first_contact


@dataclass(frozen=True)
class Unneeded:
    """Files that nothing needs. store: a run's root or a store of codes, below which `sizes` has them, in bytes by
    name. folder: what they are in. is_whole: whether it goes with them.
    """

    store: Store
    folder: str
    sizes: Mapping[str, int]
    why: str
    is_whole: bool = False

    @property
    def bytes(self) -> int:
        """Of all files."""
        return sum(self.sizes.values())


@dataclass(frozen=True)
class Found:
    """unneeded: what can be removed. notes: sentences about what is left. codes: stores of codes, as far as they are
    known. encodings: folders of those of which files may be removed.
    """

    unneeded: tuple[Unneeded, ...]
    notes: tuple[str, ...]
    codes: tuple[Store, ...] = ()
    encodings: tuple[Store, ...] = ()


@dataclass
class _Run:
    """A run with its folders. unfinished: stages that a recipe would run, or that have begun."""

    root: Store
    sizes: dict[str, int]
    folders: dict[str, StageFolder]
    needed: set[str]
    unfinished: dict[str, str]
    codes: list[Store] = field(default_factory=list)

    @property
    def needed_folders(self) -> list[StageFolder]:
        return [self.folders[key] for key in sorted(self.needed)]


def find_runs(urls: Sequence[str], recipes: Sequence[Recipe] = ()) -> list[Store]:
    """The roots at these URLs, each once, with the options of a recipe that has the root.

    Raises UserError where one is no run, and where a recipe is of none of them.
    """
    recipe_roots = {Place.of(store): store for store in map(root_store, recipes)}
    roots: dict[Place, Store] = {}
    for url in urls:
        store = Store(url.rstrip("/") or url)
        store = recipe_roots.get(Place.of(store), store)
        with first_contact(store.url):
            if not store.exists(STAGES):
                raise UserError(f"{url}: no run, which has a folder {STAGES}; give the storage.root of one")
        roots[Place.of(store)] = store
    for place in recipe_roots:
        if place not in roots:
            raise UserError(f"--recipe: its storage.root is {place}, which is none of the runs given; give that too")
    return list(roots.values())


def find_unneeded(roots: Sequence[Store], recipes: Sequence[Recipe] = ()) -> Found:
    """What can be removed. roots: as `find_runs` has them, or with the fence of a lease."""
    of_root: dict[Place, list[Recipe]] = {}
    for recipe in recipes:
        of_root.setdefault(Place.of(root_store(recipe)), []).append(recipe)
    runs = [_read_run(root, of_root.get(Place.of(root), [])) for root in roots]
    unneeded: list[Unneeded] = []
    notes: list[str] = []
    for run in runs:
        unneeded += [*_folders(run), *_partition_files(run)]
        notes += [
            f"{run.root.at(STAGES, stage).path()}: its {' and '.join(_shared(run, stage))} stay, since {why}"
            for stage, why in run.unfinished.items()
            if _shared(run, stage)
        ]
    return _with_codes(runs, tuple(unneeded), tuple(notes))


def _read_run(root: Store, recipes: Iterable[Recipe]) -> _Run:
    sizes = {f"{STAGES}/{name}": size for name, size in root.sizes(STAGES, deep=True).items()}
    folders = read_folders(root, sizes)
    wanted: list[str] = []
    unfinished: dict[str, str] = {}
    codes = [root.at(CODES)]
    for recipe in recipes:
        codes.append(codes_store(recipe))
        for stage in plan_recipe(recipe):
            wanted.append("/".join(stage.store.url.split("/")[-2:]))
            if stage.status != "done":
                unfinished[stage.name] = f"a recipe has it still to {'finish' if stage.status == 'resume' else 'run'}"
    needed = needed_keys(folders, wanted)
    for folder in (folders[key] for key in sorted(needed)):
        if folder.manifest is None:
            unfinished[folder.stage] = f"{folder.key}, begun on {folder.began[:10]}, is not finished and may use them"
    for folder in folders.values():
        if folder.manifest and folder.kind == TokenizeStage.kind:
            url = (folder.manifest.record.outputs.get("codes") or {}).get("url")
            codes += [Store(url, root.options)] if url else []
    return _Run(root, sizes, folders, needed, unfinished, codes)


def _shared(run: _Run, stage: str) -> list[str]:
    """The folders of partitions' files that a stage has."""
    return [name for name in FOLDERS if any(one.startswith(f"{STAGES}/{stage}/{name}/") for one in run.sizes)]


def _folders(run: _Run) -> Iterator[Unneeded]:
    files: dict[str, dict[str, int]] = {}
    for name, size in run.sizes.items():
        stage, folder, _ = parts(name)
        if is_fingerprint(folder):
            files.setdefault(f"{stage}/{folder}", {})[name] = size
    for key, sizes in files.items():
        if key not in run.needed:
            why = why_not_needed(run.folders[key], run.folders)
            yield Unneeded(run.root, f"{STAGES}/{key}", sizes, why, is_whole=True)


def _partition_files(run: _Run) -> Iterator[Unneeded]:
    named = needed_files(run.root, run.needed_folders)
    files: dict[str, dict[str, int]] = {}
    for name, size in run.sizes.items():
        stage, folder, _ = parts(name)
        if folder in FOLDERS and stage not in run.unfinished and name not in named:
            files.setdefault(f"{STAGES}/{stage}/{folder}", {})[name] = size
    for folder, sizes in files.items():
        yield Unneeded(run.root, folder, sizes, FOLDERS[folder.rpartition("/")[2]])


def _with_codes(runs: Sequence[_Run], unneeded: tuple[Unneeded, ...], notes: tuple[str, ...]) -> Found:
    """The same with what is found in the stores of codes that the runs use."""
    stores = {Place.of(store): store for run in runs for store in run.codes}
    stores |= {Place.of(store): store for store in (run.root.at(CODES) for run in runs)}  # which have fences
    given = [Place.of(run.root) for run in runs]
    may_ask = [run.root.path() for run in runs if TokenizeStage.kind in run.unfinished]
    needed: dict[str, set[bytes]] | None = None
    searched: list[Store] = []
    for store in stores.values():
        files = encodings(store.sizes(deep=True))
        if not files:
            continue
        there, gone = missing_users(store, given)
        notes += tuple(f"{store.path()}: {one}, which used these codes, is gone" for one in gone)
        if there:
            names = ", ".join(map(str, there))
            notes += (
                f"{store.path()}: left as it is, for these runs use it too and are not given: {names}; give them, or "
                f"delete what names them in {store.path(RUNS)} if they are gone for good",
            )
        elif may_ask:
            names = ", ".join(may_ask)
            notes += (f"{store.path()}: left as it is, for the stage tokenize is not finished in {names}",)
        else:
            needed = _all_needed_codes(runs) if needed is None else needed
            unneeded += tuple(_codes(store, files, needed))
            searched += [store.at(encoding) for encoding in files if encoding in needed]
    return Found(unneeded, notes, tuple(stores.values()), tuple(searched))


def _all_needed_codes(runs: Sequence[_Run]) -> dict[str, set[bytes]]:
    needed: dict[str, set[bytes]] = {}
    for run in runs:
        for encoding, objects in needed_codes(run.root, run.needed_folders).items():
            needed.setdefault(encoding, set()).update(objects)
    return needed


def _codes(
    store: Store, files: Mapping[str, Mapping[str, int]], needed: Mapping[str, set[bytes]]
) -> Iterator[Unneeded]:
    for encoding, sizes in files.items():
        if encoding not in needed:
            whole = {f"{encoding}/{name}": size for name, size in sizes.items()}
            yield Unneeded(store, encoding, whole, "no stage that is needed uses this encoding")
        elif names := unneeded_data(store.at(encoding), sizes, needed[encoding]):
            of_data = {f"{encoding}/{name}": sizes[name] for name in names}
            yield Unneeded(store, f"{encoding}/data", of_data, "no stage that is needed lists an object of these")
