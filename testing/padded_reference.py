"""The law's other side: plain transformers on one padded row a document, in one process.

In: an objective and initial weights. Out: gradients, weights and losses by name. It shares nothing with the engine but
the documents and the initial weights: no packing, no ring, no chunked loss, no DeepSpeed.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import LlamaForCausalLM

from model.llama.initial_weights import RandomWeights, Weights
from testing.law_batch import EPS, LEARNING_RATE, SEED, VOCABULARY, law_documents, tiny_config


class PaddedReference:
    """The law: one padded row a document, transformers' own model, the loss as LWM's code writes it.

    weights: the initial ones, by default those of `tiny_llama`. dtype: of the model. In fp64 all but transformers'
    norms and angles, which are fp32 in any model, is exact beside fp32.
    """

    def __init__(
        self,
        objective: str,
        weights: Weights | None = None,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        documents = law_documents(objective)
        shape = (len(documents), max(map(len, documents)))
        self.objective = objective
        tokens = torch.zeros(shape, dtype=torch.int64)
        valid = torch.zeros(shape)
        attended = torch.zeros(shape, dtype=torch.int64)
        for row, document in enumerate(documents):
            tokens[row, : len(document)] = torch.from_numpy(document.tokens)
            valid[row, : len(document)] = torch.from_numpy(document.loss_mask)
            attended[row, : len(document)] = 1
        self.tokens, self.valid, self.attended = (x.to(device) for x in (tokens, valid, attended))
        weights = weights or RandomWeights(tiny_config(), SEED)
        # Made in its dtype, as transformers load a checkpoint: a cast would round the angles' frequencies too.
        self.model = LlamaForCausalLM._from_config(
            copy.deepcopy(weights.config), attn_implementation="sdpa", dtype=dtype
        )
        self.model.load_state_dict({name: weights.read(name) for name in self.model.state_dict()})
        self.model.to(device)

    def loss(self) -> Tensor:
        """0.5 * (vision + text), or text alone; each the mean over rows of the row's sum over max(n_valid, 1e-10)."""
        logits = self.model(input_ids=self.tokens, attention_mask=self.attended).logits[:, :-1]
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))  # as transformers' own loss
        labels, valid = self.tokens[:, 1:], self.valid[:, 1:]
        vision = labels >= VOCABULARY.text_size
        text_loss = _mean_over_rows(logits[..., : VOCABULARY.text_size], labels, valid * ~vision)
        if self.objective == "text":
            return text_loss
        shifted = labels - VOCABULARY.text_size
        return 0.5 * (_mean_over_rows(logits[..., VOCABULARY.text_size :], shifted, valid * vision) + text_loss)

    def gradient(self) -> dict[str, Tensor]:
        """The gradient of the loss at the present weights, by name, in the model's dtype."""
        self.model.zero_grad()
        self.loss().backward()
        return {name: p.grad.clone() for name, p in self.model.named_parameters() if p.grad is not None}

    def train(self, steps: int) -> tuple[dict[str, Tensor], list[dict[str, Tensor]], list[float]]:
        """The first gradient, the weights before and after each step, and each step's loss, with torch's AdamW."""
        optimizer = torch.optim.AdamW(
            self.model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.95), eps=EPS, weight_decay=0.1
        )
        gradient: dict[str, Tensor] = {}
        weights, losses = [self.weights()], []
        for step in range(steps):
            optimizer.zero_grad()
            loss = self.loss()
            loss.backward()
            if step == 0:
                gradient = {name: p.grad.clone() for name, p in self.model.named_parameters() if p.grad is not None}
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
            optimizer.step()
            losses.append(loss.item())
            weights.append(self.weights())
        return gradient, weights, losses

    def weights(self) -> dict[str, Tensor]:
        """A copy of the weights by name."""
        return {name: p.detach().clone() for name, p in self.model.named_parameters()}


def _mean_over_rows(logits: Tensor, labels: Tensor, valid: Tensor) -> Tensor:
    nll = F.cross_entropy(logits.transpose(1, 2), labels.clamp(0, logits.shape[-1] - 1), reduction="none")
    return ((nll * valid).sum(1) / valid.sum(1).clamp(min=1e-10)).mean()
