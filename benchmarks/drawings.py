"""`ringworld bench drawings`: the drawings of docs/ring-attention.md, from what the planner itself says.

In: nothing; sequences and seeds are fixed here. Out: SVG texts, the same at every run. Each carries a digest of the
numbers it shows, so that a test can tell whether it is up to date without depending on how matplotlib writes a line.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.mixes import document_mix
from benchmarks.peers import PEERS, min_heap
from benchmarks.plan import chosen_outcome, efficiency, short
from model.attention.plan.hardware import AttentionShape, Hardware
from model.attention.plan.layouts import Assignment
from model.attention.plan.planner import LAYOUTS, TIGHTEST
from model.attention.plan.segments import cut_at_documents, traffic

MIX, CONTEXT, RANKS, SEED = "lwm", 2**17, 8, 7
"""The sequence of the first two drawings."""
SHAPE = AttentionShape(heads=32, kv_heads=8)
SCALES = ((2**17, (8, 16, 32, 64, 128, 256, 512)), (2**20, (8, 16, 32, 64, 128, 256, 512)))
SEQUENCES = 4

_STYLE: Any = {"svg.hashsalt": "ring-attention", "svg.fonttype": "none", "font.size": 9, "axes.spines.top": False}
_NAMES = {
    "lwm_ring": "LWM ring",
    "contiguous": "contiguous, skipping",
    "zigzag": "zigzag ring",
    "per_document_zigzag": "zigzag per document",
    "min_heap": "min-heap dispatch",
}


def _layouts() -> dict[str, Assignment]:
    cu_seqlens = document_mix(MIX, CONTEXT, SEED)
    layouts = {name: LAYOUTS[name](cu_seqlens, RANKS) for name in ("contiguous", "zigzag", TIGHTEST)}
    return layouts | {"min-heap": min_heap(cu_seqlens, RANKS)}


def holdings() -> dict[str, Any]:
    """By layout: the ranges of the sequence that each rank holds, and its work over the mean."""
    cu_seqlens = document_mix(MIX, CONTEXT, SEED)
    shown = {}
    for name, assignment in _layouts().items():
        sizes = np.diff(assignment.start, append=CONTEXT)
        work = traffic(cut_at_documents(cu_seqlens, assignment, RANKS), RANKS).work
        mine = [assignment.owner == rank for rank in range(RANKS)]
        shown[name] = {
            "ranges": [np.stack([assignment.start[m], sizes[m]], 1).tolist() for m in mine],
            "work": [round(x, 3) for x in (work / work.mean()).tolist()],
        }
    return {"cu_seqlens": cu_seqlens.tolist(), "layouts": shown}


def messages() -> dict[str, Any]:
    """By layout: keys that rank r receives from rank p at [r][p], as a percentage of what a rank holds."""
    cu_seqlens = document_mix(MIX, CONTEXT, SEED)
    share = CONTEXT // RANKS
    return {
        name: np.rint(100 * traffic(cut_at_documents(cu_seqlens, assignment, RANKS), RANKS).keys / share)
        .astype(int)
        .tolist()
        for name, assignment in _layouts().items()
    }


def efficiencies() -> dict[str, Any]:
    """By context, then by system: modelled efficiency for each number of ranks."""
    hardware = Hardware()
    found: dict[str, Any] = {}
    for context, ranks in SCALES:
        packed = [document_mix(MIX, context, seed) for seed in range(SEQUENCES)]
        curves = {"ours": [efficiency([chosen_outcome(cu, n, SHAPE, hardware) for cu in packed]) for n in ranks]}
        for name, outcome_of in PEERS.items():
            curves[name] = [efficiency([outcome_of(cu, n, 1, SHAPE, hardware) for cu in packed]) for n in ranks]
        found[short(context)] = {
            "ranks": list(ranks),
            **{name: [round(x, 3) for x in curve] for name, curve in curves.items()},
        }
    return found


def draw_holdings() -> str:
    """Who holds what of one sequence, and each rank's work."""
    data = holdings()
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(9.5, 8.5), layout="constrained")
        axes = figure.subplots(len(data["layouts"]), 2, width_ratios=(4, 1), sharey=True)
        for (ranges_axes, work_axes), (name, layout) in zip(axes, data["layouts"].items()):
            for rank in range(RANKS):
                ranges_axes.broken_barh(layout["ranges"][rank], (rank - 0.4, 0.8), color=_colour(rank), linewidth=0)
            for cut in _long_documents(data["cu_seqlens"]):
                ranges_axes.axvline(cut, color="0.6", linewidth=0.6, linestyle=":")
            ranges_axes.set(title=name, xlim=(0, CONTEXT), ylim=(RANKS - 0.4, -0.6), yticks=range(RANKS))
            ranges_axes.set_ylabel("rank")
            work_axes.barh(range(RANKS), layout["work"], color=[_colour(rank) for rank in range(RANKS)])
            work_axes.axvline(1, color="0.3", linewidth=0.8)
            work_axes.set_title(f"work, most {max(layout['work']):.2f} of mean")
            work_axes.set_xlim(0, max(max(each["work"]) for each in data["layouts"].values()))
        axes[-1][0].set_xlabel(f"position in the packed sequence; dotted: documents of {CONTEXT // 32} tokens and more")
        axes[-1][1].set_xlabel("work over mean")
    return _svg(figure, data)


