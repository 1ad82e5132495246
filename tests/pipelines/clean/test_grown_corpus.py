"""A real corpus that has grown is cleaned, and what is added then costs no more than itself."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipelines.clean.find import find_unneeded
from pipelines.clean.remove import leases, remove
from pipelines.inspect.verify import verify
from pipelines.recipe import Recipe
from pipelines.run import plan_recipe, root_store
from pipelines.tokenize.codes.users import Place, users
from storage.store import Store
from testing.tiny_run import write_clip
from tests.pipelines.test_growth import OF_A_CLIP, Made, lay_out, tree

pytestmark = pytest.mark.faults


def test_what_a_real_run_needs_stays_and_its_old_outputs_and_codes_go(
    local_ray: None, sources: Path, tmp_path: Path
) -> None:
    data = lay_out(tmp_path / "data")
    made = tree(data, sources, tmp_path / "run")
    recipe = Recipe.model_validate(made)
    root, codes = root_store(recipe), Store(str(tmp_path / "codes"))
    first = Made(made).files
    assert list(users(codes)) == [Place.of(root)]
    for name in sorted(data.glob("*.mp4"))[2:]:
        name.unlink()
    made_again = Made(made)
    left = made_again.files
    with leases([root]) as held:
        removed = remove(find_unneeded(held, [recipe]), held)
    assert removed.files > len(first - left) > 0
    assert set(made_again.tokenize.shared.names("documents")) == left
    done = ("sources", "vqgan", "tokenize", "pack-video")
    assert [one.status for one in plan_recipe(recipe) if one.name in done] == ["done"] * 4
    assert verify(root.path()) == []
    assert find_unneeded([root]).unneeded == ()
    write_clip(data / "more.mp4", 3)
    assert Made(made).figures.frames_encoded == OF_A_CLIP
    assert verify(root.path()) == []
