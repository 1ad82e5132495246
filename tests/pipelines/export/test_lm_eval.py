"""lm_eval, which others evaluate language models by, takes an exported folder as it is, and agrees with our scores."""

from __future__ import annotations

import json
from pathlib import Path

import lm_eval
import numpy as np
import pytest
import torch
from transformers import LlamaForCausalLM

from model.inference.answers import score_answers
from model.inference.kv_decoder import Decoder
from model.llama.llama import inference
from pipelines.evaluate.tasks.filling import pieces_after
from pipelines.export.folder import ModelFolder

QUESTIONS = [
    {"question": "What sang to the sun?", "choices": ["all the birds", "the ship"], "gold": 0},
    {"question": "What went home?", "choices": ["the sea", "the old ship", "a bird"], "gold": 1},
]
TASK = """
task: sea
dataset_path: json
dataset_kwargs: {data_files: {test: QUESTIONS}, cache_dir: CACHE}
test_split: test
output_type: multiple_choice
doc_to_text: "Question: {{question}}\\nAnswer:"
doc_to_choice: "{{choices}}"
doc_to_target: gold
metric_list:
  - metric: acc
  - metric: acc_norm
"""


@pytest.mark.slow
def test_a_local_task_of_lm_eval_runs_on_an_exported_folder_and_scores_choices_as_we_do(
    exported: ModelFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lm_eval.tasks import TaskManager

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    (tmp_path / "questions.jsonl").write_text("\n".join(map(json.dumps, QUESTIONS)))
    task = TASK.replace("QUESTIONS", f"{tmp_path}/questions.jsonl").replace("CACHE", f"{tmp_path}/cache")
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "sea.yaml").write_text(task)
    evaluated = lm_eval.simple_evaluate(
        model="hf",
        model_args={"pretrained": exported.store.path(), "dtype": "float32", "device": "cpu"},
        tasks=["sea"],
        task_manager=TaskManager(include_path=str(tmp_path / "tasks"), include_defaults=False),
        batch_size=1,
        bootstrap_iters=0,
    )
    assert evaluated["n-samples"]["sea"]["effective"] == len(QUESTIONS)
    model, tokenizer = exported.llama(), exported.tokenizer
    right = []
    for sample in evaluated["samples"]["sea"]:
        asked = QUESTIONS[sample["doc_id"]]
        text = f"Question: {asked['question']}\nAnswer:"
        prompt = np.concatenate([[tokenizer.bos_id], tokenizer.encode(text)])
        choices = pieces_after(tokenizer, text, [f" {choice}" for choice in asked["choices"]])
        theirs = [response[0][0] for response in sample["resps"]]
        with inference(model):
            (scores,) = score_answers(Decoder(model, [prompt]), [choices])
            whole = [log_probability(model, prompt, choice) for choice in choices]
        np.testing.assert_allclose(theirs, whole, rtol=0, atol=1e-4)
        # Ours is a softmax over text alone, without the ids of frames, whose share is the same for every token of a
        # model that has learnt nothing.
        shares = (scores.log_probability - whole) / scores.tokens
        np.testing.assert_allclose(shares, np.log(model.config.vocab_size / exported.vocabulary.text_size), rtol=0.1)
        right.append(int(np.argmax(scores.log_probability)) == asked["gold"])
    assert evaluated["results"]["sea"]["acc,none"] == np.mean(right)


def log_probability(model: LlamaForCausalLM, prompt: np.ndarray, choice: np.ndarray) -> float:
    """Under a softmax over the whole vocabulary."""
    ids = torch.from_numpy(np.concatenate([prompt, choice]).astype(np.int64))
    logits = model(ids[None]).logits[0, len(prompt) - 1 : -1]
    return float(logits.double().log_softmax(-1).gather(1, ids[len(prompt) :, None]).sum())
