"""The page and the JSON of a whole (tiny) run."""

from __future__ import annotations

import json
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from pipelines.evaluate import stage as evaluation
from pipelines.evaluate.job import EvaluateJob
from pipelines.recipe import Recipe
from pipelines.report import write_report
from pipelines.report.page import shown_rows
from pipelines.report.summary import _mfu
from storage.store import Store
from testing.tiny_run import VOCABULARY, make_run, with_run_facts

Run = tuple[Recipe, dict[str, tuple[Store, dict[str, Any]]]]
HOSTILE = "s3://bucket/<script>alert(1)</script>.mp4"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    recipe, made = make_run(tmp_path_factory.mktemp("run"))
    store = Store(recipe.storage.root).at("stages", "evaluate")
    job = EvaluateJob(recipe, VOCABULARY, made, store)
    parts = [part for part in evaluation.cut_parts(job) if part.name not in ("continuation-2", "continuation-3")]
    records = [
        {"part": one.name, "kind": one.kind, "result": evaluation.measure_of(one.kind)(job, one.name, **one.arguments)}
        for one in parts
    ]
    outputs = {"parts": [one.name for one in parts], "pictures": store.names("pictures")}
    bad = {"url": HOSTILE, "key": "k", "record": None, "reason": "not a video that can be read"}
    tokenize = {"outputs": {}, "figures": {"documents": 5, "tokens": 12345}, "quarantine": [bad]}
    inputs = {
        "sources": made["sources"],
        "vqgan": made["vqgan"],
        "tokenize": (store, tokenize),
        **{name: made[name] for name in ("pack-text", "train-text", "pack-video", "train-video")},
        "evaluate": (store, {"outputs": outputs, "figures": evaluation.collect(job, records)}),
    }
    return recipe, with_run_facts(inputs)


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
    write_report(*run, Store(str(tmp_path)))
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
    write_report(*run, Store(str(tmp_path)))
    page = Page((tmp_path / "report.html").read_text())
    sections = [word for word in page.words if word in _SECTIONS]
    assert sections == list(_SECTIONS)
    assert HOSTILE in page.words
    assert "“a red square”" in page.words
    text = " ".join(page.words)
    assert "On 559 held-out text tokens the final model's loss is" in text
    assert "rope_theta: 10000.0" in text


_SECTIONS = ("What the numbers say", "Pipeline", "Training", "Held-out loss", "Needle in a haystack")
_SECTIONS += ("Frames through the VQGAN", "Generated frames", "Shards", "Quarantine", "Recipe")


def test_the_json_holds_every_figure_and_both_files_also_lie_in_the_runs_root(run: Run, tmp_path: Path) -> None:
    recipe, inputs = run
    part = write_report(recipe, inputs, Store(str(tmp_path)))
    facts = json.loads((tmp_path / "report.json").read_text(), parse_constant=pytest.fail)
    assert facts["evaluation"] == inputs["evaluate"][1]["figures"]
    assert facts["training"][1]["per_step"]["vision_nats"] == [600.0, 500.0, 400.0, 300.0]
    assert facts["training"][1]["vision_nats_per_token"] == 3.0
    assert facts["training"][1]["sources"] == [{"source": "books", "targets": 200, "nats_per_token": 4.5}]
    assert facts["training"][1]["mfu"] == pytest.approx(0.4)
    for training in facts["training"]:
        figures = inputs[f"train-{training['stage']}"][1]["figures"]
        assert training["tokens_per_second"] == pytest.approx(figures["tokens_per_second"])
        assert training["per_step"]["seconds"] == [0.8] * 4
    assert [row["split"] for row in facts["shards"]] == ["train", "heldout"] * 3
    assert facts["quarantine"][0]["stage"] == "tokenize"
    assert part["figures"]["verdicts"] == facts["verdicts"]
    for name in ("report.html", "report.json"):
        assert (Path(recipe.storage.root) / name).read_bytes() == (tmp_path / name).read_bytes()


def test_the_same_run_makes_the_same_bytes(run: Run, tmp_path: Path) -> None:
    for folder in ("a", "b"):
        write_report(*run, Store(str(tmp_path / folder)))
    for name in ("report.html", "report.json"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_a_run_of_text_alone_with_nothing_held_out_has_a_report_too(run: Run, tmp_path: Path) -> None:
    recipe, inputs = run
    store, manifest = inputs["evaluate"]
    figures = {"heldout": [], "needle": [], "reconstruction": [], "generation": []}
    bare = {**manifest, "outputs": {"parts": [], "pictures": []}, "figures": figures}
    kept = {name: inputs[name] for name in ("sources", "tokenize", "pack-text", "train-text")}
    text_only = recipe.model_copy(update={"train": recipe.train.model_copy(update={"stages": recipe.train.stages[:1]})})
    write_report(text_only, {**kept, "evaluate": (store, bare)}, Store(str(tmp_path)))
    page = Page((tmp_path / "report.html").read_text())
    assert "Nothing was held out" in " ".join(page.words)
    assert "Generated frames" not in page.words


def test_secrets_in_storage_options_stay_out_of_the_report(run: Run, tmp_path: Path) -> None:
    recipe, inputs = run
    options = {"secret": "hunter2", "client_kwargs": {"aws_access_key_id": "hunter2", "endpoint_url": "http://here"}}
    storage = recipe.storage.model_copy(update={"options": options})
    write_report(recipe.model_copy(update={"storage": storage}), inputs, Store(str(tmp_path)))
    for name in ("report.html", "report.json"):
        text = (tmp_path / name).read_text()
        assert "hunter2" not in text
        assert "http://here" in text


def test_the_held_out_table_says_nothing_twice(run: Run) -> None:
    rows = run[1]["evaluate"][1]["figures"]["heldout"]
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
