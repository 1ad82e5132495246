"""Writing beside the training: what is saved is the state at the save; what fails or dies there costs only itself."""

from __future__ import annotations

import os
import signal
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from torch.multiprocessing import ProcessExitedException, ProcessRaisedException

from model import checkpoint
from model.checkpoint import writer as writers
from model.llama.initial_weights import weight_shapes
from model.training.mesh import build_mesh
from storage.errors import UserError
from storage.retry import Backoff
from storage.store import Store
from testing.engine_state import differing, whole_state
from testing.law_batch import rank_batches, tiny_config, tiny_engine
from tests.model.attention_groups import failure, run_in_processes
from tests.model.checkpoint.saving import save_checkpoint

pytestmark = pytest.mark.slow

COMMIT = "step-00000001/COMMIT"


def observe(group: Any, url: str, small_disk: str) -> dict[str, Any]:
    """Everything that the tests below look at, in one group of two ranks."""
    mesh = build_mesh(sp=2)
    batch, n_examples = rank_batches(mesh)
    engine = tiny_engine(mesh, zero_stage=2)
    seen: dict[str, Any] = {}
    engine.train_step(batch, n_examples)
    at_save = whole_state(engine)

    # No file is published before the engine has trained on, and its caller's state has moved on too.
    gate, writing, there = threading.Event(), Store.writing, []

    def held_back(root: Store, name: str) -> Any:
        gate.wait()
        return writing(root, name)

    Store.writing = held_back
    writer, state = checkpoint.Writer(engine, Store(url)), {"position": 1}
    cost = writer.save(state, before_commit=lambda: there.append(sorted(Store(url).sizes("step-00000001"))))
    seen["trained_meanwhile"] = engine.train_step(batch, n_examples).loss
    state["position"] = 2
    seen["before"] = (Path(url) / COMMIT).exists(), writer.committed
    gate.set()
    seen["written"], seen["cost"] = writer.wait(), cost
    Store.writing = writing
    seen["there"], seen["committed"] = there, (Path(url) / COMMIT).exists()

    seen["failed_before_commit"] = failure(lambda: fail_in_commit(writer))
    seen["uncommitted"] = (Path(url) / "step-00000002" / "COMMIT").exists()
    writer.save({"position": 3})
    seen["failed_again"] = failure(lambda: fail_in_commit(writer))
    seen["still_there"] = checkpoint.load_latest(engine, Store(url))

    # A store that comes back, and in which the checkpoint before cannot be removed.
    asked = iter([True, True])

    def unsteady(root: Store, name: str) -> Any:
        if mesh.rank == 1 and next(asked, False):
            raise ConnectionResetError("the store is away")
        return writing(root, name)

    def held_fast(root: Store, name: str) -> None:
        if name.startswith("step-00000001"):
            raise OSError("it stays")
        delete(root, name)

    writers.STORE_AWAY = Backoff(attempts=20, pause=0.01)
    Store.writing, delete, Store.delete = unsteady, Store.delete, held_fast
    writer.keep = 1
    engine.train_step(batch, n_examples)
    writer.save({"position": 4})
    seen["patient"] = writer.wait(), next(asked, None), checkpoint.latest_committed(Store(url))
    Store.writing, Store.delete = writing, delete
    writer.close()

    full = checkpoint.Writer(engine, Store(small_disk if mesh.rank == 1 else f"{url}/ample"))
    full.save({})
    seen["full"] = failure(lambda: full.save({}))
    seen["full_again"] = full.wait()
    engine.close()

    engine = tiny_engine(mesh, zero_stage=3)
    seen["position"] = checkpoint.load(engine, Store(url), 1)
    seen["differing"] = differing(whole_state(engine), at_save)
    engine.close()
    return seen


def fail_in_commit(writer: checkpoint.Writer) -> None:
    writer.save({}, before_commit=lambda: 1 / 0)
    writer.wait()


