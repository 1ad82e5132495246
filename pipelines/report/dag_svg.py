"""The DAG as an inline SVG: a box a stage with what it made and how long it took, an arrow where one feeds another.

Data flows along the upper row, models along the lower; a stage says its row, and below which it stands. An edge
that others imply is left out (`sources` feeds `evaluate`, but through all between). Pure.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from markupsafe import Markup, escape

_WIDTH, _HEIGHT, _GAP_X, _GAP_Y = 166, 92, 26, 44
_TOP = 34  # room above the upper row for arrows that pass over boxes


class Box(NamedTuple):
    """A stage's place: column and row (0 data, 1 models)."""

    column: int
    row: int

    @property
    def x(self) -> int:
        """Left edge."""
        return self.column * (_WIDTH + _GAP_X)

    @property
    def y(self) -> int:
        """Upper edge."""
        return _TOP + self.row * (_HEIGHT + _GAP_Y)


def needed_edges(inputs: Mapping[str, Sequence[str]]) -> list[tuple[str, str]]:
    """(from, to) of the edges that no longer path implies. inputs: names before each stage, stages in order."""
    above: dict[str, set[str]] = {}
    for name, before in inputs.items():
        above[name] = set(before).union(*(above[one] for one in before))
    return [
        (one, name)
        for name, before in inputs.items()
        for one in before
        if not any(one in above[other] for other in before if other != one)
    ]


def layout(stages: Sequence[Mapping[str, Any]]) -> dict[str, Box]:
    """Where each stage stands, by name. stages: in the DAG's order, each with name, lane and below."""
    boxes: dict[str, Box] = {}
    columns = itertools.count()
    for stage in stages:
        above = boxes.get(stage["below"])
        column = above.column if above else next(columns)
        boxes[stage["name"]] = Box(column, 1 if above or stage["lane"] == "model" else 0)
    return boxes


def draw(stages: Sequence[Mapping[str, Any]]) -> Markup:
    """The SVG. stages: of the report's tree, in order, each with name, lane, below, seconds, inputs, counts
    and quarantined; one without seconds is the page itself."""
    boxes = layout(stages)
    edges = needed_edges({stage["name"]: stage["inputs"] for stage in stages})
    width = max(box.x for box in boxes.values()) + _WIDTH
    height = max(box.y for box in boxes.values()) + _HEIGHT
    longest = max(stage["seconds"] or 0.0 for stage in stages) or 1.0
    shapes = [_arrow(boxes[one], boxes[other]) for one, other in edges]
    shapes += [_box(boxes[stage["name"]], stage, (stage["seconds"] or 0.0) / longest) for stage in stages]
    return Markup(
        f'<svg class="dag" viewBox="-2 -2 {width + 4} {height + 4}" style="min-width:{width * 0.62:.0f}px" role="img" '
        f'aria-label="The stages of the run and what feeds what">'
        '<defs><marker id="dag-tip" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" orient="auto">'
        f'<path d="M0 0 8 4 0 8z"/></marker></defs>{"".join(shapes)}</svg>'
    )


def _box(box: Box, stage: Mapping[str, Any], share: float) -> str:
    state, status = "done", "this page" if stage["seconds"] is None else f"done · {duration(stage['seconds'])}"
    if stage["quarantined"]:
        state, status = "quarantine", f"{duration(stage['seconds'])} · {stage['quarantined']} set aside"
    counts = enumerate(stage["counts"][:2])
    rows = "".join(f'<text class="count" x="12" y="{41 + 15 * i}">{escape(line)}</text>' for i, line in counts)
    return (
        f'<g transform="translate({box.x} {box.y})"><title>{escape(stage["name"])}: {escape(status)}</title>'
        f'<rect class="box" width="{_WIDTH}" height="{_HEIGHT}" rx="8"/>'
        f'<text class="name" x="12" y="22">{escape(stage["name"])}</text>{rows}'
        f'<circle class="{state}" cx="15.5" cy="{_HEIGHT - 22}" r="3.5"/>'
        f'<text class="status" x="24" y="{_HEIGHT - 18}">{escape(status)}</text>'
        f'<rect class="track" x="12" y="{_HEIGHT - 10}" width="{_WIDTH - 24}" height="3" rx="1.5"/>'
        f'<rect class="share" x="12" y="{_HEIGHT - 10}" width="{share * (_WIDTH - 24):.1f}" height="3" rx="1.5"/></g>'
    )


def _arrow(one: Box, other: Box) -> str:
    middle = _HEIGHT // 2
    if one.row == other.row and other.column == one.column + 1:
        path = f"M{one.x + _WIDTH} {one.y + middle}H{other.x - 1}"
    elif one.column == other.column:
        path = f"M{one.x + _WIDTH // 2} {one.y + _HEIGHT}V{other.y - 1}"
    elif one.row == other.row == 0:
        over = _TOP - 18
        path = f"M{one.x + _WIDTH - 24} {one.y}V{over}H{other.x + _WIDTH // 2}V{other.y - 1}"
    else:
        turn = other.x - _GAP_X // 2
        path = f"M{one.x + _WIDTH} {one.y + middle}H{turn}V{other.y + middle}H{other.x - 1}"
    return f'<path class="edge" d="{path}" marker-end="url(#dag-tip)"/>'


def duration(seconds: float) -> str:
    """Seconds for people: 0.4 s, 12 s, 3 min 20 s, 5 h 02 min."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes >= 60:
        return f"{minutes // 60} h {minutes % 60:02d} min"
    return f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"
