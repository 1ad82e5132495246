"""Every mistake that a user can make has a decided outcome: one sentence and exit code 2, or an entry in quarantine."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from jobs.cli import main
from pipelines.dag.manifest import MANIFEST, StageOutput, shared_folder
from pipelines.dag.records import FooterRecords, read_record
from pipelines.recipe import Recipe
from pipelines.run import _run_all, plan_recipe
from pipelines.tokenize.record import TokenizeRecord
from pipelines.tokenize.tokenize_task import DOCUMENTS
from testing.finished_stages import documents_of, only_folder, output_of
from testing.miniature import environment, recipe, ringworld, text_recipe, write_recipe
from tokenization.shards.document_parquet import read_documents

Command = Callable[..., str]


@pytest.fixture
def refused(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Command:
    """Runs a recipe in this process and gives the one sentence with which it was refused."""
    monkeypatch.delenv("RAY_ADDRESS", raising=False)

    def call(tree: dict[str, Any], *overrides: str) -> str:
        path = write_recipe(tmp_path / "recipe.yaml", tree)
        code = main(["run", str(path), *(word for override in overrides for word in ("--set", override))])
        said = capsys.readouterr().err.splitlines()
        assert code == 2, said
        sentences = [line for line in said if line.startswith("ringworld: ")]
        assert len(sentences) == 1
        assert said[-1] == sentences[0]
        assert not any("Traceback" in line for line in said), said
        return sentences[0]

    return call


def test_the_command_tells_a_mistake_in_one_line_with_exit_code_2(sources: Path, tmp_path: Path) -> None:
    path = write_recipe(tmp_path / "recipe.yaml", recipe(sources, tmp_path / "run"))
    done = ringworld("run", path, "--set", "tokenize.fpz=3")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == f"ringworld: {path}: unknown key 'tokenize.fpz'; did you mean 'fps'?\n"
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["sources.acts.urls=[acts/none-*.md]"], "/acts/none-*.md: no such file or object; check the URL"),
        (["storage.data=/no/such/place"], "/no/such/place/acts/*.md: no such file or object; check the URL"),
        (["text_tokenizer.path=/none/tokenizer.json"], "/none/tokenizer.json: no such file or object; check the URL"),
        (["vqgan.weights=/none/vqgan"], "/none/vqgan: no such file or folder"),
        (["train.workers=3"], "train.stages.0.sp 2 does not divide train.workers 3; choose an sp that divides it"),
        (["storage.root=/proc/ringworld"], "/proc/ringworld: no such place"),
        (["storage.root=none://x"], "none://x"),
        (["storage.root=sftp://host/x"], "sftp://host/x: this can be read at most, not be an output"),
        (["storage.root=memory://x"], "memory://x: no other process sees this; set storage.root to a folder"),
    ],
)
def test_what_is_not_there_or_does_not_fit_is_named_before_anything_is_written(
    sources: Path, tmp_path: Path, refused: Command, overrides: list[str], said: str
) -> None:
    assert said in refused(recipe(sources, tmp_path / "run"), *overrides)
    assert not (tmp_path / "run" / "stages").exists()


def test_a_second_driver_on_the_same_output_is_refused_by_name_of_the_first(
    sources: Path, tmp_path: Path, refused: Command
) -> None:
    script = (
        "import time; from storage.lease import lease; from storage.store import Store\n"
        f"with lease(Store({str(tmp_path / 'run')!r})):\n    print('held', flush=True); time.sleep(120)\n"
    )
    first = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True, env=environment())
    try:
        assert first.stdout is not None
        assert first.stdout.readline() == "held\n"
        said = refused(recipe(sources, tmp_path / "run"))
        assert f"{tmp_path}/run: another driver (pid {first.pid} on " in said
        assert "give this run its own storage.root" in said
    finally:
        first.kill()
        first.wait()


@pytest.fixture
def spoilt(sources: Path, tmp_path: Path) -> Path:
    """Sources of one whole clip and two acts, of which tests spoil some."""
    data = tmp_path / "data"
    for name in ("acts/act-00.md", "acts/act-01.md", "clips/carphone.mp4", "captions.jsonl", "tokenizer.json"):
        (data / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(sources / name, data / name)
    shutil.copytree(sources / "vqgan", data / "vqgan")
    return data


def of_spoilt(tree_of: Callable[..., dict[str, Any]], data: Path, root: Path) -> dict[str, Any]:
    """A recipe over these sources, which holds nothing out."""
    tree = tree_of(data, root)
    for source in tree["sources"].values():
        del source["heldout"]
    return tree


def spoil(data: Path) -> dict[str, str]:
    """Add objects that cannot be used; the start of the reason for each."""
    clip = (data / "clips/carphone.mp4").read_bytes()
    act = (data / "acts/act-00.md").read_bytes()
    (data / "clips/cut.mp4").write_bytes(clip[: len(clip) // 2])
    (data / "clips/noise.mp4").write_bytes(os.urandom(5000))
    (data / "clips/empty.mp4").write_bytes(b"")
    (data / "acts/latin.md").write_bytes(act[:4000] + "Prosp\xe9ro".encode("latin-1") + act[4000:])
    (data / "acts/empty.md").write_bytes(b"")
    (data / "acts/utf16.md").write_bytes(act.decode().encode("utf-16"))
    return {
        "acts/empty.md": "the text is empty",
        "acts/latin.md": "not UTF-8: byte 0xe9 at offset 4005",
        "acts/utf16.md": "not UTF-8: byte 0xff at offset 0",
        "clips/cut.mp4": "",
        "clips/empty.mp4": "",
        "clips/noise.mp4": "",
    }


@pytest.mark.slow
@pytest.mark.usefixtures("local_ray")
def test_objects_that_cannot_be_used_are_quarantined_with_their_reason_and_cost_no_other(
    spoilt: Path, tmp_path: Path
) -> None:
    fine = tokenized(of_spoilt(recipe, spoilt, tmp_path / "fine"))
    reasons = spoil(spoilt)
    tree = of_spoilt(recipe, spoilt, tmp_path / "run")
    tree["tokenize"] |= {"max_bad_fraction": 0.8}
    made = tokenized(tree)
    quarantine = {entry["key"].partition("/")[2]: entry for entry in made.manifest.quarantine}
    assert sorted(quarantine) == sorted(reasons)
    for key, reason in reasons.items():
        assert quarantine[key]["url"] == str(spoilt / key)
        assert quarantine[key]["reason"].startswith(reason)
        assert len(quarantine[key]["reason"]) > 10
    assert made.record.figures.quarantined == 6
    assert tokens(made) == tokens(fine), "the whole ones are as they were alone"


def tokenized(tree: dict[str, Any]) -> StageOutput[TokenizeRecord]:
    """Run the stages up to tokenize; what that made."""
    stages = plan_recipe(Recipe.model_validate(tree))
    _run_all(stages[:3])
    return output_of(stages[2].store, TokenizeRecord)


def tokens(made: StageOutput[TokenizeRecord]) -> dict[str, list[int]]:
    return {key: document.tokens.tolist() for key, document in documents_of(made).items()}


@pytest.mark.slow
@pytest.mark.usefixtures("local_ray")
def test_more_bad_objects_than_the_budget_fail_the_stage_and_name_the_first(
    spoilt: Path, tmp_path: Path, refused: Command
) -> None:
    spoil(spoilt)
    said = refused(of_spoilt(recipe, spoilt, tmp_path / "run"))
    assert f"over tokenize.max_bad_fraction 0.01: first {spoilt}/" in said
    assert "mend or remove them, or raise max_bad_fraction" in said
    assert not list((tmp_path / "run").glob("stages/tokenize/*/manifest.json"))


@pytest.mark.slow
@pytest.mark.usefixtures("local_ray")
def test_a_source_of_empty_objects_is_refused(spoilt: Path, tmp_path: Path, refused: Command) -> None:
    for path in (spoilt / "acts").iterdir():
        path.write_text("")
    said = refused(of_spoilt(text_recipe, spoilt, tmp_path / "run"))
    assert f"2 of 2 objects and records are bad, over tokenize.max_bad_fraction 0.01: first {spoilt}/acts/" in said
    assert "(the text is empty)" in said


@pytest.mark.slow
@pytest.mark.usefixtures("local_ray")
def test_a_codebook_that_does_not_match_the_recipe_is_named_with_both_sizes(
    spoilt: Path, tmp_path: Path, refused: Command
) -> None:
    said = refused(of_spoilt(recipe, spoilt, tmp_path / "run"), "vqgan.config.codebook_size=128")
    assert "vqgan" in said
    assert "64" in said
    assert "128" in said
    assert not list((tmp_path / "run").glob("stages/vqgan/*/manifest.json"))


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 96 KB."""
    if os.geteuid() != 0:
        pytest.skip("mounting a small file system needs root")
    disk = tmp_path / "disk"
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=96k", "tmpfs", str(disk)], check=True)
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


