"""The package as a wheel in an environment of its own: it runs without a checkout, and its own code alone."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import sysconfig
import time
import venv
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from pipelines.dag.code_versions import ROOMS, code_version
from testing.miniature import ROOT, environment, text_recipe, write_recipe
from testing.ray_nodes import RayNodes
from tests.conftest import made_once

pytestmark = pytest.mark.slow


@pytest.fixture(scope="session")
def installed(shared: Path) -> Path:
    """The `bin` of an environment with a wheel of this tree, and what it depends on from this one."""

    def build(folder: Path) -> None:
        listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True)
        for name in filter(None, listed.stdout.split("\0")):
            if (ROOT / name).is_file():
                (folder / "source" / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(ROOT / name, folder / "source" / name)
        pip = [sys.executable, "-m", "pip", "--quiet"]
        wheel = ["wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", str(folder), str(folder / "source")]
        subprocess.run([*pip, *wheel], check=True)
        venv.create(folder / "env", with_pip=False)
        python, (built,) = folder / "env" / "bin" / "python", folder.glob("*.whl")
        subprocess.run([*pip, "--python", str(python), "install", "--no-deps", "--no-index", str(built)], check=True)
        (site,) = (folder / "env").glob("lib/*/site-packages")
        (site / "dependencies.pth").write_text(sysconfig.get_path("purelib"))
        (folder / "env" / "bin" / "ray").write_text(f"#!{python}\nfrom ray.scripts.scripts import main\nmain()\n")
        (folder / "env" / "bin" / "ray").chmod(0o755)

    return made_once(shared / "installed", build) / "env" / "bin"


def without_checkout(variables: dict[str, str]) -> dict[str, str]:
    """The environment variables of a user who has no checkout."""
    return {key: value for key, value in variables.items() if key != "PYTHONPATH"}


def call(command: list[str | Path], folder: Path, **env: str) -> subprocess.CompletedProcess[str]:
    """Run a command in a folder, to its end."""
    return subprocess.run(
        [str(part) for part in command],
        cwd=folder,
        env=without_checkout(environment(**env)),
        capture_output=True,
        text=True,
        timeout=400,
        check=False,
    )


def other_checkout(folder: Path) -> Path:
    """Another checkout, whose rooms note in `imported` that they are."""
    for room in (*ROOMS, "jobs"):
        shutil.copytree(ROOT / room, folder / room, ignore=shutil.ignore_patterns("__pycache__"))
        with (folder / room / "__init__.py").open("a") as file:
            file.write(f"\nwith open({str(folder / 'imported')!r}, 'a') as file:\n    file.write(__name__ + '\\n')\n")
    return folder


def files_of_a_user(folder: Path) -> Path:
    """Modules of a user's that have our rooms' names; each ends whoever imports it."""
    folder.mkdir()
    for room in (*ROOMS, "jobs"):
        (folder / f"{room}.py").write_text("raise SystemExit('the wrong module')\n")
    return folder


def short_recipe(sources: Path, folder: Path, **tokenize: Any) -> Path:
    """Text alone, and one worker of training that makes two steps."""
    tree = text_recipe(sources, folder / "run")
    tree["train"]["workers"] = 1
    tree["train"]["stages"][0] |= {"sp": 1, "steps": 2}
    tree["tokenize"] |= tokenize
    return write_recipe(folder / "recipe.yaml", tree)


def test_the_wheel_has_the_code_and_the_recipes(installed: Path, tmp_path: Path) -> None:
    said = "from pipelines.dag.code_versions import code_version; print(code_version())"
    assert call([installed / "python", "-c", said], tmp_path).stdout.strip() == code_version()
    written = call([installed / "ringworld", "init", "quickstart"], tmp_path)
    assert written.returncode == 0, written.stderr
    planned = call([installed / "ringworld", "plan", "quickstart.yaml"], tmp_path)
    assert planned.returncode == 0, planned.stderr
    listed = (
        "from pipelines.recipe.load import load_recipe; from pipelines.sources.list_sources import list_sources;"
        "print(*(found.side for found in list_sources(load_recipe('quickstart.yaml'))))"
    )
    assert "a big grey rabbit" in call([installed / "python", "-c", listed], tmp_path).stdout


TASK = """
import ray
from pipelines.cluster.capacity import Capacity
from pipelines.cluster.ray_cluster import ray_instance
from pipelines.cluster.same_code import as_driver

