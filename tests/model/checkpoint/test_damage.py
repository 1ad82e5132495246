"""A checkpoint that rots after it was committed is found by its hashes, and the one before it is used, said loudly."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from model import checkpoint
from model.checkpoint.writer import retain
from model.llama.initial_weights import RandomWeights
from model.training.engine import TrainingEngine
from model.training.lr_schedule import Schedule
from model.training.mesh import build_mesh
from model.training.settings import EngineSettings
from storage.errors import UserError
from storage.store import Store
from testing.engine_state import whole_weights
from testing.law_batch import rank_batches, tiny_config, tiny_engine
from tests.model.attention_groups import run_in_processes
from tests.model.checkpoint.saving import save_checkpoint

pytestmark = pytest.mark.slow

WEIGHTS, RANDOM = "rank-00001-0000.safetensors", "rank-00001-random.safetensors"


def flip(path: Path) -> None:
    """One bit in the middle."""
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:1000])


DAMAGES: dict[str, tuple[Callable[[Path], None], str]] = {
    "flipped": (lambda step: flip(step / WEIGHTS), f"{WEIGHTS} has another sha256 than when it was written"),
    "truncated": (lambda step: truncate(step / WEIGHTS), f"{WEIGHTS} is 1000 bytes, not "),
    "missing": (lambda step: (step / RANDOM).unlink(), f"{RANDOM} is missing"),
    "manifest": (lambda step: flip(step / "COMMIT"), "its COMMIT "),
}
"""What happens to step 3, and what is said of it. The files are rank 1's alone."""


class Seen(NamedTuple):
    """What a load found and said."""

    position: Any
    step: int
    same_weights: bool
    warnings: list[str]


def observe(group: Any, url: str) -> dict[str, Any]:
    """Save steps 1 to 3; damage copies of them; what every rank then loads and says."""
    mesh = build_mesh(sp=2)
    batch, n_examples = rank_batches(mesh)
    engine = tiny_engine(mesh, zero_stage=2)
    weights = []
    for _ in range(3):
        engine.train_step(batch, n_examples)
        weights.append(whole_weights(engine))
        save_checkpoint(engine, Store(f"{url}/whole"), {"position": engine.step})
    engine.close()
    seen: dict[str, Any] = {}
    engine = tiny_engine(mesh, zero_stage=3)
    for name, (damage, _) in DAMAGES.items():
        copy = Path(url) / name
        mesh.on_all_ranks(lambda: made_copy(Path(url) / "whole", copy, damage) if mesh.rank == 0 else None)  # noqa: B023
        with caught_warnings() as warnings:
            position = checkpoint.load_latest(engine, Store(str(copy)))
        now, then = whole_weights(engine), weights[1]
        same = now is None or then is None or all(torch.equal(now[key], then[key]) for key in then)
        seen[name] = Seen(position, engine.step, same, warnings)

    ruined = Path(url) / "ruined"
    mesh.on_all_ranks(lambda: made_copy(Path(url) / "whole", ruined, ruin) if mesh.rank == 0 else None)
    seen["all"] = failure(lambda: checkpoint.load_latest(engine, Store(str(ruined))))
    seen["named"] = failure(lambda: checkpoint.load(engine, Store(str(ruined)), 3))
    torn = Path(url) / "torn"
    mesh.on_all_ranks(lambda: made_copy(Path(url) / "whole", torn, uncommit) if mesh.rank == 0 else None)
    seen["torn"] = checkpoint.load_latest(engine, Store(str(torn)))
    seen["none"] = checkpoint.load_latest(engine, Store(f"{url}/nothing"))

    # A run that has gone back to step 2 leaves nothing of what came after it, nor more than it is to keep.
    flipped = Path(url) / "flipped"
    checkpoint.load_latest(engine, Store(str(flipped)))
    save_checkpoint(engine, Store(str(flipped)), {"position": "again"}, keep=1)
    seen["kept"] = (
        sorted(path.name for path in flipped.iterdir()),
        checkpoint.load_latest(engine, Store(str(flipped))),
    )
    files = checkpoint.read_manifest(Store(str(flipped)), 2).files
    seen["only_its_files"] = {path.name for path in flipped.glob("step-00000002/*")} == {*files, "COMMIT"}
    engine.close()

    config = tiny_config()
    config.intermediate_size = 48
    other = TrainingEngine(RandomWeights(config, 0), mesh, EngineSettings(1, "fp32"), Schedule(0.0))
    seen["other_model"] = failure(lambda: checkpoint.load_latest(other, Store(f"{url}/whole")))
    return seen


