"""What every cell of an evaluation is given: settings, the model that is evaluated, data, and where results go."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from pipelines.decoder.limits import DEFAULT_LIMITS, Limits
from pipelines.evaluate.run_data import RunData
from pipelines.evaluate.subject import Subject
from pipelines.recipe.data import Storage
from pipelines.recipe.evaluate import Evaluate
from storage.store import Store
from tokenization.vocabulary import JointVocabulary

if TYPE_CHECKING:  # it imports torch, which the driver does without
    from model.attention.p2p import Group


@dataclass(frozen=True)
class EvaluateJob:
    """The same on every rank of a cell, but for `rank` and `group`.

    settings: of the recipe's `evaluate`. subject: the model; of a run, that of the last training stage. store: where
    cells are committed; a cell writes files of its own there on rank 0 alone (`is_first`). storage: how URLs of the
    settings are opened. limits: of what decodes files. run: None for an exported model without a recipe. folders: where
    in `store` the cells of a task are; those that are not named, in the store itself. group: the ranks that share the
    cell and call `measure` alike; None for one.
    """

    settings: Evaluate
    seed: int
    subject: Subject
    store: Store
    storage: Storage
    limits: Limits = DEFAULT_LIMITS
    run: RunData | None = None
    folders: Mapping[str, str] = field(default_factory=dict)
    rank: int = 0
    group: Group = None

    @classmethod
    def of_run(cls, run: RunData, subject: Subject, store: Store) -> EvaluateJob:
        """By the recipe of a run."""
        recipe = run.recipe
        limits = recipe.tokenize.decoder_limits
        return cls(recipe.evaluate, recipe.seed, subject, store, recipe.storage, limits, run)

    def of_task(self, task: str) -> EvaluateJob:
        """The same, with the store of one task."""
        folder = self.folders.get(task)
        return replace(self, store=self.store.at(folder), folders={}) if folder else self

    @property
    def vocabulary(self) -> JointVocabulary:
        """The joint vocabulary of the model."""
        return self.subject.vocabulary

    @property
    def device(self) -> str:
        """Where the model runs, "cpu" or "cuda"."""
        return self.subject.device

    @property
    def is_first(self) -> bool:
        """Whether this rank writes the cell's files."""
        return self.rank == 0
