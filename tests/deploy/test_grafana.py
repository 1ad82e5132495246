"""The Grafana dashboard asks for figures that there are."""

from __future__ import annotations

import json
import re
from pathlib import Path

from pipelines.train.metrics.machine import PARTS, part_figures
from pipelines.train.metrics.steps import step_figures
from tests.pipelines.train.metrics.test_monitor import line_of

DASHBOARD = Path(__file__).parents[2] / "deploy" / "grafana" / "ringworld.json"
ON_A_MACHINE = {"useful_tokens_per_second", "memory_resident_bytes", "memory_peak_bytes"}
ON_A_GPU = {"gpu_allocated_peak_bytes", "gpu_reserved_peak_bytes"}
OF_EVERY_STAGE = {"progress_done", "progress_total"}
OF_CHECKPOINTS = {"checkpoint_stall_seconds"}


def test_every_panel_shows_figures_by_their_names() -> None:
    dashboard = json.loads(DASHBOARD.read_text())
    asked = {
        name
        for panel in dashboard["panels"]
        for target in panel["targets"]
        for name in re.findall(r"ray_ringworld_(\w+)", target["expr"])
    }
    line = line_of(0)
    known = {name for name in step_figures(line) if "/" not in name}
    known |= {f"source_{name}" for name in line["sources"]["books"]}
    known |= set(part_figures(dict.fromkeys(PARTS, 1.0)))
    assert asked <= known | ON_A_MACHINE | ON_A_GPU | OF_EVERY_STAGE | OF_CHECKPOINTS
    assert {"loss", "source_nats_per_token", "mfu", "communication_seconds"} <= asked
    assert len({panel["id"] for panel in dashboard["panels"]}) == len(dashboard["panels"])
