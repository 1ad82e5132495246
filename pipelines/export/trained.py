"""What a training made, with all that it was made from: found from a run, a stage's folder or a checkpoint.

In: a URL. Out: `Trained`. All is read from the manifests in the run's own folders, so that neither the recipe nor its
sources need be there.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from model import checkpoint
from model.checkpoint.stored_weights import manifest_of
from pipelines.codecs.record import CodecRecord
from pipelines.codecs.stage import CodecStage
from pipelines.dag.manifest import (
    MANIFEST,
    STARTED,
    Declaration,
    Manifest,
    PlainRecord,
    StageOutput,
    is_fingerprint,
    place_in_run,
    read_manifest,
    record_json,
    refuse_newer,
)
from pipelines.inspect.lineage import stages_before
from pipelines.pack.record import PackRecord
from pipelines.pack.stage import PackStage
from pipelines.tokenize.record import TokenizeRecord
from pipelines.tokenize.stage import TokenizeStage
from pipelines.train.best_checkpoint import best_checkpoint
from pipelines.train.job import CHECKPOINTS
from pipelines.train.record import TrainRecord
from storage.errors import UserError
from storage.public_url import public_url
from storage.store import Store
from storage.urls import first_contact
from tokenization.vocabulary import JointVocabulary

TRAIN, EVALUATE = "train", "evaluate"
"""Kinds of stages, whose classes import this room; the name of a training stage begins with its kind."""


@dataclass(frozen=True)
class Trained:
    """A trained model.

    store: the folder of its training stage's fingerprint. stages: all that it was made from, by name. record: the
    stage's own, as JSON; empty where it is not finished. step: the last one trained. checkpoint: whether its weights
    are those of that step's checkpoint, not the model that the stage left. recipe: without secrets; None where no
    checkpoint has it any more. heldout: rows of the run's evaluation of this model, where it has been evaluated.
    """

    store: Store
    manifest: Manifest[Any]
    stages: Mapping[str, StageOutput[Any]]
    record: Mapping[str, Mapping[str, Any]]
    step: int
    checkpoint: bool
    recipe: Mapping[str, Any] | None
    heldout: tuple[Mapping[str, Any], ...] = ()

    @property
    def declaration(self) -> Declaration:
        """What determines the training."""
        return self.manifest.declaration

    @property
    def settings(self) -> Mapping[str, Any]:
        """The training stage's own settings: `stage` and `train` of the recipe."""
        return self.declaration.settings

    @property
    def name(self) -> str:
        """The recipe's name and the stage's."""
        stage = self.declaration.stage.removeprefix(f"{TRAIN}-")
        return f"{self.recipe['name']}-{stage}" if self.recipe else stage

    @property
    def tokenize(self) -> StageOutput[TokenizeRecord]:
        """The stage that made the documents."""
        return self._only(TokenizeStage.kind)

    @property
    def codec(self) -> StageOutput[CodecRecord] | None:
        """The stage that made the VQGAN; None where there are no media."""
        return next(iter(self.of_kind(CodecStage.kind).values()), None)

    def of_kind(self, kind: str) -> dict[str, StageOutput[Any]]:
        """Of what it was made from the stages of a kind, by name."""
        return {name: one for name, one in self.stages.items() if one.manifest.declaration.kind == kind}

    def earlier(self) -> list[StageOutput[Any]]:
        """The training stages before it, first to last, each of which started from the weights of the one before."""
        trainings, found = self.of_kind(TRAIN), list[StageOutput[Any]]()
        inputs = self.declaration.inputs
        while before := next((trainings[name] for name in inputs if name in trainings), None):
            found.append(before)
            inputs = before.manifest.declaration.inputs
        return found[::-1]

    def vocabulary(self) -> JointVocabulary:
        """That of the sequences which it was trained on. Raises UserError where their sets are gone."""
        for name in self.declaration.inputs:
            if self.stages[name].manifest.declaration.kind == PackStage.kind:
                store = self.stages[name].store
                packed = read_manifest(store, PackRecord)
                if packed and (found := _vocabulary(StageOutput(store, packed))):
                    return found
        raise UserError(
            f"{self.store.path()}: the sets of shards that it was trained on are gone; run the recipe again"
        )

    def _only(self, kind: str) -> StageOutput[Any]:
        found = list(self.of_kind(kind).values())
        if not found:
            raise UserError(f"{self.store.path()}: no {kind} stage is behind it; run the recipe again")
        return found[0]


