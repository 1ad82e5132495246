"""A recipe as a DAG: which stages there are, what each depends on, which settings and code shape its output.

What only changes how fast a stage runs (pools, resources, retries) is left out of the settings, so that a run can
carry on over another cluster.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pipelines.cluster.progress import bar
from pipelines.dag.stage import Stage, digest
from pipelines.recipe import Recipe, TrainStage
from pipelines.sources.listing import SourceObject, list_sources, listing_digest, read_objects, write_objects
from pipelines.train.profiled_steps import ProfiledSteps
from storage.errors import UserError
from storage.store import Store
from storage.urls import fetch_file, list_objects
from tokenization.text.tokenizer import load_text_tokenizer
from tokenization.vocabulary import JointVocabulary

Manifest = dict[str, Any]


@dataclass(frozen=True)
class StageRun:
    """What a stage's `run` is given: its own folder, what its inputs made, and which training steps to trace."""

    store: Store
    inputs: Mapping[str, tuple[Store, Manifest]]
    profile: ProfiledSteps | None = None


def build_stages(recipe: Recipe) -> list[Stage]:
    """The recipe's DAG, every stage after its inputs. Lists the sources, which may raise UserError."""
    objects = list_sources(recipe)
    media = recipe.vqgan is not None and any(found.kind != "text" for found in objects)
    stages = [_sources(objects)]
    if media:
        stages.append(_vqgan(recipe))
    stages.append(_tokenize(recipe, media))
    previous: str | None = None
    for stage in recipe.train.stages:
        stages.append(_pack(recipe, stage))
        stages.append(_train(recipe, stage, previous))
        previous = stages[-1].name
    stages.append(_evaluate(recipe, media))
    stages.append(_report(recipe, [stage.name for stage in stages]))
    return stages


def joint_vocabulary(recipe: Recipe) -> JointVocabulary:
    """The vocabulary of the recipe's text tokenizer and VQGAN; without a VQGAN it has no vision range."""
    tokenizer = load_text_tokenizer(str(fetch_file(recipe.text_tokenizer.path, recipe.storage.options)))
    special = {"bos_id": tokenizer.bos_id, "eos_id": tokenizer.eos_id}
    if recipe.vqgan is None:
        return JointVocabulary(tokenizer.size, 0, 0, **special)
    return JointVocabulary.for_codebook(tokenizer.size, recipe.vqgan.sizes.codebook_size, **special)


def _sources(objects: Sequence[SourceObject]) -> Stage:
    return Stage(
        name="sources",
        settings=listing_digest(objects),
        module="pipelines.sources.listing",
        inputs=(),
        run=lambda run: write_objects(run.store, objects),
    )


def _vqgan(recipe: Recipe) -> Stage:
    vqgan = recipe.vqgan
    assert vqgan is not None

    def run(stage: StageRun) -> Manifest:
        from pipelines.codecs import vqgan_task

        objects = read_objects(stage.inputs["sources"][0]) if vqgan.train else []
        with bar("vqgan", vqgan.train.steps if vqgan.train else None, "step") as line:
            return vqgan_task(vqgan, objects, recipe.seed, stage.store, line)

    return Stage(
        name="vqgan",
        settings={
            "config": vqgan.sizes.to_dict(),
            "weights": _weights(vqgan.weights, recipe),
            "train": vqgan.train.model_dump(exclude={"checkpoint_steps"}) if vqgan.train else None,
            "seed": recipe.seed,
        },
        module="pipelines.codecs",
        inputs=("sources",) if vqgan.train else (),
        run=run,
    )


def _weights(url: str | None, recipe: Recipe) -> str | None:
    """What identifies named weights, a file or a folder: a hash of the listing. UserError when nothing is there."""
    if url is None:
        return None
    options = recipe.storage.options
    try:
        return digest([dataclasses.asdict(found) for found in list_objects(url, options)])
    except UserError:
        return digest([dataclasses.asdict(found) for found in list_objects(f"{url.rstrip('/')}/*", options)])


_HOW_TOKENIZE_RUNS = {"decode", "encode", "max_bad_fraction", "piece_seconds", "in_flight_mib"}


