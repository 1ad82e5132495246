"""The cells of the evaluation on a tiny run, and the stage over Ray."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from model.inference.generate import generate_text
from model.inference.kv_decoder import Decoder
from model.llama.llama import inference
from pipelines.cluster.progress import bar
from pipelines.evaluate.cell import Cell
from pipelines.evaluate.job import EvaluateJob
from pipelines.evaluate.pictures import strip
from pipelines.evaluate.record import EvaluateRecord
from pipelines.evaluate.run import evaluate_all
from pipelines.evaluate.run_data import RunData
from pipelines.evaluate.shared_prefill import prefilled, shared_lengths
from pipelines.evaluate.table import tabulate
from pipelines.evaluate.task_table import TASKS, all_cells
from pipelines.evaluate.tasks.generation import continuation_prompt
from pipelines.evaluate.tasks.needle import ask, choice_nats, nats
from pipelines.recipe import Recipe
from storage.store import Store
from testing.tiny_run import VOCABULARY, make_run
from tokenization.text.continuation import follow
from tokenization.text.tokenizer import load_text_tokenizer


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> EvaluateJob:
    recipe, inputs = make_run(tmp_path_factory.mktemp("run"))
    return job_of(recipe, inputs, "evaluate")


def job_of(recipe: Recipe, inputs: dict[str, Any], folder: str) -> EvaluateJob:
    run = RunData(recipe, VOCABULARY, inputs)
    return EvaluateJob.of_run(run, run.trained(run.last), Store(recipe.storage.root).at("stages", folder))


def measure(job: EvaluateJob, name: str) -> dict[str, Any]:
    (cell,) = (cell for cell in all_cells(job) if cell.name == name)
    return TASKS[cell.task].measure(job, cell)


def test_every_stage_is_scored_on_its_sources_and_the_last_on_those_that_others_read(job: EvaluateJob) -> None:
    assert [cell.name for cell in all_cells(job)] == [
        "loss-text-books",
        "loss-video-books",
        "loss-video-clips",
        *(f"needle-{context}-{number}" for context in (128, 256) for number in (0, 1)),
        "reconstruction-heldout",
        "reconstruction-train",
        "continuation-0",
        "continuation-1",
        "continuation-2",
        "continuation-3",
        "prompt-0",
    ]
    recipe = job.run.recipe
    stages = [stage.model_copy(update={"mixture": {"clips": 1.0}}) for stage in recipe.train.stages[1:]]
    train = replace(recipe.train, stages=[recipe.train.stages[0], *stages])
    clips_last = job_of(recipe.model_copy(update={"train": train}), job.run.outputs, "evaluate")
    losses = {cell.name: cell.arguments for cell in all_cells(clips_last, ["heldout"])}
    assert losses["loss-video-books"] == {"stage": "video", "pack": "text", "source": "books"}


def test_what_a_task_lacks_leaves_it_out(job: EvaluateJob) -> None:
    bare = job.settings.model_copy(update={"needle": None, "generation": None})
    assert TASKS["needle"].lacks(replace(job, settings=bare)) == "evaluate.needle is not there; set needle.contexts"
    assert {cell.task for cell in all_cells(replace(job, settings=bare))} == {"heldout", "reconstruction"}
    assert all_cells(replace(job, run=None), ["heldout", "needle", "reconstruction"]) == []
    assert [cell.name for cell in all_cells(replace(job, run=None))] == ["prompt-0"]


def test_an_untrained_models_held_out_loss_is_uniform_and_over_the_unigram(job: EvaluateJob) -> None:
    records = [measure(job, f"loss-video-{source}") for source in ("books", "clips")]
    rows = {row["modality"]: row for row in tabulate(job, records, "all")}
    assert rows["text"]["nats_per_token"] == pytest.approx(np.log(32000), abs=0.1)
    assert rows["vision"]["nats_per_token"] == pytest.approx(np.log(256), abs=0.1)
    for row in rows.values():
        assert 0 < row["unigram_heldout"] < row["unigram_train"] < row["nats_per_token"]
    assert rows["text"]["targets"] == sum(record["targets"]["text"] for record in records)
    small = replace(job, settings=job.settings.model_copy(update={"max_sequences": 1}))
    assert measure(small, "loss-text-books")["sequences"] == 1


def test_needles_are_asked_over_all_depths_and_without_one_in_contexts_that_hold_the_answer(job: EvaluateJob) -> None:
    results = {f"needle-128-{number}": measure(job, f"needle-128-{number}") for number in (0, 1)}
    (row,) = TASKS["needle"].rows(job, results)
    assert row["depths"] == [0.0, 0.5, 1.0]
    assert [(one["round"], one["depth"]) for one in row["answers"]] == [
        (number, depth) for number in (0, 1) for depth in (0.0, 0.5, 1.0, None)
    ]
    assert all(one["tokens"] <= 128 - 16 for one in row["answers"])
    assert len({one["needle"] for one in row["answers"]}) == 2
    assert row["accuracy"] == [0.0, 0.0, 0.0]
    assert row["digit_nats"] == pytest.approx([np.log(32000)] * 3, abs=0.3)
    assert row["choice_nats"] == pytest.approx([np.log(10)] * 3, abs=0.3)
    (of_one,) = TASKS["needle"].rows(job, {"needle-128-1": results["needle-128-1"]})
    assert (row["rounds"], of_one["rounds"]) == (2, 1)
    assert {one["round"] for one in of_one["answers"]} == {1}


def test_a_model_is_asked_once_and_the_true_answers_logits_are_those_of_one_whole_pass(job: EvaluateJob) -> None:
    model = job.subject.model()
    prompt, truth = np.arange(5, 45), np.array([100, 200, 300])
    with inference(model):
        answer, logits = ask(Decoder(model, [prompt], room=4), truth, 32000, VOCABULARY.eos_id, 4)
        whole = model(torch.from_numpy(np.concatenate([prompt, truth]))[None]).logits[0, :, :32000]
    np.testing.assert_allclose(logits, whole[39:42].numpy(), atol=1e-4)
    (greedy,) = generate_text(model, VOCABULARY, [prompt], 4)
    assert answer == greedy.tolist()


def test_prompts_that_begin_alike_are_prefilled_as_if_each_were_alone(job: EvaluateJob) -> None:
    model = job.subject.model()
    text = np.arange(100, 140)
    prompts = [np.concatenate([text[:place], [7, 8], text[place:]]) for place in (0, 1, 20, 20, 40)] + [text[:30], text]
    with inference(model):
        shared = [decoder.logits(0, 32000) for decoder in prefilled(model, prompts, 4)]
        alone = [Decoder(model, [prompt]).logits(0, 32000) for prompt in prompts]
    for one, other in zip(shared, alone, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-5)
    assert shared_lengths([np.array(one) for one in ([1, 9, 9], [1, 2, 9, 9], [1, 2, 3])]) == [1, 2, 2]
    assert shared_lengths([np.array([1, 2])] * 3) == [1, 1, 1]


def test_nats_of_digits_are_cross_entropies_among_all_ids_and_among_ten() -> None:
    tokenizer = load_text_tokenizer()
    logits = np.random.default_rng(0).normal(size=(7, 32000)).astype(np.float32)
    digits = follow(tokenizer, "is:", "1234567")[-7:]
    whole = torch.nn.functional.cross_entropy(torch.from_numpy(logits), torch.from_numpy(digits).long())
    assert nats(logits, digits) == pytest.approx(float(whole), rel=1e-5)
    logits[:, :] = 5.0
    assert choice_nats(logits, digits, tokenizer) == pytest.approx(np.log(10))
    assert choice_nats(logits, np.full(7, 500), tokenizer) is None


def test_reconstructions_of_both_splits_are_measured_and_held_out_pairs_are_shown(job: EvaluateJob) -> None:
    heldout = measure(job, "reconstruction-heldout")
    train = measure(job, "reconstruction-train")
    assert [one["key"] for one in heldout["objects"]] == ["clips/held-a.mp4"]
    assert [one["key"] for one in train["objects"]] == ["clips/train-a.mp4"]
    assert heldout["psnr"] == pytest.approx(heldout["objects"][0]["psnr"])
    assert len(heldout["pairs"]) == 3
    assert train["pairs"] == []
    with job.store.open(heldout["pairs"][0]["file"]) as file:
        assert Image.open(file).size == (16, 34)


def test_a_continuation_is_measured_beside_the_last_frame_standing_still(job: EvaluateJob) -> None:
    first, again = (measure(job, "continuation-0") for _ in range(2))
    assert first == again
    assert first["given"] == first["frames"] == 2
    assert first["code_agreement_still"] > first["code_agreement"]
    with job.store.open(first["file"]) as file:
        assert Image.open(file).size == (4 * 18 - 2 + 2, 34)
    assert "skipped" in TASKS["generation"].measure(job, Cell("continuation-9", "generation", {"window": 9}))


def test_a_continuations_prompt_is_what_training_saw_up_to_the_next_frame(job: EvaluateJob) -> None:
    codes = np.arange(32).reshape(2, 16)
    prompt = continuation_prompt(job, "clips", {}, codes)
    begin = job.subject.tokenizer().encode("<vision>")
    assert prompt.tolist() == [
        VOCABULARY.bos_id,
        *begin,
        *(codes[0] + 32000),
        VOCABULARY.eof_id,
        *(codes[1] + 32000),
        VOCABULARY.eof_id,
    ]


def test_frames_come_from_a_text_prompt(job: EvaluateJob) -> None:
    result = measure(job, "prompt-0")
    assert result["prompt"] == "a red square"
    with job.store.open(result["file"]) as file:
        assert Image.open(file).size == (2 * 18 - 2, 16)


def test_a_strip_sets_frames_apart_by_transparent_gaps() -> None:
    picture = strip([np.full((2, 4, 4, 3), 9, np.uint8), np.full((1, 4, 4, 3), 9, np.uint8)])
    assert picture.shape == (10, 10, 4)
    assert picture[:4, 4:6, 3].max() == 0
    assert picture[6:, 6:, 3].max() == 0
    assert picture[0, 0].tolist() == [9, 9, 9, 255]
    apart = strip([np.full((3, 8, 8, 3), 9, np.uint8)], given=2)
    assert np.flatnonzero(apart[0, :, 3] == 0).tolist() == [8, 9, 18, 19, 20]


@pytest.mark.slow
@pytest.mark.usefixtures("local_ray")
def test_the_stage_runs_on_ray_and_repeats_only_the_cells_that_were_not_committed(job: EvaluateJob) -> None:
    evaluate = job.settings.model_copy(update={"generation": None})
    recipe = job.run.recipe.model_copy(update={"evaluate": evaluate})
    own = job_of(recipe, job.run.outputs, "evaluate-ray")
    store = own.store

    def run() -> EvaluateRecord:
        with bar("evaluate", None, "cell") as line:
            return evaluate_all(own, line)

    def stamps() -> dict[str, int]:
        return {name: Path(store.path(name)).stat().st_mtime_ns for name in store.names("partitions")}

    first = run()
    before = stamps()
    assert len(before) == 9
    store.delete("partitions/needle-256-1.json")
    again = run()
    assert again == first
    assert {name for name, stamp in stamps().items() if before[name] != stamp} == {"partitions/needle-256-1.json"}
    assert {(row["stage"], row["source"], row["modality"]) for row in first.figures.heldout} == {
        ("text", "books", "text"),
        ("text", "all", "text"),
        *((stage, "books", "text") for stage in ("video", "final")),
        *(
            (stage, source, m)
            for stage in ("video", "final")
            for source in ("clips", "all")
            for m in ("text", "vision")
        ),
    }
    assert [one["context"] for one in first.figures.needle] == [128, 256]
    assert all(store.exists(name) for name in first.outputs.pictures)
