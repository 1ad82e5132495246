"""The report's plots of tasks at length: loss over the position of a token, and maps of frames hidden in films.

In: rows of the evaluation. Out: SVG elements. Every axis has its quantity and unit.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.ticker import FuncFormatter, NullLocator

from pipelines.report import svg_style as ink
from pipelines.report.figures import heat_cells
from pipelines.report.numbers import context_name


def loss_by_position(rows: Sequence[Mapping[str, Any]]) -> str:
    """A step a bin of positions: nats of its tokens."""
    edges = [*(row["from"] for row in rows), rows[-1]["to"] + 1]
    nats = [row["nats_per_token"] for row in rows]
    with ink.styled():
        made = ink.figure(11, 3.4)
        axis = made.subplots()
        axis.stairs(nats, edges, color=ink.TEXT, linewidth=2, baseline=None)
        axis.set_xscale("log", base=2)
        axis.set_xlim(edges[0], edges[-1])
        axis.set_xticks(edges[:-1])
        axis.xaxis.set_minor_locator(NullLocator())
        axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: context_name(int(value))))
        axis.set_xlabel("position in the window, tokens")
        axis.set_ylabel("nats a token")
        for start, end, value in zip(edges[:-1], edges[1:], nats):
            middle = (start * end) ** 0.5
            axis.annotate(f"{value:.2f}", (middle, value), (0, 4), textcoords="offset points", ha="center", fontsize=9)
        axis.margins(y=0.2)
        return ink.to_svg(made, "positions", "Loss of held-out text over the position of a token")


def film_map(rows: Sequence[Mapping[str, Any]]) -> str:
    """Maps over the films' lengths and depths: share of right answers and, of recognition, what the needle gains."""
    is_recognition = rows[0]["by"] == "recognition"
    depths = [f"{depth:.0%}" for depth in rows[0]["depths"]]
    lengths = [f"{row['frames']:,}" for row in rows]
    with ink.styled():
        made = ink.figure(8, 1.6 + (0.42 if len(depths) <= 10 else 0.3) * (len(depths) + 1))
        drawn: Any = made.subplots(1, 2 if is_recognition else 1)
        axes = np.atleast_1d(drawn)
        accuracy = np.array([row["accuracy"] for row in rows], dtype=float).T
        heat_cells(axes[0], accuracy, accuracy, depths, lengths)
        axes[0].set_title("right answers, share of rounds")
        axes[0].set_ylabel("depth of the needle")
        if is_recognition:
            gain = np.array([row["needle_gain"] for row in rows], dtype=float).T
            most = max(float(np.nanmax(gain)), 1e-9)
            heat_cells(axes[1], gain, np.clip(gain / most, 0, 1), depths, lengths)
            axes[1].set_title("gain of the needle, nats a code")
        for axis in axes:
            axis.set_xlabel("length of the film, frames")
        return ink.to_svg(made, "film", "Frames hidden in films: right answers over the films' lengths and the depth")
