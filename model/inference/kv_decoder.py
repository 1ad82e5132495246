"""A batch of prompts decoded token by token with a KV cache: the loop that text and frame generation share.

Prompts of different lengths are padded on the left, padding is masked out of attention, and positions start at each
prompt's first token. Long prompts enter in chunks, which bound the activations.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from transformers import DynamicCache, LlamaForCausalLM


class Decoder:
    """State of a batch of B sequences: KV cache, mask, and the hidden state that predicts the next token.

    Use within `model.llama.llama.inference`. prompts: integer arrays [L_b] of joint ids, none empty.
    """

    def __init__(self, model: LlamaForCausalLM, prompts: Sequence[np.ndarray], prefill_chunk: int = 4096):
        lengths = [len(prompt) for prompt in prompts]
        if not lengths or min(lengths) == 0:
            raise ValueError("every prompt needs at least one token")
        self.model = model
        self.device = model.lm_head.weight.device
        self.cache = DynamicCache(config=model.config)
        longest = max(lengths)
        ids = torch.zeros(len(prompts), longest, dtype=torch.long)
        self.hidden: Tensor  # [B, D], final hidden state of the last token
        self.mask = torch.zeros(len(prompts), longest, dtype=torch.bool)
        for row, prompt in enumerate(prompts):
            ids[row, longest - len(prompt) :] = torch.from_numpy(np.asarray(prompt, dtype=np.int64))
            self.mask[row, longest - len(prompt) :] = True
        ids, self.mask = ids.to(self.device), self.mask.to(self.device)
        # Without padding no mask is given, which lets the attention run its causal kernel.
        self.padded = min(lengths) != longest
        positions = (self.mask.cumsum(dim=1) - 1).clamp(min=0)
        self.next_position = positions[:, -1:] + 1
        for start in range(0, longest, prefill_chunk):
            end = min(start + prefill_chunk, longest)
            self._advance(ids[:, start:end], positions[:, start:end], self.mask[:, :end])

    def logits(self, first: int, last: int) -> Tensor:
        """fp32 logits [B, last - first] of the next token over the ids first..last-1 only."""
        return torch.nn.functional.linear(self.hidden, self.model.lm_head.weight[first:last]).float()

    def append(self, ids: Tensor) -> None:
        """Extend every sequence by one token. ids: int64 [B]."""
        self.mask = torch.cat((self.mask, self.mask.new_ones(len(self.mask), 1)), dim=1)
        self._advance(ids.unsqueeze(1), self.next_position, self.mask)
        self.next_position = self.next_position + 1

    def keep(self, rows: Tensor) -> None:
        """Go on with some of the sequences only. rows: int64, their indices."""
        self.cache.batch_select_indices(rows)
        self.mask, self.hidden, self.next_position = self.mask[rows], self.hidden[rows], self.next_position[rows]

    def _advance(self, ids: Tensor, positions: Tensor, mask: Tensor) -> None:
        output = self.model.model(
            input_ids=ids,
            position_ids=positions,
            attention_mask=mask if self.padded else None,
            past_key_values=self.cache,
            use_cache=True,
        )
        self.hidden = output.last_hidden_state[:, -1]


def guided(logits: Tensor, guidance: float) -> Tensor:
    """Classifier-free guidance: [2B, n], conditional rows then unconditional -> uncond + guidance * (cond - uncond)."""
    conditional, unconditional = logits.chunk(2)
    return unconditional + guidance * (conditional - unconditional)


def choose(logits: Tensor, top_k: int | None, temperature: float, generator: torch.Generator | None) -> Tensor:
    """One index a row, int64 [B], of fp32 logits [B, n]: the likeliest at temperature 0, else drawn among the top k.

    top_k None or >= n draws among all. The draw depends on the generator alone, which lives on the logits' device.
    """
    if temperature < 0:
        raise ValueError(f"temperature {temperature} is negative; 0 is greedy")
    if temperature == 0:
        return logits.argmax(dim=-1)
    logits = logits / temperature
    if top_k is not None and top_k < logits.shape[-1]:
        kept, ids = logits.topk(top_k, dim=-1)
        drawn = torch.multinomial(kept.softmax(dim=-1), 1, generator=generator)
        return ids.gather(1, drawn).squeeze(1)
    return torch.multinomial(logits.softmax(dim=-1), 1, generator=generator).squeeze(1)
