"""The picture of the DAG: which arrows, where the boxes stand."""

from __future__ import annotations

from itertools import combinations
from typing import Any
from xml.etree import ElementTree

import pytest

from pipelines.report.dag_svg import draw, duration, layout, needed_edges

INPUTS = {
    "sources": [],
    "vqgan": ["sources"],
    "tokenize": ["sources", "vqgan"],
    "pack-a": ["tokenize"],
    "train-a": ["pack-a"],
    "pack-b": ["tokenize"],
    "train-b": ["pack-b", "train-a"],
    "evaluate": ["sources", "vqgan", "pack-a", "pack-b", "train-a", "train-b"],
}


def placed(name: str) -> dict[str, Any]:
    """Where a stage wants to be drawn."""
    below = name.replace("train-", "pack-") if name.startswith("train-") else None
    return {"name": name, "lane": "model" if below or name == "evaluate" else "data", "below": below}


def test_only_edges_that_no_longer_path_implies_are_drawn() -> None:
    assert needed_edges(INPUTS) == [
        ("sources", "vqgan"),
        ("vqgan", "tokenize"),
        ("tokenize", "pack-a"),
        ("pack-a", "train-a"),
        ("tokenize", "pack-b"),
        ("pack-b", "train-b"),
        ("train-a", "train-b"),
        ("train-b", "evaluate"),
    ]


def test_a_train_stage_stands_under_its_pack_stage_and_no_two_stages_share_a_place() -> None:
    boxes = layout([placed(name) for name in INPUTS])
    for name in ("a", "b"):
        assert boxes[f"train-{name}"].column == boxes[f"pack-{name}"].column
        assert (boxes[f"pack-{name}"].row, boxes[f"train-{name}"].row) == (0, 1)
    assert all(boxes[one] != boxes[other] for one, other in combinations(boxes, 2))
    assert all(boxes[one].column <= boxes[other].column for one, other in needed_edges(INPUTS))


def test_the_drawing_is_one_well_formed_element_that_names_every_stage_and_escapes() -> None:
    stages = [
        {
            **placed(name),
            "seconds": 3.0,
            "inputs": before,
            "counts": ["<b>& co"],
            "quarantined": int(name == "tokenize"),
        }
        for name, before in INPUTS.items()
    ]
    root = ElementTree.fromstring(draw(stages))
    words = [node.text for node in root.iter() if node.text]
    assert all(name in words for name in INPUTS)
    assert words.count("<b>& co") == len(INPUTS)
    assert "3.0 s · 1 set aside" in words
    assert len([node for node in root.iter() if node.get("class") == "edge"]) == len(needed_edges(INPUTS))


@pytest.mark.parametrize(
    ("seconds", "said"),
    [(0.04, "0.0 s"), (12.4, "12 s"), (59.7, "1 min 00 s"), (200, "3 min 20 s"), (18120, "5 h 02 min")],
)
def test_durations_read_as_a_person_says_them(seconds: float, said: str) -> None:
    assert duration(seconds) == said
