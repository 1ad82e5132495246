"""What stages need at the same time, so that the run's own Ray instance never leaves a stage waiting for ever.

A task waits for room, and so does an actor by which a pool grows; the first actors of a pool, and all training workers,
need theirs at once.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import reduce

from pipelines.recipe import Resources


@dataclass(frozen=True)
class Capacity:
    """Logical CPUs, GPUs and custom resources."""

    cpus: float = 0.0
    gpus: float = 0.0
    custom: dict[str, float] = field(default_factory=dict)

    def plus(self, pool: Resources, workers: int) -> Capacity:
        """With so many workers of a pool beside it."""
        custom = dict(self.custom)
        for name, amount in pool.custom.items():
            custom[name] = custom.get(name, 0.0) + amount * workers
        return Capacity(self.cpus + pool.cpus * workers, self.gpus + pool.gpus * workers, custom)

    def at_least(self, other: Capacity) -> Capacity:
        """The larger of the two in each resource."""
        names = {*self.custom, *other.custom}
        custom = {name: max(self.custom.get(name, 0.0), other.custom.get(name, 0.0)) for name in sorted(names)}
        return Capacity(max(self.cpus, other.cpus), max(self.gpus, other.gpus), custom)


def needed_at_once(needs: Iterable[Capacity]) -> Capacity:
    """The capacity in which each of these fits, one after another."""
    return reduce(Capacity.at_least, needs, Capacity())
