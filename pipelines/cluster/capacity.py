"""What a recipe needs at the same time, so that a Ray instance of our own never leaves a stage waiting for ever.

A task waits for room, and so does an actor by which a pool grows; the first ones of a pool, and all training workers,
need theirs at once.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from pipelines.recipe import Recipe, Resources


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


def needed_at_once(recipe: Recipe) -> Capacity:
    """The capacity with which every stage of the recipe can run.

    Of a range of training workers the least need their GPUs, which are there or not; CPUs and custom resources, which
    are but numbers, are for all.
    """
    tokenize, train, nothing = recipe.tokenize, recipe.train, Capacity()
    least = train.workers if train.min_workers is None else train.min_workers
    needs = [
        nothing.plus(tokenize.decode, 1).plus(tokenize.encode, tokenize.encode.min_workers if recipe.vqgan else 0),
        nothing.plus(recipe.pack.pool, 1),
        replace(nothing.plus(train.resources, train.workers), gpus=train.resources.gpus * least),
        nothing.plus(recipe.evaluate.resources, 1),
    ]
    if recipe.vqgan and recipe.vqgan.train:
        needs.append(Capacity(cpus=recipe.vqgan.train.threads))
    total = nothing
    for need in needs:
        total = total.at_least(need)
    return total
