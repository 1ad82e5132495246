"""Credentials in the URLs of a recipe open its sources and are in no file that a run writes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from pipelines.recipe import Recipe
from pipelines.run import _run_all, plan_recipe
from pipelines.sources.heldout import heldout_notes
from pipelines.sources.listing import Listing
from testing.http_server import files_server
from testing.miniature import text_recipe

SECRET = "hush-hush"


def made_recipe(sources: Path, root: Path, web: str, secret: str, **source: Any) -> Recipe:
    place = web.replace("://", f"://user:{secret}@")
    tree = text_recipe(sources, root)
    tree["storage"]["data"] = place
    signed = f"{web}/acts/act-01.md?X-Amz-Signature={secret}&X-Amz-Date={secret}"
    urls = ["acts/act-00.md", "acts/held.md", signed]
    tree["sources"] = {"acts": {"urls": urls, "heldout": [f"{place}/acts/held.md"], **source}}
    return Recipe.model_validate(tree)


@pytest.mark.slow
@pytest.mark.usefixtures("local_ray")
def test_no_file_of_a_run_has_them_and_other_ones_run_nothing_again(sources: Path, tmp_path: Path) -> None:
    with files_server(sources) as web:
        root = tmp_path / "run"
        _run_all(plan_recipe(made_recipe(sources, root, web, SECRET))[:3])
        files = [path for path in root.rglob("*") if path.is_file()]
        assert len(files) > 8
        assert not [path for path in files if SECRET.encode() in path.read_bytes()]
        again = plan_recipe(made_recipe(sources, root, web, "renewed"))
        assert [stage.status for stage in again[:3]] == ["done"] * 3
        assert again[0].notes == (f"sources.acts.heldout {web}/acts/held.md: 1 object",)


def test_what_is_shown_of_a_recipe_has_none(tmp_path: Path) -> None:
    shown = str(made_recipe(tmp_path, tmp_path, "http://127.0.0.1", SECRET).public_json())
    assert "http://127.0.0.1/acts/act-01.md?X-Amz-Signature=...&X-Amz-Date=" in shown
    assert f"user:{SECRET}" not in shown


def test_a_signature_of_a_url_relative_to_a_web_server_is_not_shown(tmp_path: Path) -> None:
    name = f"acts/act-01.md?v=1&X-Amz-Signature={SECRET}"
    recipe = made_recipe(tmp_path, tmp_path, "http://127.0.0.1:9", SECRET, urls=[name], side=[name], heldout=[name])
    shown = recipe.public_json()
    assert SECRET not in str(shown)
    for key in ("urls", "side", "heldout"):
        assert shown["sources"]["acts"][key] == ["acts/act-01.md?v=1&X-Amz-Signature=..."]
    assert heldout_notes(recipe, Listing.of([])) == (
        "sources.acts.heldout acts/act-01.md?v=1&X-Amz-Signature=...: 0 objects",
    )