@pytest.mark.slow
@pytest.mark.usefixtures("local_ray")
def test_a_disk_that_fills_up_is_one_sentence_and_what_is_on_it_is_whole(
    sources: Path, small_disk: Path, refused: Command
) -> None:
    said = refused(text_recipe(sources, small_disk / "run"))
    place = f"{small_disk}/run/stages/tokenize"
    assert f"{place}: the disk is full; free space or set storage.root elsewhere" in said
    home = only_folder(small_disk / "run", "tokenize")
    shared = shared_folder(home)
    written = shared.names(DOCUMENTS)
    assert written, "some partitions found room"
    records = FooterRecords(shared, DOCUMENTS)
    for name in written:
        with shared.open(name) as file:
            made = list(read_documents(file))
            record = read_record(file)
        assert made
        assert record["documents"] == len(made)
        assert records.file(record["partition"]) == name
    for record in records.load([Path(name).stem for name in written]):
        assert shared.sha256(record["file"]) == record["sha256"]
        written.remove(record["file"])
    assert not written
    assert not home.exists(MANIFEST)


@pytest.mark.slow
def test_a_disk_that_is_full_from_the_start_is_one_sentence_too(
    sources: Path, small_disk: Path, refused: Command
) -> None:
    filler = os.open(small_disk / "filler", os.O_WRONLY | os.O_CREAT)
    with contextlib.suppress(OSError):
        while True:
            os.write(filler, bytes(4096))
    os.close(filler)
    assert "the disk is full" in refused(text_recipe(sources, small_disk / "run"))


@pytest.mark.slow
def test_a_cluster_that_does_not_answer_is_named(sources: Path, tmp_path: Path) -> None:
    path = write_recipe(tmp_path / "recipe.yaml", text_recipe(sources, tmp_path / "run"))
    done = ringworld("run", path, RAY_ADDRESS="127.0.0.1:9")
    assert done.returncode == 2, done.stderr
    assert done.stderr.splitlines()[-1] == (
        "ringworld: RAY_ADDRESS=127.0.0.1:9: no Ray cluster answers there; start it or unset it"
    )
    assert "Traceback" not in done.stderr
