"""`ringworld export` of a real run: its last stage, one named, a checkpoint, and what it refuses."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

from jobs.cli import main
from model.checkpoint.manifest import committed_steps
from pipelines.export.folder import open_model
from pipelines.export.trained import find_trained
from pipelines.export.write import export_model
from pipelines.train.metrics.steps import read_metrics
from storage.store import Store
from testing.finished_stages import only_folder
from testing.s3_server import ObjectStore
from tokenization.text.tokenizer import load_text_tokenizer

pytestmark = pytest.mark.slow


def weights(folder: str | Path) -> dict[str, torch.Tensor]:
    return AutoModelForCausalLM.from_pretrained(folder).state_dict()


def assert_equal_weights(one: str | Path, other: str | Path) -> None:
    theirs = weights(other)
    for name, weight in weights(one).items():
        torch.testing.assert_close(weight, theirs[name], rtol=0, atol=0)


def test_a_run_becomes_a_folder_that_stock_transformers_and_open_model_load(
    undisturbed: Path, sources: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["export", str(undisturbed), "--out", str(tmp_path / "model")]) == 0
    said = capsys.readouterr().out
    assert f"{tmp_path / 'model'}: miniature-video, of train-video (" in said
    assert_equal_weights(tmp_path / "model", only_folder(undisturbed, "train-video").path("model"))
    tokenizer, ours = AutoTokenizer.from_pretrained(tmp_path / "model"), load_text_tokenizer(str(sources))
    for text in ("", "Full fathom five  thy father lies", "<s> <vision>\n</s>"):
        assert tokenizer.encode(text, add_special_tokens=False) == ours.encode(text).tolist()
    folder = open_model(str(tmp_path / "model"))
    assert folder.vocabulary.sizes == {"text": 512, "vision": 256}
    assert folder.codec().config.codebook_size == 64


def test_the_card_has_the_recipe_as_training_had_it(
    undisturbed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["export", str(undisturbed), "--stage", "text", "--out", str(tmp_path / "model"), "--json"]) == 0
    described = json.loads(capsys.readouterr().out)
    assert described["origin"] | {"fingerprint": ""} == {
        "stage": "train-text",
        "fingerprint": "",
        "step": 12,
        "precision": "fp32",
    }
    card = (tmp_path / "model" / "README.md").read_text()
    recipe = yaml.safe_load(card.rpartition("```yaml\n")[2].partition("\n```")[0])
    assert recipe["model"]["size"]["hidden_size"] == 32
    assert "options" not in recipe["storage"]
    assert "`acts/*.md`" in card
    assert "VQGAN was imported" in card


def test_the_last_checkpoint_is_the_model_that_its_stage_left(undisturbed: Path, tmp_path: Path) -> None:
    stage = only_folder(undisturbed, "train-video")
    checkpoint = stage.path("checkpoints/step-00000004")
    assert main(["export", checkpoint, "--out", str(tmp_path / "model")]) == 0
    assert_equal_weights(tmp_path / "model", stage.path("model"))
    config, left = (
        json.loads((Path(one) / "config.json").read_text()) for one in (tmp_path / "model", stage.path("model"))
    )
    assert config == left


def test_the_best_checkpoint_is_exported_of_a_run_and_of_a_stage_that_is_not_finished(
    undisturbed: Path, tmp_path: Path
) -> None:
    stage = only_folder(undisturbed, "train-text")
    measured = {line["step"] + 1: line["heldout"]["loss"] for line in read_metrics(stage) if "heldout" in line}
    assert list(measured) == [3, 6, 9, 12]
    best = min(measured, key=measured.__getitem__)
    assert main(["export", str(undisturbed), "--stage", "text", "--best", "--out", str(tmp_path / "model")]) == 0
    assert open_model(str(tmp_path / "model")).description.origin.step == best

    run = shutil.copytree(undisturbed, tmp_path / "run")
    stage = only_folder(run, "train-text")
    shutil.rmtree(stage.path("model"))
    os.unlink(stage.path("manifest.json"))
    shutil.rmtree(stage.path("checkpoints/step-00000012"))
    best = min([3, 6, 9], key=measured.__getitem__)
    assert main(["export", stage.path(), "--best", "--out", str(tmp_path / "unfinished")]) == 0
    assert open_model(str(tmp_path / "unfinished")).description.origin.step == best


def test_a_checkpoint_of_a_stage_that_is_not_finished_is_exported(undisturbed: Path, tmp_path: Path) -> None:
    run = shutil.copytree(undisturbed, tmp_path / "run")
    stage = only_folder(run, "train-text")
    shutil.rmtree(stage.path("model"))
    os.unlink(stage.path("manifest.json"))
    (step, *_) = committed_steps(stage.at("checkpoints"))
    assert step < 12
    folder = stage.path(f"checkpoints/step-{step:08d}")
    assert main(["export", folder, "--out", str(tmp_path / "model")]) == 0
    model = open_model(str(tmp_path / "model"))
    assert model.description.origin.step == step
    assert model.llama().config.max_position_embeddings == 128
    assert f"the checkpoint of step {step}" in (tmp_path / "model" / "README.md").read_text()


def test_a_bucket_takes_an_export(undisturbed: Path, object_store: ObjectStore) -> None:
    target = Store("s3://data/exported/model", object_store.options)
    written = export_model(find_trained(str(undisturbed)), target)
    assert target.sha256("model.safetensors") == written.files["model.safetensors"]
    there = open_model("s3://data/exported/model", object_store.options)
    assert (there.description.origin, there.description.files) == (written.origin, written.files)
    assert there.llama().config.vocab_size == 768
    assert export_model(find_trained(str(undisturbed)), target) == there.description


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["nowhere"], "nowhere: no run, training stage or checkpoint; give a run's root"),
        (["RUN", "--stage", "audio"], "there is no training stage audio; its stages are evaluate, pack-text"),
        (["RUN/stages/tokenize"], "tokenize trains nothing; give the folder of a stage that does"),
        (["RUN/stages/train-text", "--stage", "text"], "no run's root, where --stage names a stage; leave out --stage"),
        (["RUN/stages/train-text/*/checkpoints/step-00000012", "--best"], "a checkpoint, of which none is the best"),
        (["RUN", "--out", "http://host/model"], "this can be read at most"),
        (["RUN", "--out", "RUN"], "holds something else (codes/"),
    ],
)
def test_a_users_mistake_is_one_sentence(
    undisturbed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], reason: str
) -> None:
    words = [word.replace("RUN", str(undisturbed)) for word in arguments]
    words = [str(next(Path("/").glob(word[1:]))) if "*" in word else word for word in words]
    out = [] if "--out" in words else ["--out", str(tmp_path / "model")]
    assert main(["export", *words, *out]) == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert said.startswith("ringworld: ")
    assert reason in said
    assert not (tmp_path / "model").exists()


def test_a_torn_checkpoint_is_refused(undisturbed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = shutil.copytree(undisturbed, tmp_path / "run")
    folder = only_folder(run, "train-text").at("checkpoints", "step-00000012")
    name = next(name for name in folder.names() if name.endswith(".safetensors") and "random" not in name)
    data = bytearray(Path(folder.path(name)).read_bytes())
    data[-5] ^= 1
    Path(folder.path(name)).write_bytes(data)
    assert main(["export", folder.path(), "--out", str(tmp_path / "model")]) == 2
    assert "has another sha256 than when it was written" in capsys.readouterr().err
    assert not (tmp_path / "model" / "config.json").exists()
    os.unlink(folder.path("COMMIT"))
    assert main(["export", folder.path(), "--out", str(tmp_path / "other")]) == 2
