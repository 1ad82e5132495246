"""model/checkpoint and model/convert/export_hf.py: resuming is exact to the bit, and a torn checkpoint never counts."""

from __future__ import annotations

import json
import logging
import math
import shutil
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import fsspec
import pytest
import torch
from transformers import AutoModelForCausalLM

from model import checkpoint
from model.convert import export_hf as export
from model.training.engine import TrainingEngine
from model.training.mesh import Mesh, build_mesh
from storage.errors import UserError
from storage.store import Store
from testing.engine_state import differing, whole_state, whole_weights
from testing.law_batch import rank_batches, tiny_engine
from tests.model.attention_groups import run_in_processes
from tests.model.checkpoint.saving import save_checkpoint

pytestmark = pytest.mark.slow


SMALL_FILE = 80_000  # bytes: room for one of the tables


class Case(NamedTuple):
    """A way to train and save."""

    zero_stage: int
    precision: str = "fp32"
    decay: str = "all"
    offload: tuple[str, ...] = ()


CASES = [
    Case(1),
    Case(3),
    Case(1, "bf16"),
    Case(2, "bf16"),
    Case(0),
    Case(2, decay="matrices", offload=("offload_optimizer",)),
    Case(3, "bf16", "matrices", ("offload_optimizer", "offload_param")),
]


class Outcome(NamedTuple):
    """What training left: every weight and moment, and the steps' losses; on rank 0."""

    tensors: dict[str, torch.Tensor]
    losses: list[float]
    client_state: Any


def straight(group: Any) -> list[Outcome]:
    """Six steps in one go."""
    return [_train(case, 6) for case in CASES]


def first_half(group: Any, url: str) -> list[Outcome]:
    """Three steps, saved after each with its position; the last two are kept. The model is exported too."""
    return [_train(case, 3, save_to=f"{url}/{number}") for number, case in enumerate(CASES)]


def second_half(group: Any, url: str) -> tuple[list[Outcome], list[list[str]]]:
    """Three more steps from what `first_half` committed; and what `hand_over` finds of it."""
    return [_train(case, 3, load_from=f"{url}/{number}") for number, case in enumerate(CASES)], hand_over(url)


def hand_over(url: str) -> list[list[str]]:
    """Of fresh engines with the weights of `first_half`: what is not as it was saved, or not as in a fresh engine."""
    seen = []
    for number, case in enumerate(CASES):
        mesh = build_mesh(sp=2)
        batch, n_examples = rank_batches(mesh)
        engine = case_engine(case, mesh)
        checkpoint.load_weights(engine, Store(f"{url}/{number}"), 3)
        tensors, loss, steps = whole_state(engine), engine.eval_step(batch, n_examples).loss, engine.step
        checkpoint.load(engine, Store(f"{url}/{number}"), 3)
        saved = whole_state(engine)
        wrong = [name for name, x in tensors.items() if not torch.equal(x, 0 * x if " " in name else saved[name])]
        wrong += [] if engine.eval_step(batch, n_examples).loss == loss else ["the weights it computes with"]
        seen.append(wrong + ["a step"] * steps)
        engine.close()
    return seen


def _train(case: Case, steps: int, save_to: str | None = None, load_from: str | None = None) -> Outcome:
    mesh = build_mesh(sp=2)
    batch, n_examples = rank_batches(mesh)
    engine = case_engine(case, mesh)
    client_state = None
    if load_from is not None:
        client_state = checkpoint.load_latest(engine, Store(load_from))
    losses = []
    for _ in range(steps):
        losses.append(engine.train_step(batch, n_examples).loss)
        if save_to is not None:
            save_checkpoint(engine, Store(save_to), {"loader": {"epoch": 0, "position": engine.step}}, keep=2)
    if save_to is not None:
        with mock.patch(
            "model.convert.export_hf.FILE_BYTES", SMALL_FILE if case.zero_stage == 3 else export.FILE_BYTES
        ):
            export.export_hf(engine, Store(f"{save_to}/model"))
    tensors = whole_state(engine)
    engine.close()
    return Outcome(tensors, losses, client_state)


