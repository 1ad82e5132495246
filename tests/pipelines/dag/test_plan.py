"""The plan: what is done stays done, what changed says why it runs, and code re-runs nothing."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from pipelines.dag import code_versions
from pipelines.dag.kept import REQUEST
from pipelines.dag.manifest import FORMAT, MANIFEST, STARTED, Manifest, PlainRecord, digest, read_manifest
from pipelines.dag.plan import REBUILDS, PlannedStage, plan
from pipelines.dag.stage import Made, Stage, StageContext
from pipelines.run import run_stages
from storage.errors import UserError
from storage.store import Store


@dataclass(frozen=True)
class Plain(Stage[PlainRecord]):
    """A stage that has nothing to do but to be planned."""

    kind = "plain"
    record = PlainRecord
    output_version = 1

    named: str
    set: Mapping[str, Any]
    inputs: tuple[str, ...] = ()
    ran: list[str] = field(default_factory=list)

    @property
    def name(self) -> str:
        return self.named

    def settings(self) -> Mapping[str, Any]:
        return self.set

    def run(self, context: StageContext) -> Made[PlainRecord]:
        self.ran.append(self.name)
        return Made(PlainRecord(figures={"inputs": sorted(context.inputs)}))


def stages(fps: float = 4.0, context: int = 1024) -> list[Stage[Any]]:
    return [
        Plain("tokenize", {"fps": fps}),
        Plain("pack", {"context": context}, ("tokenize",)),
        Plain("train", {}, ("pack",)),
    ]


def finish(planned: Sequence[PlannedStage]) -> None:
    for stage in planned:
        stage.store.write_json(STARTED, {"format": FORMAT, **stage.declaration.to_json()})
        manifest = Manifest(stage.declaration, PlainRecord(), fingerprint=stage.fingerprint)
        stage.store.write_json(MANIFEST, manifest.to_json())


def finish_in_format_1(stage_list: Sequence[Stage[Any]], store: Store, code: str, finished: str = "2026") -> None:
    """As versions did that named a stage's folder by hashes of code."""
    fingerprints: dict[str, str] = {}
    for stage in stage_list:
        inputs = {name: fingerprints[name] for name in stage.inputs}
        declaration = {
            "stage": stage.name,
            "settings": dict(stage.settings()),
            "code": {"tokenization.fields": code},
            "inputs": inputs,
        }
        fingerprints[stage.name] = digest(declaration)
        home = store.at("stages", stage.name, fingerprints[stage.name][:16])
        home.write_json(STARTED, declaration)
        facts = {"fingerprint": fingerprints[stage.name], "seconds": 1.0, "finished": finished, "quarantine": []}
        home.write_json(MANIFEST, {**declaration, **facts, "outputs": {"made": code}, "figures": {}})


def statuses(planned: Sequence[PlannedStage]) -> dict[str, str]:
    return {stage.name: stage.status for stage in planned}


@pytest.fixture(autouse=True)
def no_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    """None of these stages needs a cluster."""
    monkeypatch.setattr("pipelines.run.ray_instance", lambda address, need: contextlib.nullcontext())


DONE = {"tokenize": "done", "pack": "done", "train": "done"}


def test_what_is_committed_is_done_and_what_is_only_started_resumes(tmp_path: Path) -> None:
    store = Store(str(tmp_path))
    first = plan(stages(), store)
    assert statuses(first) == {"tokenize": "run", "pack": "run", "train": "run"}
    assert all(stage.reasons == ("never run",) for stage in first)
    finish(first[:1])
    first[1].store.write_json(STARTED, first[1].declaration.to_json())
    assert statuses(plan(stages(), store)) == {"tokenize": "done", "pack": "resume", "train": "run"}


def test_a_changed_setting_runs_what_depends_on_it_and_nothing_else(tmp_path: Path) -> None:
    store = Store(str(tmp_path))
    finish(plan(stages(), store))
    changed = {stage.name: stage for stage in plan(stages(context=2048), store)}
    assert changed["tokenize"].status == "done"
    assert changed["pack"].reasons == ("setting context: 1024 -> 2048",)
    assert changed["train"].reasons == ("input pack changed",)
    assert statuses(plan(stages(), store)) == DONE


def test_a_raised_output_version_runs_the_stage_and_what_depends_on_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = Store(str(tmp_path))
    finish(plan(stages(), store))
    monkeypatch.setattr(Plain, "output_version", 2)
    raised = plan(stages(), store)
    assert raised[0].reasons == ("this version makes other output: 1 -> 2",)
    assert statuses(raised) == {"tokenize": "run", "pack": "run", "train": "run"}