def _tokenize(recipe: Recipe, media: bool) -> Stage:
    tokenizer = list_objects(recipe.text_tokenizer.path, recipe.storage.options)[0]

    def run(stage: StageRun) -> Manifest:
        from pipelines.tokenize import cut_partitions, tokenize_all

        objects = read_objects(stage.inputs["sources"][0])
        vqgan = stage.inputs["vqgan"][0] if media else None
        total = len(cut_partitions(objects, recipe.tokenize.partition_bytes))
        with bar("tokenize", total, "part") as line:
            made = tokenize_all(recipe, objects, joint_vocabulary(recipe), vqgan, stage.store, line)
        made["outputs"]["made_of"] = {
            "sources": stage.inputs["sources"][1]["figures"],
            "text_tokenizer": made["outputs"]["text_tokenizer"]["fingerprint"],
            "vqgan": stage.inputs["vqgan"][1]["outputs"]["fingerprint"] if media else None,
        }
        return made

    return Stage(
        name="tokenize",
        settings={
            "fields": {name: source.fields for name, source in recipe.sources.items()},
            "max_frames": {name: source.max_frames for name, source in recipe.sources.items() if source.max_frames},
            "tokenize": recipe.tokenize.model_dump(exclude=_HOW_TOKENIZE_RUNS),
            "text_tokenizer": tokenizer.etag,
            "encoder": recipe.vqgan.precision if recipe.vqgan else None,
            "seed": recipe.seed,
        },
        module="pipelines.tokenize",
        inputs=("sources", "vqgan") if media else ("sources",),
        run=run,
    )


def _pack(recipe: Recipe, stage: TrainStage) -> Stage:
    def run(this: StageRun) -> Manifest:
        from pipelines.pack.stage import PackJob, cut_pack_partitions, pack_all

        documents, tokenized = this.inputs["tokenize"]
        parts = tokenized["outputs"]["partitions"]
        job = PackJob(recipe.pack, stage, joint_vocabulary(recipe), recipe.seed)
        total = len(cut_pack_partitions(parts, list(stage.mixture), recipe.pack.partition_tokens))
        with bar(f"pack-{stage.name}", total, "part") as line:
            packed = pack_all(job, parts, documents, this.store, line)
        packed["outputs"]["made_of"] = tokenized["outputs"]["made_of"]
        return packed

    return Stage(
        name=f"pack-{stage.name}",
        settings={
            "pack": recipe.pack.model_dump(exclude={"pool"}),
            "context": stage.context,
            "objective": stage.objective,
            "sources": sorted(stage.mixture),
            "document_tokens": [stage.min_document_tokens, stage.max_document_tokens],
            "seed": recipe.seed,
        },
        module="pipelines.pack.stage",
        inputs=("tokenize",),
        run=run,
    )


WHAT_TRAINING_COMPUTES = {"precision", "betas", "eps", "weight_decay", "decay", "clip_norm", "bad_steps"}
"""Keys of `train` that a model depends on. The gradient is the same on any mesh, at any ZeRO stage, by any saving of
memory and by any kernels, and a checkpoint fits them all: a run goes on when they change, and no stage is trained
again."""
HOW_A_STAGE_RUNS = {"export", "sp", "rows", "attention", "zero", "memory", "tokens"}
"""Keys of a stage that its model does not depend on; `tokens` is another way to say `steps`."""


def _train(recipe: Recipe, stage: TrainStage, previous: str | None) -> Stage:
    def run(this: StageRun) -> Manifest:
        from pipelines.train import train_stage

        before = this.inputs[previous][0] if previous else None
        with bar(f"train-{stage.name}", stage.steps, "step") as line:
            packed = this.inputs[f"pack-{stage.name}"]
            return train_stage(recipe, stage, joint_vocabulary(recipe), packed, before, this.store, line, this.profile)

    first = {"model": {"size": recipe.model.size, "init": _weights(recipe.model.init, recipe)}} if not previous else {}
    return Stage(
        name=f"train-{stage.name}",
        settings={
            "stage": stage.model_dump(exclude=HOW_A_STAGE_RUNS),
            "train": recipe.train.model_dump(include=WHAT_TRAINING_COMPUTES),
            "seed": recipe.seed,
            **first,
        },
        module="pipelines.train",
        inputs=(f"pack-{stage.name}", previous) if previous else (f"pack-{stage.name}",),
        run=run,
    )


def _evaluate(recipe: Recipe, media: bool) -> Stage:
    packs = tuple(f"pack-{stage.name}" for stage in recipe.train.stages)

    def run(this: StageRun) -> Manifest:
        from pipelines.evaluate import evaluate_all

        with bar("evaluate", None, "part") as line:
            return evaluate_all(recipe, joint_vocabulary(recipe), this.inputs, this.store, line)

    trains = tuple(f"train-{stage.name}" for stage in recipe.train.stages)
    return Stage(
        name="evaluate",
        settings={"evaluate": recipe.evaluate.model_dump(exclude={"resources"}), "seed": recipe.seed},
        module="pipelines.evaluate",
        inputs=("sources", *(("vqgan",) if media else ()), *packs, *trains),
        run=run,
    )


def _report(recipe: Recipe, before: list[str]) -> Stage:
    def run(this: StageRun) -> Manifest:
        from pipelines.report import write_report

        return write_report(recipe, this.inputs, this.store)

    return Stage(
        name="report",
        settings={"name": recipe.name},
        module="pipelines.report",
        inputs=tuple(before),
        run=run,
    )