def case_engine(case: Case, mesh: Mesh) -> TrainingEngine:
    """With ZeRO-3 even the smallest weight is split, but where parameters are offloaded: there small ones stay."""
    to_host = {"device": "cpu", "pin_memory": False}
    options: dict[str, Any] = {name: to_host for name in case.offload}
    options["stage3_param_persistence_threshold"] = 100 if case.offload else 0
    return tiny_engine(
        mesh, zero_stage=case.zero_stage, precision=case.precision, decay=case.decay, zero_options=options
    )


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> tuple[Path, list[Outcome]]:
    """A folder with what `first_half` committed, and what it held in memory then."""
    folder = tmp_path_factory.mktemp("checkpoints")
    return folder, run_in_processes(first_half, 2, str(folder))[0]


@pytest.fixture(scope="module")
def resumed(saved) -> tuple[list[Outcome], list[list[str]]]:
    """Of `second_half`, in new processes."""
    return run_in_processes(second_half, 2, str(saved[0]))[0]


def test_resuming_in_new_processes_is_bit_for_bit_the_uninterrupted_run(saved, resumed):
    _, halves = saved
    whole = run_in_processes(straight, 2)[0]
    for case, all_six, first, second in zip(CASES, whole, halves, resumed[0], strict=True):
        assert first.losses + second.losses == all_six.losses, case
        assert len(all_six.tensors) == 3 * 21
        assert differing(second.tensors, all_six.tensors) == [], case
        assert second.client_state == {"loader": {"epoch": 0, "position": 3}}


def test_another_stage_starts_from_the_fp32_weights_and_nothing_else(resumed):
    assert resumed[1] == [[]] * len(CASES)


def test_only_the_newest_are_kept(saved):
    folder, _ = saved
    assert sorted(path.name for path in (folder / "0").iterdir()) == ["model", "step-00000002", "step-00000003"]


def test_a_checkpoint_names_all_its_files_and_is_whole(saved):
    folder, _ = saved
    for number, case in enumerate(CASES):
        url = str(folder / str(number))
        manifest = checkpoint.read_manifest(Store(url), 3)
        there = {path.name for path in (folder / str(number) / "step-00000003").iterdir()}
        assert there == {*manifest.files, checkpoint.COMMIT}
        assert {entry.rank for entry in manifest.files.values()} == {0, 1}
        n_held = sum(one.numel for entry in manifest.files.values() for one in entry.ranges)
        assert n_held == sum(math.prod(shape) for shape, _ in manifest.parameters.values()), "nothing twice"
        assert (manifest.world_size, manifest.sp, manifest.zero_stage) == (2, 2, case.zero_stage)
        assert checkpoint.verify(Store(url), 3, hashes=True) is None


@pytest.mark.parametrize(
    ("tear", "flaw"),
    [
        (lambda folder: (folder / "COMMIT").unlink(), "it has no COMMIT"),
        (lambda folder: (folder / "COMMIT").write_text('{"format": 2, "st'), "its COMMIT cannot be read"),
        (
            lambda folder: (folder / "rank-00001-random.safetensors").unlink(),
            "rank-00001-random.safetensors is missing",
        ),
        (lambda folder: _truncate(folder / "rank-00000-0000.safetensors"), "rank-00000-0000.safetensors is 1000 bytes"),
    ],
)
def test_a_torn_checkpoint_is_passed_over_for_the_one_before(saved, tmp_path, caplog, tear, flaw):
    shutil.copytree(saved[0] / "0", tmp_path / "copy")
    tear(tmp_path / "copy" / "step-00000003")
    with caplog.at_level(logging.WARNING):
        assert checkpoint.latest_committed(Store(str(tmp_path / "copy"))) == 2
    assert flaw in caplog.text


def _truncate(path: Path) -> None:
    with path.open("r+b") as file:
        file.truncate(1000)


