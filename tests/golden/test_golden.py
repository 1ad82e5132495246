"""What every stage makes of small inputs is what it made before, or its output version is raised.

`goldens.json` has, by stage and version, hashes where bytes are the same on every processor, and numbers, held to
`TOLERANCES`, where they are not. Entries are never changed: a stage that makes something else raises its
`output_version` and adds an entry:

    GOLDEN_WRITE=1 .venv/bin/python -m pytest tests/golden
"""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest

from pipelines.codecs.stage import CodecStage
from pipelines.dag.stage import Stage
from pipelines.evaluate.stage import EvaluateStage
from pipelines.pack.stage import PackStage
from pipelines.sources.stage import SourcesStage
from pipelines.tokenize.stage import TokenizeStage
from pipelines.train.stage import TrainStage
from tests.golden import outputs

pytestmark = pytest.mark.slow

GOLDENS = Path(__file__).with_name("goldens.json")
EXACT = {SourcesStage: outputs.sources, TokenizeStage: outputs.tokenize, PackStage: outputs.pack}
CLOSE = {CodecStage: outputs.vqgan, TrainStage: outputs.train, EvaluateStage: outputs.evaluate}
TOLERANCES = {CodecStage: 3e-3, TrainStage: 1e-3, EvaluateStage: 1e-3}
"""Relative. After six steps the VQGAN's losses by oneDNN's AVX2 and AVX-512 kernels are 1.1e-3 apart, which
ONEDNN_MAX_CPU_ISA=AVX2 shows on a processor that has both.
"""


def compare(stage: type[Stage[Any]], made: dict[str, Any]) -> None:
    """Raise AssertionError where a stage made something else than its version says."""
    goldens = json.loads(GOLDENS.read_text()) if GOLDENS.exists() else {}
    entry = goldens.setdefault(stage.kind, {})
    version = str(stage.output_version)
    if version not in entry and os.environ.get("GOLDEN_WRITE"):
        entry[version] = made
        GOLDENS.write_text(json.dumps(goldens, indent=1, sort_keys=True) + "\n")
    assert version in entry, f"{stage.kind} has no golden of version {version}; add it with GOLDEN_WRITE=1"
    expected = entry[version] if stage in EXACT else pytest.approx(entry[version], rel=TOLERANCES[stage])
    assert made == expected, f"{stage.kind} makes other output: raise {stage.__name__}.output_version"


@pytest.mark.usefixtures("local_ray")
@pytest.mark.parametrize("stage", EXACT, ids=lambda stage: stage.kind)
def test_a_stage_makes_the_bytes_of_its_version(stage: type[Stage[Any]], tmp_path: Path) -> None:
    compare(stage, EXACT[stage](tmp_path))


@pytest.mark.usefixtures("in_this_process")
@pytest.mark.parametrize("stage", CLOSE, ids=lambda stage: stage.kind)
def test_a_stage_makes_the_numbers_of_its_version(stage: type[Stage[Any]], tmp_path: Path) -> None:
    compare(stage, CLOSE[stage](tmp_path))


@pytest.mark.usefixtures("local_ray")
def test_a_changed_byte_fails_until_the_version_is_raised(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("GOLDEN_WRITE", raising=False)
    monkeypatch.setitem(outputs.TEXTS, "b.txt", outputs.TEXTS["b.txt"] + ".")
    for stage, make in EXACT.items():
        with pytest.raises(AssertionError, match=f"{stage.kind} makes other output: raise {stage.__name__}"):
            compare(stage, make(tmp_path / stage.kind))
    monkeypatch.setattr(PackStage, "output_version", version := PackStage.output_version + 1)
    with pytest.raises(AssertionError, match=f"pack has no golden of version {version}; add it"):
        compare(PackStage, outputs.pack(tmp_path / "raised"))


def test_goldens_are_only_ever_added() -> None:
    root = GOLDENS.parents[2]
    name = GOLDENS.relative_to(root).as_posix()
    listed = subprocess.run(["git", "log", "--format=%H", "--", name], cwd=root, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("no history here to hold them against")
    now = json.loads(GOLDENS.read_text())
    for commit in listed.stdout.split():
        then = subprocess.run(["git", "show", f"{commit}:{name}"], cwd=root, capture_output=True, text=True, check=True)
        for kind, versions in json.loads(then.stdout).items():
            for version, golden in versions.items():
                assert now[kind][version] == golden, f"{kind} {version} was changed since {commit[:12]}"
