"""pipelines/train/group_size.py: how many workers a stage gets."""

from __future__ import annotations

from typing import Any

import pytest

from pipelines.recipe import Resources, Train, TrainStage
from pipelines.train.group_size import group_sizes, room_for


def train_of(workers: int, min_workers: int | None, **stage: Any) -> tuple[Train, TrainStage]:
    common = {"name": "text", "context": 64, "rope_theta": 1e4, "steps": 4, "mixture": {"books": 1}, "lr": 1e-3}
    tree = {"batch_tokens": 64 * 12, "objective": "text", **common, **stage}
    train = Train.model_validate({"workers": workers, "min_workers": min_workers, "stages": [tree]})
    return train, train.stages[0]


@pytest.mark.parametrize(
    ("workers", "min_workers", "stage", "sizes"),
    [
        (4, None, {}, [4]),
        (4, 1, {}, [4, 3, 2, 1]),
        (6, 2, {}, [6, 5, 4, 3, 2]),
        (8, 2, {"sp": 2}, [8, 6, 4, 2]),
        (8, 2, {"sp": 4}, [8, 4]),
        (6, 1, {"rows": 2}, [6, 5, 4, 3, 2, 1]),
        (14, 9, {}, [14, 13, 12, 11, 10, 9]),
        (9, 6, {"sp": 2}, [8, 6]),
    ],
)
def test_sizes_form_a_mesh_the_fastest_first(workers: int, min_workers: int | None, stage: Any, sizes: Any) -> None:
    assert group_sizes(*train_of(workers, min_workers, **stage)) == sizes


def test_room_is_counted_node_by_node() -> None:
    nodes = [{"CPU": 5.0, "GPU": 2.0, "trainer": 9.0}, {"CPU": 3.0, "GPU": 4.0, "trainer": 9.0}, {"CPU": 64.0}]
    assert room_for(Resources(cpus=2, gpus=1, custom={"trainer": 1}), nodes) == 3
    assert room_for(Resources(cpus=2), nodes) == 2 + 1 + 32
    assert room_for(Resources(cpus=0, gpus=0.5), nodes) == 4 + 8


def test_tokens_are_whole_batches() -> None:
    train, stage = train_of(1, None, steps=None, tokens=64 * 12 * 3 + 1)
    assert stage.steps == 4
    with pytest.raises(ValueError, match=r"tokens 768 are 1 steps of batch_tokens 768, not 4; give one"):
        train_of(1, None, tokens=768)
    with pytest.raises(ValueError, match="min_workers 3 is more than workers 2"):
        train_of(2, 3)
    assert train.hang_seconds == 1800
