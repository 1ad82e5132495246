"""LWM's released files become a folder that stands alone: with LWM's logits, killed or not."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import LlamaForCausalLM

from jobs.cli import main
from model.convert.import_lwm import LWMWeights, lwm_config, open_lwm
from model.llama.initial_weights import weight_shapes
from pipelines.export import from_lwm
from pipelines.export.folder import open_model
from pipelines.export.from_lwm import LWMFiles, import_lwm
from storage.errors import UserError
from storage.store import Store
from tests.model.lwm_reference import DATA, EVERY, TEXT, arrays, joint, write_leaves
from tests.model.peak_memory import peak_bytes

VISION = DATA / "vision_V1_fp32"
SETTINGS = {"num_attention_heads": 4, "max_sequence_length": 256, "theta": 50000000, "rms_norm_eps": 1e-6}


@pytest.fixture
def config(tmp_path: Path) -> str:
    path = tmp_path / "config.json"
    path.write_text(json.dumps(SETTINGS))
    return str(path)


def files(config: str, checkpoint: Path = VISION, **changes: object) -> LWMFiles:
    return LWMFiles(**{"checkpoint": str(checkpoint), "config": config, "codes": 318, **changes})


def lwm_vqgan() -> dict[str, np.ndarray]:
    """A small VQGAN's flax parameters."""
    data = Path(__file__).parents[2] / "data" / "vqgan"
    generator, shapes = np.random.default_rng(0), json.loads((data / "lwm_small_shapes.json").read_text())
    return {name: generator.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}


