"""pipelines/train/memory_advice.py: what train stages take, which fit a device, and the cheapest settings that do."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from jobs.cli import main
from model.layers.memory_settings import MemorySettings
from pipelines.recipe.load import load_recipe
from pipelines.train.memory_advice import GIB, StageMemory, recipe_memory

RECIPES = Path(__file__).parents[3] / "recipes"
FIXED = ["text_tokenizer.path=/nowhere", "train.min_workers=128"]
SPENDTHRIFT = ["train.zero=1", "train.memory={}"]


def million(device: float | None = None, *overrides: str) -> StageMemory:
    """The 7B's stage of a million tokens over 128 workers, 64 of which share a sequence."""
    recipe = load_recipe(RECIPES / "lwm-text-7b.yaml", [*FIXED, *overrides])
    return recipe_memory(recipe, None if device is None else int(device * GIB))[-1]


def test_the_parts_make_the_peak_and_none_is_negative() -> None:
    for overrides in ((), SPENDTHRIFT, ["train.memory={activations: full, offload_activations: true}"]):
        memory = million(None, *overrides).memory
        assert memory.peak == max(memory.moments.values()) == sum(memory.device.values())
        assert min(memory.device.values()) >= 0
        assert memory.host_peak == max(sum(parts.values()) for parts in memory.on_host.values())
        assert min(size for parts in memory.on_host.values() for size in parts.values()) > 0


