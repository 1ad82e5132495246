"""The report's plots: training curves over the whole curriculum, held-out loss beside its baselines, needle heat maps.

In: parts of the report's tree. Out: SVG elements. Every axis has its quantity and unit.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from pipelines.report import svg_style as ink
from pipelines.report.numbers import context_name, count
from pipelines.train.metrics.steps import modalities

POINTS = 1500
"""Points of a curve, at most; a longer run is drawn at every n-th step."""
_LETTER = 0.009  # width of a letter as a share of the axis
_MEASURED: dict[str, Any] = {"marker": "o", "markersize": 4, "linewidth": 1.2, "markerfacecolor": ink.SURFACE}
_PLAIN = FuncFormatter(lambda value, _: f"{value:g}")
_SI = FuncFormatter(lambda value, _: count(value) if value else "0")


def training_curves(training: Sequence[Mapping[str, Any]], heldout: Sequence[Mapping[str, Any]]) -> str:
    """Loss, throughput, gradient norm and learning rate of all stages over one axis of tokens."""
    colours = _colours(name for stage in training for name in modalities(stage["per_step"]))
    ends = np.cumsum([0, *(stage["tokens"] for stage in training)])
    with ink.styled():
        made = ink.figure(11, 8.6)
        axes = made.subplots(4, 1, sharex=True, gridspec_kw={"height_ratios": [3.2, 1, 1, 1]})
        loss, speed, norm, rate = axes
        for stage, start, end in zip(training, ends[:-1], ends[1:]):
            name, columns = stage["stage"], stage["per_step"]
            for modality in modalities(columns):
                own = (name, "all", modality)
                rows = [row for row in heldout if (row["stage"], row["source"], row["modality"]) == own]
                _loss(loss, columns, modality, colours[modality], (start, end), rows)
                _measured(loss, stage, modality, colours[modality], start)
            places = start + np.cumsum(columns["tokens"])
            _line(speed, places, np.array(columns["tokens"]) / np.maximum(columns["seconds"], 1e-9), ink.INK)
            _line(norm, places, np.array(columns["grad_norm"], dtype=float), ink.INK)
            _line(rate, places, np.array(columns["lr"]), ink.INK)
            if (end - start) / ends[-1] >= _LETTER * len(name):  # else the table below the plot alone names it
                middle = ((start + end) / 2, 1.0)
                _note(loss, name, middle, (0, 6), xycoords=("data", "axes fraction"), ha="center", color=ink.INK)
        for axis, label in zip(axes, ("loss, nats a token", "tokens/s", "grad norm", "learning rate")):
            for boundary in ends[1:-1]:
                axis.axvline(boundary, color=ink.MUTED, linewidth=1, linestyle=(0, (2, 3)))
            axis.grid(axis="x", visible=False)
            axis.margins(x=0.01)
            axis.set_ylabel(label)
        speed.yaxis.set_major_formatter(_SI)
        speed.set_ylim(bottom=0)
        norm.set_yscale("log")
        norm.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5), numticks=6))
        norm.yaxis.set_major_formatter(_PLAIN)
        norm.yaxis.set_minor_formatter(NullFormatter())
        rate.set_ylim(bottom=0)
        rate.yaxis.set_major_formatter(_PLAIN)
        rate.xaxis.set_major_formatter(_SI)
        rate.set_xlabel("tokens trained on, all stages")
        made.align_ylabels(axes)
        _legend(made, loss, colours, measured=any(stage["heldout"] for stage in training))
        return ink.to_svg(made, "training", "Training curves of all stages over the tokens trained on")


def heldout_bars(rows: Sequence[Mapping[str, Any]]) -> str:
    """A bar a row of the held-out table, with the two unigram models as marks on it."""
    colours = _colours(row["modality"] for row in rows)
    with ink.styled():
        made = ink.figure(11, 0.95 + 0.46 * len(rows))
        axis = made.subplots()
        for place, row in enumerate(rows):
            axis.barh(place, row["nats_per_token"], height=0.56, color=colours[row["modality"]])
            for key, style in (("unigram_heldout", "-"), ("unigram_train", (0, (1.5, 1.5)))):
                axis.plot([row[key]] * 2, [place - 0.38, place + 0.38], color=ink.INK, linewidth=2, linestyle=style)
            nats, inside = row["nats_per_token"], {"ha": "right", "va": "center", "fontweight": "bold"}
            _note(axis, f"{nats:.2f}", (nats, place), (-6, 0), color=ink.SURFACE, **inside)
        axis.set_yticks(range(len(rows)), [f"{row['stage']}  ·  {row['source']}  ·  {row['modality']}" for row in rows])
        axis.tick_params(axis="y", length=0, labelcolor=ink.INK)
        axis.spines["left"].set_visible(False)
        axis.grid(axis="y", visible=False)
        axis.invert_yaxis()
        axis.set_xlim(left=0)
        axis.set_xlabel("nats a token (lower is better)")
        axis.plot([], [], color=ink.INK, linewidth=2, label="unigram entropy of the same tokens")
        axis.plot([], [], color=ink.INK, linewidth=2, linestyle=(0, (1.5, 1.5)), label="unigram of training shards")
        made.legend(loc="outside upper left", ncols=2)
        return ink.to_svg(made, "heldout", "Held-out loss of each stage, source and modality beside unigram models")


def needle_maps(rows: Sequence[Mapping[str, Any]], trained_context: int) -> str:
    """Maps over context and depth: share of right answers, and nats of its digits, among all ids and among the ten."""
    with ink.styled():
        depths = rows[0]["depths"]
        made = ink.figure(11 if len(rows) <= 8 else 17, 1.6 + (0.42 if len(depths) <= 10 else 0.3) * (len(depths) + 1))
        left, middle, right = made.subplots(1, 3)
        accuracy = np.array([row["accuracy"] for row in rows]).T
        labels = [f"{depth:.0%}" for depth in depths]
        contexts = [context_name(row["context"]) + ("*" if row["context"] > trained_context else "") for row in rows]
        heat_cells(left, accuracy, accuracy, labels, contexts)
        left.set_title("right answers, share of rounds")
        left.set_ylabel("depth of the needle")
        for axis, key, title in (
            (middle, "digit_nats", "nats of a true digit"),
            (right, "choice_nats", "the same among ten digits"),
        ):
            nats = np.array([[*row[key], row[f"{key}_without"]] for row in rows], dtype=float).T
            shares = 1 - nats / np.nanmax([*nats.ravel(), math.log(10)])
            heat_cells(axis, nats, shares, [*labels, "no needle"], contexts)
            axis.set_title(title)
        for axis in (left, middle, right):
            axis.set_xlabel("context, tokens" + (" (* over the trained)" if "*" in "".join(contexts) else ""))
        return ink.to_svg(
            made, "needle", "Needle in a haystack: accuracy and nats of the digits over context and depth"
        )


def _loss(
    axis: Axes,
    columns: Mapping[str, Sequence[float]],
    modality: str,
    colour: str,
    ends: tuple[int, int],
    heldout: Sequence[Mapping[str, Any]],
) -> None:
    """One modality's curve over a stage, and its held-out loss at the end. ends: the stage's, in tokens."""
    targets = np.array(columns[f"{modality}_targets"])
    if not targets.any():
        return
    with np.errstate(divide="ignore", invalid="ignore"):
        nats = np.where(targets > 0, np.array(columns[f"{modality}_nats"]) / targets, np.nan)
    _line(axis, ends[0] + np.cumsum(columns["tokens"]), nats, colour, smooth=True)
    for row in heldout:
        axis.plot(ends, [row["unigram_heldout"]] * 2, color=colour, linewidth=1.2, linestyle=(0, (4, 3)))
        point: dict[str, Any] = {"marker": "o", "markersize": 8, "markeredgecolor": ink.SURFACE, "markeredgewidth": 2}
        axis.plot(ends[1:], [row["nats_per_token"]], color=colour, clip_on=False, zorder=5, **point)


def _measured(axis: Axes, stage: Mapping[str, Any], modality: str, colour: str, start: int) -> None:
    """One modality's held-out loss while the stage trained. start: the stage's, in tokens."""
    targets = f"{modality}_targets"
    rows = [row for row in stage["heldout"] if row.get(targets)]
    places = start + np.cumsum(stage["per_step"]["tokens"])
    nats = [row[f"{modality}_nats"] / row[targets] for row in rows]
    axis.plot([places[row["step"]] for row in rows], nats, color=colour, zorder=4, **_MEASURED)


def _line(axis: Axes, places: np.ndarray, values: np.ndarray, colour: str, smooth: bool = False) -> None:
    step = math.ceil(len(values) / POINTS)
    if smooth:
        axis.plot(places[::step], values[::step], color=colour, linewidth=1, alpha=0.3)
        values = smoothed(values)
    axis.plot(places[::step], values[::step], color=colour, linewidth=2 if smooth else 1.4)


def _note(axis: Axes, text: str, place: tuple[float, float], offset: tuple[float, float], **style: Any) -> None:
    """Text at a place of the axis, moved by so many points."""
    axis.annotate(text, place, xytext=offset, textcoords="offset points", **style)


def smoothed(values: np.ndarray) -> np.ndarray:
    """Mean over about a twenty-fifth of the curve around each step, which lags behind nothing; NaN is passed over."""
    kernel = np.hanning(2 * (len(values) // 50) + 3)[1:-1]
    there = np.isfinite(values)
    weight = np.convolve(there, kernel, mode="same")
    total = np.convolve(np.where(there, values, 0.0), kernel, mode="same")
    return np.divide(total, weight, out=np.full(len(values), np.nan), where=weight > 0)


def _colours(names: Iterable[str]) -> dict[str, str]:
    """The page's colour of each modality; text and vision have their own everywhere, the others take theirs in turn."""
    colours = {"text": ink.TEXT, "vision": ink.VISION}
    further = sorted(set(names) - set(colours))
    return colours | dict(zip(further, itertools.cycle(ink.FURTHER)))


