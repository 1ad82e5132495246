"""The train stage's own part of dispatch: from recipe, mesh and model to what plans its micro-batches."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
import torch

from model.attention.plan.hardware import AttentionShape, Hardware
from model.attention.plan.options import AttentionOptions
from model.llama.config import llama_config
from model.llama.hf_weights import StoredWeights
from model.llama.llama import build_llama, whole_llama
from model.training.mesh import Mesh
from pipelines.pack.record import PackOutputs, PackRecord
from pipelines.train.data import describe, stage_dispatcher
from pipelines.train.engine_setup import initial_weights
from pipelines.train.job import TrainJob
from pipelines.train.stage import TrainStage
from storage.errors import UserError
from storage.store import Store
from testing.tiny_run import VOCABULARY, tiny_recipe
from tests.model.lwm_reference import lwm_tensors, write_leaves
from tokenization.loader.batch import MicroBatch

MESH = Mesh(dp=1, sp=4, rank=3, sp_group=None)
SIZES = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 8}
CONFIG = llama_config({**SIZES, "num_key_value_heads": 2}, VOCABULARY.size, 128, 1e4)


def job_of(tmp_path, **train: object) -> TrainJob:
    recipe = tiny_recipe(tmp_path)
    recipe = recipe.model_copy(update={"train": dataclasses.replace(recipe.train, **train)})
    store = Store(str(tmp_path))
    record = PackRecord(PackOutputs({"books": {"train": {"file": "books.json"}}, "clips": {}}))
    return TrainJob(recipe, recipe.train.stages[0], VOCABULARY, store, record, None, store)


def test_the_dispatcher_knows_place_shape_hardware_and_choices(tmp_path) -> None:
    job = job_of(tmp_path, precision="bf16", hardware=Hardware(across=1e9), attention=AttentionOptions(layout="zigzag"))
    dispatcher = stage_dispatcher(job, MESH, CONFIG)
    assert (dispatcher.sp, dispatcher.sp_rank) == (4, 3)
    assert dispatcher.shape == AttentionShape(heads=8, kv_heads=2, head_size=8, itemsize=2)
    assert dispatcher.hardware is not None
    assert dispatcher.hardware.across == 1e9
    assert (dispatcher.layout, dispatcher.ulysses, dispatcher.route) == ("zigzag", None, None)
    assert dispatcher.n_sources == 1


def test_a_stages_own_choices_come_first(tmp_path) -> None:
    job = job_of(tmp_path, attention=AttentionOptions(layout="zigzag"))
    job = dataclasses.replace(job, stage=job.stage.model_copy(update={"attention": AttentionOptions(route="relay")}))
    dispatcher = stage_dispatcher(job, MESH, CONFIG)
    assert (dispatcher.layout, dispatcher.route) == (None, "relay")


def test_a_checkpoints_kv_heads_are_looked_at_before_training(tmp_path) -> None:
    with pytest.raises(UserError, match=r"train-text: attention\.ulysses 4 does not divide the model's 2 kv heads"):
        stage_dispatcher(job_of(tmp_path, attention=AttentionOptions(ulysses=4)), MESH, CONFIG)


def test_the_first_plan_is_one_line(tmp_path) -> None:
    job = job_of(tmp_path, attention=AttentionOptions(layout="contiguous", ulysses=2, route="direct"))
    arrays = [np.zeros(128, dtype) for dtype in (np.int32, np.int32, np.float32)]
    batch = MicroBatch(*arrays, cu_seqlens=np.array([0, 100, 128], dtype=np.int32), keys=("a",))
    line = describe(stage_dispatcher(job, MESH, CONFIG)(batch))
    assert line == "2 documents of 128 tokens over 4 rank(s): layout contiguous, Ulysses degree 2, route direct"


def test_a_run_starts_from_a_hugging_face_folder_or_from_a_stage_of_another_run(tmp_path) -> None:
    text = build_llama(llama_config(SIZES, VOCABULARY.text_size, 64, 1e4), seed=5)
    text.save_pretrained(tmp_path / "plain")
    text.save_pretrained(tmp_path / "stage" / "model")
    (tmp_path / "stage" / "manifest.json").write_text("{}")
    models = []
    for folder in ("plain", "stage"):
        job = job_of(tmp_path)
        model = job.recipe.model.model_copy(update={"init": str(tmp_path / folder)})
        job = dataclasses.replace(job, recipe=job.recipe.model_copy(update={"model": model}))
        models.append(whole_llama(initial_weights(job)))
    for model in models:
        assert model.config.vocab_size == VOCABULARY.size
        assert torch.equal(model.lm_head.weight[: VOCABULARY.text_size], text.lm_head.weight)
        assert model.config.max_position_embeddings == job.stage.context
    assert torch.equal(models[0].lm_head.weight, models[1].lm_head.weight)


def lwm_job(tmp_path, name: str = "lwm", **sizes: int) -> TrainJob:
    """One whose `model.init` is the LWM checkpoint of a model of text."""
    text = build_llama(llama_config(SIZES, VOCABULARY.text_size, 64, 1e4), seed=5)
    with (tmp_path / "lwm").open("wb") as file:
        write_leaves(file, lwm_tensors(dict(text.named_parameters()), text.config, stacked=True))
    job = job_of(tmp_path)
    model = job.recipe.model.model_copy(update={"init": str(tmp_path / name), "size": {**SIZES, **sizes}})
    return dataclasses.replace(job, recipe=job.recipe.model_copy(update={"model": model}))


def test_a_run_starts_from_a_released_lwm_checkpoint(tmp_path) -> None:
    job = lwm_job(tmp_path)
    model = whole_llama(initial_weights(job))
    text = build_llama(llama_config(SIZES, VOCABULARY.text_size, 64, 1e4), seed=5)
    assert model.config.vocab_size == VOCABULARY.size
    for name, weight in text.named_parameters():
        assert torch.equal(model.get_parameter(name)[: len(weight)], weight)
    stage = TrainStage(job.recipe, job.stage, None)
    stage._check_lwm()
    before = stage.settings()["model"]["init"]
    (tmp_path / "lwm").write_bytes((tmp_path / "lwm").read_bytes() + b"more")
    assert stage.settings()["model"]["init"] != before


def test_an_lwm_checkpoint_of_other_sizes_or_cut_short_is_refused_before_anything_runs(tmp_path) -> None:
    job = lwm_job(tmp_path, num_hidden_layers=2)
    stage = TrainStage(job.recipe, job.stage, None)
    with pytest.raises(UserError, match=r"model\.size: num_hidden_layers is 2, in the LWM checkpoint .*lwm 1; give"):
        stage.check()
    job = lwm_job(tmp_path)
    (tmp_path / "lwm").write_bytes((tmp_path / "lwm").read_bytes()[:-9])
    with pytest.raises(UserError, match="is not LWM's msgpack format"):
        TrainStage(job.recipe, job.stage, None).check()


def test_the_weights_to_start_from_are_in_the_fingerprint_wherever_they_lie_in_the_folder(tmp_path) -> None:
    recipe = tiny_recipe(tmp_path)
    recipe = recipe.model_copy(update={"model": recipe.model.model_copy(update={"init": str(tmp_path / "stage")})})
    stage = TrainStage(recipe, recipe.train.stages[0], None)
    seen = []
    for folder, files in (("stage", 3), ("stage/model", 3), ("stage/model", 5)):
        (tmp_path / folder).mkdir(exist_ok=True)
        for name in ("config.json", "model.safetensors.index.json", "model-00001-of-00001.safetensors"):
            (tmp_path / folder / name).write_text(f"{folder} {files}")
        seen.append(stage.settings()["model"]["init"])
    assert len(set(seen)) == 3


def test_an_index_names_files_beside_it_alone(tmp_path) -> None:
    index = {"weight_map": {"model.norm.weight": "../other/model.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match=r"index\.json: '\.\./other/model\.safetensors' is no file beside it"):
        StoredWeights(CONFIG, lambda: tmp_path).read("model.norm.weight")