@pytest.mark.parametrize("file_bytes", [60_000, 2 << 30])
def test_stock_transformers_has_lwms_logits(
    tmp_path: Path, config: str, file_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The vision slice of the joint head is LWM's vision head."""
    monkeypatch.setattr("model.convert.export_hf.FILE_BYTES", file_bytes)
    import_lwm(files(config), Store(str(tmp_path / "model")))
    stock, report = LlamaForCausalLM.from_pretrained(tmp_path / "model", output_loading_info=True)
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert (len(list((tmp_path / "model").glob("*.safetensors"))) > 3) == (file_bytes == 60_000)
    stored = arrays("vision_V1")
    ids = torch.from_numpy(joint(stored["input_tokens"], stored["input_vision_masks"])).long()
    ours = stock(ids).logits.detach().numpy()[:, EVERY - 1 :: EVERY]
    np.testing.assert_allclose(ours[..., :TEXT], stored["text_logits"], rtol=0, atol=1.5e-5)
    np.testing.assert_allclose(ours[..., TEXT:], stored["vision_logits"], rtol=0, atol=1.5e-5)
    folder = open_model(str(tmp_path / "model"))
    assert folder.vocabulary.sizes == {"text": TEXT, "vision": 320}
    assert (folder.vocabulary.eof_id, folder.description.origin.stage) == (TEXT + 318, "import-lwm")


def test_bf16_is_rounded_once(tmp_path: Path, config: str) -> None:
    import_lwm(files(config, dtype=torch.bfloat16), Store(str(tmp_path / "model")))
    stock = LlamaForCausalLM.from_pretrained(tmp_path / "model", dtype="auto")
    assert stock.dtype == torch.bfloat16
    leaves = open_lwm(VISION)
    weights = LWMWeights(leaves, lwm_config(leaves, 4, 256, 5e7))
    for name in weight_shapes(weights.config):
        assert torch.equal(stock.state_dict()[name], weights.read(name).bfloat16())


def test_a_killed_import_is_no_model_and_carries_on(
    tmp_path: Path, config: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("model.convert.export_hf.FILE_BYTES", 60_000)
    import_lwm(files(config), Store(str(tmp_path / "whole")))
    written = 0
    write = from_lwm.write_weights

    def killed(*given: object, **named: object) -> None:
        nonlocal written
        written += 1
        if written == 4:
            raise KeyboardInterrupt
        write(*given, **named)  # type: ignore[arg-type]

    monkeypatch.setattr(from_lwm, "write_weights", killed)
    with pytest.raises(KeyboardInterrupt):
        import_lwm(files(config), Store(str(tmp_path / "model")))
    assert not (tmp_path / "model" / "config.json").exists()
    with pytest.raises(UserError, match="not finished"):
        open_model(str(tmp_path / "model"))
    with caplog.at_level("INFO", "ringworld"):
        import_lwm(files(config), Store(str(tmp_path / "model")))
    assert sum("is there" in line for line in caplog.messages) == 3
    for path in (tmp_path / "whole").iterdir():
        assert (tmp_path / "model" / path.name).read_bytes() == path.read_bytes()


def test_memory_is_the_largest_weight_and_not_the_checkpoint(tmp_path: Path, config: str) -> None:
    """24 stacked layers in chunks: what is held at once stays far under the whole, in one file too."""
    width, layers = 128, 24
    leaves = {"transformer/wte/embedding": torch.randn(64, width), "lm_head/kernel": torch.randn(width, 64)}
    leaves["transformer/ln_f/kernel"] = torch.ones(width)
    for name in ("wq", "wk", "wv", "wo"):
        leaves[f"transformer/h/scan_decoder/attention/{name}/kernel"] = torch.randn(layers, width, width)
    for name, shape in {"w1": (width, 256), "w2": (256, width), "w3": (width, 256)}.items():
        leaves[f"transformer/h/scan_decoder/feed_forward/{name}/kernel"] = torch.randn(layers, *shape)
    for name in ("attention_norm", "ffn_norm"):
        leaves[f"transformer/h/scan_decoder/{name}/kernel"] = torch.ones(layers, width)
    with open(tmp_path / "file", "wb") as file:
        write_leaves(file, leaves, chunk_bytes=1 << 18)
    whole = sum(tensor.nbytes for tensor in leaves.values())
    leaves.clear()
    target = Store(str(tmp_path / "model"))
    peak = peak_bytes(lambda: import_lwm(files(config, tmp_path / "file"), target))
    assert peak < whole / 8


def test_the_command_takes_tokenizer_and_vqgan_and_says_what_does_not_fit(
    tmp_path: Path, config: str, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(*arguments: str) -> tuple[int, str]:
        code = main(["import-lwm", *arguments, "--out", str(tmp_path / "model")])
        return code, capsys.readouterr().err

    mistakes = {
        ("params::/nowhere/file", "--config", config): "/nowhere/file: no such file or object",
        (str(VISION), "--config", "9B"): "--config 9B: neither a file nor one of 7B",
        (str(VISION), "--config", "7B"): "give both --context and --rope-theta",
        (str(VISION), "--config", config): "has 320 vision ids, of which LWM's models have 8448; give --codes",
        (str(VISION), "--config", config, "--codes", "319"): "--codes 319: the 320 ids of vision have no room for",
        (config, "--config", config): "is not LWM's msgpack format",
        (str(VISION), "--config", str(VISION)): "not the JSON of a configuration",
        (str(VISION), "--config", config, "--tokenizer", "package://mistral_common/data/tokenizer.model.v1"): (
            "it has 32000 ids, BOS 1 and EOS 2, the checkpoint 512"
        ),
    }
    for arguments, said in mistakes.items():
        code, error = run(*arguments)
        assert (code, said in error) == (2, True), error
        assert "Traceback" not in error
        assert not (tmp_path / "model").exists()
    vqgan = tmp_path / "vqgan"
    np.savez(tmp_path / "vqgan.npz", **lwm_vqgan())
    assert main(["import-vqgan", str(tmp_path / "vqgan.npz"), "--resolution", "64", "--out", str(vqgan)]) == 0
    arguments = (str(VISION), "--config", config, "--vqgan", str(vqgan))
    assert run(*arguments)[0] == 0
    assert open_model(str(tmp_path / "model")).codec().config.codebook_size == 64
    shutil.rmtree(tmp_path / "model")
    again = (str(VISION), "--config", config, "--vqgan", str(tmp_path / "vqgan.npz"), "--resolution", "64")
    assert run(*again)[0] == 0
    assert open_model(str(tmp_path / "model")).vocabulary.eof_id == TEXT + 64
