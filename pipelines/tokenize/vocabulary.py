"""The joint vocabulary of a recipe: its text tokenizer's ids and its codec's."""

from __future__ import annotations

from pipelines.recipe import Recipe
from tokenization.text.tokenizer import load_text_tokenizer
from tokenization.text.tokenizer_files import fetch_tokenizer
from tokenization.vocabulary import JointVocabulary


def joint_vocabulary(recipe: Recipe) -> JointVocabulary:
    """The vocabulary of the recipe's text tokenizer and VQGAN; without a VQGAN it has no vision range."""
    tokenizer = load_text_tokenizer(str(fetch_tokenizer(recipe.text_tokenizer.path, recipe.storage.options)))
    special = {"bos_id": tokenizer.bos_id, "eos_id": tokenizer.eos_id}
    if recipe.vqgan is None:
        return JointVocabulary.of_text(tokenizer.size, **special)
    return JointVocabulary.for_codebook(tokenizer.size, recipe.vqgan.sizes.codebook_size, **special)