def find_trained(url: str, stage: str | None = None, best: bool = False) -> Trained:
    """What was trained at a URL: a run's root, the folder of a training stage or of a fingerprint of it, a checkpoint.

    stage: of a run, the name of the training stage; None: the one that was finished last. best: the stage's checkpoint
    of least held-out loss, in place of the model that it left. Raises UserError where nothing trained is there, or no
    best checkpoint.
    """
    store = Store(Store(url.rstrip("/") or url).path())  # of a relative path, so that the folders above it are known
    with first_contact(url):
        if store.exists(checkpoint.COMMIT):
            if best:
                raise UserError(f"{public_url(url)}: a checkpoint, of which none is the best; leave out --best")
            return _of_checkpoint(store)
        folders = store.folders()
        if "stages" in folders:
            return _of_run(store, stage, best)
        if stage is not None:
            raise UserError(f"{public_url(url)}: no run's root, where --stage names a stage; leave out --stage")
        if any(store.exists(name) for name in (MANIFEST, STARTED)):
            return trained_in(store, best=best)
        if fingerprints := [store.at(name) for name in folders if is_fingerprint(name)]:
            return trained_in(_last_finished(fingerprints, store), best=best)
    raise UserError(
        f"{public_url(url)}: no run, training stage or checkpoint; give a run's root, ROOT/stages/train-NAME, or a "
        f"checkpoints/step-N in it"
    )


def trained_in(store: Store, step: int | None = None, best: bool = False) -> Trained:
    """What a training stage left in the folder of its fingerprint.

    step: that of one of its checkpoints, in place of the model that it left; with best, of the best one. Raises
    UserError where the folder is of no training, of one that is not finished, or has no best checkpoint.
    """
    manifest = _manifest(store)
    stage = manifest.declaration.stage
    if manifest.declaration.kind != TRAIN:
        raise UserError(f"{store.path()}: {stage} trains nothing; give the folder of a stage that does, train-NAME")
    if best:
        step = _best_step(store)
    if step is None and not manifest.finished:
        raise UserError(
            f"{store.path()}: {stage} is not finished; run the recipe on, or give one of the checkpoints in "
            f"{store.path(CHECKPOINTS)}"
        )
    record = record_json(manifest.record)
    last = int(record["figures"]["steps"]) if step is None else step
    stages, recipe = stages_before(store, manifest), _kept_recipe(store, step)
    heldout = _heldout(store, manifest) if step is None else ()
    return Trained(store, manifest, stages, record, last, step is not None, recipe, heldout)


def just_trained(
    store: Store, inputs: Mapping[str, StageOutput[Any]], record: TrainRecord, recipe: Mapping[str, Any]
) -> Trained:
    """The same of a stage that has trained and is about to commit its manifest. inputs: its own, as it read them."""
    folders = {name: place_in_run(output.store) for name, output in inputs.items()}
    manifest = replace(_manifest(store), input_folders=folders)
    stages = stages_before(store, manifest)
    return Trained(store, manifest, stages, record_json(record), record.figures.steps, False, recipe)


def _best_step(store: Store) -> int:
    found = best_checkpoint(store.at(CHECKPOINTS))
    if found is None:
        raise UserError(
            f"{store.path()}: none of its checkpoints is known to be the best; train with train.heldout set, or leave "
            f"out --best"
        )
    return int(found["step"])