def place():
    import jobs, model, pipelines, storage, tokenization
    return [room.__file__ for room in (jobs, model, pipelines, storage, tokenization)]

class Actor:
    place = staticmethod(place)

with ray_instance(None, Capacity(cpus=1)):
    answers = [ray.remote(as_driver(place)).remote(), ray.remote(Actor).remote().place.remote()]
    print(*(path for answer in answers for path in ray.get(answer)), sep="\\n")
"""


@pytest.mark.faults
@pytest.mark.parametrize("fill", [other_checkout, files_of_a_user])
def test_tasks_and_actors_import_the_installed_code_in_whatever_folder_their_driver_is_started(
    fill: Callable[[Path], Path], installed: Path, tmp_path: Path
) -> None:
    folder = fill(tmp_path / "started")
    done = call([installed / "python", "-P", "-c", TASK], folder)
    assert done.returncode == 0, done.stderr
    (site,) = installed.parent.glob("lib/*/site-packages")
    places = done.stdout.split()
    assert len(places) == 10
    assert all(Path(place).is_relative_to(site) for place in places), places
    assert not (folder / "imported").exists(), (folder / "imported").read_text()


@pytest.mark.faults
@pytest.mark.parametrize("fill", [other_checkout, files_of_a_user])
def test_whatever_the_folder_holds_in_which_it_is_started_the_installed_code_runs(
    fill: Callable[[Path], Path], installed: Path, sources: Path, tmp_path: Path
) -> None:
    folder = fill(tmp_path / "started")
    done = call([installed / "ringworld", "run", short_recipe(sources, tmp_path)], folder)
    assert done.returncode == 0, done.stderr
    assert not (folder / "imported").exists(), (folder / "imported").read_text()


def test_as_a_module_too(installed: Path, sources: Path, tmp_path: Path) -> None:
    folder = files_of_a_user(tmp_path / "started")
    (folder / "jobs.py").unlink()  # which Python itself would take for ours
    done = call([installed / "python", "-m", "jobs.cli", "plan", short_recipe(sources, tmp_path)], folder)
    assert done.returncode == 0, done.stderr


class Nodes(RayNodes):
    """Nodes whose users have no checkout."""

    def environment(self, **more: str) -> dict[str, str]:
        """Of whoever may use the cluster."""
        return without_checkout(super().environment()) | more


@pytest.fixture
def nodes(installed: Path) -> Iterator[RayNodes]:
    """A cluster whose nodes run the environment's Ray."""
    made = Nodes(bin=installed)
    try:
        yield made
    finally:
        made.stop()


@pytest.mark.faults
def test_a_node_with_other_code_makes_nothing_whether_it_joins_a_run_or_was_there_before_it(
    nodes: RayNodes, installed: Path, sources: Path, tmp_path: Path
) -> None:
    other = other_checkout(tmp_path / "other")
    recipe = short_recipe(sources, tmp_path, decode={"custom": {"decode": 1}, "workers": 2})
    address = nodes.start_head()
    wait_for(lambda: any(Path(nodes.folders[0]).glob("session_2*/sockets/raylet")))
    command = [str(installed / "ringworld"), "run", str(recipe)]
    env = nodes.environment(RAY_ADDRESS=address)
    with (tmp_path / "log").open("wb") as log:
        first = subprocess.Popen(command, cwd=tmp_path, env=env, stdout=log, stderr=log)
    wait_for(lambda: "tokenize" in (tmp_path / "log").read_text().partition("ray joined")[2])
    nodes.join(address, 1, "decode", 2, PYTHONPATH=str(other))
    assert first.wait(120) == 2, (tmp_path / "log").read_text()
    second = call(command, tmp_path, **{key: env[key] for key in env if key.startswith("RAY_")})
    assert second.returncode == 2, second.stderr
    for said in ((tmp_path / "log").read_text(), second.stderr):
        assert "Traceback" not in said
        assert re.fullmatch(
            rf"ringworld: node \S+ imports Ringworld from {re.escape(str(other))}, which is other code than this "
            rf"run's, from {re.escape(str(installed.parent))}/\S+; install the same version on every node, or ship a "
            rf"checkout with `ray job submit --working-dir \.`",
            said.strip().splitlines()[-1],
        )
    made = {path.parent.parent.name for path in (tmp_path / "run" / "stages").rglob("manifest.json")}
    assert made == {"sources"}
    assert not [*(tmp_path / "run" / "stages" / "tokenize").rglob("*.parquet")]


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.2)
