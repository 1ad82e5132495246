"""One small run with manifests, made once for all tests of its files."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipelines.recipe import Recipe
from storage.store import Store
from testing.committed_run import commit_run


@pytest.fixture(scope="session")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Recipe, dict[str, Store]]:
    return commit_run(tmp_path_factory.mktemp("export") / "tiny")


@pytest.fixture
def root(run: tuple[Recipe, dict[str, Store]]) -> Path:
    return Path(run[0].storage.root)