def _of_run(root: Store, stage: str | None, best: bool) -> Trained:
    names = [name for name in root.folders("stages") if name.startswith(f"{TRAIN}-")]
    there = f"its stages are {', '.join(root.folders('stages'))}"
    if stage is None:
        stores = [root.at("stages", name, one) for name in names for one in root.folders(f"stages/{name}")]
        stores = [one for one in stores if is_fingerprint(one.url.rpartition("/")[2])]
        return trained_in(_last_finished(stores, root), best=best)
    name = stage if stage in names else f"{TRAIN}-{stage}"
    if name not in names:
        raise UserError(f"{root.path()}: there is no training stage {stage}; {there}")
    history = root.at("stages", name)
    stores = [history.at(one) for one in history.folders() if is_fingerprint(one)]
    return trained_in(_last_finished(stores, history), best=best)


def _last_finished(stores: list[Store], where: Store) -> Store:
    """Of those finished in the same second, the one trained on the weights of the other."""
    outputs = [(store, manifest) for store in stores if (manifest := read_manifest(store, PlainRecord))]
    if not outputs:
        raise UserError(f"{where.path()}: no training is finished there; run the recipe on, or give a checkpoint")

    def age(one: tuple[Store, Manifest[PlainRecord]]) -> tuple[str, int]:
        stages = stages_before(*one)
        return one[1].finished, sum(before.manifest.declaration.kind == TRAIN for before in stages.values())

    latest = max(manifest.finished for _, manifest in outputs)
    return max((one for one in outputs if one[1].finished == latest), key=age)[0]


def _of_checkpoint(folder: Store) -> Trained:
    home, _, name = folder.url.rpartition("/")
    number = name.rpartition("-")[2]
    stage = replace(folder, url=home.rpartition("/")[0])
    if not number.isdigit() or not (stage.exists(STARTED) or stage.exists(MANIFEST)):
        raise UserError(f"{folder.path()}: this checkpoint lies in no stage of a run; give it where training wrote it")
    return trained_in(stage, step=int(number))


def _manifest(store: Store) -> Manifest[Any]:
    """Of a stage's folder; of one that is not finished, what was declared."""
    if (manifest := read_manifest(store, PlainRecord)) is not None:
        return manifest
    started = store.read_json(STARTED)
    if started is None:
        raise UserError(f"{store.path()}: not the folder of a stage; give a run's root, or ROOT/stages/train-NAME")
    refuse_newer(started, store.path(STARTED))
    declaration = Declaration.from_json(started)
    return Manifest(declaration, PlainRecord(), fingerprint=declaration.fingerprint)


def _kept_recipe(store: Store, step: int | None) -> Mapping[str, Any] | None:
    """The recipe that a checkpoint was saved with: that of `step`, or else of the last."""
    checkpoints = store.at(CHECKPOINTS)
    steps = [step] if step is not None else checkpoint.committed_steps(checkpoints)[-1:]
    with contextlib.suppress(checkpoint.DamagedError):
        for one in steps:
            return manifest_of(checkpoints, one).client_state.get("recipe")
    return None


def _heldout(store: Store, manifest: Manifest[Any]) -> tuple[Mapping[str, Any], ...]:
    """Of the last evaluation in the run of the model in a stage's folder, the rows that are of this model."""
    history, stage = Store(store.url.rsplit("/", 2)[0]).at(EVALUATE), manifest.declaration.stage
    found = [read_manifest(history.at(name), PlainRecord) for name in history.folders() if is_fingerprint(name)]
    of_this = [one for one in found if one and one.declaration.inputs.get(stage) == manifest.fingerprint]
    if not of_this:
        return ()
    rows = max(of_this, key=lambda one: one.finished).record.figures.get("heldout", ())
    return tuple(row for row in rows if f"{TRAIN}-{row['stage']}" == stage)


def _vocabulary(packed: StageOutput[PackRecord]) -> JointVocabulary | None:
    return next((shard_set.vocabulary for shard_set in _sets(packed)), None)


def _sets(packed: StageOutput[PackRecord]) -> Iterator[Any]:
    for source, splits in packed.record.outputs.sets.items():
        for split in splits:
            with contextlib.suppress(FileNotFoundError):
                if shard_set := packed.record.read_set(packed.shared, source, split):
                    yield shard_set