def test_other_code_and_libraries_are_shown_and_run_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = Store(str(tmp_path))
    monkeypatch.setattr(Plain, "libraries", ("numpy", "no-such-distribution"))
    run_stages(plan(stages(), store), store)
    assert all(stage.notes == () for stage in plan(stages(), store))
    monkeypatch.setattr("pipelines.dag.code_versions.code_version", lambda: "0" * 16)
    monkeypatch.setattr("pipelines.dag.code_versions._installed", lambda name: "0.1" if name == "numpy" else None)
    (tokenize, *_) = later = plan(stages(), store)
    assert statuses(later) == DONE
    (note,) = tokenize.notes
    assert note.startswith("made with other code, numpy ")
    assert note.endswith("(now 0.1); `--rebuild tokenize` makes it again")


def test_the_code_version_is_that_of_every_source_file_of_the_rooms() -> None:
    shipped = {path.parent.name for path in Path(code_versions.__file__).parents[2].glob("*/__init__.py")}
    assert set(code_versions.ROOMS) == shipped - {"jobs", "ringworld", "recipes", "benchmarks", "testing", "tests"}
    assert code_versions.code_version() == code_versions.code_version()
    assert len(code_versions.code_version()) == 16


def test_rebuild_makes_a_stage_and_what_depends_on_it_again_and_carries_on_what_it_began(tmp_path: Path) -> None:
    store = Store(str(tmp_path))
    finish(plan(stages(), store))
    again = plan(stages(), store, rebuild=["pack"])
    assert statuses(again) == {"tokenize": "done", "pack": "run", "train": "run"}
    assert again[1].reasons == ("--rebuild asks for it again",)
    # As the driver leaves it that was killed in the middle of it.
    store.write_json(REBUILDS, {"pack": 1})
    again[1].store.write_json(STARTED, again[1].declaration.to_json())
    assert statuses(plan(stages(), store, rebuild=["pack"])) == {"tokenize": "done", "pack": "resume", "train": "run"}
    finish(again)
    assert statuses(plan(stages(), store)) == DONE
    assert plan(stages(), store, rebuild=["pack"])[1].declaration.rebuild == 2


def test_rebuild_names_a_stage_of_the_dag(tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match=r"--rebuild packs: the recipe has no such stage; its stages are tokenize, pack"
    ):
        plan(stages(), Store(str(tmp_path)), rebuild=["packs"])


def test_a_run_of_format_1_is_adopted_where_settings_and_inputs_agree(tmp_path: Path) -> None:
    store = Store(str(tmp_path))
    finish_in_format_1(stages(), store, "a")
    adopted = plan(stages(), store)
    assert statuses(adopted) == DONE
    assert all("adopted" in stage.notes[0] for stage in adopted)
    manifest = read_manifest(adopted[1].store, PlainRecord)
    assert manifest is not None
    assert manifest.record.outputs == {"made": "a"}
    assert manifest.declaration.kind == "pack"
    changed = plan(stages(context=2048), store)
    assert statuses(changed) == {"tokenize": "done", "pack": "run", "train": "run"}
    assert changed[1].reasons == ("setting context: 1024 -> 2048",)
    assert changed[2].reasons == ("input pack changed",)
    finish(changed[1:])
    assert statuses(plan(stages(context=2048), store)) == DONE


def test_of_two_runs_of_format_1_by_other_code_the_newest_whole_one_is_adopted(tmp_path: Path) -> None:
    store = Store(str(tmp_path))
    finish_in_format_1(stages(), store, "new", "2026-02")
    finish_in_format_1(stages(), store, "old", "2026-01")
    finish_in_format_1(stages()[:1], store, "unfinished", "2026-03")
    for folder in store.folders("stages/tokenize"):
        home = store.at("stages", "tokenize", folder)
        if home.read_json(MANIFEST)["outputs"] == {"made": "unfinished"}:
            home.delete(MANIFEST)
    adopted = plan(stages(), store)
    assert statuses(adopted) == DONE
    assert [stage.store.read_json(MANIFEST)["outputs"]["made"] for stage in adopted] == ["new"] * 3


def test_what_format_1_began_is_carried_on_in_its_folder(tmp_path: Path) -> None:
    store = Store(str(tmp_path))
    finish_in_format_1(stages(), store, "a")
    train = plan(stages(), store)[2].store
    train.delete(MANIFEST)
    resumed = plan(stages(), store)
    assert (resumed[2].status, resumed[2].store) == ("resume", train)
    run_stages(resumed, store)
    assert statuses(plan(stages(), store)) == DONE
    assert train.read_json(MANIFEST)["input_folders"]["pack"] == "/".join(resumed[1].store.url.split("/")[-3:])


def test_a_manifest_of_a_later_format_is_refused_with_one_sentence(tmp_path: Path) -> None:
    store = Store(str(tmp_path))
    planned = plan(stages(), store)
    finish(planned)
    planned[0].store.write_json(MANIFEST, {"format": FORMAT + 1})
    with pytest.raises(UserError, match=rf"has format {FORMAT + 1}, this version reads up to {FORMAT}; upgrade"):
        plan(stages(), store)


