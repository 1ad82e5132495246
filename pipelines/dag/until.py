"""The part of a DAG that `--until` asks for: some of its stages, and all that these need."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

from pipelines.dag.stage import Stage
from storage.errors import UserError


def stages_until(stages: Sequence[Stage[Any]], last: str, rebuild: Collection[str] = ()) -> list[Stage[Any]]:
    """The stage named `last`, or all stages of the kind `last`, and all that they depend on, in the order of the DAG.

    rebuild: names of stages that are to be made again. Raises UserError where the DAG has no stage of the name or kind
    `last`, and where one that is to be made again is not among what is left.
    """
    needed = {stage.name for stage in stages if last in (stage.name, stage.kind)}
    if not needed:
        named = ", ".join(stage.name for stage in stages)
        raise UserError(
            f"--until {last}: the recipe has no such stage; its stages are {named}, and `pack` or `train` is all that "
            f"pack or train"
        )
    for stage in reversed(stages):
        if stage.name in needed:
            needed.update(stage.inputs)
    if lost := sorted({stage.name for stage in stages} & set(rebuild) - needed):
        raise UserError(f"--rebuild {lost[0]}: --until {last} does not need this stage; leave out one of the two")
    return [stage for stage in stages if stage.name in needed]