def draw_messages() -> str:
    """Who sends how many keys to whom."""
    data = messages()
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(9.5, 3.2), layout="constrained")
        for axes, (name, keys) in zip(figure.subplots(1, len(data), sharey=True), data.items()):
            _draw_matrix(axes, keys)
            received = sum(map(sum, keys)) / 100 / RANKS / RANKS
            axes.set(title=f"{name}\n{received:.2f} S a rank", xlabel="from rank")
        figure.axes[0].set_ylabel("to rank")
    return _svg(figure, data)


def _draw_matrix(axes: Axes, percent: Sequence[Sequence[int]]) -> None:
    axes.pcolormesh(percent, cmap="Blues", vmin=0, vmax=150, edgecolors="white", linewidth=0.5)
    for to, row in enumerate(percent):
        for source, value in enumerate(row):
            if value:
                axes.text(source + 0.5, to + 0.5, str(value), ha="center", va="center", fontsize=6)
    middles = [rank + 0.5 for rank in range(RANKS)]
    axes.set(aspect="equal", ylim=(RANKS, 0), xticks=middles, yticks=middles)
    axes.set_xticklabels([str(rank) for rank in range(RANKS)])
    axes.set_yticklabels([str(rank) for rank in range(RANKS)])


def draw_efficiencies() -> str:
    """Modelled efficiency against the number of ranks."""
    data = efficiencies()
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(9.5, 4), layout="constrained")
        for axes, (context, curves) in zip(figure.subplots(1, len(data), sharey=True), data.items()):
            for i, name in enumerate(("ours", *PEERS)):
                style = {"color": "black", "linewidth": 2.2} if name == "ours" else {"color": f"C{i - 1}"}
                label = "ours, as chosen" if name == "ours" else _NAMES[name]
                axes.plot(curves["ranks"], curves[name], marker=".", label=label, **style)
            axes.set_xscale("log", base=2)
            axes.set(title=f"{MIX}, {context} tokens", xlabel="ranks", xticks=curves["ranks"], ylim=(0, 1.02))
            axes.set_xticklabels([str(n) for n in curves["ranks"]])
            axes.grid(alpha=0.3)
        figure.axes[0].set_ylabel("modelled efficiency")
        figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=6, fontsize=8)
    return _svg(figure, data)


DRAWINGS: dict[str, tuple[Callable[[], dict[str, Any]], Callable[[], str]]] = {
    "ring-attention-holdings.svg": (holdings, draw_holdings),
    "ring-attention-messages.svg": (messages, draw_messages),
    "ring-attention-efficiency.svg": (efficiencies, draw_efficiencies),
}
"""By file name: the numbers shown, and the drawing."""


def digest(data: dict[str, Any]) -> str:
    """Of the numbers that a drawing shows, as the drawing carries it."""
    return "sha256:" + hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()


def _colour(rank: int) -> str:
    return f"C{rank}"


def _long_documents(cu_seqlens: Sequence[int]) -> list[int]:
    """Both ends of each document of a 32nd of the context and more."""
    return [end for pair in pairwise(cu_seqlens) if pair[1] - pair[0] >= CONTEXT // 32 for end in pair]


def _svg(figure: Figure, data: dict[str, Any]) -> str:
    text = io.StringIO()
    with matplotlib.rc_context(_STYLE):
        figure.savefig(text, format="svg", metadata={"Date": None, "Description": digest(data)})
    # matplotlib ends some lines in blanks, which tools that clean files would take away.
    return "\n".join(line.rstrip() for line in text.getvalue().splitlines()) + "\n"
