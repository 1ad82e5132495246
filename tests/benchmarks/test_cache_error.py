"""`ringworld bench cache`: the errors of a cache in 8 bits, of a folder's model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from jobs.cli import main
from jobs.guard import USER_MISTAKE
from tests.model.inference.stock import small_llama


@pytest.mark.slow
def test_errors_and_sizes_of_every_format_are_written(tmp_path: Path) -> None:
    path = tmp_path / "cache.json"
    small_llama().save_pretrained(tmp_path / "model")
    sizes = ["--context", "40", "--tokens", "8", "--json", str(path)]
    assert main(["bench", "cache", str(tmp_path / "model"), *sizes]) == 0
    rows = json.loads(path.read_text(encoding="utf-8"))["formats"]
    assert rows["exact"]["bytes_per_token"] == 2 * 2 * 2 * 8 * 4  # layers, keys and values, heads, head size, fp32
    assert rows["int8"]["bytes_per_token"] == 2 * 2 * 2 * (8 + 4)
    assert 0 < rows["int8"]["attention_relative_error"] < rows["fp8"]["attention_relative_error"] < 0.1
    assert 0 < rows["int8"]["kl_nats"] < rows["fp8"]["kl_nats"] < 0.1


def test_a_folder_without_a_model_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "cache", str(tmp_path)]) == USER_MISTAKE
    assert "no config.json there" in capsys.readouterr().err
