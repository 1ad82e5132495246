"""Cuts are stable: what is added, removed or changed touches its own partition."""

from __future__ import annotations

import numpy as np
import pytest

from pipelines.dag.cut import cut

LIMIT = 1_000


def partitions(units: dict[str, int]) -> dict[str, tuple[tuple[str, int], ...]]:
    """The units of each partition, with their weights."""
    names = sorted(units)
    weights = np.array([units[name] for name in names], np.int64)
    return {
        one.name: tuple((names[unit], units[names[unit]]) for unit in one.units) for one in cut(names, weights, LIMIT)
    }


def many(count: int, seed: int) -> dict[str, int]:
    weights = np.random.default_rng(seed).integers(1, 400, count)
    return {f"videos/{number:06d}.mp4": int(weight) for number, weight in enumerate(weights)}


def test_every_unit_is_in_one_partition_within_the_limit() -> None:
    units = many(3_000, 0) | {"long": 5_000, "longer": 600}
    made = partitions(units)
    assert sorted(unit for part in made.values() for unit in part) == sorted(units.items())
    assert all(sum(weight for _, weight in part) <= LIMIT or len(part) == 1 for part in made.values())
    assert [part for part in made.values() if ("long", 5_000) in part] == [(("long", 5_000),)]
    assert len(made) < 2.5 * sum(units.values()) / LIMIT  # about 1.4 times the fewest


@pytest.mark.parametrize("seed", range(4))
def test_a_unit_touches_its_own_partition(seed: int) -> None:
    units = many(2_000, seed)
    before = set(partitions(units).values())
    name = f"videos/{seed * 7:06d}.mp4"
    for changed in (units | {"one more": 300}, units | {name: 1 + units[name]}, {**units, "long": 10**6}):
        after = set(partitions(changed).values())
        assert max(len(after - before), len(before - after)) <= 2
    del units[name]
    after = set(partitions(units).values())
    assert len(after - before) <= 1
    assert len(before - after) <= 2


def test_the_order_of_units_and_the_others_do_not_matter() -> None:
    units = many(500, 5)
    names = list(units)
    weights = np.array(list(units.values()), np.int64)
    forward = {one.name: {names[unit] for unit in one.units} for one in cut(names, weights, LIMIT)}
    back = {one.name: {names[::-1][unit] for unit in one.units} for one in cut(names[::-1], weights[::-1], LIMIT)}
    assert forward == back
    assert cut([], np.zeros(0, np.int64), LIMIT) == []


def test_names_of_bytes_that_are_no_text_are_cut_too() -> None:
    assert len(cut(["a\udcff", "b"], np.array([1, 1]), LIMIT)) == 1
