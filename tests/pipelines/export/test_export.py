"""An exported model stands alone: stock transformers loads it, `open_model` has all that was behind it."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from model.llama.llama import inference, load_llama
from pipelines.dag.manifest import MANIFEST, Declaration, Manifest, PlainRecord, StageOutput
from pipelines.export.folder import Description, ModelFolder, check_target, open_model
from pipelines.export.trained import find_trained
from pipelines.export.write import export_model, origin_of
from pipelines.inspect.describe import describe
from pipelines.inspect.verify import verify
from storage.errors import UserError
from storage.store import Store
from testing.tiny_run import VOCABULARY
from tokenization.codecs.vqgan.model import VQGAN
from tokenization.text.tokenizer import load_text_tokenizer


def copied(exported: ModelFolder, tmp_path: Path) -> Path:
    return Path(shutil.copytree(exported.store.path(), tmp_path / "model"))


def test_stock_transformers_has_the_trained_models_logits_and_our_ids(exported: ModelFolder, run) -> None:
    folder = exported.store.path()
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    text = "a red  square <vision> and </s> a literal <s>"
    ids = tokenizer(text, return_tensors="pt").input_ids
    assert ids[0].tolist() == [VOCABULARY.bos_id, *load_text_tokenizer().encode(text).tolist()]
    ours = load_llama(Path(run[1]["train-video"].path("model")))
    with inference(ours):
        torch.testing.assert_close(model(ids).logits, ours(ids).logits, atol=1e-6, rtol=1e-5)
    assert type(model).__name__ == "LlamaForCausalLM"


def test_a_literal_vision_marker_is_text_by_both_tokenizers(exported: ModelFolder) -> None:
    theirs = AutoTokenizer.from_pretrained(exported.store.path())
    ids = exported.tokenizer.encode("<vision>").tolist()
    assert theirs.encode("<vision>", add_special_tokens=False) == ids
    assert max(ids) < exported.vocabulary.text_size
    assert theirs.decode(ids) == exported.tokenizer.decode(ids) == "<vision>"


def test_the_folder_alone_has_vocabulary_codec_tokenizer_and_weights(exported: ModelFolder, run) -> None:
    assert exported.vocabulary == VOCABULARY
    assert exported.config.max_position_embeddings == 512
    vqgan, made = exported.codec(), VQGAN.load(run[1]["vqgan"].path("weights"))
    assert vqgan.fingerprint == made.fingerprint == exported.description.codecs["vision"].fingerprint
    assert exported.description.codecs["vision"].fps == 8
    frames = np.random.default_rng(0).integers(0, 256, (2, 16, 16, 3), dtype=np.uint8)
    np.testing.assert_array_equal(vqgan.encode(frames), made.encode(frames))
    ours = load_llama(Path(run[1]["train-video"].path("model")))
    for name, weight in exported.llama().state_dict().items():
        torch.testing.assert_close(weight, ours.state_dict()[name], rtol=0, atol=0)
    with pytest.raises(UserError, match="the model has no codec of audio"):
        exported.codec("audio")


def test_every_file_is_described_by_its_hash(exported: ModelFolder) -> None:
    store = exported.store
    assert exported.description.files == {
        name: store.sha256(name) for name in store.names() if name != "ringworld.json"
    }


def test_stock_generation_ends_at_eos(exported: ModelFolder) -> None:
    made = GenerationConfig.from_pretrained(exported.store.path())
    assert (made.bos_token_id, made.eos_token_id, made.pad_token_id) == (1, 2, 2)


def test_the_model_card_says_how_it_was_trained_and_from_what(exported: ModelFolder) -> None:
    card = (Path(exported.store.path()) / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: transformers\n")
    assert "| text | 128 | 10000 | 4 | 1.02k |  | 7.000 | books 1 |" in card
    assert "| video | 512 | 10000 | 4 | 2.05k |  | 7.000 | books 0.2, clips 0.8 |" in card
    assert re.search(r"\| books \| 3 \| [\d.]+kB \| text \|", card)
    assert "5 documents of 12.3k tokens were made of them, 32 frames among them." in card
    assert (
        "| vision | 32000 to 32255 | 64 | `<eof>` 32064, `<eov>` 32065 | vqgan in `codecs/vision`, 8 frames/s |" in card
    )
    assert "| train-video |" in card
    assert "code 0123456789abcdef" in card


def test_the_cards_code_runs(exported: ModelFolder, capsys: pytest.CaptureFixture[str]) -> None:
    card = (Path(exported.store.path()) / "README.md").read_text()
    first, second = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    names: dict[str, object] = {}
    for code in (first, second):
        exec(code.replace("DIR", exported.store.path()), names)
    assert capsys.readouterr().out.startswith("<s> Once")
    assert names["vqgan"].config.codebook_size == 64


def test_of_a_long_curriculum_the_card_has_the_stages_in_their_order(root: Path) -> None:
    trained, stages, before = find_trained(str(root), "text"), {}, {}
    for name in ("train-a", "train-b", "train-c", "train-d"):
        manifest = Manifest(Declaration(name, "train", {}, 1, before), PlainRecord())
        stages, before = {name: StageOutput(trained.store, manifest), **stages}, {"pack": "", name: ""}
    last = dataclasses.replace(trained.manifest, declaration=Declaration("train-e", "train", {}, 1, before))
    long = dataclasses.replace(trained, manifest=last, stages=stages)
    names = [output.manifest.declaration.stage for output in long.earlier()]
    assert names == ["train-a", "train-b", "train-c", "train-d"]


def test_weights_in_several_files_are_exported_with_their_index(run, root: Path, tmp_path: Path) -> None:
    trained = find_trained(str(shutil.copytree(root, tmp_path / "run")))
    folder = Path(trained.store.path("model"))
    model = load_llama(folder)
    (folder / "model.safetensors").unlink()
    model.save_pretrained(folder, max_shard_size="5MB")
    trained = dataclasses.replace(trained, record={**trained.record, "outputs": {}})
    written = export_model(trained, Store(str(tmp_path / "model")))
    assert len([name for name in written.files if name.startswith("model-")]) > 1
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "model").state_dict()
    for name, weight in open_model(str(tmp_path / "model")).llama().state_dict().items():
        torch.testing.assert_close(weight, model.state_dict()[name], rtol=0, atol=0)
        torch.testing.assert_close(weight, again[name], rtol=0, atol=0)


def test_the_card_has_the_held_out_loss_of_a_model_that_was_evaluated(root: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(root, tmp_path / "run")
    trained = find_trained(str(copy))
    row = {"source": "clips", "modality": "vision", "targets": 1234, "nats_per_token": 4.5, "unigram_heldout": 5.25}
    rows = [{"stage": "text", **row}, {"stage": "video", **row}]
    declaration = Declaration("evaluate", "evaluate", {}, 1, {"train-video": trained.manifest.fingerprint})
    manifest = Manifest(declaration, PlainRecord({}, {"heldout": rows}), fingerprint=declaration.fingerprint)
    Store(str(copy)).write_json(f"stages/evaluate/{declaration.fingerprint[:16]}/{MANIFEST}", manifest.to_json())
    export_model(find_trained(str(copy)), Store(str(tmp_path / "model")))
    card = (tmp_path / "model" / "README.md").read_text()
    assert card.count("| clips | vision | 1,234 | 4.500 | 5.250 |") == 1
    export_model(find_trained(str(copy), "text"), Store(str(tmp_path / "other")))
    assert "Held-out" not in (tmp_path / "other" / "README.md").read_text()


def test_a_path_relative_to_the_run_is_taken(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(root / "stages" / "train-text")
    assert find_trained(".").of_kind("tokenize")
    (name,) = (path.name for path in Path().iterdir())
    assert find_trained(name).of_kind("tokenize")


def test_of_two_exports_that_begin_at_once_one_is_refused(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Store, "create_json", lambda store, name, value: False)
    with pytest.raises(UserError, match="another export has begun there just now"):
        export_model(find_trained(str(root)), Store(str(tmp_path / "model")))


@pytest.mark.parametrize("name", ["text", "train-text"])
def test_a_stage_is_named_in_its_run_or_given_as_a_folder(run, root: Path, name: str, tmp_path: Path) -> None:
    by_name = find_trained(str(root), name)
    folder = root / "stages" / "train-text"
    assert by_name.store.path() == find_trained(str(folder)).store.path() == run[1]["train-text"].path()
    assert find_trained(run[1]["train-text"].path()).step == 4
    assert find_trained(str(root)).declaration.stage == "train-video"


def test_the_same_export_carries_on_where_it_was_killed(
    run, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "model"
    writing, made = Store.writing, []

    def killed(store: Store, name: str, exclusive: bool = False):
        if name.startswith("codecs/"):
            raise KeyboardInterrupt
        made.append(name)
        return writing(store, name, exclusive)

    trained = find_trained(str(root))
    with monkeypatch.context() as patched:
        patched.setattr(Store, "writing", killed)
        with pytest.raises(KeyboardInterrupt):
            export_model(trained, Store(str(target)))
    assert "model.safetensors" in made
    assert not (target / "config.json").exists()
    with pytest.raises(UserError, match=f"^{target}: its export was not finished; run the same command again"):
        open_model(str(target))
    written = (target / "model.safetensors").stat().st_mtime_ns
    export_model(find_trained(str(root)), Store(str(target)))
    assert (target / "model.safetensors").stat().st_mtime_ns == written
    assert open_model(str(target)).vocabulary == VOCABULARY


def test_whenever_a_replacement_is_killed_the_folder_is_still_known_for_an_export(
    root: Path, exported: ModelFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained, kills = find_trained(str(root), "text"), 0
    texts = {"tokenizer.json": b"{}", "tokenizer_config.json": b"{}"}  # whose making takes the longest
    monkeypatch.setattr("pipelines.export.write.tokenizer_files", lambda file, context: texts)
    change = {name: getattr(Store, name) for name in ("writing", "delete", "delete_many")}
    for at in range(40):
        target, changes = Path(shutil.copytree(exported.store.path(), tmp_path / f"{at}" / "model")), iter(range(at))

        def killed(method: str, *words: object, changes=changes) -> object:
            if next(changes, None) is None:
                raise KeyboardInterrupt
            return change[method](*words)

        with monkeypatch.context() as patched:
            for name in change:
                patched.setattr(Store, name, lambda *words, name=name, killed=killed: killed(name, *words))
            try:
                export_model(trained, Store(str(target)), replace=True)
                break
            except KeyboardInterrupt:
                kills += 1
        check_target(Store(str(target)), origin_of(trained), replace=True)
    assert kills > 5
    assert open_model(str(target)).description.origin == origin_of(trained)


def test_a_model_that_is_there_already_is_left_as_it_is(root: Path, exported: ModelFolder, tmp_path: Path) -> None:
    target = copied(exported, tmp_path)
    before = {path: path.stat().st_mtime_ns for path in target.rglob("*")}
    assert export_model(find_trained(str(root)), Store(str(target))) == exported.description
    assert {path: path.stat().st_mtime_ns for path in target.rglob("*")} == before


def test_a_weight_file_that_was_damaged_meanwhile_is_written_again(root: Path, exported: ModelFolder, tmp_path) -> None:
    target = copied(exported, tmp_path)
    (target / "model.safetensors").write_bytes(b"x" * 100)
    export_model(find_trained(str(root)), Store(str(target)))
    assert Store(str(target)).sha256("model.safetensors") == exported.description.files["model.safetensors"]


def test_another_model_is_replaced_only_where_that_is_asked_for(root: Path, exported: ModelFolder, tmp_path) -> None:
    target = copied(exported, tmp_path)
    (target / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match=r"holds another exported model \(train-video, step 4\)"):
        export_model(find_trained(str(root), "text"), Store(str(target)))
    assert open_model(str(target)).description == exported.description
    export_model(find_trained(str(root), "text"), Store(str(target)), replace=True)
    assert open_model(str(target)).description.origin.stage == "train-text"
    assert open_model(str(target)).config.max_position_embeddings == 128
    assert (target / "notes.txt").read_text() == "mine"


def test_a_folder_with_something_else_is_refused_and_left_alone(root: Path, tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(UserError, match=r"holds something else \(thesis.txt\)"):
        export_model(find_trained(str(root)), Store(str(tmp_path)), replace=True)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]
    with pytest.raises(UserError, match="this is a file; set --out to a new folder"):
        export_model(find_trained(str(root)), Store(str(tmp_path / "thesis.txt")))


def test_weights_that_are_not_what_was_committed_are_not_exported(run, root: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(root, tmp_path / "run")
    (weights,) = (copy / "stages" / "train-video").glob("*/model/model.safetensors")
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    with pytest.raises(UserError, match=r"model\.safetensors: what is to be exported is not what was committed"):
        export_model(find_trained(str(copy)), Store(str(tmp_path / "model")))
    assert not (tmp_path / "model" / "model.safetensors").exists()
    assert not (tmp_path / "model" / "config.json").exists()


def test_a_bucket_holds_an_export_as_a_folder_does(root: Path, exported: ModelFolder) -> None:
    export_model(find_trained(str(root)), Store("memory://models/tiny"))
    there = open_model("memory://models/tiny")
    assert there.description == exported.description
    assert there.tokenizer.encode("a  b").tolist() == exported.tokenizer.encode("a  b").tolist()
    assert there.codec().fingerprint == exported.codec().fingerprint
    assert there.llama().config.vocab_size == VOCABULARY.size


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda folder: None, "no exported model is there; make one by `ringworld export"),
        (lambda folder: (folder / "ringworld.json").write_text('{"format": 9}'), "has format 9, this version reads 1"),
        (lambda folder: (folder / "ringworld.json").write_text('{"format": 1}'), "not what an export writes"),
        (lambda folder: (folder / "ringworld.json").write_text("[]"), "not what an export writes"),
    ],
)
def test_what_is_no_export_is_not_opened(tmp_path: Path, make, reason: str) -> None:
    make(tmp_path)
    with pytest.raises(UserError, match=re.escape(reason)):
        open_model(str(tmp_path))


def test_without_media_there_is_no_codec(root: Path, tmp_path: Path, run) -> None:
    trained = find_trained(str(root))
    stages = {name: one for name, one in trained.stages.items() if name != "vqgan"}
    written = export_model(dataclasses.replace(trained, stages=stages), Store(str(tmp_path / "model")))
    assert isinstance(written, Description)
    assert not written.codecs
    assert not [name for name in written.files if name.startswith("codecs/")]


def test_of_two_that_ended_in_one_second_the_last_of_the_curriculum_counts(root: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(root, tmp_path / "run")
    for path in copy.glob(f"stages/train-*/*/{MANIFEST}"):
        path.write_text(json.dumps(json.loads(path.read_text()) | {"finished": "2025-01-02T00:00:00+00:00"}))
    assert find_trained(str(copy)).declaration.stage == "train-video"


def test_inspect_says_which_model_an_export_is_and_verifies_every_file(exported: ModelFolder, tmp_path: Path) -> None:
    target = copied(exported, tmp_path)
    found = describe(str(target))
    assert (found["kind"], found["stage"], found["step"], found["is_whole"]) == ("model", "train-video", 4, True)
    assert found["codecs"] == {"vision": "codecs/vision"}
    assert verify(str(target)) == []
    (target / "tokenizer.json").write_text("{}")
    (target / "codecs" / "vision" / "config.json").unlink()
    problems = verify(str(target))
    assert [problem.partition(":")[0] for problem in problems] == ["codecs/vision/config.json", "tokenizer.json"]
