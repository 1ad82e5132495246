"""Runs that are made without a cluster."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from storage.store import Store
from tests.pipelines.clean.made_run import Run, listed, without_ray


@pytest.fixture(autouse=True)
def no_ray() -> Iterator[None]:
    with without_ray():
        yield


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """Not made yet, over two objects."""
    return Run(Store(str(tmp_path / "run")), [listed("a"), listed("b")])
