"""What rooms share: one set of miniature sources, and one undisturbed run over them, made once for all workers."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from filelock import FileLock
from hypothesis import settings

from testing.miniature import lay_out, recipe, ringworld, write_recipe
from testing.s3_server import ObjectStore
from testing.s3_server import object_store as running_store

# The same examples every time, so that whether a change passes is a matter of the change; HYPOTHESIS_PROFILE=explore
# draws new ones.
settings.register_profile("repeatable", derandomize=True, deadline=None)
settings.register_profile("explore", deadline=None, print_blob=True)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "repeatable"))


@pytest.fixture(scope="session")
def sources(shared: Path) -> Path:
    """Real acts and clips, a small vocabulary and a small VQGAN."""
    return made_once(shared / "miniature", lambda folder: lay_out(folder / "data")) / "data"


@pytest.fixture(scope="session")
def undisturbed(sources: Path, shared: Path) -> Path:
    """The root of a run that nothing interrupted; its recipe is `recipe.yaml` beside it.

    It was watched closely, which makes no other run of it.
    """

    def run(folder: Path) -> None:
        path = write_recipe(folder / "recipe.yaml", recipe(sources, folder / "run"))
        done = ringworld("run", path, "--profile", "1:3", "--set", "train.hardware.peak_flops=1e12")
        assert done.returncode == 0, done.stderr

    return made_once(shared / "undisturbed", run) / "run"


@pytest.fixture(scope="session")
def local_ray() -> Iterator[None]:
    """Ray with two CPUs in the test's own process, for calling a pipeline's functions.

    All files share it, so that its processes are started and import torch once.
    """
    import ray  # a second, which the workers that run no such test need not spend

    # What Ray forwards it prints at any time, into what some later test reads.
    quiet = {"logging_level": "warning", "log_to_driver": False}
    ray.init(num_cpus=2, include_dashboard=False, object_store_memory=2**27, **quiet)
    yield
    ray.shutdown()


@pytest.fixture(scope="session")
def object_store() -> Iterator[ObjectStore]:
    """An S3 server with a bucket `data`."""
    with running_store("data") as store:
        yield store


@pytest.fixture(scope="session")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that all of pytest's parallel workers have."""
    own = tmp_path_factory.getbasetemp()
    return own.parent if "PYTEST_XDIST_WORKER" in os.environ else own


def made_once(folder: Path, make: Callable[[Path], object]) -> Path:
    """The folder as `make` fills it, by whichever parallel worker needs it first; the others wait for it."""
    with FileLock(folder.with_suffix(".lock")):
        if not folder.exists():
            folder.mkdir()
            make(folder)
            folder.with_suffix(".made").touch()
        assert folder.with_suffix(".made").exists(), f"making {folder} has failed before"
    return folder


@pytest.hookimpl(tryfirst=True)  # xdist reads the groups in the same hook
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """A file, whose tests share fixtures, stays on one parallel worker; slow files come first.

    Of the files that need the undisturbed run one begins, and the others follow when it has been made.
    """
    for item in items:
        item.add_marker(pytest.mark.xdist_group(str(item.path)))
    slow = {item.path for item in items if item.get_closest_marker("slow") or item.get_closest_marker("faults")}
    needing = {item.path for item in items if "undisturbed" in getattr(item, "fixturenames", ())}
    first = next((item.path for item in items if item.path in needing), None)
    items.sort(key=lambda item: (item.path != first, item.path not in slow, item.path in needing))
