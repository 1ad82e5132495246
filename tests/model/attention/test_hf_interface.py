"""transformers' unmodified Llama over the ring: logits and gradients are those of each document alone, densely."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from model.attention.hf_interface import NAME, ring_attention_forward
from model.attention.plan.planner import plan_sequence
from model.attention.plan.sequence_plan import SequencePlan
from testing.dense_attention import random_tensors, relative_error
from testing.reorder import dispatch, in_order
from tests.model.attention_groups import run_in_processes

CU_SEQLENS = np.array([0, 37, 38, 90, 128])
VOCABULARY = 50
# transformers' norms and eager softmax compute in fp32, whatever the model's dtype.
TOLERANCE = 1e-6


def tiny_llama(attention: str) -> LlamaForCausalLM:
    """fp64, two layers, grouped heads of size 12; the same weights every time."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=48,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        attn_implementation=attention,
    )
    return LlamaForCausalLM(config).double()


def inputs() -> tuple[Tensor, Tensor]:
    """Token ids int64 [S] and the gradient of the logits [S, V]."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(VOCABULARY, (CU_SEQLENS[-1],), generator=generator)
    return ids, torch.randn(len(ids), VOCABULARY, generator=generator, dtype=torch.float64)


def dense() -> tuple[Tensor, list[Tensor]]:
    """Logits [S, V] and parameter gradients, one document after the other through stock eager attention."""
    model = tiny_llama("eager")
    ids, grad = inputs()
    logits = torch.cat([model(ids[None, a:b]).logits[0] for a, b in pairwise(CU_SEQLENS)])
    logits.backward(grad)
    return logits.detach(), [p.grad for p in model.parameters()]


def ring(group: dist.ProcessGroup | None, plan: SequencePlan, checkpointing: bool) -> tuple[Tensor, list[Tensor]]:
    """This rank's logits, and the parameter gradients summed over the group."""
    rank = 0 if group is None else dist.get_rank(group)
    model = tiny_llama(NAME).train()
    if checkpointing:
        model.activation_checkpointing_enable()
    ids, grad = (dispatch(x, plan, rank) for x in inputs())
    positions = torch.from_numpy(dispatch(plan.positions, plan, rank))
    logits = model(ids[None], position_ids=positions[None], use_cache=False, plan=plan, group=group).logits[0]
    logits.backward(grad)
    gradients = [p.grad for p in model.parameters()]
    if group is not None:
        for gradient in gradients:
            dist.all_reduce(gradient, group=group)
    return logits.detach(), gradients


@pytest.mark.slow
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("sp", [1, 2, pytest.param(4, marks=pytest.mark.faults)])
def test_llama_on_gloo_processes_equals_dense_documents(sp: int, checkpointing: bool) -> None:
    plan = plan_sequence(CU_SEQLENS, sp)
    by_rank = run_in_processes(ring, sp, plan, checkpointing)
    expected_logits, expected_gradients = dense()
    logits = in_order([logits for logits, _ in by_rank], plan)
    assert relative_error(logits, expected_logits) <= TOLERANCE
    for _, gradients in by_rank:
        assert max(relative_error(x, r) for x, r in zip(gradients, expected_gradients)) <= TOLERANCE


def test_without_a_plan_each_row_is_one_causal_document() -> None:
    ids = inputs()[0].view(4, 32)
    with torch.no_grad():
        torch.testing.assert_close(tiny_llama(NAME)(ids).logits, tiny_llama("eager")(ids).logits)


def test_cached_keys_come_before_the_queries() -> None:
    ids = inputs()[0].view(4, 32)
    model = tiny_llama(NAME)
    with torch.no_grad():
        cache = None
        parts = []
        for chunk in (ids[:, :20], ids[:, 20:31], ids[:, 31:]):
            output = model(chunk, past_key_values=cache, use_cache=True)
            cache = output.past_key_values
            parts.append(output.logits)
        torch.testing.assert_close(torch.cat(parts, dim=1), tiny_llama("eager")(ids).logits)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"attention_mask": torch.ones(1, 1, 8, 8)}, "attention mask"),
        ({"dropout": 0.1}, "dropout"),
        ({"sliding_window": 4}, "sliding window"),
        ({"plan": plan_sequence(np.array([0, 16]), 1)}, "2 rows"),
    ],
)
def test_what_the_ring_cannot_do_is_refused(settings: dict, message: str) -> None:
    q, k, v, _ = (x.transpose(0, 1).expand(2, -1, -1, -1) for x in random_tensors(8, 2, 2, 4, torch.float32))
    with pytest.raises(ValueError, match=message):
        ring_attention_forward(torch.nn.Module(), q, k, v, **{"attention_mask": None, **settings})


def test_gradients_through_a_cache_are_refused() -> None:
    q, k, v, _ = (x.transpose(0, 1)[None] for x in random_tensors(8, 2, 2, 4, torch.float32))
    with pytest.raises(ValueError, match="no backward"):
        ring_attention_forward(torch.nn.Module(), q[:, :, :3].requires_grad_(), k, v, None)
