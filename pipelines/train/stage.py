"""The train stage: one stage of the curriculum, packed shards and the weights of the stage before to the next model."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from model.layers.kernels.interface import missing_for
from pipelines.cluster.capacity import Capacity
from pipelines.cluster.progress import bar
from pipelines.dag.manifest import Manifest, url_digest
from pipelines.dag.stage import Made, Stage, StageContext
from pipelines.export.folder import check_target
from pipelines.pack.record import PackRecord
from pipelines.pack.stage import PackStage
from pipelines.recipe import Recipe, output_settings
from pipelines.recipe import TrainStage as TrainSettings
from pipelines.report.numbers import count_of
from pipelines.train.job import MODEL
from pipelines.train.lwm_init import lwm_file, lwm_weights
from pipelines.train.metrics.wandb import check_wandb
from pipelines.train.record import TrainRecord
from storage.errors import UserError
from storage.public_url import public_url
from storage.store import Store
from storage.urls import first_contact
from tokenization.text.tokenizer_files import fetch_tokenizer


@dataclass(frozen=True)
class TrainStage(Stage[TrainRecord]):
    """Trains `stage`, one of the recipe's. previous: the name of the train stage before it, if there is one."""

    kind = "train"
    record = TrainRecord
    output_version = 1
    libraries = ("torch", "transformers", "deepspeed")
    lane = "model"
    keeps_its_data = "begun"

    recipe: Recipe
    stage: TrainSettings
    previous: str | None

    @staticmethod
    def named(stage: str) -> str:
        """The name in the DAG of a training stage of the recipe."""
        return f"train-{stage}"

    @property
    def name(self) -> str:
        """After the recipe's stage."""
        return self.named(self.stage.name)

    @property
    def pack(self) -> str:
        """The stage that packs for it, below which it is drawn."""
        return PackStage.named(self.stage.name)

    drawn_below = pack

    @property
    def inputs(self) -> tuple[str, ...]:
        """Shards, and the model of the stage before."""
        return (self.pack, self.previous) if self.previous else (self.pack,)

    def settings(self) -> Mapping[str, Any]:
        """What the model's weights depend on. The gradient is the same on any mesh, at any ZeRO stage, by any saving of
        memory and by any kernels, and a checkpoint fits them all, so that a run goes on when they change.
        """
        recipe, model = self.recipe, self.recipe.model
        init = _weights_digest(model.init, recipe.storage.options) if model.init else None
        first = {} if self.previous else {"model": {"size": model.size, "init": init}}
        stage, train = output_settings(self.stage), output_settings(recipe.training)
        return {"stage": stage, "train": train, "seed": recipe.seed, **first}

    def resources(self) -> Capacity:
        """All workers at once; of a range of workers, GPUs for the least.

        GPUs are there or not, while CPUs and custom resources are only numbers to a Ray instance of our own.
        """
        train = self.recipe.training
        gpus = train.resources.gpus * (train.min_workers or train.workers)
        return dataclasses.replace(Capacity().plus(train.resources, train.workers), gpus=gpus)

    def check(self) -> None:
        """Raise UserError where kernels, Weights & Biases, or a place and a tokenizer to export cannot be used as the
        recipe asks.
        """
        if missing := missing_for(self.recipe.training.kernels):
            raise UserError(f"train.kernels {self.recipe.training.kernels}: {missing}, or set train.kernels: torch")
        check_wandb(self.recipe)
        self._check_lwm()
        if (target := self._export_target()) is not None:
            index = [stage.name for stage in self.recipe.curriculum].index(self.stage.name)
            check_target(target, replace=True, key=f"train.stages.{index}.export ({self.stage.name})")
            self._check_exported_tokenizer()

    def _check_lwm(self) -> None:
        """Of a checkpoint of LWM's that is on this machine, that it is whole and of the recipe's sizes."""
        init, options = self.recipe.model.init, self.recipe.storage.options
        if self.previous or init is None or (file := lwm_file(init, options)) is None:
            return
        if Path(file).is_file():
            lwm_weights(self.recipe, file, self.stage.context, self.stage.rope_theta)

    def run(self, context: StageContext) -> Made[TrainRecord]:
        """Train in groups of Ray Train workers."""
        from pipelines.tokenize.vocabulary import joint_vocabulary
        from pipelines.train.job import TrainJob
        from pipelines.train.run import train_stage

        packed = context.input(self.pack, PackRecord)
        job = TrainJob(
            recipe=self.recipe,
            stage=self.stage,
            vocabulary=joint_vocabulary(self.recipe),
            shards=packed.shared,
            packed=packed.record,
            before=context.input(self.previous, TrainRecord).store if self.previous else None,
            store=context.store,
            profile=context.profile,
        )
        with bar(self.name, self.stage.steps, "step") as line:
            record = train_stage(job, line)
        if (target := self._export_target(context.store)) is not None:
            from pipelines.export.trained import just_trained
            from pipelines.export.write import export_model

            trained = just_trained(context.store, context.inputs, record, self.recipe.public_json())
            export_model(trained, target, replace=True)
        return Made(record)

    def _check_exported_tokenizer(self) -> None:
        from tokenization.text.hf_files import tokenizer_files  # a tokenizer's imports take time

        file = fetch_tokenizer(self.recipe.text_tokenizer.path, self.recipe.storage.options)
        tokenizer_files(file, self.stage.context)

    def _export_target(self, held: Store | None = None) -> Store | None:
        """Where the recipe has the model exported to. held: a store whose lease covers what is written there."""
        if self.stage.export is None:
            return None
        return Store(self.stage.export, self.recipe.storage.options, held.fence if held else None)

    def summary(self, manifest: Manifest[TrainRecord]) -> tuple[str, ...]:
        """Steps and tokens."""
        figures = manifest.record.figures
        return (count_of(figures.steps, "steps"), count_of(figures.tokens, "tokens"))


def _weights_digest(url: str, options: dict[str, Any]) -> str:
    """What identifies the weights to start from: LWM's file, or a folder's; a train stage's are in its `MODEL`.

    Raises UserError where there are none.
    """
    with first_contact(url):
        file = lwm_file(url, options)
    if file is not None:
        return url_digest("model.init", file, options)
    store = Store(url, options)
    with first_contact(url):
        found = next((place for place in (store.at(MODEL), store) if place.exists("config.json")), None)
    identity = url_digest("model.init", found.url if found else url, options)
    if found is None:
        raise UserError(
            f"{public_url(url)}: no config.json is in this folder; set model.init to that of a Hugging Face Llama, or "
            f"of a train stage"
        )
    return identity