def _legend(made: Figure, axis: Axes, colours: Mapping[str, str], measured: bool) -> None:
    present = {line.get_color() for line in axis.get_lines()}
    for modality, colour in colours.items():
        if colour in present:
            axis.plot([], [], color=colour, linewidth=2, label=f"{modality}, training")
    axis.plot([], [], color=ink.MUTED, marker="o", linestyle="", label="held out, at the stage's end")
    if measured:
        axis.plot([], [], color=ink.MUTED, label="held out, while training", **_MEASURED)
    axis.plot([], [], color=ink.MUTED, linewidth=1.2, linestyle=(0, (4, 3)), label="unigram entropy of held-out tokens")
    made.legend(loc="outside upper left", ncols=4)


def heat_cells(axis: Axes, values: np.ndarray, shares: np.ndarray, rows: Sequence[str], columns: Sequence[str]) -> None:
    """A table of coloured cells. values, shares: [rows, columns]; shares in 0..1 choose the colour."""
    many = len(columns) > 8
    for (y, x), value in np.ndenumerate(values):
        if not np.isfinite(value):
            continue
        colour = ink.heat(float(shares[y, x]))
        axis.add_patch(Rectangle((x - 0.5, y - 0.5), 1, 1, facecolor=colour, edgecolor=ink.SURFACE, linewidth=2))
        on_cell = ink.ON_HEAT if shares[y, x] > 0.55 else ink.INK
        text, size = (f"{value:.1f}", 7) if many else (f"{value:.2f}", 10)
        axis.annotate(text, (x, y), ha="center", va="center", fontsize=size, color=on_cell)
    axis.set_xlim(-0.5, len(columns) - 0.5)
    axis.set_ylim(len(rows) - 0.5, -0.5)
    axis.set_xticks(range(len(columns)), columns, rotation=50 if many else 0)
    axis.set_yticks(range(len(rows)), rows)
    axis.tick_params(length=0)
    axis.grid(visible=False)
    for spine in axis.spines.values():
        spine.set_visible(False)