def test_bytes_that_changed_are_found_by_their_hash(saved, tmp_path):
    shutil.copytree(saved[0] / "0", tmp_path / "copy")
    url, path = str(tmp_path / "copy"), tmp_path / "copy" / "step-00000003" / "rank-00000-random.safetensors"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    assert checkpoint.latest_committed(Store(url)) == 3
    assert checkpoint.latest_committed(Store(url), hashes=True) == 2
    assert (
        checkpoint.verify(Store(url), 3) == "rank-00000-random.safetensors has another sha256 than when it was written"
    )


def test_no_checkpoint_is_none(tmp_path):
    assert checkpoint.latest_committed(Store(str(tmp_path / "nothing"))) is None


def alone(group: Any, url: str) -> dict[str, Any]:
    """One process: an object store's code path, and what a load of someone else's checkpoint says."""
    told: list[bool] = []
    mesh = build_mesh(on_progress=told.append)
    batch, n_examples = rank_batches(mesh)
    engine, store = tiny_engine(mesh, zero_stage=2), "memory://bucket/run"
    pieces = {"start": list(told)}
    engine.train_step(batch, n_examples)
    fsspec.filesystem("memory").pipe_file(
        "/bucket/run/step-00000009/rank-00000-0000.safetensors", b"of a killed writer"
    )
    for keep in (None, 1):
        save_checkpoint(engine, Store(store), {"position": 1}, keep=keep)
        engine.step += 1
    before = whole_weights(engine)
    told.clear()
    export.export_hf(engine, Store(f"{store}/model"))
    pieces["export"] = list(told)
    other = tiny_engine(mesh, zero_stage=2)
    told.clear()
    position = checkpoint.load(other, Store(store), 2)
    pieces["load"] = list(told)
    after = whole_weights(other)
    seen: dict[str, Any] = {
        "pieces": pieces,
        "steps": (checkpoint.latest_committed(Store(store), hashes=True), other.step, position),
        "folders": sorted(Store(store).folders()),
        "one_left": checkpoint.verify(Store(store), 1),
        "equal": all(torch.equal(after[name], before[name]) for name in before),
        "two_ranks": checkpoint.load(other, Store(url), 3)["loader"],
    }
    try:
        checkpoint.load(other, Store("nowhere://x"), 3)
    except UserError as error:
        seen["no_scheme"] = str(error)
    return seen


def test_an_object_store_keeps_checkpoints_too(saved):
    seen = run_in_processes(alone, 1, str(saved[0] / "0"))[0]
    assert seen["steps"] == (2, 2, {"position": 1})
    assert seen["equal"]
    assert seen["folders"] == ["model", "step-00000002"]
    assert seen["one_left"] == "it has no COMMIT"
    assert seen["two_ranks"] == {"epoch": 0, "position": 3}
    assert "the scheme 'nowhere' cannot be used" in seen["no_scheme"]
    own_then_others = [False, True]
    assert seen["pieces"] == {
        "start": own_then_others * (1 + 21),  # whether all weights are there, then each of them
        "export": own_then_others * 3,  # what was there before, the one file, the description
        "load": [*own_then_others, False, False, True],  # what was committed, then one file
    }


@pytest.mark.parametrize("number", range(len(CASES)))
def test_an_export_is_the_plain_model_of_the_master_weights(saved, number):
    folder, halves = saved
    llama = AutoModelForCausalLM.from_pretrained(folder / str(number) / "model", dtype="auto")
    assert llama.dtype == (torch.bfloat16 if CASES[number].precision == "bf16" else torch.float32)
    weights = halves[number].tensors
    assert all(torch.equal(x, weights[name].to(llama.dtype)) for name, x in llama.state_dict().items())
    files = [path.stat().st_size for path in (folder / str(number) / "model").glob("*.safetensors")]
    assert max(files) < 1.1 * SMALL_FILE < sum(files) if CASES[number].zero_stage == 3 else len(files) == 1
    config = json.loads((folder / str(number) / "model" / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"]
