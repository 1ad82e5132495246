"""model/llama/flops.py: by hand, and beside what torch counts as it computes."""

from __future__ import annotations

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention
from torch.utils.flop_counter import FlopCounterMode

from model.llama.config import PRESETS, llama_config
from model.llama.flops import peak_flops, step_flops
from model.training.micro_batch_loss import micro_batch_loss
from model.training.rank_batch import Dispatcher
from testing.law_batch import VOCABULARY, global_batch, tiny_config, tiny_llama


def test_a_step_by_hand() -> None:
    config = llama_config(
        {"hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 3, "num_attention_heads": 4}
        | {"num_key_value_heads": 2},
        {"text": 70, "vision": 30},
        context=64,
        rope_theta=1e4,
    )
    projections = 8 * 8 + 8 * 4 + 8 * 4 + 8 * 8
    weights = 3 * (projections + 3 * 8 * 16)
    pairs = 10 * 11 // 2 + 5 * 6 // 2  # documents of 10 and of 5 tokens
    forward = 2 * weights * 15 + 3 * 4 * 8 * pairs + 2 * 8 * (70 * 6 + 30 * 4)
    assert step_flops(config, 15, pairs, {"text": 6, "vision": 4}, backward=False) == forward
    assert step_flops(config, 15, pairs, {"text": 6, "vision": 4}) == 3 * forward


def test_the_7b_costs_six_operations_a_weight_and_token() -> None:
    config = llama_config("7B", 32000, 4096, 1e4)
    weights = 32 * (4 * 4096**2 + 3 * 4096 * 11008) + 4096 * 32000
    assert PRESETS["7B"]["hidden_size"] == 4096
    assert step_flops(config, 1000, 0, {"text": 1000}) == 6 * weights * 1000


def test_what_torch_counts_without_attention_is_the_dense_part() -> None:
    (micro_batch,), _ = global_batch()
    batch = Dispatcher()(micro_batch)
    vision = int(((batch.labels >= VOCABULARY.text_size) & (batch.loss_weight > 0)).sum())
    text = int((batch.loss_weight > 0).sum()) - vision
    model = tiny_llama()
    with FlopCounterMode(display=False) as counted:  # of our attention's kernels it knows nothing
        loss, _ = micro_batch_loss(model, batch)
        forward = counted.get_total_flops()
        loss.backward()
    assert forward == step_flops(tiny_config(), len(batch.tokens), 0, {"text": text, "vision": vision}, backward=False)
    # The head's logits, which the backward makes again, are counted; its weight's gradient, added in place, is not.
    assert counted.get_total_flops() == step_flops(
        tiny_config(), len(batch.tokens), 0, {"text": text, "vision": vision}
    )


def test_pairs_cost_what_torch_counts_of_an_attention_that_skips_none() -> None:
    q = torch.zeros(1, 4, 32, 8, requires_grad=True)  # [B, H, L, D]
    with FlopCounterMode(display=False) as counted, sdpa_kernel(SDPBackend.MATH):
        scaled_dot_product_attention(q, q, q).sum().backward()
    sizes = {"hidden_size": 32, "intermediate_size": 1, "num_hidden_layers": 1, "num_attention_heads": 4}
    assert counted.get_total_flops() == step_flops(llama_config(sizes, 10, 32, 1e4), 0, 32 * 32, {})


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H200", 989e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA GH200 480GB", 989e12),
        ("NVIDIA GB200", 2500e12),
        ("NVIDIA B200", 2250e12),
        ("Quadro P400", None),
    ],
)
def test_a_gpu_is_known_by_its_name(name: str, peak: float | None) -> None:
    assert peak_flops(name) == peak
