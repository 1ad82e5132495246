"""A recipe is checked whole at the edge, and every mistake is one sentence with file, key and remedy."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest

from model.attention.plan.hardware import CPU_CORES, Hardware
from model.attention.plan.options import AttentionOptions
from model.layers.memory_settings import MemorySettings
from pipelines.build import build_stages
from pipelines.dag.plan import plan
from pipelines.recipe.load import load_recipe
from pipelines.recipe.yaml_tree import read_yaml
from storage.errors import UserError
from storage.store import Store
from testing.miniature import recipe, write_recipe

QUICKSTART = Path(__file__).parents[3] / "recipes" / "quickstart.yaml"


def test_overrides_reach_into_lists_and_read_numbers_as_yaml_users_write_them() -> None:
    recipe = load_recipe(QUICKSTART, ["train.stages.0.lr=3e-4", "storage.root=/tmp/x", "tokenize.decode.workers=3"])
    assert recipe.train.stages[0].lr == 3e-4
    assert recipe.storage.root == "/tmp/x"
    assert recipe.tokenize.decode.workers == 3


def test_local_paths_hold_wherever_workers_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    recipe = load_recipe(QUICKSTART, ["storage.root=runs/x", "model.init=llama", "text_tokenizer.path=s3://b/t.model"])
    assert recipe.storage.root == str(tmp_path / "runs" / "x")
    assert recipe.model.init == str(tmp_path / "llama")
    assert recipe.storage.data == str(tmp_path)
    assert recipe.text_tokenizer.path == "s3://b/t.model"


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("train.stages.0.lrr=1", ["train.stages.0.lrr", "did you mean 'lr'"]),
        ("trian.workers=1", ["unknown key 'trian'", "did you mean 'train'"]),
        ("train.workers=3", ["train.stages.0.sp 2 does not divide train.workers 3"]),
        ("train.stages.0.batch_tokens=1000", ["train.stages.0.batch_tokens", "no multiple of its context"]),
        ("train.stages.0.mixture={films: 1}", ["films", "sources does not define"]),
        ("train.stages.9.lr=1", ["no index", "9"]),
        ("train.stages.0.lr.x=1", ["'x' is below a value"]),
        ("sources.plays.urls.0.x=1", ["'x' is below a value"]),
        ("train.stages.0.warmup_steps=100000", ["warmup_steps", "leaves no step"]),
        ("train.zero=5", ["train.zero"]),
        (
            "train.resources={gpus: 1}",
            ["train.resources.gpus 1 needs half precision", "set train.precision: bf16, or train.resources.gpus: 0"],
        ),
        ("evaluate.resources={gpus: 1}", ["evaluate.resources.gpus 1 needs half precision", "set train.precision"]),
        ("train.resources={gpus: 2}", ["train.resources.gpus 2 is not what a worker trains on", "set 1"]),
        ("train.resources={gpus: 0.5}", ["train.resources.gpus 0.5 is not what a worker trains on", "set 1"]),
        ("train.clip_norm=-1", ["train.clip_norm", "greater than or equal to 0"]),
        ("train.clip_norm=.nan", ["train.clip_norm", "finite"]),
        ("train.eps=0", ["train.eps", "greater than 0"]),
        ("train.betas=[0.9, 1]", ["train.betas.1", "less than 1"]),
        ("train.betas=[-0.1, 0.9]", ["train.betas.0", "greater than or equal to 0"]),
        ("train.weight_decay=-0.1", ["train.weight_decay", "greater than or equal to 0"]),
        ("train.resources.cpus=-1", ["train.resources.cpus", "greater than or equal to 0"]),
        ("train.stages.0.lr=.inf", ["train.stages.0.lr", "finite"]),
        ("train.stages.0.final_lr=-1e-5", ["train.stages.0.final_lr", "greater than or equal to 0"]),
        ("train.stages.0.mixture={plays: -1}", ["train.stages.0.mixture.plays", "greater than or equal to 0"]),
        ("train.stages.0.mixture={plays: 0}", ["train.stages.0.mixture has no share above 0", "raise one"]),
        ("train.stages.0.min_document_tokens=-1", ["train.stages.0.min_document_tokens", "greater than or equal to 0"]),
        ("train.stages.0.max_document_tokens=0", ["train.stages.0.max_document_tokens", "greater than 0"]),
        (
            "train.stages.0={name: odd, context: 255, rope_theta: 1, steps: 1, batch_tokens: 255, mixture: {plays: 1}, "
            "objective: text, lr: 1, sp: 2}",
            ["train.stages.0.context 255 x rows 1 is no multiple of sp 2", "change one of them"],
        ),
        (
            "train.attention.layout=zagzig",
            ["train.attention.layout", "should be 'contiguous', 'zigzag', 'shared-0.5%'"],
        ),
        ("train.attention.route=scenic", ["train.attention.route", "'direct' or 'relay'"]),
        ("train.attention.ulysses=4", ["train.attention.ulysses 4 does not divide train.stages.0.sp 2", "choose"]),
        ("train.stages.1.attention={ulysses: 3}", ["train.stages.1.attention.ulysses 3 does not", "stages.1.sp 2"]),
        ("train.hardware.inside=0", ["train.hardware.inside", "greater than 0"]),
        ("train.hardware.gpus_per_node=8", ["train.hardware.gpus_per_node", "did you mean 'ranks_per_node'"]),
        ("evaluate.needle.contexts=[4096]", ["evaluate.needle.contexts", "4096", "lower it"]),
        (
            "evaluate.generation.frames=100",
            ["evaluate.generation", "104 frames are 6760 tokens", "lower prompt_frames"],
        ),
        ("vqgan.weights=/nowhere", ["vqgan.weights or vqgan.train"]),
        ("vqgan.config.resolutionn=3", ["resolutionn"]),
        ("seed", ["key.path=value"]),
        ("train.memory.activations=some", ["train.memory.activations", "all-but-attention"]),
        ("train.memory.offload_activations=true", ["train.memory", "choose all-but-attention or full"]),
        ("train.memory.offload_parameters=true", ["train.memory.offload_parameters needs ZeRO stage 3", "zero: 3"]),
        ("train.stages.1.memory={offload_parameters: true}", ["train.stages.1.memory.offload_parameters needs"]),
        ("train.zero_group=2", ["train.zero_group 2 needs ZeRO stage 3, not 1", "or drop it in train.stages.0"]),
        ("train.stages.1.zero_group=2", ["train.stages.1.zero_group 2 needs ZeRO stage 3", "in train.stages.1"]),
        ("train.zero_group=1", ["train.zero_group", "greater than or equal to 2"]),
        ("train.zero_group=true", ["train.zero_group", "true is no number"]),
        ("train.kernels=fused", ["train.kernels", "'torch', 'compile' or 'liger'"]),
        ("train.kernels=liger", ["train.kernels liger needs a GPU a worker", "set train.resources.gpus: 1"]),
    ],
)
def test_a_mistake_is_one_sentence_naming_file_key_and_remedy(override: str, said: list[str]) -> None:
    with pytest.raises(UserError) as caught:
        load_recipe(QUICKSTART, [override])
    message = str(caught.value)
    assert "\n" not in message
    for words in said:
        assert words in message, message
    assert "quickstart.yaml" in message or "--set" in message


@pytest.mark.parametrize("named", ["train", "train.stages.1"])
def test_stage_0_of_zero_is_for_fp32(named: str) -> None:
    zero = f"{named}.zero=0"
    train = load_recipe(QUICKSTART, [zero]).train
    assert train.for_stage(train.stages[1]).zero == 0
    said = re.escape(f"{named}.zero 0 trains in fp32 only, and train.precision is bf16; set {named}.zero: 1")
    with pytest.raises(UserError, match=said):
        load_recipe(QUICKSTART, [zero, "train.precision=bf16"])


def test_a_ulysses_degree_divides_the_kv_heads() -> None:
    sizes = "model.size={hidden_size: 96, intermediate_size: 96, num_hidden_layers: 1, num_attention_heads: 3}"
    shared = ["train.attention.ulysses=2", "train.stages.2.sp=2"]
    with pytest.raises(UserError, match=r"train\.attention\.ulysses 2 does not divide the model's 3 kv heads; choose"):
        load_recipe(QUICKSTART, [sizes, *shared])
    assert load_recipe(QUICKSTART, [sizes]).train.attention.ulysses is None
    assert load_recipe(QUICKSTART, shared).train.attention.ulysses == 2


def test_ranks_share_what_one_forward_pass_joins_without_any_other_rule() -> None:
    stage = ["train.stages.0.context=255", "train.stages.0.batch_tokens=2040"]
    assert load_recipe(QUICKSTART, stage).train.stages[0].rows == 8


def test_a_stage_may_share_its_sequences_in_its_own_way() -> None:
    overrides = ["train.attention.layout=zigzag", "train.stages.1.attention={route: relay}"]
    train = load_recipe(QUICKSTART, overrides).train
    choices = [train.for_stage(stage).attention for stage in train.stages]
    assert choices[0] == choices[2] == AttentionOptions(layout="zigzag", ulysses=None, route=None)
    assert choices[1] == AttentionOptions(layout=None, ulysses=None, route="relay")


def test_a_stage_may_save_memory_in_its_own_way() -> None:
    overrides = ["train.memory.activations=full", "train.stages.1.memory={mlp_tile: 512}", "train.stages.1.zero=3"]
    train = load_recipe(QUICKSTART, overrides).train
    assert [train.for_stage(stage).memory for stage in train.stages] == [
        MemorySettings("full"),
        MemorySettings(mlp_tile=512),
        MemorySettings("full"),
    ]
    assert [train.for_stage(stage).zero for stage in train.stages] == [train.zero, 3, train.zero]


def test_a_group_that_holds_the_weights_divides_the_workers_and_may_be_a_stages_own() -> None:
    common = ["train.zero=3", "train.workers=4", "train.zero_group=2", "train.stages.1.zero_group=4"]
    common += [f"train.stages.{number}.sp=4" for number in range(3)]
    train = load_recipe(QUICKSTART, common).train
    assert [train.for_stage(stage).zero_group for stage in train.stages] == [2, 4, 2]
    said = "zero_group 3 does not divide the 4 training workers; choose a divisor of 4 in train.stages.1"
    with pytest.raises(UserError, match=said):
        load_recipe(QUICKSTART, [*common, "train.stages.1.zero_group=3"])


def test_the_hardware_is_by_default_an_h100_or_a_cpu_core() -> None:
    assert load_recipe(QUICKSTART.with_name("lwm-text-7b.yaml")).train.hardware == Hardware()
    assert load_recipe(QUICKSTART).train.hardware == CPU_CORES
    given = load_recipe(QUICKSTART, ["train.hardware={across: 1.25e+9, ranks_per_node: 4, flops: null}"]).train.hardware
    assert given == replace(CPU_CORES, across=1.25e9, ranks_per_node=4)


def test_a_missing_or_broken_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such recipe file"):
        load_recipe(tmp_path / "none.yaml")
    broken = tmp_path / "broken.yaml"
    broken.write_text("a: [1")
    with pytest.raises(UserError, match=r"broken\.yaml: not valid YAML"):
        load_recipe(broken)
    broken.write_text("- just\n- a list\n")
    with pytest.raises(UserError, match="no mapping"):
        load_recipe(broken)


def test_a_folder_and_bytes_that_are_no_text_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"cannot be read \(Is a directory\); give the path of a YAML recipe"):
        load_recipe(tmp_path)
    (tmp_path / "latin.yaml").write_bytes(b"name: caf\xe9")
    with pytest.raises(UserError, match=r"latin\.yaml: not UTF-8"):
        load_recipe(tmp_path / "latin.yaml")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (
            "name: a\nsources:\n  s: {urls: [a]}\n  t: {urls: [b]}\n  s: {urls: [c]}",
            "'s' occurs twice, in lines 3 and 5",
        ),
        ("name: a\nname: a", "'name' occurs twice, in lines 1 and 2"),
        ("- {a: 1, a: 2}", "'a' occurs twice, in line 1"),
        ("a: &a {x: 1}\nb:\n  <<: *a\n  <<: {y: 1}", "'<<' occurs twice, in lines 3 and 4"),
    ],
)
def test_a_key_that_occurs_twice_is_refused_by_its_lines(text: str, said: str, tmp_path: Path) -> None:
    (tmp_path / "twice.yaml").write_text(text)
    with pytest.raises(UserError, match=re.escape(said)):
        load_recipe(tmp_path / "twice.yaml")


def test_what_is_merged_from_an_anchor_may_be_replaced() -> None:
    assert read_yaml("a: &a {x: 1}\nb: &b {<<: *a, x: 2}\nc: {<<: *b, x: 3}")["c"] == {"x": 3}


def test_another_mesh_carries_on_and_another_learning_rate_begins_anew() -> None:
    def names(*overrides: str) -> dict[str, str]:
        recipe = load_recipe(QUICKSTART, ["storage.root=/tmp/nowhere", *overrides])
        return {stage.name: stage.fingerprint for stage in plan(build_stages(recipe), Store("/tmp/nowhere"))}

    before = names()
    other_mesh = ["train.workers=4", "train.min_workers=1", "train.zero=3", "train.stages.0.sp=1"]
    assert names(*other_mesh, "train.memory.activations=full", "train.kernels=compile") == before
    after = names("train.stages.1.lr=1e-3")
    assert after["train-text-256"] == before["train-text-256"]
    assert after["train-text-512"] != before["train-text-512"]


def test_places_of_the_home_and_of_the_environment_are_looked_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    path = write_recipe(tmp_path / "recipe.yaml", recipe("$HOME/data", "~/run"))
    storage = load_recipe(path).storage
    assert (storage.root, storage.data) == (f"{tmp_path}/run", f"{tmp_path}/data")
