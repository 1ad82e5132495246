"""A training stage whose recipe says `export` leaves the same folder as `ringworld export` makes of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from pipelines.dag.manifest import MANIFEST, StageOutput, read_manifest
from pipelines.dag.stage import StageContext
from pipelines.export.folder import open_model
from pipelines.export.trained import find_trained
from pipelines.export.write import export_model
from pipelines.pack.record import PackRecord
from pipelines.recipe import Recipe
from pipelines.train.record import TrainRecord
from pipelines.train.stage import TrainStage
from storage.errors import UserError
from storage.store import Store


def output(store: Store, record: type[Any]) -> StageOutput[Any]:
    manifest = read_manifest(store, record)
    assert manifest is not None
    return StageOutput(store, manifest)


def stage_of(recipe: Recipe, target: Path | str) -> TrainStage:
    settings = recipe.curriculum[1].model_copy(update={"export": str(target)})
    return TrainStage(recipe, settings, "train-text")


@pytest.fixture
def ended(run: tuple[Recipe, dict[str, Store]], monkeypatch: pytest.MonkeyPatch) -> tuple[Recipe, StageContext]:
    """The run's last training stage, trained to its end and not yet committed."""
    recipe, stores = run
    record = output(stores["train-video"], TrainRecord).record
    monkeypatch.setattr("pipelines.train.run.train_stage", lambda job, line: record)
    inputs = {
        "pack-video": output(stores["pack-video"], PackRecord),
        "train-text": output(stores["train-text"], TrainRecord),
    }
    finished, read_bytes = stores["train-video"].path(MANIFEST), Store.read_bytes

    def before_the_commit(store: Store, name: str) -> bytes | None:
        return None if store.path(name) == finished else read_bytes(store, name)

    monkeypatch.setattr(Store, "read_bytes", before_the_commit)
    return recipe, StageContext(stores["train-video"], inputs)


def test_a_stage_exports_what_the_command_exports(
    ended: tuple[Recipe, StageContext], root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe, context = ended
    stage_of(recipe, tmp_path / "by-stage").run(context)
    monkeypatch.undo()
    export_model(find_trained(str(root)), Store(str(tmp_path / "by-command")))
    ours, theirs = (open_model(str(tmp_path / name)).description for name in ("by-stage", "by-command"))
    assert ours.origin == theirs.origin
    assert ours.files | {"README.md": ""} == theirs.files | {"README.md": ""}


def test_the_card_has_no_credentials(ended: tuple[Recipe, StageContext], tmp_path: Path) -> None:
    recipe, context = ended
    source = recipe.sources["books"].model_copy(update={"urls": ["https://me:hunter2@host/a.txt?token=hunter2"]})
    storage = recipe.storage.model_copy(update={"options": {"key": "hunter2", "secret": "hunter2"}})
    secret = recipe.model_copy(update={"sources": {**recipe.sources, "books": source}, "storage": storage})
    stage_of(secret, tmp_path / "model").run(context)
    card = (tmp_path / "model" / "README.md").read_text()
    assert "host/a.txt" in card
    assert "hunter2" not in "".join(path.read_text() for path in (tmp_path / "model").glob("*.[jm][sd]*"))


def test_a_stage_replaces_what_it_exported_before(
    ended: tuple[Recipe, StageContext], root: Path, tmp_path: Path
) -> None:
    recipe, context = ended
    export_model(find_trained(str(root), "text"), Store(str(tmp_path / "model")))
    stage_of(recipe, tmp_path / "model").check()
    stage_of(recipe, tmp_path / "model").run(context)
    assert open_model(str(tmp_path / "model")).description.origin.stage == "train-video"


def test_before_anything_is_trained_a_folder_with_something_else_is_refused(
    run: tuple[Recipe, dict[str, Store]], tmp_path: Path
) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    said = r"holds something else \(thesis.txt\), which stays as it is; set train.stages.1.export \(video\) to a new"
    with pytest.raises(UserError, match=said):
        stage_of(run[0], tmp_path).check()
    with pytest.raises(UserError, match="this can be read at most"):
        stage_of(run[0], "https://host/model").check()


def test_before_anything_is_trained_a_tokenizer_that_cannot_be_exported_is_refused(
    run: tuple[Recipe, dict[str, Store]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tokenization.text.hf_files.SPACE", "_")
    with pytest.raises(UserError, match="to other ids; name another tokenizer"):
        stage_of(run[0], tmp_path / "model").check()
    TrainStage(run[0], run[0].curriculum[1], "train-text").check()
