"""pipelines/train/groups.py: what each group of workers is started with."""

from __future__ import annotations

from typing import Any

from ray.train.torch import TorchTrainer

from pipelines.train.groups import _Trainer


def test_no_dashboard_is_asked_whether_a_group_is_to_live() -> None:
    def callbacks(kind: type[TorchTrainer]) -> list[str]:
        trainer: Any = kind(lambda: None)
        return [type(one).__name__ for one in trainer._create_default_callbacks()]

    assert set(callbacks(TorchTrainer)) - set(callbacks(_Trainer)) == {
        "DatasetsCallback",
        "PlacementGroupCleanerCallback",
    }
