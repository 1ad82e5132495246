"""The page and the JSON of a whole (tiny) run."""

from __future__ import annotations

import dataclasses
import json
import sys
import types
from dataclasses import dataclass
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from pipelines.build import build_stages
from pipelines.dag.manifest import StageOutput, record_json
from pipelines.evaluate.cell import Hole
from pipelines.evaluate.job import EvaluateJob
from pipelines.evaluate.record import EvaluateFigures, EvaluateOutputs, EvaluateRecord
from pipelines.evaluate.run import rows_by_task
from pipelines.evaluate.run_cells import Results
from pipelines.evaluate.run_data import RunData
from pipelines.evaluate.stage import EvaluateStage
from pipelines.evaluate.task_table import TASKS, Task, all_cells
from pipelines.recipe import Recipe
from pipelines.report.page import shown_rows
from pipelines.report.record import ReportRecord
from pipelines.report.summary import _mfu
from pipelines.report.write import write_report
from pipelines.sources.list_sources import list_sources
from pipelines.tokenize.record import TokenizeFigures, TokenizeOutputs, TokenizeRecord
from pipelines.tokenize.stage import TokenizeStage
from storage.store import Store
from testing.tiny_run import VOCABULARY, make_run, output


@dataclass(frozen=True)
class Run:
    recipe: Recipe
    outputs: dict[str, StageOutput[Any]]

    def report(self, folder: Path, **changes: Any) -> ReportRecord:
        """Write the report of the run, or of a changed one."""
        run = dataclasses.replace(self, **changes)
        stages = build_stages(run.recipe, list_sources(self.recipe))
        return write_report(run.recipe, stages, run.outputs, Store(str(folder)))


HOSTILE = "s3://bucket/<script>alert(1)</script>.mp4"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    recipe, made = make_run(tmp_path_factory.mktemp("run"))
    store = Store(recipe.storage.root).at("stages", "evaluate")
    data = RunData(recipe, VOCABULARY, made)
    job = EvaluateJob.of_run(data, data.trained(data.last), store)
    cells = [cell for cell in all_cells(job) if cell.name not in ("continuation-2", "continuation-3")]
    results = Results({cell.name: TASKS[cell.task].measure(job, cell) for cell in cells})
    outputs = EvaluateOutputs(tuple(results.by_cell), tuple(store.names("pictures")))
    bad = {"url": HOSTILE, "key": "k", "record": None, "reason": "not a video that can be read"}
    tokenize = TokenizeRecord(TokenizeOutputs(), TokenizeFigures(5, 12345, thinned_videos=2, frames_left_out=1500))
    evaluated = EvaluateRecord(outputs, EvaluateFigures.of(rows_by_task(job, cells, results), ()))
    for stage in build_stages(recipe):
        if isinstance(stage, TokenizeStage):
            done = output(stage, store, tokenize, 3.0)
            made[stage.name] = StageOutput(store, dataclasses.replace(done.manifest, quarantine=(bad,)))
        if isinstance(stage, EvaluateStage):
            made[stage.name] = output(stage, store, evaluated, 9.0)
    return Run(recipe, made)


