"""A stage of the DAG: one class in one folder, which `pipelines.build` lists.

To add one, subclass `Stage`, declare its record (two frozen dataclasses, `outputs` and `figures`), and name it in the
list. Plan, driver, cluster and report need nothing else.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Generic, Literal, TypeVar

from pipelines.cluster.capacity import Capacity
from pipelines.dag.manifest import Manifest, StageOutput, shared_folder
from pipelines.train.profiled_steps import ProfiledSteps
from storage.store import Store

R = TypeVar("R")
Q = TypeVar("Q")


@dataclass(frozen=True)
class StageContext:
    """What a running stage is given: its own folder, what its inputs made, and which training steps to trace.

    rebuild: how often `--rebuild` asked for it.
    """

    store: Store
    inputs: Mapping[str, StageOutput[Any]]
    profile: ProfiledSteps | None = None
    rebuild: int = 0

    @property
    def shared(self) -> Store:
        """Where partitions put their files: with those of all that the stage made in the run, so named by content."""
        return shared_folder(self.store)

    def input(self, name: str, record: type[Q]) -> StageOutput[Q]:
        """The output of one input, whose record has this type."""
        output = self.inputs[name]
        assert isinstance(output.record, record), f"{name} is no {record.__name__}"
        return output


@dataclass(frozen=True)
class Made(Generic[R]):
    """What a stage returns: its record, and what it put in quarantine, an entry with a reason each.

    quarantined: how many there are, of which `quarantine` may list the first alone.
    """

    record: R
    quarantine: tuple[Mapping[str, Any], ...] = ()
    quarantined: int = 0


class Stage(ABC, Generic[R]):
    """One node of the DAG. Objects are cheap: nothing heavy is imported before `run`."""

    kind: ClassVar[str]
    """What stages of this class are called together; `name` where there is one of them."""
    record: ClassVar[type[Any]]
    """The type of its record, a frozen dataclass with `outputs` and `figures`."""
    output_version: ClassVar[int]
    """Raised by hand whenever the same settings and inputs give other bytes than before; golden tests hold it."""
    libraries: ClassVar[tuple[str, ...]] = ()
    """Distributions whose version may show in the output: kept in the manifest, shown by `plan`."""
    lane: ClassVar[Literal["data", "model"]] = "data"
    """The row of the drawn DAG."""
    keeps_its_data: ClassVar[Literal["begun", "done", None]] = None
    """From when on it keeps the data that it began with, where the sources change and the recipe does not."""

    @property
    def name(self) -> str:
        """Unique in the DAG."""
        return self.kind

    @property
    def drawn_below(self) -> str | None:
        """The stage of the upper row under which this one is drawn; None for a column of its own."""
        return None

    @property
    @abstractmethod
    def inputs(self) -> tuple[str, ...]:
        """Names of the stages whose output this one reads."""

    @abstractmethod
    def settings(self) -> Mapping[str, Any]:
        """Plain JSON of all that shapes the output beside the inputs. Raises UserError where a named file is absent."""

    def requested(self) -> Mapping[str, Any]:
        """Those of the settings that the recipe decides, not what the sources hold."""
        return self.settings()

    @property
    def kept_for(self) -> tuple[str, ...]:
        """Names of stages: where all of them keep what this one has made for them, it is not made anew."""
        return ()

    def resources(self) -> Capacity:
        """What has to be free at the same time for the stage to run at all."""
        return Capacity()

    def check(self) -> None:
        """Raise UserError for whatever can be refused before anything runs."""
        return

    @abstractmethod
    def run(self, context: StageContext) -> Made[R]:
        """Make the output in `context.store`. Called again after a failure, it carries on."""

    def notes(self, figures: Mapping[str, Any] | None) -> tuple[str, ...]:
        """What `plan` tells beside the reasons. figures: of the manifest as its JSON; None where there is none yet."""
        return ()

    def summary(self, manifest: Manifest[R]) -> tuple[str, ...]:
        """What was made, in a few words each: for the report's DAG."""
        return ()
