"""The benchmark of tokenizing measures real work: the same pictures and codes of all systems, every process seen."""

from __future__ import annotations

import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from benchmarks.looped_clip import FPS, SIZE, looped, pictures
from benchmarks.tokenize import Claim, Settings, print_tokenize, tokenize_report
from benchmarks.tokenize_stage import SMALL
from tokenization.media.frame_sampling import FrameRequest
from tokenization.media.video import decode_frames


def test_a_looped_clip_repeats_its_pictures(tmp_path: Path) -> None:
    chunks = list(decode_frames(looped(tmp_path / "a.mp4", 10.5), FrameRequest(fps=25, size=16)))
    frames = np.concatenate([chunk.frames for chunk in chunks])
    assert len(frames) == 2 * 132
    np.testing.assert_array_equal(frames[:132], frames[132:])
    assert pictures(5).shape == (5, SIZE, SIZE, 3)


def test_a_claim_is_met_on_its_own_side() -> None:
    assert Claim("", 2.0, 2.0).met
    assert not Claim("", 2.0, 1.9).met
    assert Claim("", 1.5, 1.4, at_most=True).met
    assert not Claim("", 1.5, 1.6, at_most=True).met


@pytest.mark.faults
def test_all_parts_are_measured(capsys: pytest.CaptureFixture[str]) -> None:
    settings = Settings(SMALL, seconds=5, encoded=2, frames=42, clips=2, hour=10, rounds=1)
    # Apart from the Ray of other tests, which has no room for its encoders.
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        report = pool.submit(tokenize_report, settings).result()
    assert len(report["claims"]) == 4
    assert report["hour"]["frames"] == 10.56 * FPS // 1 + 1
    for part in ("pipeline", "hour"):
        assert {"tokenize", "_Encoder", "decoder"} <= set(report[part]["memory"]), "each kind of process was seen"
        assert all(0.03 < gib < 8 for gib in report[part]["memory"].values())
    assert all(figure > 0 for part in ("decode", "encode") for figure in report[part].values())
    print_tokenize(report)
    assert capsys.readouterr().out.count(": met") + report_missed(report) == 4


def report_missed(report: dict) -> int:
    return sum(not claim["met"] for claim in report["claims"])
