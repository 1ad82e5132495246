"""What is predicted of a card's activations is what a step on a pretended card allocates, tensor by tensor."""

from __future__ import annotations

import pytest

from model.layers.memory_settings import MemorySettings
from model.llama.config import llama_config
from model.llama.sizes import PRESETS
from model.memory_estimate.activations import activation_bytes
from model.training.rank_batch import Dispatcher
from model.training.settings import EngineSettings
from testing.pretended_card import documents, step_peak

IDS = {"text": 32_000, "vision": 8448}
LAYERS, CONTEXT = 2, 65_536
SIZES = {
    "7B": {**PRESETS["7B"], "num_hidden_layers": LAYERS},
    "8 heads of keys": {
        "hidden_size": 4096,
        "intermediate_size": 14_336,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
    },
}


@pytest.mark.slow
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(
    ("memory", "count"),
    [
        (MemorySettings("full", mlp_tile=4096), 1),
        (MemorySettings("full", mlp_tile=4096), 64),
        (MemorySettings("all-but-attention", mlp_tile=4096), 1),
        (MemorySettings("full"), 1),
        (MemorySettings("mlp", mlp_tile=4096), 1),
        (MemorySettings("mlp"), 1),
        (MemorySettings("keep", mlp_tile=4096), 1),
        (MemorySettings(), 1),
    ],
)
def test_a_step_allocates_on_a_card_what_is_predicted(size: str, memory: MemorySettings, count: int) -> None:
    config = llama_config(SIZES[size], IDS, CONTEXT, 5e7)
    batch = documents(CONTEXT, count)
    settings = EngineSettings(zero=2, precision="bf16", memory=memory)
    predicted = activation_bytes(config, 2, Dispatcher()(batch).plan, settings, on_cuda=True)
    at_work = max(predicted.mlp, predicted.attention, predicted.final + predicted.loss)
    total = predicted.batch + LAYERS * predicted.kept_layer + at_work
    # The kernel's workspace has up to 128 rows more a document.
    assert total / step_peak(config, batch, memory) == pytest.approx(1, abs=0.005 if count == 1 else 0.015)
