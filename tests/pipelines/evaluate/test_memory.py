"""What an evaluation takes of its workers, and the recipes that are refused for it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from jobs.cli import main
from pipelines.evaluate.memory import answering, check_evaluation, evaluation_memory
from pipelines.evaluate.stage import EvaluateStage
from pipelines.recipe.load import load_recipe
from storage.errors import UserError

RECIPES = Path(__file__).parents[3] / "recipes"
LWM = ["lwm-text-7b.yaml", "lwm-vision-7b.yaml"]
NOWHERE = "text_tokenizer.path=/nowhere"
GIB = 2**30


@pytest.mark.parametrize("name", LWM)
def test_the_evaluation_of_lwm_fits_its_workers(name):
    recipe = load_recipe(RECIPES / name, [NOWHERE])
    cells = evaluation_memory(recipe, int(recipe.evaluate.device_memory * GIB))
    assert {cell.workers for cell in cells} == {recipe.evaluate.sp}
    assert max(cell.context for cell in cells if cell.task == "needle") == 2**20
    assert {cell.context for cell in cells if cell.task == "heldout"} == {s.context for s in recipe.curriculum}
    assert all(cell.fits for cell in cells)
    check_evaluation(recipe)


def test_an_evaluation_that_cannot_fit_is_refused_with_how_many_workers_it_needs():
    recipe = load_recipe(RECIPES / LWM[0], [NOWHERE, "evaluate.sp=4"])
    with pytest.raises(UserError) as error:
        EvaluateStage(recipe, None).check()
    assert "needle at 1048576 tokens takes 14" in str(error.value)  # 13 GiB of weights and 128 of keys
    assert "evaluate.sp 4, more than evaluate.device_memory 75; set evaluate.sp to 16 or" in str(error.value)
    with pytest.raises(UserError, match="take larger devices or leave that context out"):
        check_evaluation(load_recipe(RECIPES / LWM[0], [NOWHERE, "evaluate.device_memory=12"]))
    check_evaluation(load_recipe(RECIPES / LWM[0], [NOWHERE, "evaluate.sp=4", "evaluate.device_memory=null"]))


def test_plan_memory_covers_the_evaluation_and_how_a_context_is_answered(capsys):
    recipe, arguments = str(RECIPES / LWM[0]), ["--memory", "--set", NOWHERE, "--set", "evaluate.sp=8"]
    assert main(["plan", recipe, *arguments, "--gpu-memory", "75"]) == 0
    printed = capsys.readouterr().out
    assert "evaluate, needle at 524288: " in printed
    assert "on 8 worker(s); does not fit: evaluate.sp 16 fits" in printed
    assert "a context of 1048576 is answered by: 16 x " in printed
    assert main(["plan", recipe, *arguments, "--json"]) == 0
    rows = [row for row in json.loads(capsys.readouterr().out) if row["stage"] == "evaluate"]
    (million,) = (row for row in rows if row["context"] == 2**20 and row["task"] == "needle")
    assert million["peak"] == sum(million["device"].values())
    assert million["fits"] is None


def test_the_table_of_the_documentation_is_the_plan_s():
    lines = (RECIPES.parent / "docs" / "inference.md").read_text(encoding="utf-8").splitlines()
    stated = {
        line.split("|")[1].strip(): [int(cell) for cell in line.split("|")[2:-1]]
        for line in lines
        if line.startswith(("| 128K", "| 256K", "| 512K", "| 1M"))
    }
    recipe = load_recipe(RECIPES / LWM[0], [NOWHERE])
    planned: dict[int, list[int]] = {}
    for device in (75, 135):
        for answer in answering(recipe, device * GIB):
            assert answer.least is not None
            planned.setdefault(answer.context, []).append(answer.least[0])
    names = {"128K": 2**17, "256K": 2**18, "512K": 2**19, "1M": 2**20}
    assert stated == {name: planned[context] for name, context in names.items()}
