"""`ringworld bench plan`: what our plans and the peers' layouts make of LWM's mixes, by the planner's cost model.

In: contexts, ranks, mixes, the layer's shape. Out: a report with one cell for each combination, each over several
seeded sequences, and the targets beside what was measured. Nothing is executed but the planner itself, which is timed.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict

import numpy as np

from benchmarks.machine import machine
from benchmarks.mixes import document_mix, kinds_of
from benchmarks.peers import PEERS, Outcome, direct_outcome, relay_outcome
from model.attention.plan.hardware import AttentionShape, Hardware
from model.attention.plan.planner import LAYOUTS, TIGHTEST, plan_sequence, ulysses_degrees
from storage.errors import UserError

CONTEXTS = (2**15, 2**17, 2**20)
RANKS = (8, 64, 512)
LARGEST = (2**20, 512)
"""Context and ranks for which planning time is held to a target."""

Figures = dict[str, float | int | str]
Cell = dict


def plan_report(
    contexts: Sequence[int],
    ranks: Sequence[int],
    mixes: Sequence[str],
    sequences: int,
    shape: AttentionShape,
    hardware: Hardware,
) -> dict:
    """The table, the claims that its cells allow, and the settings.

    Raises UserError on an unknown mix, and where a number of ranks does not divide a context.
    """
    for mix in mixes:
        kinds_of(mix)
    for context in contexts:
        for n in ranks:
            if n < 1 or context % n:
                raise UserError(f"{n} ranks do not divide a context of {context} tokens")
    cells = [_cell(mix, context, n, sequences, shape, hardware) for mix in mixes for context in contexts for n in ranks]
    return {
        "benchmark": "plan",
        "settings": {"sequences": sequences, "shape": asdict(shape), "hardware": asdict(hardware)},
        "machine": machine(),
        "claims": claims(cells),
        "cells": cells,
    }


def _cell(mix: str, context: int, ranks: int, sequences: int, shape: AttentionShape, hardware: Hardware) -> Cell:
    seeds = range(sequences if kinds_of(mix) else 1)  # one document is the same whatever the seed
    packed = [document_mix(mix, context, seed) for seed in seeds]
    degrees = ulysses_degrees(ranks, shape, hardware)
    systems: dict[str, Figures] = {
        "tightest": _figures(_tightest(cu, ranks, shape, hardware) for cu in packed),
        "chosen": _figures(chosen_outcome(cu, ranks, shape, hardware) for cu in packed),
    }
    for name, outcome_of in PEERS.items():
        by_degree = {u: [outcome_of(cu, ranks // u, u, shape, hardware) for cu in packed] for u in degrees}
        best = [min(outcomes, key=lambda outcome: outcome.seconds) for outcomes in zip(*by_degree.values())]
        systems[name] = {**_figures(by_degree[1]), "efficiency_at_best_ulysses": efficiency(best)}
    return {
        "mix": mix,
        "context": context,
        "ranks": ranks,
        "documents": round(float(np.mean([len(cu) - 1 for cu in packed])), 1),
        "planning_ms": round(max(_planning_ms(cu, ranks, shape, hardware) for cu in packed), 2),
        "systems": systems,
    }


def _tightest(cu_seqlens: np.ndarray, ranks: int, shape: AttentionShape, hardware: Hardware) -> Outcome:
    assignment = LAYOUTS[TIGHTEST](cu_seqlens, ranks)
    return direct_outcome(TIGHTEST, cu_seqlens, assignment, ranks, 1, shape, hardware)


def chosen_outcome(cu_seqlens: np.ndarray, ranks: int, shape: AttentionShape, hardware: Hardware) -> Outcome:
    """What comes of the planner's choice."""
    plan = plan_sequence(cu_seqlens, ranks, shape=shape, hardware=hardware)
    outcome_of = direct_outcome if plan.route == "direct" else relay_outcome
    return outcome_of(plan.layout, cu_seqlens, plan.assignment, plan.ring, plan.ulysses, shape, hardware)


def _figures(outcomes: Iterable[Outcome]) -> Figures:
    """The worst balance, the mean and the most keys, and the efficiency over all sequences together."""
    found = list(outcomes)
    return {
        "work_over_mean": round(max(outcome.work_over_mean for outcome in found), 4),
        "keys": round(float(np.mean([outcome.keys for outcome in found])), 5),
        "most_keys": round(max(outcome.most_keys for outcome in found), 5),
        "peers": round(float(np.mean([outcome.peers for outcome in found])), 2),
        "efficiency": efficiency(found),
        "ways": ", ".join(f"{n}x {way}" for way, n in Counter(outcome.way for outcome in found).most_common()),
    }