def made_copy(whole: Path, copy: Path, damage: Callable[[Path], None]) -> None:
    shutil.copytree(whole, copy)
    damage(copy / "step-00000003")


def ruin(step: Path) -> None:
    """All three, each in another way."""
    flip(step / WEIGHTS)
    truncate(step.parent / "step-00000002" / WEIGHTS)
    (step.parent / "step-00000001" / RANDOM).unlink()


def uncommit(step: Path) -> None:
    for commit in step.parent.glob("*/COMMIT"):
        commit.unlink()


def failure(action: Callable[[], Any]) -> UserError | None:
    try:
        action()
    except UserError as error:
        return error
    return None


class caught_warnings(logging.Handler):  # noqa: N801 - used as a context manager
    """The warnings that this process logs meanwhile."""

    def __enter__(self) -> list[str]:
        self.said: list[str] = []
        logging.getLogger("ringworld.model.checkpoint").addHandler(self)
        return self.said

    def emit(self, record: logging.LogRecord) -> None:
        self.said.append(f"{record.levelname}: {record.getMessage()}")

    def __exit__(self, *_: object) -> None:
        logging.getLogger("ringworld.model.checkpoint").removeHandler(self)


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return run_in_processes(observe, 2, str(tmp_path_factory.mktemp("damaged")))


@pytest.mark.parametrize("name", DAMAGES)
def test_the_one_before_is_used_and_every_rank_says_why(ranks: list[dict[str, Any]], name: str) -> None:
    for seen in ranks:
        assert seen[name].position == {"position": 2}
        assert seen[name].step == 2
        assert seen[name].same_weights
        (said,) = seen[name].warnings
        assert said.startswith("WARNING: checkpoint ")
        assert f"{name}/step-00000003 is damaged and not used: {DAMAGES[name][1]}" in said
        assert said.endswith("; that of step 2 is used instead")


def test_where_all_are_damaged_the_user_is_told_so(ranks: list[dict[str, Any]]) -> None:
    for seen in ranks:
        said = str(seen["all"])
        assert f"ruined: every checkpoint is damaged (step 3: {WEIGHTS} has another sha256" in said
        assert f"step 2: {WEIGHTS} is 1000 bytes" in said
        assert f"step 1: {RANDOM} is missing" in said
        assert "delete the folder to train from the beginning" in said
        assert "delete this folder to resume from the one before" in str(seen["named"])


def test_where_none_was_ever_committed_there_is_none(ranks: list[dict[str, Any]]) -> None:
    assert [(seen["torn"], seen["none"]) for seen in ranks] == [(None, None)] * 2


def test_a_run_that_has_gone_back_forgets_what_came_after(ranks: list[dict[str, Any]]) -> None:
    assert [seen["kept"] for seen in ranks] == [(["step-00000002"], {"position": "again"})] * 2
    assert all(seen["only_its_files"] for seen in ranks)


def test_another_models_checkpoint_is_refused(ranks: list[dict[str, Any]]) -> None:
    for seen in ranks:
        assert "mlp.down_proj.weight is 32x64 in it and 32x48 in this run" in str(seen["other_model"])


def test_the_newest_committed_stay_whatever_else_is_there(tmp_path: Path) -> None:
    for step in range(1, 7):
        (tmp_path / f"step-{step:08d}").mkdir()
        if step not in (3, 5):
            (tmp_path / f"step-{step:08d}" / "COMMIT").write_text("")
    root = Store(str(tmp_path))
    retain(root, 4, None, [])
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"step-{step:08d}" for step in (1, 2, 4)]
    retain(root, 4, 2, [])
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"step-{step:08d}" for step in (2, 4)]
    retain(root, 4, 0, [])
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000004"]


def test_an_exempt_step_stays_beside_the_newest_where_it_is_committed_and_not_gone_back_from(tmp_path: Path) -> None:
    for step in range(1, 7):
        (tmp_path / f"step-{step:08d}").mkdir()
        if step != 2:
            (tmp_path / f"step-{step:08d}" / "COMMIT").write_text("")
    retain(Store(str(tmp_path)), 5, 1, [], exempt=(2, 3, 6))
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"step-{step:08d}" for step in (3, 5)]
