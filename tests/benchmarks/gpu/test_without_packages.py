"""The GPU script on a machine with little beside torch and transformers: what it lacks costs the parts that need it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.gpu.parts import PARTS, chosen
from tests.benchmarks.gpu.absent import NEVER, environment_without

ROOT = Path(__file__).parents[3]
ABSENT = (
    *NEVER,
    "deepspeed",
    "diffusers",
    "pydantic",
    "pydantic_core",
    "hjson",
    "liger_kernel",
    "flash_attn_interface",
)


@pytest.mark.slow
def test_parts_that_need_what_is_absent_are_skipped_by_name_and_the_others_pass(tmp_path: Path) -> None:
    report = tmp_path / "gpu.json"
    environment = environment_without(ABSENT, tmp_path)
    blocked = subprocess.run(
        [sys.executable, "-c", "import pydantic"], env=environment, check=False, capture_output=True
    )
    assert b"No module named 'pydantic'" in blocked.stderr
    command = [sys.executable, "-m", "jobs.cli", "bench", "gpu", "--device", "cpu", "--tiny", "--json", str(report)]
    done = subprocess.run(command, cwd=ROOT, env=environment, check=False, capture_output=True, text=True)
    parts = json.loads(report.read_text())["parts"]
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    lacking = {part.name for part in PARTS if set(part.packages) & set(ABSENT) or part.cards > 1}
    assert {name for name, entry in parts.items() if entry["state"] == "skipped"} == lacking
    assert {entry["state"] for name, entry in parts.items() if name not in lacking} <= {"passed"}
    for part in PARTS:
        if found := set(part.packages) & set(ABSENT):
            assert parts[part.name]["why"].startswith("not installed: ")
            assert found <= set(parts[part.name]["why"].removeprefix("not installed: ").split(", "))


def test_the_kernels_need_torch_alone() -> None:
    (kernels,) = chosen(["kernels"])
    assert not set(kernels.packages) & set(ABSENT)