@pytest.fixture(scope="module")
def small_disk(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A file system of 64 KB."""
    if os.geteuid() != 0:
        pytest.skip("mounting a small file system needs root")
    disk = tmp_path_factory.mktemp("disk")
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(disk)], check=True)
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory, small_disk: Path) -> list[dict[str, Any]]:
    return run_in_processes(observe, 2, str(tmp_path_factory.mktemp("beside")), str(small_disk))


def test_training_goes_on_while_a_save_is_written(ranks: list[dict[str, Any]]) -> None:
    for seen in ranks:
        assert seen["before"] == (False, None)
        assert seen["committed"]
        assert (seen["written"].step, seen["written"].seconds > 0) == (1, True)


def test_what_is_saved_is_the_state_at_the_save(ranks: list[dict[str, Any]]) -> None:
    assert len(ranks[0]["there"]) == 1
    assert [seen["differing"] for seen in ranks] == [[], []]
    assert [seen["position"] for seen in ranks] == [{"position": 1}] * 2


def test_the_bytes_are_those_of_the_ranks_own_parts(ranks: list[dict[str, Any]]) -> None:
    first, second = (seen["cost"].n_bytes for seen in ranks)
    n_parameters = sum(shape.numel() for shape in weight_shapes(tiny_config()).values())
    assert [first, second] == pytest.approx([12 * n_parameters / 2] * 2, rel=0.05)
    written = ranks[0]["written"].n_bytes
    assert 0 < written - first - second < 20_000, "the random states besides"
    assert ranks[1]["written"].n_bytes == written


def test_rank_0_calls_its_caller_when_all_files_are_there_and_before_they_count(ranks: list[dict[str, Any]]) -> None:
    assert ranks[0]["there"] == [
        [f"rank-{rank:05d}-{part}.safetensors" for rank in (0, 1) for part in ("0000", "random")]
    ]
    assert ranks[1]["there"] == []


def test_what_fails_on_one_rank_fails_on_all_at_the_next_call_and_nothing_is_committed(
    ranks: list[dict[str, Any]],
) -> None:
    for seen in ranks:
        assert isinstance(seen["failed_before_commit"], ZeroDivisionError)
        assert not seen["uncommitted"]


def test_a_committed_step_counts_until_the_same_step_is_committed_anew(ranks: list[dict[str, Any]]) -> None:
    for seen in ranks:
        assert isinstance(seen["failed_again"], ZeroDivisionError)
        assert seen["still_there"] == {"position": 3}


def test_a_store_that_is_away_for_a_while_costs_no_checkpoint(ranks: list[dict[str, Any]]) -> None:
    for seen in ranks:
        written, _, committed = seen["patient"]
        assert (written.step, committed) == (3, 3)
    assert ranks[1]["patient"][1] is None, "it had to try again"


def test_a_full_disk_of_one_rank_is_told_by_all(ranks: list[dict[str, Any]], small_disk: Path) -> None:
    for seen in ranks:
        assert isinstance(seen["full"], UserError)
        assert str(seen["full"]) == f"{small_disk}: the disk is full; free space or set storage.root elsewhere"
        assert seen["full_again"] is None


def killed_while_writing(group: Any, url: str) -> None:
    """Two steps; rank 1 is killed when its thread has written its first file of the second, while rank 0 trains on."""
    mesh = build_mesh(sp=2)
    batch, n_examples = rank_batches(mesh)
    engine = tiny_engine(mesh, zero_stage=2)
    writer = checkpoint.Writer(engine, Store(url))
    for _ in range(2):
        engine.train_step(batch, n_examples)
        writer.wait()
        if engine.step == 2 and mesh.rank == 1:
            os.fsync = lambda _: os.kill(os.getpid(), signal.SIGKILL)
        writer.save({"position": engine.step})
    while True:
        engine.train_step(batch, n_examples)


def carry_on(group: Any, url: str) -> tuple[int, Any]:
    """Resume from the newest whole checkpoint and save one step more."""
    mesh = build_mesh(sp=2)
    batch, n_examples = rank_batches(mesh)
    engine = tiny_engine(mesh, zero_stage=2)
    client_state = checkpoint.load_latest(engine, Store(url))
    engine.train_step(batch, n_examples)
    save_checkpoint(engine, Store(url), {"position": engine.step})
    return engine.step, client_state


@pytest.mark.faults
def test_a_writer_killed_half_way_costs_only_its_own_checkpoint(tmp_path: Path) -> None:
    with pytest.raises((ProcessExitedException, ProcessRaisedException)):
        run_in_processes(killed_while_writing, 2, str(tmp_path))
    assert "COMMIT" not in {path.name for path in (tmp_path / "step-00000002").glob("*")}
    assert list(tmp_path.rglob(".tmp-*")), "the killed rank leaves its file"
    assert checkpoint.latest_committed(Store(str(tmp_path))) == 1
    assert run_in_processes(carry_on, 2, str(tmp_path)) == [(2, {"position": 1})] * 2
    assert checkpoint.latest_committed(Store(str(tmp_path)), hashes=True) == 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000001", "step-00000002"]