def efficiency(outcomes: Sequence[Outcome]) -> float:
    """The share of the time of several sequences together in which the hardware does useful work."""
    return round(sum(outcome.ideal for outcome in outcomes) / sum(outcome.seconds for outcome in outcomes), 4)


def _planning_ms(cu_seqlens: np.ndarray, ranks: int, shape: AttentionShape, hardware: Hardware) -> float:
    """CPU milliseconds, the best of three after one that warms up."""
    taken = []
    for _ in range(4):
        started = time.process_time()
        plan_sequence(cu_seqlens, ranks, shape=shape, hardware=hardware)
        taken.append(time.process_time() - started)
    return 1e3 * min(taken[1:])


# --- Claims ---

_EFFICIENCY = {("lwm", 2**17, 64): 0.79, ("lwm", 2**20, 64): 0.93, ("lwm", 2**20, 512): 0.77}
HIGH = 0.95
"""Efficiency from which a peer is good enough to be on a par with."""


def claims(cells: Sequence[Cell]) -> list[dict]:
    """Each target that these cells can show, with what was measured and whether it is met."""
    found = {(cell["mix"], cell["context"], cell["ranks"]): cell for cell in cells}
    return [_claim(*claim) for claim in _measured(found)]


def _claim(text: str, at: str, target: float, measured: float, met: bool) -> dict:
    return {"claim": text, "where": at, "target": target, "measured": round(measured, 4), "met": bool(met)}


def _measured(found: dict[tuple[str, int, int], Cell]) -> Iterator[tuple[str, str, float, float, bool]]:
    """(claim, the cell that decides it, target, measured, met)."""
    balance = {key: cell["systems"]["tightest"]["work_over_mean"] for key, cell in found.items()}
    worst = max(balance, key=balance.__getitem__)
    yield "tightest: work max/mean at most", _name(worst), 1.05, balance[worst], balance[worst] <= 1.05

    keys = {key: _keys_over_min_heap(cell) for key, cell in found.items()}
    worst = max(keys, key=keys.__getitem__)
    yield "tightest: keys received over min-heap's at most", _name(worst), 1.05, keys[worst], keys[worst] <= 1.05
    if (half := ("lwm", 2**20, 8)) in keys:
        yield "tightest: keys received over min-heap's at most", _name(half), 0.5, keys[half], keys[half] <= 0.5

    ours = {key: cell["systems"]["chosen"]["efficiency"] for key, cell in found.items()}
    for key, target in _EFFICIENCY.items():
        if key in ours:
            yield "chosen: efficiency at least", _name(key), target, ours[key], ours[key] >= target

    theirs = {(key, peer): cell["systems"][peer]["efficiency"] for key, cell in found.items() for peer in PEERS}
    lead = {at: ours[at[0]] - efficiency for at, efficiency in theirs.items()}
    least = min(lead, key=lead.__getitem__)
    where = f"{_name(least[0])} {least[1]}"
    yield "chosen: efficiency over any peer's, difference at least", where, -0.01, lead[least], lead[least] >= -0.01
    if behind := {at: lead[at] for at, efficiency in theirs.items() if efficiency < HIGH}:
        least = min(behind, key=behind.__getitem__)
        where = f"{_name(least[0])} {least[1]}"
        text = f"chosen: efficiency over any peer's below {HIGH}, difference above"
        yield text, where, 0.0, behind[least], behind[least] > 0

    taken = {key: cell["planning_ms"] for key, cell in found.items() if key[1:] == LARGEST}
    if taken:
        slowest = max(taken, key=taken.__getitem__)
        yield "planning: CPU milliseconds at most", _name(slowest), 50.0, taken[slowest], taken[slowest] <= 50


def _keys_over_min_heap(cell: Cell) -> float:
    ours, theirs = (cell["systems"][name]["keys"] for name in ("tightest", "min_heap"))
    return ours / theirs if theirs else (float("inf") if ours else 0.0)


def _name(key: tuple[str, int, int]) -> str:
    mix, context, ranks = key
    return f"{mix} {short(context)}/{ranks}"


def short(tokens: int) -> str:
    """32768 as 32K, 1048576 as 1M."""
    for unit, letter in ((2**20, "M"), (2**10, "K")):
        if tokens % unit == 0:
            return f"{tokens // unit}{letter}"
    return str(tokens)