def test_a_new_stage_is_one_class_and_one_place_in_the_list(tmp_path: Path) -> None:
    nothing = Plain("nothing", {}, ("train",))
    store = Store(str(tmp_path))
    done = run_stages(plan([*stages(), nothing], store), store)
    assert done["nothing"].record.figures == {"inputs": ["train"]}
    assert nothing.ran == ["nothing"]
    assert plan([*stages(), nothing], store)[-1].status == "done"


# --- Sources that grow ---


@dataclass(frozen=True)
class Between(Plain):
    """A stage that is made for others."""

    kept: tuple[str, ...] = ()

    @property
    def kept_for(self) -> tuple[str, ...]:
        return self.kept


@dataclass(frozen=True)
class Growing(Between):
    """Its setting is what there is now, which nobody asked for."""

    def requested(self) -> Mapping[str, Any]:
        return {}


@dataclass(frozen=True)
class Training(Plain):
    """A stage that keeps its data as soon as it has begun."""

    keeps_its_data = "begun"


def curriculum(objects: int, lr: float = 1.0, trained: int = 2) -> list[Stage[Any]]:
    """Documents of so many objects, packed for each of the trainings, of which each goes on with that before."""
    numbers = range(trained)
    made: list[Stage[Any]] = [
        Growing("sources", {"objects": objects}, kept=("tokenize",)),
        Between("tokenize", {}, ("sources",), kept=tuple(f"pack-{n}" for n in numbers)),
    ]
    for n in numbers:
        before = (f"train-{n - 1}",) if n else ()
        made += [
            Between(f"pack-{n}", {}, ("tokenize",), kept=(f"train-{n}",)),
            Training(f"train-{n}", {"lr": lr}, (f"pack-{n}", *before)),
        ]
    return made


def begin(planned: PlannedStage) -> None:
    declared = {"format": FORMAT, **planned.declaration.to_json(), REQUEST: planned.request}
    planned.store.write_json(STARTED, declared)


def test_a_training_that_has_begun_keeps_its_data_and_the_next_takes_what_has_come_since(
    no_ray: None, tmp_path: Path
) -> None:
    store = Store(str(tmp_path))
    first = plan(curriculum(3), store)
    run_stages(first[:3], store)  # sources, tokenize, pack-0
    begin(first[3])
    (sources, tokenize, pack_0, train_0, pack_1, train_1) = plan(curriculum(4), store)
    assert (train_0.status, train_0.store, train_0.declaration) == ("resume", first[3].store, first[3].declaration)
    assert pack_0.notes[0].startswith("keeps the data that it began with, of 2")
    assert (pack_0.status, pack_0.store) == ("done", first[2].store)
    assert [one.status for one in (sources, tokenize, pack_1, train_1)] == ["run"] * 4
    assert pack_1.declaration.inputs == {"tokenize": tokenize.fingerprint}
    assert train_1.declaration.inputs == {"pack-1": pack_1.fingerprint, "train-0": first[3].fingerprint}


def test_nothing_is_made_that_only_kept_stages_read(no_ray: None, tmp_path: Path) -> None:
    store = Store(str(tmp_path))
    first = plan(curriculum(3), store)
    run_stages(first, store)
    assert {one.status for one in plan(curriculum(4), store)} == {"done"}
    grown = statuses(plan(curriculum(4, trained=3), store))
    kept = ("pack-0", "train-0", "pack-1", "train-1")
    assert grown == {name: "done" if name in kept else "run" for name in grown}


def test_what_the_recipe_or_a_rebuild_asks_for_is_made_of_what_is_there_now(no_ray: None, tmp_path: Path) -> None:
    store = Store(str(tmp_path))
    run_stages(plan(curriculum(3), store), store)
    changed = statuses(plan(curriculum(4, lr=2.0), store))
    assert set(changed.values()) == {"run"}
    rebuilt = statuses(plan(curriculum(4), store, ["train-1"]))
    assert rebuilt == {name: "done" if name in ("pack-0", "train-0") else "run" for name in rebuilt}


def test_a_training_is_not_kept_whose_data_this_version_makes_otherwise(
    no_ray: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = Store(str(tmp_path))
    run_stages(plan(curriculum(3), store), store)
    monkeypatch.setattr(Between, "output_version", 2)
    assert set(statuses(plan(curriculum(3), store)).values()) == {"run"}


def test_a_training_that_has_begun_on_data_that_are_gone_begins_anew(no_ray: None, tmp_path: Path) -> None:
    store = Store(str(tmp_path))
    first = plan(curriculum(3, trained=1), store)
    run_stages(first[:3], store)
    begin(first[3])
    first[2].store.delete(MANIFEST)
    again = plan(curriculum(4, trained=1), store)
    assert (again[3].status, again[3].declaration == first[3].declaration) == ("run", False)
