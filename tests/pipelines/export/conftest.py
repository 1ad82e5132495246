"""One small run with manifests, made once for all tests of its files."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from pipelines.export.folder import ModelFolder, open_model
from pipelines.export.trained import find_trained
from pipelines.export.write import export_model
from pipelines.recipe import Recipe
from storage.store import Store
from testing.committed_run import commit_run


@pytest.fixture(scope="session")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Recipe, dict[str, Store]]:
    return commit_run(tmp_path_factory.mktemp("export") / "tiny")


@pytest.fixture
def root(run: tuple[Recipe, dict[str, Store]]) -> Path:
    return Path(run[0].storage.root)


@pytest.fixture(scope="session")
def exported(run, tmp_path_factory: pytest.TempPathFactory) -> ModelFolder:
    """Of the run's last stage, with the run moved away."""
    target = tmp_path_factory.mktemp("exported") / "model"
    root = Path(run[0].storage.root)
    copy = shutil.copytree(root, target.with_name("run"))
    export_model(find_trained(str(copy)), Store(str(target)))
    shutil.rmtree(copy)
    return open_model(str(target))
