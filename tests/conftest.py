"""What rooms share: one set of miniature sources, and one undisturbed run over them, made once a session."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import settings
from miniature import lay_out, recipe, ringworld, write_recipe

# The same examples every time, so that whether a change passes is a matter of the change; HYPOTHESIS_PROFILE=explore
# draws new ones.
settings.register_profile("repeatable", derandomize=True, deadline=None)
settings.register_profile("explore", deadline=None, print_blob=True)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "repeatable"))


@pytest.fixture(scope="session")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Real acts and clips, a small vocabulary and a small VQGAN."""
    return lay_out(tmp_path_factory.mktemp("miniature") / "data")


@pytest.fixture(scope="session")
def undisturbed(sources: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The root of a run that nothing interrupted; its recipe is `recipe.yaml` beside it.

    It was watched closely, which makes no other run of it.
    """
    folder = tmp_path_factory.mktemp("undisturbed")
    path = write_recipe(folder / "recipe.yaml", recipe(sources, folder / "run"))
    done = ringworld("run", path, "--profile", "1:3", "--set", "train.hardware.peak_flops=1e12")
    assert done.returncode == 0, done.stderr
    return folder / "run"


@pytest.hookimpl(tryfirst=True)  # xdist reads the groups in the same hook
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Parallel workers share no fixtures: a file stays on one of them, and so do all files that use the one run."""
    sharing = {item.path for item in items if "undisturbed" in getattr(item, "fixturenames", ())}
    for item in items:
        item.add_marker(pytest.mark.xdist_group("undisturbed" if item.path in sharing else str(item.path)))
