"""The tasks at length and those about a user's questions, on a tiny run with a random model and files made for it."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from model.inference.answers import AnswerScores
from model.inference.generate import generate_text
from model.inference.kv_decoder import Decoder
from model.llama.llama import inference
from pipelines.evaluate.asking import asked_together, batches, greedy_answers, slices
from pipelines.evaluate.job import EvaluateJob
from pipelines.evaluate.run_data import RunData
from pipelines.evaluate.task_table import TASKS, all_cells
from pipelines.evaluate.tasks import multi_needle, ruler_task, video_needle
from pipelines.evaluate.tasks.needle_prompts import CITIES
from pipelines.evaluate.tasks.ruler import retrieval
from pipelines.recipe import output_settings
from pipelines.recipe.evaluate import Evaluate
from pipelines.sources.list_sources import list_sources
from storage.errors import UserError
from storage.store import Store
from testing.tiny_run import VOCABULARY, make_run, write_clip

SQUAD = {
    "data": [
        {
            "paragraphs": [
                {
                    "context": f"Town {n} has a mayor. Her name is Ann-{n}.",
                    "qas": [{"question": f"Who is mayor of town {n}?", "answers": [{"text": f"Ann-{n}"}]}],
                }
            ]
        }
        for n in range(9)
    ]
}
CHOICES = [
    {"question": "What moves?", "choices": ["a square", "a bird"], "answer": 0, "video": "held-a.mp4", "id": "first"},
    {"question": "Which colour?", "choices": ["red", "blue", "green"], "answer": "A", "video": "held-a.mp4"},
    {"question": "What is shown?", "choices": ["a dot", "a line"], "answer": "B", "image": "dot.png"},
    {"question": "Who?", "choices": ["he", "she"], "answer": 1, "context": "She did it."},
    {"question": "Where?", "choices": ["here"], "answer": 0},
    {"question": "Gone?", "choices": ["yes", "no"], "answer": 0, "video": "none.mp4"},
    {"question": "Text?", "choices": ["yes", "no"], "answer": 0, "video": "train-a.txt"},
    {"question": "Elsewhere?", "choices": ["yes", "no"], "answer": 0, "image": "/etc/hostname"},
]
ANSWERS = [
    {"question": "Who did it?", "answers": ["she"], "context": "She did it."},
    {"question": "How many?", "answers": ["one", "1"], "video": "held-a.mp4"},
    {"question": "How many?", "answers": []},
]


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> EvaluateJob:
    recipe, inputs = make_run(tmp_path_factory.mktemp("run"))
    data = Path(recipe.storage.data)
    write_clip(data / "held-b.mp4", speed=5)
    pixels = np.random.default_rng(0).integers(0, 255, (24, 24, 3), np.uint8)
    Image.fromarray(pixels).save(data / "dot.png")
    for name, rows in (("choices", CHOICES), ("answers", ANSWERS)):
        (data / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (data / "squad.json").write_text(json.dumps(SQUAD))
    run = RunData(recipe, VOCABULARY, inputs, listing=list_sources(recipe))
    return EvaluateJob.of_run(run, run.trained(run.last), Store(recipe.storage.root).at("stages", "evaluate"))


def with_settings(job: EvaluateJob, **evaluate: Any) -> EvaluateJob:
    return replace(job, settings=Evaluate.model_validate(evaluate))


def results_of(job: EvaluateJob, task: str) -> dict[str, dict[str, Any]]:
    """What the cells of a task commit, after its check."""
    assert TASKS[task].lacks(job) is None
    TASKS[task].check(job)
    return json.loads(json.dumps({cell.name: TASKS[task].measure(job, cell) for cell in all_cells(job, [task])}))


def measured(job: EvaluateJob, task: str) -> list[dict[str, Any]]:
    return list(TASKS[task].rows(job, results_of(job, task)))


def answers_of(results: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    return [answer for result in results.values() for answer in result["answers"]]


def test_several_needles_are_asked_for_in_every_context_and_case(job: EvaluateJob) -> None:
    cases = [{"hidden": 3, "asked": 2}, {"hidden": 2, "asked": 1}]
    own = with_settings(job, multi_needle={"contexts": [400], "cases": cases, "rounds": 2})
    rows = measured(own, "multi-needle")
    assert [(row["context"], row["hidden"], row["asked"]) for row in rows] == [
        (400, hidden, asked) for hidden, asked in ((3, 2), (2, 1))
    ]
    for row in rows:
        assert row["rounds"] == len(row["answers"]) == 2
        assert all(len(one["asked"]) == len(one["depths"]) == row["asked"] for one in row["answers"])
        assert row["accuracy"] == row["all_right"] == 0.0
    assert rows[0]["answers"][0]["asked"] != rows[0]["answers"][1]["asked"]
    assert TASKS["multi-needle"].verdict(rows)[0] == "bad"


def test_whoever_reads_the_prompts_can_answer_them(job: EvaluateJob, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = job.subject.tokenizer()

    def read(prompts: list[np.ndarray], *_: object) -> list[list[int]]:
        answers = []
        for text, _, question in (tokenizer.decode(one).rpartition("\n\nQuestion:") for one in prompts):
            hidden = re.findall(r"number (?:of )?(\S+)?.*? is: (\d{7})\.|magic (.+?) number is: (\d{7})\.", text)
            known = {key or city: number or other for key, number, city, other in hidden}
            answers.append(tokenizer.encode(", ".join(n for k, n in known.items() if k in question)).tolist())
        return answers

    for module in (multi_needle, ruler_task):
        monkeypatch.setattr(module, "asked_together", lambda model, prompts, most, group: prompts)
        monkeypatch.setattr(module, "greedy_answers", read)
    cases = [{"hidden": 3, "asked": 2}, {"hidden": 2, "asked": 1}]
    settings = {"contexts": [450], "cases": cases, "rounds": 3}
    needles = measured(with_settings(job, multi_needle=settings), "multi-needle")
    assert [(row["accuracy"], row["all_right"]) for row in needles] == [(1.0, 1.0)] * 2
    tasks = ["niah_single_1", "niah_single_2", "niah_multikey_1", "niah_multikey_2", "niah_multiquery"]
    (row,) = measured(with_settings(job, ruler={"contexts": [900], "tasks": tasks, "examples": 2}), "ruler")
    assert {task: row[task] for task in tasks} == dict.fromkeys(tasks, 1.0)
    assert row["mean"] == 1.0


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"contexts": [256], "cases": [{"hidden": 2, "asked": 2}]}, "256 tokens keep 32 for the answer, and 2 numbers"),
        ({"contexts": [512], "cases": [{"hidden": 40, "asked": 1}]}, "512 tokens leave no room for text"),
    ],
)
def test_needles_that_do_not_fit_are_refused_before_anything_runs(
    job: EvaluateJob, settings: dict[str, Any], reason: str
) -> None:
    with pytest.raises(UserError, match=reason):
        TASKS["multi-needle"].check(with_settings(job, multi_needle=settings))


def test_no_more_needles_are_hidden_than_there_are_cities() -> None:
    limit = len(CITIES)
    for hidden, fits in ((limit, True), (limit + 1, False)):
        try:
            Evaluate.model_validate({"multi_needle": {"contexts": [9], "cases": [{"hidden": hidden, "asked": 1}]}})
        except ValueError:
            assert not fits
        else:
            assert fits


def test_rulers_tasks_have_a_score_each_and_a_mean_at_every_context(
    job: EvaluateJob, monkeypatch: pytest.MonkeyPatch
) -> None:
    tasks = ["niah_multiquery", "vt"]
    own = with_settings(job, ruler={"contexts": [480, 500], "tasks": tasks, "examples": 1, "squad": "squad.json"})
    monkeypatch.setattr(retrieval, "ANSWER_TOKENS", 20)
    rows = measured(own, "ruler")
    assert [row["context"] for row in rows] == [480, 500]
    for row in rows:
        assert row["examples"] == 3
        assert {row[task] for task in (*tasks, "qa_1")} == {0.0}
        assert row["mean"] == 0.0
        assert row["is_whole"]
    grade, sentence = TASKS["ruler"].verdict(rows)
    assert grade == "bad"
    assert "over 3 of the 13 tasks" in sentence


def test_of_ruler_a_context_with_a_hole_does_not_count_as_reached(job: EvaluateJob) -> None:
    own = with_settings(job, ruler={"contexts": [500], "tasks": ["vt", "fwe"], "examples": 1})
    done = {"context": 500, "task": "vt", "answers": [{"score": 1.0}]}
    (row,) = TASKS["ruler"].rows(own, {"ruler-500-vt-0": done})
    assert (row["vt"], row["fwe"], row["mean"], row["is_whole"]) == (1.0, None, 1.0, False)
    grade, sentence = TASKS["ruler"].verdict([row])
    assert grade == "bad"
    assert "not reached" in sentence


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"contexts": [200]}, r"evaluate.ruler.contexts: \d+ tokens leave no room"),
        (
            {"contexts": [4096], "squad": "choices.jsonl"},
            r"evaluate.ruler.squad: .*choices.jsonl: .*published",
        ),
        ({"contexts": [4096], "hotpotqa": "none.json"}, r"none.json"),
    ],
)
def test_a_ruler_that_can_only_fail_is_refused(job: EvaluateJob, settings: dict[str, Any], reason: str) -> None:
    with pytest.raises(UserError, match=reason):
        TASKS["ruler"].check(with_settings(job, ruler=settings))


def test_loss_is_measured_by_position_over_windows_of_one_document_each(job: EvaluateJob) -> None:
    own = with_settings(job, perplexity={"context": 200, "windows": 4})
    rows = measured(own, "perplexity")
    assert [(row["from"], row["to"]) for row in rows][-2:] == [(64, 127), (128, 199)]
    (windows,) = {row["windows"] for row in rows}
    assert 2 <= windows < 4
    assert sum(row["targets"] for row in rows) == windows * 199
    assert [row["nats_per_token"] for row in rows] == pytest.approx([np.log(32000)] * len(rows), abs=0.2)
    assert TASKS["perplexity"].verdict(rows)[0] == "bad"
    too_long = with_settings(job, perplexity={"context": 9000, "windows": 1})
    with pytest.raises(Exception, match="no held-out document has 9000 tokens"):
        measured(too_long, "perplexity")


@pytest.mark.parametrize("letters", [False, True])
def test_the_likeliest_choice_counts_and_lines_that_cannot_be_asked_are_named(job: EvaluateJob, letters: bool) -> None:
    own = with_settings(job, choice={"made": {"file": "choices.jsonl", "frames": 3, "letters": letters}})
    results = results_of(own, "choice")
    (row,) = TASKS["choice"].rows(own, results)
    answers = answers_of(results)
    assert [answer["line"] for answer in answers] == [1, 2, 3, 4]
    assert answers[0]["name"] == "first"
    assert (row["asked"], row["of_questions"], row["left_out"]) == (4, 7, 4)
    reasons = {one["line"]: one["reason"] for one in row["reasons"]}
    assert list(reasons) == [5, 6, 7, 8]
    assert "no such object" in reasons[6]
    assert "/etc/hostname" in reasons[8]
    assert row["chance"] == pytest.approx((3 / 2 + 1 / 3) / 4)
    for answer in answers:
        chosen = int(np.argmax(answer["log_probability"]))
        assert answer["is_right"] == (chosen == answer["right"])
        if letters:
            assert answer["tokens"] == [1] * len(answer["tokens"])
    assert row["accuracy"] == np.mean([answer["is_right"] for answer in answers])


def test_questions_about_one_film_are_answered_as_if_each_were_asked_alone(job: EvaluateJob) -> None:
    together = with_settings(job, choice={"made": {"file": "choices.jsonl", "frames": 3}})
    alone = with_settings(job, choice={"made": {"file": "choices.jsonl", "frames": 3, "at_most": 1}})
    first, *others = answers_of(results_of(together, "choice"))
    (one,) = answers_of(results_of(alone, "choice"))
    assert len(others) == 3
    np.testing.assert_allclose(one["log_probability"], first["log_probability"], rtol=0, atol=1e-4)


def test_short_answers_are_judged_by_the_answers_that_a_line_accepts(job: EvaluateJob) -> None:
    own = with_settings(job, qa={"made": {"file": "answers.jsonl", "frames": 2, "answer_tokens": 5}})
    results = results_of(own, "qa")
    (row,) = TASKS["qa"].rows(own, results)
    assert [answer["line"] for answer in answers_of(results)] == [1, 2]
    assert (row["asked"], row["of_questions"], row["left_out"]) == (2, 2, 1)
    assert row["exact"] == row["f1"] == row["contained"] == 0.0
    assert TASKS["qa"].verdict([row])[0] == "bad"


@pytest.mark.parametrize(("task", "file"), [("choice", "answers.jsonl"), ("qa", "choices.jsonl"), ("qa", "none.jsonl")])
def test_a_file_without_a_usable_line_is_refused_before_anything_runs(job: EvaluateJob, task: str, file: str) -> None:
    with pytest.raises(UserError, match=file):
        TASKS[task].check(with_settings(job, **{task: {"made": {"file": file}}}))


def test_a_hidden_frame_is_told_from_candidates_at_every_depth(job: EvaluateJob) -> None:
    own = with_settings(job, video_needle={"frames": [4, 6], "depths": 3, "rounds": 2, "candidates": 2})
    rows = measured(own, "video-needle")
    assert [row["frames"] for row in rows] == [4, 6]
    for row in rows:
        assert row["by"] == "recognition"
        assert row["depths"] == [0.0, 0.5, 1.0]
        assert row["chance"] == 0.5
        assert row["accuracy_without"] is None
        assert len(row["accuracy"]) == len(row["needle_gain"]) == 3
        assert np.abs(row["needle_gain"]).max() > 0
        assert [(one["round"], one["depth"]) for one in row["answers"]] == [
            (number, depth) for number in (0, 1) for depth in (0.0, 0.5, 1.0, None)
        ]
    assert "A frame hidden in films of up to 6 frames" in TASKS["video-needle"].verdict(rows)[1]


def test_a_model_that_remembers_every_frame_of_a_film_tells_the_hidden_one(
    job: EvaluateJob, monkeypatch: pytest.MonkeyPatch
) -> None:
    def seen(job: EvaluateJob, prompts: list[np.ndarray], choices: list[list[np.ndarray]]) -> list[AnswerScores]:
        text = [prompt.tobytes() for prompt in prompts]
        counts = [[float(choice.tobytes() in one) for choice in own] for one, own in zip(text, choices)]
        return [AnswerScores(np.array(own), np.ones(len(own), np.int64)) for own in counts]

    monkeypatch.setattr(video_needle, "_scores", seen)
    settings = {"frames": [4], "depths": 3, "rounds": 6, "candidates": 3}
    (row,) = measured(with_settings(job, video_needle=settings), "video-needle")
    assert row["accuracy"] == [1.0, 1.0, 1.0]
    assert row["others_gain"] == [0.0, 0.0, 0.0]
    assert len({answer["right"] for answer in row["answers"] if "right" in answer}) > 1
    assert TASKS["video-needle"].verdict([row])[0] == "good"


def test_an_image_with_a_question_is_hidden_as_in_v_niah(job: EvaluateJob) -> None:
    own = with_settings(job, video_needle={"frames": [4], "depths": 2, "rounds": 1, "questions": "choices.jsonl"})
    (row,) = measured(own, "video-needle")
    assert row["by"] == "questions"
    assert row["accuracy_without"] in (0.0, 1.0)
    assert {one["right"] for one in row["answers"]} == {1}


def test_a_film_that_is_too_short_and_candidates_that_are_too_few_leave_a_reason(job: EvaluateJob) -> None:
    for settings, reason in (
        ({"frames": [28]}, "no held-out video has 28 frames"),
        ({"frames": [99]}, "99 frames, the needle and a candidate are 1,717 tokens, more than the last stage's"),
        ({"frames": [4], "candidates": 40}, "only 1?[0-9] different frames"),
    ):
        with pytest.raises(Exception, match=reason):
            measured(with_settings(job, video_needle=settings), "video-needle")


def test_tasks_say_what_they_lack(job: EvaluateJob) -> None:
    bare = with_settings(job)
    for task in ("multi-needle", "ruler", "perplexity", "choice", "qa", "video-needle"):
        assert f"evaluate.{task.replace('-', '_')} is not there" in TASKS[task].lacks(bare)
    alone = replace(with_settings(job, ruler={"contexts": [512], "tasks": ["vt"]}), run=None)
    assert TASKS["ruler"].lacks(alone) is None
    assert "set evaluate.text" in TASKS["ruler"].lacks(replace(alone, settings=Evaluate(ruler={"contexts": [512]})))


def test_settings_that_are_not_set_leave_earlier_evaluations_what_they_were() -> None:
    assert output_settings(Evaluate()).keys() == {"max_sequences", "needle", "generation", "reconstructions"}


def test_prompts_are_answered_together_as_they_are_alone(job: EvaluateJob) -> None:
    model = job.subject.model()
    generator = np.random.default_rng(1)
    begin = generator.integers(3, 32000, 30)
    prompts = [np.concatenate([begin, generator.integers(3, 32000, n)]) for n in (1, 5, 3)]
    alone = [generate_text(model, VOCABULARY, [prompt], 6)[0].tolist() for prompt in prompts]
    with inference(model):
        assert greedy_answers(asked_together(model, prompts, 6), VOCABULARY, 6) == alone
        assert greedy_answers(asked_together(model, [begin, begin[:7]], 6), VOCABULARY, 6) == [
            generate_text(model, VOCABULARY, [prompt], 6)[0].tolist() for prompt in (begin, begin[:7])
        ]
        assert greedy_answers(Decoder(model, prompts[:1], room=6), VOCABULARY, 6) == alone[:1]


def test_rows_that_end_are_let_go_and_the_others_go_on(job: EvaluateJob) -> None:
    model = job.subject.model()
    prompts = [np.arange(5, 25), np.arange(40, 70), np.arange(100, 110)]
    whole = [generate_text(model, VOCABULARY, [prompt], 8, eos_id=-1)[0].tolist() for prompt in prompts]
    ends = replace(VOCABULARY, eos_id=whole[1][2])
    with inference(model):
        answers = greedy_answers(asked_together(model, prompts, 8), ends, 8)
    expected = [row[: row.index(ends.eos_id)] if ends.eos_id in row else row for row in whole]
    assert answers == expected
    assert len(answers[1]) == whole[1].index(ends.eos_id) < 8


def test_prompts_are_batched_by_their_tokens_and_cells_cut_by_theirs() -> None:
    assert list(batches([5, 5, 5, 20, 3], 10)) == [[0, 1], [2], [3], [4]]
    assert list(batches([1] * 5, 100, most=2)) == [[0, 1], [2, 3], [4]]
    assert list(batches([], 10)) == []
    assert slices(5, 2**21) == [(0, 2), (2, 4), (4, 5)]
    assert slices(3, 2**30) == [(0, 1), (1, 2), (2, 3)]
    assert slices(3, 1) == [(0, 3)]
