"""Kernels that cannot be had here are told before anything runs."""

from __future__ import annotations

from pathlib import Path

import pytest

from jobs.cli import main
from jobs.guard import USER_MISTAKE
from model.layers.kernels import interface as loading

QUICKSTART = Path(__file__).parents[3] / "recipes" / "quickstart.yaml"


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["train.kernels=compile"], "train.kernels compile: torch.compile finds no C++ compiler; install g++ here and"),
        (
            ["train.kernels=liger", "train.precision=bf16", "train.resources.gpus=1"],
            "train.kernels liger: the package liger-kernel is not installed; pip install 'ringworld[liger]' here",
        ),
    ],
)
def test_kernels_that_cannot_be_had_are_told_before_anything_runs(
    overrides: list[str], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(loading, "_is_installed", lambda package: False)
    monkeypatch.setattr(loading, "_has_compiler", lambda: False)
    root = tmp_path / "run"
    settings = [f"storage.root={root}", *overrides]
    words = [word for setting in settings for word in ("--set", setting)]
    assert main(["run", str(QUICKSTART), *words]) == USER_MISTAKE
    assert said in capsys.readouterr().err
    assert not root.exists()
