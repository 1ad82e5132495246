"""A rank that dies in the midst of decoding: the others end with a sentence, and nothing waits for it."""

from __future__ import annotations

import os
import signal
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from model.inference.kv_decoder import Decoder, RankLost
from model.llama.llama import inference
from tests.model.inference.stock import VOCABULARY, small_llama
from tests.model.inference.test_sharded import PROMPTS

pytestmark = pytest.mark.faults


def decode(rank: int, folder: str, phase: str) -> None:
    """Rank 1 kills itself before the prefill or while decoding; rank 0 writes down how it ended."""
    torch.set_num_threads(1)
    store = f"file://{folder}/store"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=2, timeout=timedelta(seconds=30))
    model = small_llama()
    try:
        with inference(model):
            dist.barrier()
            if rank == 1 and phase == "prefill":
                os.kill(os.getpid(), signal.SIGKILL)
            decoder = Decoder(model, PROMPTS, prefill_chunk=16, group=dist.group.WORLD)
            for step in range(1000):
                if rank == 1 and step == 5:
                    os.kill(os.getpid(), signal.SIGKILL)
                decoder.append(decoder.agreed(decoder.logits(0, VOCABULARY).argmax(-1)))
    except RankLost as error:
        Path(folder, "ended").write_text(str(error), encoding="utf-8")


@pytest.mark.parametrize("phase", ["prefill", "decoding"])
def test_the_loss_of_a_rank_ends_the_others_with_a_sentence(phase, tmp_path):
    started = mp.start_processes(decode, args=(str(tmp_path), phase), nprocs=2, start_method="spawn", join=False)
    survivor, lost = started.processes
    lost.join(100)
    assert lost.exitcode == -signal.SIGKILL
    survivor.join(25)  # less than the group's timeout: the lost connection is noticed, not waited for
    assert survivor.exitcode == 0
    assert "rank 0 of 2 that share the cache lost another one" in (tmp_path / "ended").read_text(encoding="utf-8")
