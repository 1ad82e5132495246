"""The drawings of docs/ring-attention.md show what the planner does now, and come out the same at every run."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.drawings import DRAWINGS, digest

DOCS = Path(__file__).parents[2] / "docs"


@pytest.mark.parametrize("name", DRAWINGS)
def test_the_committed_drawing_is_up_to_date(name: str) -> None:
    data, _ = DRAWINGS[name]
    assert digest(data()) in (DOCS / name).read_text(), "run `ringworld bench drawings`"


def test_a_drawing_is_the_same_at_every_run() -> None:
    data, draw = DRAWINGS["ring-attention-messages.svg"]
    drawn = draw()
    assert drawn == draw()
    assert digest(data()) in drawn


def test_the_text_beside_the_drawings_shows_them_all() -> None:
    text = (DOCS / "ring-attention.md").read_text()
    assert all(f"]({name})" in text for name in DRAWINGS)
