"""Matplotlib figures as SVG for a page of two themes: a figure is drawn in stand-in colours that become CSS variables.

The SVG carries text as text in the page's font, no fixed size, no date, and ids of its own, so that the same numbers
make the same bytes and several figures live in one page.
"""

from __future__ import annotations

import io
import re
from contextlib import AbstractContextManager
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure

INK = "#010101"
MUTED = "#020202"
GRID = "#030303"
TEXT = "#040404"
VISION = "#050505"
FURTHER = ("#080101", "#080202")
"""Of modalities beyond text and vision, in turn."""
SURFACE = "#060606"
ON_HEAT = "#080808"

_VARIABLES = {INK: "--ink", MUTED: "--muted", GRID: "--grid", SURFACE: "--surface", ON_HEAT: "--on-heat"}
_VARIABLES |= {TEXT: "--text", VISION: "--vision", FURTHER[0]: "--third", FURTHER[1]: "--fourth"}
_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "ringworld",
    "font.family": "DejaVu Sans",
    "font.size": 10,
    "axes.edgecolor": GRID,
    "axes.labelcolor": MUTED,
    "axes.titlecolor": INK,
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.titlepad": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": GRID,
    "grid.linewidth": 0.8,
    "text.color": INK,
    "xtick.color": GRID,
    "ytick.color": GRID,
    "xtick.labelcolor": MUTED,
    "ytick.labelcolor": MUTED,
    "legend.frameon": False,
    "legend.labelcolor": INK,
    "lines.solid_capstyle": "round",
}


def heat(share: float) -> str:
    """The stand-in for a cell's colour, 0 (nothing) to 1 (the most)."""
    return f"#fe00{round(100 * min(max(share, 0.0), 1.0)):02x}"


def styled() -> AbstractContextManager[None]:
    """The house style for figures made within."""
    return mpl.rc_context(_STYLE)


def figure(width: float, height: float) -> Figure:
    """A figure of so many inches (72 CSS pixels each), without background and without pyplot's global state."""
    made = Figure(figsize=(width, height), layout="constrained")
    made.patch.set_alpha(0)
    return made


def to_svg(made: Figure, name: str, label: str) -> str:
    """The figure as an inline SVG element. name: unique in the page. label: what a screen reader says of it."""
    buffer = io.StringIO()
    with styled():
        made.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None}, transparent=True)
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    size = r'(<svg [^>]*?)width="[\d.]+pt" height="[\d.]+pt"'
    svg = re.sub(size, rf'\1role="img" aria-label="{label}"', svg, count=1)
    svg = re.sub(r'\bid="', f'id="{name}-', svg)
    svg = re.sub(r'(href="#|url\(#)', rf"\1{name}-", svg)
    svg = re.sub(r"font: ((?:bold |\d+ )?[\d.]+px) [^;\"]+", r"font: \1 var(--font)", svg)
    mixed = "color-mix(in oklab, var(--heat) {}%, var(--heat-base))"
    svg = re.sub(r"#fe00([0-9a-f]{2})", lambda found: mixed.format(int(found[1], 16)), svg)
    return re.sub("|".join(_VARIABLES), lambda found: f"var({_VARIABLES[found[0]]})", svg).strip()
