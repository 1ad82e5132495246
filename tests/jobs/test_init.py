"""`ringworld init` writes a recipe that loads, says what to set next, and never overwrites."""

from __future__ import annotations

from pathlib import Path

import pytest

from jobs.cli import main
from pipelines.recipe.load import load_recipe

NAMES = sorted(path.stem for path in (Path(__file__).parents[2] / "recipes").glob("*.yaml"))


@pytest.mark.parametrize("name", NAMES)
def test_each_recipe_is_written_whole_and_loads(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["init", name, str(tmp_path / "new")]) == 0
    written = tmp_path / "new" / f"{name}.yaml"
    assert load_recipe(written).name == name
    said = capsys.readouterr().out
    assert said.startswith(f"wrote {written}\n")
    assert "storage.root" in said
    assert said.endswith(f"`ringworld plan {written}` says what it will do, `ringworld run {written}` does it.\n")


def test_the_quickstart_is_written_here_where_nothing_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["init"]) == 0
    assert [path.name for path in tmp_path.iterdir()] == ["quickstart.yaml"]


def test_a_file_that_exists_is_left_as_it_is(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "quickstart.yaml").write_text("mine")
    assert main(["init", "quickstart", str(tmp_path)]) == 2
    assert (tmp_path / "quickstart.yaml").read_text() == "mine"
    said = capsys.readouterr().err
    assert (
        said
        == f"ringworld: init: {tmp_path}/quickstart.yaml exists already and is left as it is; name another folder\n"
    )


def test_an_unknown_name_or_a_folder_that_cannot_be_is_one_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    assert main(["init", "none", str(tmp_path)]) == 2
    assert capsys.readouterr().err.endswith(f"'none'; choose one of {', '.join(NAMES)}\n")
    assert main(["init", "quickstart", str(tmp_path / "file")]) == 2
    assert "name another folder" in capsys.readouterr().err