class Page(HTMLParser):
    """Collects tags, addresses and text."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.addresses: list[str] = []
        self.words: list[str] = []
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.addresses += [
            value or "" for key, value in attrs if key in ("src", "href", "xlink:href", "data", "srcset")
        ]

    def handle_data(self, data: str) -> None:
        self.words.append(data.strip())


def test_the_page_needs_no_network_and_no_script(run: Run, tmp_path: Path) -> None:
    run.report(tmp_path)
    html = (tmp_path / "report.html").read_text()
    page = Page(html)
    assert not {"script", "link", "iframe", "object"} & set(page.tags)
    assert "@import" not in html
    assert "url(http" not in html
    assert page.addresses
    assert all(address.startswith(("data:image/png;base64,", "#")) for address in page.addresses)
    assert page.tags.count("svg") == 4
    assert page.tags.count("img") == 3 + 2 + 1


def test_the_page_shows_every_part_of_the_run_and_escapes_what_it_quotes(run: Run, tmp_path: Path) -> None:
    run.report(tmp_path)
    page = Page((tmp_path / "report.html").read_text())
    sections = [word for word in page.words if word in _SECTIONS]
    assert sections == list(_SECTIONS)
    assert HOSTILE in page.words
    assert "“a red square”" in page.words
    text = " ".join(page.words)
    assert "On 559 held-out text tokens the final model's loss is" in text
    assert "2 videos thinned to max_frames: 1,500 frames left out." in text
    assert "rope_theta: 10000.0" in text


_SECTIONS = ("What the numbers say", "Pipeline", "Training", "Held-out loss", "Needle in a haystack")
_SECTIONS += ("Frames through the VQGAN", "Generated frames", "Shards", "Quarantine", "Recipe")


def test_the_json_holds_every_figure_and_both_files_also_lie_in_the_runs_root(run: Run, tmp_path: Path) -> None:
    part = run.report(tmp_path)
    facts = json.loads((tmp_path / "report.json").read_text(), parse_constant=pytest.fail)
    assert facts["evaluation"] == record_json(run.outputs["evaluate"].record)["figures"]
    assert facts["training"][1]["per_step"]["vision_nats"] == [600.0, 500.0, 400.0, 300.0]
    assert facts["training"][1]["vision_nats_per_token"] == 3.0
    assert facts["training"][1]["sources"] == [{"source": "books", "targets": 200, "nats_per_token": 4.5}]
    assert facts["training"][1]["mfu"] == pytest.approx(0.4)
    for training in facts["training"]:
        figures = run.outputs[f"train-{training['stage']}"].record.figures
        assert training["tokens_per_second"] == pytest.approx(figures.tokens_per_second)
        assert training["per_step"]["seconds"] == [0.8] * 4
    assert [row["split"] for row in facts["shards"]] == ["train", "heldout"] * 3
    assert facts["quarantine"][0]["stage"] == "tokenize"
    assert list(part.figures.verdicts) == facts["verdicts"]
    for name in ("report.html", "report.json"):
        assert (Path(run.recipe.storage.root) / name).read_bytes() == (tmp_path / name).read_bytes()


def test_the_same_run_makes_the_same_bytes(run: Run, tmp_path: Path) -> None:
    for folder in ("a", "b"):
        run.report(tmp_path / folder)
    for name in ("report.html", "report.json"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_a_run_of_text_alone_with_nothing_held_out_has_a_report_too(run: Run, tmp_path: Path) -> None:
    evaluated = run.outputs["evaluate"]
    bare = dataclasses.replace(evaluated.manifest, record=EvaluateRecord(EvaluateOutputs((), ()), EvaluateFigures()))
    kept = {name: run.outputs[name] for name in ("sources", "tokenize", "pack-text", "train-text")}
    train = dataclasses.replace(run.recipe.train, stages=run.recipe.train.stages[:1])
    text_only = run.recipe.model_copy(update={"train": train})
    outputs = {**kept, "evaluate": StageOutput(evaluated.store, bare)}
    run.report(tmp_path, recipe=text_only, outputs=outputs)
    page = Page((tmp_path / "report.html").read_text())
    assert "Nothing was held out" in " ".join(page.words)
    assert "Generated frames" not in page.words


def test_cells_that_could_not_be_measured_are_named_with_their_reasons(run: Run, tmp_path: Path) -> None:
    evaluated = run.outputs["evaluate"]
    holes = (Hole("needle-512-0", "needle", "a worker or its node died, 5 times"), Hole("needle-512-1", "needle", "it"))
    figures = dataclasses.replace(evaluated.record.figures, holes=tuple(map(dataclasses.asdict, holes)))
    record = EvaluateRecord(evaluated.record.outputs, figures)
    manifest = dataclasses.replace(evaluated.manifest, record=record)
    run.report(tmp_path, outputs={**run.outputs, "evaluate": StageOutput(evaluated.store, manifest)})
    page = Page((tmp_path / "report.html").read_text())
    assert "Holes" in page.words
    assert "a worker or its node died, 5 times" in page.words
    text = " ".join(page.words)
    assert "2 cells of the evaluation could not be measured and the figures are without: needle-512-0 (a worker" in text
    facts = json.loads((tmp_path / "report.json").read_text())
    assert facts["verdicts"][-1]["grade"] == "bad"
    assert [hole["cell"] for hole in facts["evaluation"]["holes"]] == ["needle-512-0", "needle-512-1"]


def test_a_task_without_a_plot_of_its_own_has_a_table_and_a_verdict(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = types.ModuleType("pipelines.evaluate.tasks.echo")
    module.TITLE, module.verdict = "Echoes", lambda rows: ("fair", f"{len(rows)} echoes.")
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setitem(TASKS, "echo", Task("echo", "echo"))
    evaluated = run.outputs["evaluate"]
    rows = ({"word": "<b>", "share": 0.5, "answers": [{"long": 1}]}, {"word": "b", "share": None, "answers": []})
    record = EvaluateRecord(evaluated.record.outputs, EvaluateFigures.of({"echo": rows}, ()))
    manifest = dataclasses.replace(evaluated.manifest, record=record)
    run.report(tmp_path, outputs={**run.outputs, "evaluate": StageOutput(evaluated.store, manifest)})
    words = Page((tmp_path / "report.html").read_text()).words
    start = words.index("Echoes")
    assert [word for word in words[start:] if word][:7] == ["Echoes", "word", "share", "<b>", "0.500", "b", "-"]
    assert "2 echoes." in words


def test_secrets_in_storage_options_stay_out_of_the_report(run: Run, tmp_path: Path) -> None:
    recipe = run.recipe
    options = {"secret": "hunter2", "client_kwargs": {"aws_access_key_id": "hunter2", "endpoint_url": "http://here"}}
    storage = recipe.storage.model_copy(update={"options": options})
    run.report(tmp_path, recipe=recipe.model_copy(update={"storage": storage}))
    for name in ("report.html", "report.json"):
        text = (tmp_path / name).read_text()
        assert "hunter2" not in text
        assert "http://here" in text


def test_the_held_out_table_says_nothing_twice(run: Run) -> None:
    rows = run.outputs["evaluate"].record.figures.heldout
    assert [(row["stage"], row["source"], row["modality"]) for row in shown_rows(rows)] == [
        ("text", "books", "text"),
        ("final", "books", "text"),
        ("final", "clips", "text"),
        ("final", "clips", "vision"),
        ("final", "all", "text"),
    ]


def test_the_mfu_of_a_stage_is_over_all_its_seconds() -> None:
    steps = [
        {"seconds": 1.0, "machine": {"mfu": mfu, "step_seconds": seconds}} for mfu, seconds in ((0.4, 1), (0.1, 4))
    ]
    assert _mfu(steps) == pytest.approx(0.8 / 5), "a step that waited for its batch computed no more for it"
    assert _mfu([{"seconds": 1.0, "machine": {}}]) is None