def test_fp32_weights_and_moments_are_twelve_bytes_a_parameter_over_all_ranks() -> None:
    n_parameters = 2 * 32_000 * 4096 + 4096 + 32 * (4 * 4096**2 + 3 * 4096 * 11008 + 2 * 4096)
    parts = million().memory.device
    assert parts["masters and moments"] == 12 * -(-n_parameters // 128)
    assert parts["weights"] == 2 * -(-n_parameters // 128)
    assert million(None, "train.zero=2").memory.device["weights"] == 2 * n_parameters


def test_each_choice_takes_less_than_the_one_before() -> None:
    peaks = [
        million(None, f"train.memory={{{choice}}}").memory.peak
        for choice in (
            "",
            "activations: mlp",
            "activations: all-but-attention",
            "activations: all-but-attention, mlp_tile: 4096",
            "activations: full, mlp_tile: 4096",
            "activations: full, mlp_tile: 4096, offload_activations: true",
            "activations: full, mlp_tile: 4096, offload_activations: true, offload_optimizer: true",
        )
    ]
    assert peaks == sorted(peaks, reverse=True)
    assert len(set(peaks)) >= 6  # a tiled MLP changes nothing where the attention's part of a layer takes more


def test_what_is_offloaded_waits_on_the_host() -> None:
    chosen = "activations: full, offload_activations: true, offload_optimizer: true"
    memory = million(None, f"train.memory={{{chosen}}}").memory
    tokens = 2**20 // 64
    host = memory.on_host["training"]
    assert host["activations"] == 32 * tokens * 4096 * 2
    assert host["masters and moments"] == million().memory.device["masters and moments"]
    assert "activations" not in million().memory.on_host["training"]


@pytest.mark.parametrize(("activations", "blocks"), [("full", 1), ("all-but-attention", 2)])
def test_each_block_of_pinned_memory_is_a_power_of_two(activations: str, blocks: int) -> None:
    """By hand, of a rank's tokens: layer inputs and attention outputs in bf16, and a logsumexp in fp32 a head."""
    tokens = 3 * 2**20 // 64  # whose rows take 3 parts of 4 of the next power of two
    sequences = ["train.stages.4.rows=3", "train.stages.4.batch_tokens=6291456"]
    memory = f"train.memory={{activations: {activations}, offload_activations: true}}"
    held = million(None, memory, *sequences).memory.on_host["training"]["activations"]
    exact = 32 * tokens * (blocks * 4096 * 2 + (blocks - 1) * 32 * 4)
    assert held == exact * 4 // 3


def test_the_host_holds_a_weight_at_the_start_then_a_checkpoint_and_at_the_end_a_file() -> None:
    own, largest = million().memory.device["masters and moments"] // 12, 32_000 * 4096
    start, copy, file = (
        {"a weight that rank 0 reads": 8 * largest},
        {"a checkpoint being written": 12 * own},
        {"a file that rank 0 exports": 2 << 30},
    )
    assert million().memory.on_host == {"start": start, "training": copy, "export": file}
    # Pinned: the weights in one block, the gradients in two, as they are summed and as the optimizer steps them.
    assert 2**26 < 2 * own < 2**27
    weights = {"weights": 2**27}
    optimizer = {"masters and moments": 12 * own, "gradients": 2 * 2**28}
    offloading = "train.memory={offload_optimizer: true, offload_parameters: true}"
    assert million(None, offloading).memory.on_host == {
        "start": weights | start,
        "training": weights | optimizer | copy,
        "update": weights | optimizer | copy | {"the optimizer's step": 8 * own},
        "export": weights | optimizer | file,
    }
    fewer = million(None, "train.min_workers=64", "train.zero=2").memory.on_host["training"]
    assert fewer == {"a checkpoint being written": pytest.approx(2 * 12 * own, abs=12)}


def test_a_group_holds_all_weights_a_second_time_and_a_wider_one_less() -> None:
    n_parameters = million().memory.device["masters and moments"] * 128 // 12
    plain = million().memory
    for group in (8, 32):
        memory = million(None, f"train.zero_group={group}").memory
        assert memory.device["weights"] - plain.device["weights"] == pytest.approx(2 * n_parameters / group, abs=1e3)
        assert memory.peak - plain.peak == memory.device["weights"] - plain.device["weights"]
    offloading = "train.memory={offload_optimizer: true, offload_parameters: true}"
    on_host = million(None, offloading, "train.zero_group=8").memory.on_host["training"]["weights"]
    pinned = 2**27 - plain.device["weights"]  # a rank's own lie in one block of pinned memory
    assert on_host == million(None, "train.zero_group=8").memory.device["weights"] + pinned
    assert million(None, "train.zero_group=128").memory == plain


def test_the_first_thing_advised_is_a_wider_group() -> None:
    narrow, wide = (million(None, f"train.zero_group={group}").memory.peak for group in (8, 16))
    device = (narrow + wide) / 2 / GIB
    stage = million(device, "train.zero_group=8")
    assert stage.advice is not None
    assert stage.advice[0] == {"zero_group": 16}
    assert million(device, "train.zero_group=8", "train.stages.4.zero_group=16").memory == stage.advice[1]


def test_without_a_gpu_the_node_holds_the_device_too() -> None:
    stage = million()
    assert stage.host_bytes(stage.memory) == stage.memory.host_peak
    stage = million(None, "train.resources={cpus: 1}")
    assert stage.host_bytes(stage.memory) == stage.memory.host_peak + stage.memory.peak


def test_the_fewest_workers_that_a_stage_may_get_are_reckoned_with() -> None:
    assert million(None, "train.min_workers=64").workers == 64
    assert million(None, "train.min_workers=64").memory.peak > million().memory.peak


def test_a_device_that_is_large_enough_needs_no_advice() -> None:
    stage = million(80)
    assert stage.fits is True
    assert stage.advice is None
    assert million().fits is None


@pytest.mark.parametrize("device", [60, 30, 12])
def test_advice_fits_and_nothing_cheaper_is_named(device: float) -> None:
    stage = million(device, *SPENDTHRIFT)
    assert stage.fits is False
    assert stage.advice is not None
    changes, memory = stage.advice
    assert memory.peak <= device * GIB
    overrides = [f"train.stages.4.{key}={json.dumps(value)}" for key, value in changes.items()]
    assert million(device, *SPENDTHRIFT, *overrides).memory == memory
    MemorySettings(**changes.get("memory", {}))


def test_the_cheapest_advice_comes_first() -> None:
    roomy, tight = million(100, *SPENDTHRIFT).advice, million(21, *SPENDTHRIFT).advice
    assert roomy is not None
    assert tight is not None
    assert roomy[0] == {"memory": {"activations": "mlp"}}
    assert tight[0]["memory"]["activations"] == "all-but-attention"
    assert million(0.1).advice is None


def test_the_command_prints_every_stage_and_json_for_machines(capsys: pytest.CaptureFixture[str]) -> None:
    fixed = [argument for override in FIXED for argument in ("--set", override)]
    arguments = ["plan", "--memory", str(RECIPES / "lwm-text-7b.yaml"), *fixed]
    assert main([*arguments, "--gpu-memory", "10"]) == 0
    out = capsys.readouterr().out
    assert out.count("a device on 128 worker(s)") == 5
    assert out.count("  2.00 GiB of its node's memory a worker, most at: export\n") == 5
    assert out.count("a checkpoint being written of host memory, at: training\n") == 5
    assert "cheapest that fits: {" in out
    assert main([*arguments, "--json"]) == 0
    rows = [row for row in json.loads(capsys.readouterr().out) if row["stage"] != "evaluate"]
    assert [row["peak"] for row in rows] == [sum(row["device"].values()) for row in rows]
    assert [row["host_peak"] for row in rows] == [sum(row["host"]["export"].values()) for row in rows]
    assert main(["plan", str(RECIPES / "lwm-text-7b.yaml"), "--gpu-memory", "10"]) == 2
    assert "--memory" in capsys.readouterr().err
