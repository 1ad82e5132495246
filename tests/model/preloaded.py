"""What each process of a group imports and compiles at its start, done once in the server that forks them."""

from __future__ import annotations

import importlib

import numpy as np
import torch

from model.attention.plan.planner import plan_sequence

plan_sequence(np.array([0, 20, 48]), 2)  # numba loads its tables at the first call
MODULES = ["testing.law_batch", "testing.padded_reference", "model.checkpoint"]
# DeepSpeed looks for GPUs as it is imported, after which processes that are forked could not use one.
if not torch.cuda.is_available():
    MODULES += ["deepspeed.ops.adam", "deepspeed.runtime.zero.muon.original_muon", "functorch.compile"]
for name in MODULES:
    importlib.import_module(name)
